package kvm_test

import (
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// A backup's external snapshot lies above the export: the VM is only behind,
// a planned failover is refused, and after the commit of the overlay all is
// well again without a digest pass. A saved guest cannot come back past the
// export: its image is locked.
func TestABackupsSnapshotIsBehindAndABypassIsPrevented(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("backup", 11, 1, "")
	c := w.start(d)
	w.protect(d, "1s")
	begun := time.Now()
	w.virsh("A", "snapshot-create-as", d.Name, "b1", "--disk-only", "--atomic", "--no-metadata",
		"--diskspec", "vda,snapshot=external,file=/var/lib/libvirt/images/backup.overlay")
	v, err := w.WaitStatus(w.step(), "A", d.Name, "behind", func(v status.VM) bool { return v.State == status.Behind })
	w.must(err)
	t.Logf("seen after %v: %s", time.Since(begun).Round(100*time.Millisecond), v.Reason)
	if out := w.refused("A", 6, "failover", "planned", d.Name, "--yes"); !strings.Contains(out, "blockcommit") {
		t.Fatalf("the refusal does not name the way out:\n%s", out)
	}
	n := c.Synced()
	_, err = c.WaitSynced(w.step(), n+60)
	w.must(err)
	// the guest wrote on for over a second: the last copy must age
	if now := w.status("A", d.Name); !now.LastCommit.Equal(v.LastCommit) || now.RPO < time.Second {
		t.Fatalf("the last copy is said to be of %v (%v old), it is of %v", now.LastCommit, now.RPO, v.LastCommit)
	}
	w.virsh("A", "blockcommit", d.Name, "vda", "--active", "--pivot", "--wait")
	w.replicating("A", d.Name)

	// a saved guest
	w.virsh("A", "managedsave", d.Name)
	if out, err := w.Lab.Host("A").Virsh(w.step(), "start", d.Name); err == nil {
		if v := w.status("A", d.Name); v.State == status.Replicating && v.Health == "normal" {
			t.Logf("restored through the export: %s", out)
		} else {
			t.Fatalf("restored, but %s because %q", v.State, v.Reason)
		}
	} else {
		t.Logf("the restore past the export is refused: %v", err)
		w.virsh("A", "managedsave-remove", d.Name)
		w.ctl("A", "vm", "start", d.Name)
	}
	b, err := w.Console("B", d, true)
	w.must(err)
	_, err = c.WaitBoot(w.step())
	if err == nil {
		_, err = c.WaitSynced(w.step(), n+10)
	}
	w.must(err)
	w.replicating("A", d.Name)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(b, last.Uint("n"))
}
