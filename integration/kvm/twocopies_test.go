package kvm_test

import (
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// The link is cut and the failover forced while the old primary's guest runs on:
// two running copies of one VM. When the hosts hear of each other both say so and
// go on saying it, also after a restart of the daemons; nothing is shipped,
// nothing is merged and no guest is stopped, until a person decides.
func TestTwoRunningCopiesAreReportedByBothHostsAndNeverMerged(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("twice", 61, 1, "")
	a := w.start(d)
	w.protect(d, "2s")
	_, err := a.WaitSynced(w.step(), a.Synced()+10)
	w.must(err)

	w.must(w.Lab.Host("A").Link(false))
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("B", "failover", "unplanned", d.Name, "--force", "--yes", "--reason", "the link is cut, not the host")
	found := w.booted(b, 0)
	high, err := b.WaitSynced(w.step(), found+20)
	w.must(err)
	_, err = a.WaitSynced(w.step(), a.Synced()+20)
	w.must(err)
	cut := w.status("A", d.Name)
	if !cut.Running || !w.status("B", d.Name).Running {
		t.Fatal("only one copy runs: the test shows nothing")
	}

	w.must(w.Lab.Host("A").Link(true))
	diverged := func(v status.VM) bool {
		return v.State == status.Diverged && v.Running && strings.Contains(fmtConditions(v), "diverged: ")
	}
	both := func(when string) {
		t.Helper()
		for _, h := range []string{"A", "B"} {
			_, err := w.WaitStatus(w.step(), h, d.Name, "diverged, and running, "+when, diverged)
			w.must(err)
		}
		if now := w.status("A", d.Name); now.Epoch != cut.Epoch {
			t.Errorf("%s: A shipped epoch %d after the cut at %d", when, now.Epoch, cut.Epoch)
		}
	}
	both("after the cut")
	for _, h := range []string{"A", "B"} { // sticky: a daemon that starts knows it
		w.must(w.Daemon(h).Kill())
		w.must(w.StartDaemon(w.step(), h))
	}
	both("after a restart of the daemons")
	w.refused("A", 6, "failover", "planned", d.Name, "--yes")
	w.refused("B", 6, "failover", "commit", d.Name, "--yes")
	_, err = b.WaitSynced(w.step(), b.Synced()+10)
	w.must(err)
	_, err = a.WaitSynced(w.step(), a.Synced()+10)
	w.must(err)
	both("after both wrote further")

	// A person decides for B: A's guest is off before, and only B's records are
	// found when the VM comes home.
	w.virsh("A", "destroy", d.Name)
	w.ctl("B", "failover", "reverse", d.Name, "--yes")
	w.replicating("B", d.Name)
	home, err := w.Console("A", d, false)
	w.must(err)
	w.ctl("B", "failover", "planned", d.Name, "--yes")
	last, err := b.WaitWord(w.step(), "LAST")
	w.must(err)
	if n := w.booted(home, last.Uint("n")); n != last.Uint("n") || n < high {
		t.Errorf("record %d is the highest on A, B's guest had written %d", n, last.Uint("n"))
	}
	w.replicating("A", d.Name)
	w.noErrors("B", d, true)
}
