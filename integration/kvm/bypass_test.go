package kvm_test

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
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

// device is what QEMU calls the first virtio disk.
const device = "/machine/peripheral/virtio-disk0/virtio-backend"

// qmp runs one QEMU command of a guest on A.
func (w *world) qmp(d guest.Domain, command string, args map[string]any) json.RawMessage {
	w.t.Helper()
	b, err := json.Marshal(map[string]any{"execute": command, "arguments": args})
	w.must(err)
	var r struct {
		Return json.RawMessage
		Error  *struct{ Desc string }
	}
	out := w.virsh("A", "qemu-monitor-command", d.Name, string(b))
	w.must(json.Unmarshal([]byte(out), &r))
	if r.Error != nil {
		w.t.Fatalf("%s: %s", command, r.Error.Desc)
	}
	return r.Return
}

// drive puts the guest's disk on a node.
func (w *world) drive(d guest.Domain, node string) {
	w.t.Helper()
	w.qmp(d, "qom-set", map[string]any{"path": device, "property": "drive", "value": node})
}

// Somebody takes the guest's disk off its export by hand, past the image's lock:
// that is critical as long as it lasts, no failover is begun, and when the
// export is back a comparison finds all that was written past it.
func TestWritesPastTheExportAreCriticalAndFoundByTheComparison(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("past", 12, 1, "")
	c := w.start(d)
	w.protect(d, "1s")
	var export string
	w.must(json.Unmarshal(w.qmp(d, "qom-get", map[string]any{"path": device, "property": "drive"}), &export))
	w.qmp(d, "blockdev-add", map[string]any{"driver": "raw", "node-name": "past", "file": map[string]any{
		"driver": "file", "filename": d.Disks[0].File, "locking": "off",
	}})
	w.drive(d, "past")
	begun := time.Now()
	v := w.condition("A", d.Name, "bypass", "vda", "shut the guest down")
	t.Logf("seen after %v: %s because %s", time.Since(begun).Round(100*time.Millisecond), v.Health, v.Reason)
	if v.Health != "critical" {
		t.Errorf("health is %s", v.Health)
	}
	if out := w.refused("A", 6, "failover", "planned", d.Name, "--yes"); !strings.Contains(out, "past the tracker") {
		t.Errorf("the refusal does not name the cause:\n%s", out)
	}
	n := c.Synced()
	_, err := c.WaitSynced(w.step(), n+60)
	w.must(err)
	w.drive(d, export)
	w.qmp(d, "blockdev-del", map[string]any{"node-name": "past"})
	w.replicating("A", d.Name)
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(b, last.Uint("n"))
}

// A guest ends below a backup's snapshot. Where its definition stands on the
// export it is not started without what it wrote; the handbook's way puts the
// snapshot under it again, and everything travels once it is merged. Where the
// definition names the snapshot it is just started.
func TestAGuestThatEndsBelowASnapshotLosesNothing(t *testing.T) {
	const overlay = "/var/lib/libvirt/images/kept.overlay"
	w := up(t, estate.Options{})
	d := w.guest("kept", 13, 1, "")
	c := w.start(d)
	w.protect(d, "1s")
	ends := func(file string) {
		w.virsh("A", "snapshot-create-as", d.Name, "b1", "--disk-only", "--atomic", "--no-metadata", "--diskspec", "vda,snapshot=external,file="+file)
		_, err := w.WaitStatus(w.step(), "A", d.Name, "behind", func(v status.VM) bool { return v.State == status.Behind })
		w.must(err)
		_, err = c.WaitSynced(w.step(), c.Synced()+30)
		w.must(err)
		w.virsh("A", "destroy", d.Name)
	}
	runs := func(n uint64) {
		_, err := c.WaitSynced(w.step(), n+10)
		w.must(err)
		if v := w.status("A", d.Name); v.State != status.Behind {
			t.Errorf("it is %s while the guest writes into the snapshot", v.State)
		}
		w.virsh("A", "blockcommit", d.Name, "vda", "--active", "--pivot", "--wait")
		w.replicating("A", d.Name)
	}
	ends(overlay)
	v := w.condition("A", d.Name, "overlay", overlay, "--without-snapshot")
	if v.State != status.Behind || v.Health != "critical" {
		t.Errorf("state %s, health %s", v.State, v.Health)
	}
	n := c.Synced()
	w.refused("A", 6, "vm", "start", d.Name, "--force")
	w.refused("A", 6, "failover", "planned", d.Name, "--yes")
	w.refused("A", 6, "vm", "disable", d.Name, "--yes")
	if out, err := w.Lab.Host("A").Virsh(w.step(), "start", d.Name); err == nil {
		t.Fatalf("libvirt starts it without the snapshot: %s", out)
	}
	// The way in the handbook.
	h := w.Lab.Host("A")
	_, err := h.Exec(w.step(), "qemu-img", "rebase", "-u", "-F", "raw", "-b", "nbd+unix:///vda?socket=/run/replicad/vm/"+d.UUID+"/nbd.sock", overlay)
	w.must(err)
	doc := w.virsh("A", "dumpxml", d.Name, "--inactive")
	disk := regexp.MustCompile(`(?s)<disk type='network'.*?</disk>`).FindString(doc)
	onto := regexp.MustCompile(`(?s)<source .*</source>`).ReplaceAllString(disk, "<source file='"+overlay+"'/>")
	onto = strings.Replace(strings.Replace(onto, "type='network'", "type='file'", 1), "type='raw'", "type='qcow2'", 1)
	w.must(os.WriteFile(h.Path("/var/lib/libvirt/images/kept.xml"), []byte(strings.Replace(doc, disk, onto, 1)), 0o600))
	w.virsh("A", "define", "/var/lib/libvirt/images/kept.xml")
	w.ctl("A", "vm", "start", d.Name)
	runs(n)
	// Now the guest was started on the export, and libvirt takes the definition along.
	ends(overlay + "2")
	w.condition("A", d.Name, "overlay", overlay+"2", "vm start")
	n = c.Synced()
	w.ctl("A", "vm", "start", d.Name)
	runs(n)
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(b, last.Uint("n"))
}
