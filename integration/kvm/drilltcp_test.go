package kvm_test

import (
	"strings"
	"testing"

	"kvmreplica/integration/estate"
)

// A drill's tcp proof is a listener in the copy's own guest: it passes for the
// port on which the guest listens, at the address that the configuration reserves
// for the copy, and fails for one on which nobody does.
func TestADrillsTCPProofIsAListenerInTheGuest(t *testing.T) {
	w := up(t, estate.Options{Config: "[[network]]\nvm = \"listens\"\nto = \"default\"\ntest = \"default\"\ntest_ip = \"192.168.122.78\"\n"})
	d, _ := w.networked("listens", 62, "lab.net=1 lab.tcp=7007")
	w.protect(d, "1s")
	out := w.ctl("B", "drill", d.Name, "--proof", "tcp:7007")
	for _, want := range []string{"worked", "port 7007 of 192.168.122.78 accepts connections", "192.168.122.78 in default"} {
		if !strings.Contains(out, want) {
			t.Errorf("the drill does not say %q:\n%s", want, out)
		}
	}
	v := w.noCopies(d.Name)
	if v.LastDrill == nil || !v.LastDrill.OK || v.Proven == nil {
		t.Errorf("the drill that passed is not shown: %+v", v.LastDrill)
	}
	out = w.refused("B", 1, "drill", d.Name, "--proof", "tcp:7008", "--timeout", "20s")
	if !strings.Contains(out, "no proof in time: dial tcp 192.168.122.78:7008") {
		t.Errorf("nobody listens there, and the drill said:\n%s", out)
	}
	if v := w.noCopies(d.Name); v.LastDrill == nil || v.LastDrill.OK || !strings.Contains(fmtConditions(v), "drill-failed: ") {
		t.Errorf("the drill that failed is not shown: %+v", v.LastDrill)
	}
}
