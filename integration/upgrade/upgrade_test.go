package upgrade_test

import (
	"context"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

// upgrades is how many a campaign makes: few, or as many as the environment
// asks for.
func upgrades(few int) int {
	if n, err := strconv.Atoi(os.Getenv("KVMREPLICA_UPGRADES")); err == nil && n > 0 {
		return n
	}
	return few
}

func TestUpgradesUnderVerifiedLoadAreNoticedByNobody(t *testing.T) {
	n := upgrades(8)
	t.Logf("seed %d, %d upgrades", seed, n)
	newWorld(t, "").upgrade(n)
}

// upgrade makes n upgrades under load and judges what they left.
func (w *world) upgrade(n int) {
	t := w.t
	t.Helper()
	var pauses []time.Duration
	refused := 0
	deadline := time.Now().Add(patience + time.Duration(n)*10*time.Second)
	for len(pauses) < n && len(w.errs) == 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d upgrades, %d taken back", len(pauses), n, refused)
		}
		before := w.status()
		a, err := w.plane.Upgrade(context.Background(), dataplane.UpgradeRequest{})
		if err != nil {
			t.Logf("taken back: %v", err)
			refused++
			continue
		}
		pauses = append(pauses, a.Pause)
		after := w.status()
		for after.Instance == before.Instance { // the old one may answer for a moment
			after = w.status()
		}
		if a.PID != after.PID || a.Connections != workers*disks {
			t.Fatalf("upgrade %d: %+v, then %+v", len(pauses), a, after)
		}
		if after.Suspect != 0 || after.Recovered != "" || after.TrackingLost != "" {
			t.Fatalf("upgrade %d: the tracker is not exact: %+v", len(pauses), after)
		}
		w.goesOn(20)
	}
	if c := w.reconnects.Load(); c != 0 {
		t.Errorf("%d connections were lost", c)
	}
	w.judge()
	if len(pauses) == 0 {
		return
	}
	slices.Sort(pauses)
	t.Logf("%d upgrades, %d taken back: pause median %v, p99 %v, worst %v; longest answer %v; %d operations, %d epochs committed, %d ended by upgrades",
		len(pauses), refused, pauses[len(pauses)/2], pauses[len(pauses)*99/100], pauses[len(pauses)-1], time.Duration(w.worst.Load()),
		w.ops.Load(), w.epochs.Load(), w.lost.Load())
}

// points are the moments at which a process of an upgrade may die, and whether
// a client has to connect anew then.
var points = []struct {
	at         string
	reconnects bool
}{
	{"upgrade/started", true},
	{"upgrade/checked", true},
	{"upgrade/held", true},
	{"upgrade/rested", true},
	{"upgrade/sent", false}, // the successor has everything: it goes on
	{"upgrade/ready", false},
	{"upgrade/committed", false},
	{"upgrade/gone", false},
	{"successor/started", false},
	{"successor/received", false},
	{"successor/adopted", false},
	{"successor/ready", true}, // unless the predecessor sees it in time
	{"successor/go", true},
	{"successor/serving", true},
	{"upgrade/started/keeper", false},
	{"upgrade/held/keeper", false},
	{"upgrade/sent/keeper", false},
	{"upgrade/committed/keeper", false},
	{"upgrade/gone/keeper", false},
	{"successor/go/keeper", false},
	{"successor/serving/keeper", false},
}

func TestADeathAtAnyStepOfAnUpgradeLeavesOneProcessServing(t *testing.T) {
	for _, p := range points {
		t.Run(strings.ReplaceAll(p.at, "/", "-"), func(t *testing.T) {
			t.Setenv("REPLICAD_CRASH_AT", p.at)
			newWorld(t, "").survives(p.reconnects)
		})
	}
}

// survives makes an upgrade in which a process dies, and judges what it left.
func (w *world) survives(reconnects bool) {
	t := w.t
	t.Helper()
	w.goesOn(20)
	a, err := w.plane.Upgrade(context.Background(), dataplane.UpgradeRequest{})
	t.Logf("answer: %+v, %v", a, err)
	w.goesOn(40)
	w.plane = dt.Ensure(t, &w.cfg) // as the daemon does when a keeper is gone
	w.until("one data plane is left", func() bool { return len(w.planes()) == 1 })
	st := w.status()
	if st.PID != w.planes()[0] {
		t.Errorf("process %d answers, %v run", st.PID, w.planes())
	}
	if n := w.reconnects.Load(); n != 0 && !reconnects {
		t.Errorf("%d connections were lost", n)
	}
	// And it can be killed as any other: its keeper knows it.
	dt.Kill(t, st.PID)
	w.goesOn(20)
	w.judge()
	t.Logf("%d operations, %d reconnects, %d epochs, %d ended", w.ops.Load(), w.reconnects.Load(), w.epochs.Load(), w.lost.Load())
}
