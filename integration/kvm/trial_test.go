package kvm_test

import (
	"os/exec"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// The primary loses power. An older point is tried: its guest shows exactly what
// that point held. It is cancelled, nothing is lost; another one is tried and
// committed while its guest writes; the way back sends what differs, and what
// the old primary had is kept there.
func TestAnOlderPointIsTriedCancelledTriedAgainAndCommitted(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("trial", 2, 1, "")
	c := w.start(d)
	w.protect(d, "2s")
	cut := w.status("A", d.Name).Epoch
	_, err := w.WaitStatus(w.step(), "A", d.Name, "two cycles further", func(v status.VM) bool { return v.Epoch >= cut+2 })
	w.must(err)
	low := c.Synced()
	// A point needs 15 s from the one before.
	_, err = w.WaitStatus(w.step(), "A", d.Name, "cycles further", func(v status.VM) bool { return v.Epoch >= cut+14 })
	w.must(err)
	safe := c.Synced()
	_, err = w.WaitStatus(w.step(), "A", d.Name, "another cycle further", func(v status.VM) bool { return v.Epoch >= cut+17 })
	w.must(err)
	w.must(w.Lab.Host("A").Crash())

	b, err := w.Console("B", d, true)
	w.must(err)
	out := w.ctl("B", "failover", "unplanned", d.Name, "--point", "oldest", "--force", "--yes")
	if !strings.Contains(out, "chosen state") || !strings.Contains(out, "failover-trial") {
		t.Fatalf("the choice and the trial were not shown:\n%s", out)
	}
	old := w.booted(b, 0)
	if old >= safe {
		t.Fatalf("the oldest point's guest found record %d, the newest cut holds at least %d: it is not the older state", old, safe)
	}
	_, err = b.WaitSynced(w.step(), old+5)
	w.must(err)
	w.ctl("B", "failover", "cancel", d.Name, "--yes")
	if v := w.status("B", d.Name); v.Role != status.Replica || v.Running {
		t.Fatalf("after the cancel: %+v", v)
	}

	w.ctl("B", "failover", "unplanned", d.Name, "--force", "--yes")
	high := w.booted(b, max(safe, low))
	_, err = b.WaitSynced(w.step(), high+5)
	w.must(err)
	w.ctl("B", "failover", "commit", d.Name, "--yes")
	_, err = b.WaitSynced(w.step(), high+20)
	w.must(err)
	_, err = w.WaitStatus(w.step(), "B", d.Name, "plain images", func(v status.VM) bool { return v.Failover == nil })
	w.must(err)

	w.restart("A")
	_, err = w.WaitStatus(w.step(), "A", d.Name, "held back", func(v status.VM) bool {
		return !v.Running && strings.Contains(fmtConditions(v), "promoted")
	})
	w.must(err)
	// Nothing is written during the return, so that the old disk can be compared whole.
	w.virsh("B", "suspend", d.Name)
	image := w.Lab.Host("A").Path(d.Disks[0].File)
	if out, err := exec.CommandContext(w.step(), "cp", "--sparse=always", image, image+".was").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	w.ctl("B", "failover", "reverse", d.Name, "--yes")
	v, err := w.WaitStatus(w.step(), "B", d.Name, "replicating", func(v status.VM) bool { return v.State == status.Replicating && !v.LastCommit.IsZero() })
	w.must(err)
	if full := v.Disks[0].Size; v.Stats.SentBytes > full/4 {
		t.Errorf("the way back sent %d bytes of a %d byte disk", v.Stats.SentBytes, full)
	}
	w.virsh("B", "resume", d.Name)
	out = w.ctl("A", "failover", "patch", "list", d.Name)
	if !strings.Contains(out, "bytes of generation") {
		t.Fatalf("what A had is not kept:\n%s", out)
	}
	patch := strings.Fields(out)[0]
	if out := w.refused("B", 1, "failover", "patch", "mount", d.Name, patch); !strings.Contains(out, "the old primary") {
		t.Errorf("on the other host it is not said where the patch is:\n%s", out)
	}
	_, err = b.WaitSynced(w.step(), b.Synced()+20)
	w.must(err)
	m := w.mountOn("A", "failover", "patch", "mount", d.Name, patch)
	w.sameDisk(image+".was", m.Disks[0].URI)
	w.ctl("A", "point", "unmount", d.Name, m.ID)
	w.replicating("B", d.Name)
	w.noErrors("B", d, true)
}
