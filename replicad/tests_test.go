package replicad

import (
	"testing"
	"time"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
)

// What is typed on the wrong host comes back as the command for the right one,
// with everything that was typed, fit for a shell.
func TestACommandTypedOnThePrimaryComesBackWhole(t *testing.T) {
	size := int64(5 << 30)
	for want, a := range map[string]api.Action{
		"failover test demo": {Verb: api.FailoverTest, VM: "demo", Point: "latest"},
		"failover test demo --point '2026-11-22 10:31' --network bridge:br0 --name 'it'\\''s a try' --quota 5368709120 --dry-run": {
			Verb: api.FailoverTest, VM: "demo", Point: "2026-11-22 10:31", Network: "bridge:br0", Name: "it's a try", Quota: &size, DryRun: true,
		},
		"failover test-stop 'a b' --test demo-test":                      {Verb: api.TestStop, VM: "a b", Name: "demo-test"},
		"failover test-stop demo --all":                                  {Verb: api.TestStop, VM: "demo", All: true},
		"drill demo --isolated --proof 'console:login: ' --timeout 2m0s": {Verb: api.Drill, VM: "demo", Isolated: true, Proof: "console:login: ", Timeout: 2 * time.Minute},
		"drill demo": {Verb: api.Drill, VM: "demo", Point: "latest", Proof: "agent", Timeout: 10 * time.Minute},
	} {
		if got := testCommand(a); got != want {
			t.Errorf("typed:\n  %s\nbut this is named:\n  %s", want, got)
		}
	}
}

// Of the drills of two hosts the newest counts, and one is better than none.
func TestTheNewestDrillOfBothHostsIsShown(t *testing.T) {
	now := time.Now()
	old, fresh := &status.Drill{Started: now.Add(-time.Hour)}, &status.Drill{Started: now}
	for _, c := range [][3]*status.Drill{{old, fresh, fresh}, {fresh, old, fresh}, {nil, old, old}, {old, nil, old}, {nil, nil, nil}} {
		if got := newerDrill(c[0], c[1]); got != c[2] {
			t.Errorf("of %v and %v: %v", c[0], c[1], got)
		}
	}
}
