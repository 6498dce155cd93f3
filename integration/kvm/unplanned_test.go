package kvm_test

import (
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// The primary loses power. The replica is started from its last cut; the old
// primary comes back and neither starts the VM nor ships; the way back sends
// what differs, and a planned failover restores the first state.
func TestUnplannedFailoverAndTheReturnOfTheOldPrimary(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("lost", 2, 1, "")
	c := w.start(d)
	w.protect(d, "2s")
	cut := w.status("A", d.Name).Epoch
	_, err := w.WaitStatus(w.step(), "A", d.Name, "two cycles further", func(v status.VM) bool { return v.Epoch >= cut+2 })
	w.must(err)
	safe := c.Synced()
	_, err = w.WaitStatus(w.step(), "A", d.Name, "another cycle further", func(v status.VM) bool { return v.Epoch >= cut+4 })
	w.must(err)

	if out := w.refused("B", 6, "failover", "unplanned", d.Name, "--yes"); !strings.Contains(out, "its guest runs") {
		t.Fatalf("with a living primary: %s", out)
	}
	w.must(w.Lab.Host("A").Crash())
	if out := w.refused("B", 6, "failover", "unplanned", d.Name, "--yes"); !strings.Contains(out, "--force") {
		t.Fatalf("with a silent primary: %s", out)
	}
	b, err := w.Console("B", d, true)
	w.must(err)
	out := w.ctl("B", "failover", "unplanned", d.Name, "--force", "--yes", "--reason", "test")
	if !strings.Contains(out, "will be lost") {
		t.Fatalf("the loss was not shown first:\n%s", out)
	}
	high := w.booted(b, safe)
	_, err = b.WaitSynced(w.step(), high+10)
	w.must(err)

	w.restart("A")
	_, err = w.WaitStatus(w.step(), "A", d.Name, "held back", func(v status.VM) bool {
		return !v.Running && strings.Contains(fmtConditions(v), "start-held: ") && strings.Contains(fmtConditions(v), "promoted")
	})
	w.must(err)
	if out, err := w.Lab.Host("A").Virsh(w.step(), "start", d.Name); err == nil {
		t.Fatalf("the old primary could start the VM: %s", out)
	}
	w.refused("A", 6, "vm", "start", d.Name)

	w.ctl("B", "failover", "reverse", d.Name, "--yes")
	v := w.replicating("B", d.Name)
	if full := v.Disks[0].Size; v.Stats.SentBytes > full/4 {
		t.Errorf("the way back sent %d bytes of a %d byte disk", v.Stats.SentBytes, full)
	}
	a, err := w.Console("A", d, false)
	w.must(err)
	w.ctl("B", "failover", "planned", d.Name, "--yes")
	last, err := b.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(a, last.Uint("n"))
	w.replicating("A", d.Name)
	w.noErrors("B", d, true)
}

func fmtConditions(v status.VM) string {
	var s strings.Builder
	for _, c := range v.Conditions {
		s.WriteString(c.Code + ": " + c.Text + "\n")
	}
	return s.String()
}
