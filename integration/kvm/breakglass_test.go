package kvm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

// fsck runs replicafsck on a host.
func (w *world) fsck(host string, args ...string) (string, error) {
	w.t.Helper()
	bin, err := estate.Binaries(w.step())
	w.must(err)
	out, err := w.Lab.Host(host).Command(w.step(), filepath.Join(bin, "replicafsck"), args...).CombinedOutput()
	w.t.Logf("%s# replicafsck %s\n%s", host, strings.Join(args, " "), out)
	return string(out), err
}

// fsckRefuses expects a refusal with a word in it.
func (w *world) fsckRefuses(host, word string, args ...string) {
	w.t.Helper()
	if out, err := w.fsck(host, args...); err == nil || !strings.Contains(out, word) {
		w.t.Fatalf("replicafsck %v: %v; want a refusal with %q", args, err, word)
	}
}

// powerOff shuts a guest down as libvirt alone does and returns its last record.
func (w *world) powerOff(host string, d guest.Domain, c *console.Console) uint64 {
	w.t.Helper()
	w.virsh(host, "shutdown", d.Name, "--mode", "acpi")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	w.eventually("the guest is off", func() bool {
		return strings.Contains(w.virsh(host, "domstate", d.Name), "shut off")
	})
	return last.Uint("n")
}

func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	ctx := w.step()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			w.t.Fatalf("it never came about: %s", what)
		case <-tick.C:
		}
	}
}

// startVM starts a VM by replicactl; the daemon may still be busy with it.
func (w *world) startVM(host string, d guest.Domain) {
	w.t.Helper()
	w.eventually("the VM is started on "+host, func() bool {
		out, err := w.Ctl(w.step(), host, "vm", "start", d.Name)
		if err != nil && !strings.Contains(out, "another operation") {
			w.t.Fatal(err)
		}
		return err == nil
	})
}

// released waits until a host says that the VM is out of its hands.
func (w *world) released(host string, d guest.Domain) {
	w.t.Helper()
	v, err := w.WaitStatus(w.step(), host, d.Name, "released", func(v status.VM) bool {
		return strings.Contains(fmtConditions(v), "released: ") && v.Health == "critical"
	})
	w.must(err)
	if v.State != status.Unprotected {
		w.t.Errorf("a released VM has the state %s", v.State)
	}
}

// The daemon is gone. The guest is released, runs from its own image with
// stock libvirt and writes past everybody; when replicad runs again it first
// leaves the guest alone, and once that is off protection resumes by digest.
func TestAReleasedGuestRunsWithoutReplicadAndIsProtectedAgainByDigest(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("glass", 31, 2, "")
	c := w.start(d)
	w.virsh("A", "autostart", d.Name)
	before := w.virsh("A", "dumpxml", "--inactive", d.Name)
	w.protect(d, "1s")
	if info := w.virsh("A", "dominfo", d.Name); !strings.Contains(info, "Autostart:      disable") {
		t.Errorf("autostart was not taken over:\n%s", info)
	}
	w.fsckRefuses("A", "replicad runs", "release", d.Name)
	w.fsckRefuses("B", "replicad runs", "release", d.Name)
	w.must(w.Daemon("A").Kill())
	w.fsckRefuses("A", "virsh shutdown "+d.Name, "release", d.Name)
	w.fsckRefuses("A", "no such VM", "release", "nobody")
	last := w.powerOff("A", d, c)
	// The data plane dies as well: its tracker looks as if it had gone on, and
	// only the mark tells the next one what it must not believe.
	_, err := w.Lab.Host("A").Exec(w.step(), "sh", "-c", "cd /run/replicad/vm/"+d.UUID+"; kill -9 $(cat keeper.pid); kill -9 $(cat dataplane.pid)")
	w.must(err)
	_, err = w.fsck("A", "release", d.Name)
	w.must(err)
	_, err = w.fsck("A", "release", "--all") // again: nothing changes
	w.must(err)
	if after := w.virsh("A", "dumpxml", "--inactive", d.Name); after != before {
		t.Errorf("the definition is not what it was before protection:\n%s\nit was:\n%s", after, before)
	}
	if info := w.virsh("A", "dominfo", d.Name); !strings.Contains(info, "Autostart:      enable") {
		t.Errorf("autostart was not given back:\n%s", info)
	}
	c, err = w.Console("A", d, false)
	w.must(err)
	w.virsh("A", "start", d.Name)
	high := w.booted(c, last)
	_, err = c.WaitSynced(w.step(), high+30)
	w.must(err)

	w.must(w.StartDaemon(w.step(), "A"))
	w.released("A", d)
	_, err = c.WaitSynced(w.step(), c.Synced()+20) // it is left alone
	w.must(err)
	last = w.powerOff("A", d, c)
	c, err = w.Console("A", d, false)
	w.must(err)
	_, err = w.WaitStatus(w.step(), "A", d.Name, "in replicad's hands again", func(v status.VM) bool {
		return !strings.Contains(fmtConditions(v), "released: ") && v.State != status.Unprotected
	})
	w.must(err)
	if doc := w.virsh("A", "dumpxml", "--inactive", d.Name); !strings.Contains(doc, "/nbd.sock") {
		t.Errorf("the definition does not point to the exports:\n%s", doc)
	}
	w.startVM("A", d)
	high = w.booted(c, last)
	v := w.replicating("A", d.Name)
	full := v.Disks[0].Size + v.Disks[1].Size
	t.Logf("after the release %d bytes were sent (%d before compression); the disks have %d", v.Stats.SentBytes, v.Stats.RawBytes, full)
	if v.Stats.RawBytes > full/4 {
		t.Errorf("after the release %d bytes were shipped, the disks have %d", v.Stats.RawBytes, full)
	}
	_, err = c.WaitSynced(w.step(), high+10)
	w.must(err)
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	end, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(b, end.Uint("n"))
	w.noErrors("A", d, false)
	w.noErrors("B", d, true)
}

// The primary's host is dead and the replica's daemon is gone. The replica is
// recovered and released with replicafsck alone and boots from its plain image;
// the daemons that come back corrupt nothing: the recovered side owns the VM,
// and the way back is that of an unplanned failover.
func TestARecoveredReplicaRunsWithoutReplicadAndOwnsTheVM(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("saved", 32, 1, "")
	c := w.start(d)
	w.protect(d, "1s")
	cut := w.status("A", d.Name).Epoch
	_, err := w.WaitStatus(w.step(), "A", d.Name, "two cycles further", func(v status.VM) bool { return v.Epoch >= cut+2 })
	w.must(err)
	safe := c.Synced()
	_, err = w.WaitStatus(w.step(), "A", d.Name, "another cycle further", func(v status.VM) bool { return v.Epoch >= cut+4 })
	w.must(err)
	w.must(w.Lab.Host("A").Crash())
	w.must(w.Daemon("B").Kill())

	w.fsckRefuses("B", "recover "+d.Name+" --in-place", "release", d.Name)
	_, err = w.fsck("B", "check", d.Name)
	w.must(err)
	_, err = w.fsck("B", "recover", d.Name, "--in-place")
	w.must(err)
	_, err = w.fsck("B", "release", d.Name)
	w.must(err)
	b, err := w.Console("B", d, true)
	w.must(err)
	w.virsh("B", "start", d.Name)
	high := w.booted(b, safe)
	_, err = b.WaitSynced(w.step(), high+10)
	w.must(err)

	w.must(w.StartDaemon(w.step(), "B"))
	w.released("B", d)
	w.restart("A")
	w.held("A", d)
	_, err = b.WaitSynced(w.step(), b.Synced()+10)
	w.must(err)
	last := w.powerOff("B", d, b)
	v, err := w.WaitStatus(w.step(), "B", d.Name, "the primary", func(v status.VM) bool {
		return v.Role == status.Primary && v.State == status.FailedOver && strings.Contains(fmtConditions(v), "no-reverse")
	})
	w.must(err)
	w.held("A", d)
	b, err = w.Console("B", d, true)
	w.must(err)
	w.startVM("B", d)
	w.booted(b, last)
	w.ctl("B", "failover", "reverse", d.Name, "--yes")
	v = w.replicating("B", d.Name)
	t.Logf("the way back sent %d bytes of %d", v.Stats.SentBytes, v.Disks[0].Size)
	if v.Stats.SentBytes > v.Disks[0].Size/4 {
		t.Errorf("the way back sent %d bytes of a %d byte disk", v.Stats.SentBytes, v.Disks[0].Size)
	}
	a, err := w.Console("A", d, false)
	w.must(err)
	w.ctl("B", "failover", "planned", d.Name, "--yes")
	end, err := b.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(a, end.Uint("n"))
	w.noErrors("B", d, true)
}

// held waits until a host holds the VM back and shows that it cannot be started.
func (w *world) held(host string, d guest.Domain) {
	w.t.Helper()
	_, err := w.WaitStatus(w.step(), host, d.Name, "held back", func(v status.VM) bool {
		return !v.Running && strings.Contains(fmtConditions(v), "start-held: ")
	})
	w.must(err)
	if out, err := w.Lab.Host(host).Virsh(w.step(), "start", d.Name); err == nil {
		w.t.Fatalf("host %s started the VM: %s", host, out)
	}
}

// A daemon that hangs can be worked around: a forced release holds until that
// daemon is started again. What is in the way then is said and left alone.
func TestAForcedReleaseHoldsUntilReplicadIsStartedAgain(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("forced", 33, 1, "")
	c := w.start(d)
	w.protect(d, "1s")
	last := w.powerOff("A", d, c)
	_, err := w.fsck("A", "release", "--force", d.Name)
	w.must(err)
	w.released("A", d)
	c, err = w.Console("A", d, false)
	w.must(err)
	w.virsh("A", "start", d.Name)
	high := w.booted(c, last)
	_, err = c.WaitSynced(w.step(), high+10)
	w.must(err)
	w.virsh("A", "managedsave", d.Name)
	w.released("A", d)

	w.must(w.Daemon("A").Kill())
	w.must(w.StartDaemon(w.step(), "A"))
	_, err = w.WaitStatus(w.step(), "A", d.Name, "waiting for the saved guest", func(v status.VM) bool {
		return strings.Contains(fmtConditions(v), "managed save image")
	})
	w.must(err)
	w.virsh("A", "start", d.Name) // from the saved state, past us
	_, err = c.WaitSynced(w.step(), c.Synced()+10)
	w.must(err)
	last = w.powerOff("A", d, c)
	c, err = w.Console("A", d, false)
	w.must(err)
	_, err = w.WaitStatus(w.step(), "A", d.Name, "in replicad's hands again", func(v status.VM) bool {
		return !strings.Contains(fmtConditions(v), "released: ") && v.State != status.Unprotected
	})
	w.must(err)
	w.startVM("A", d)
	w.booted(c, last)
	w.replicating("A", d.Name)
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	end, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(b, end.Uint("n"))
}

// The variables of a UEFI guest come along when its replica is recovered
// without the daemon: a guest without its boot entries may not boot.
func TestARecoveredUEFIGuestHasItsVariables(t *testing.T) {
	if _, err := os.Stat("/usr/share/OVMF/OVMF_CODE_4M.fd"); err != nil {
		t.Skip("needs ovmf: ", err)
	}
	w := up(t, estate.Options{})
	d := w.guest("efisaved", 34, 1, "")
	d.UEFI = true
	w.start(d)
	v := w.protect(d, "1s")
	_, err := w.WaitStatus(w.step(), "A", d.Name, "two cycles further", func(n status.VM) bool { return n.Epoch >= v.Epoch+2 })
	w.must(err)
	w.must(w.Lab.Host("A").Crash())
	want, err := os.ReadFile(w.Lab.Host("A").Path(d.NVRAM()))
	w.must(err)
	w.must(w.Daemon("B").Kill())
	_, err = w.fsck("B", "recover", d.Name, "--in-place")
	w.must(err)
	_, err = w.fsck("B", "release", d.Name)
	w.must(err)
	out, err := w.Lab.Host("B").Exec(w.step(), "sh", "-c", "ls /var/lib/libvirt/qemu/nvram/")
	w.must(err)
	got, err := os.ReadFile(w.Lab.Host("B").Path("/var/lib/libvirt/qemu/nvram/" + strings.TrimSpace(out)))
	w.must(err)
	if n := differ(got, want); n != 0 || len(got) != len(want) {
		t.Errorf("the variables differ in %d of %d bytes", n, len(want))
	}
	b, err := w.Console("B", d, true)
	w.must(err)
	w.virsh("B", "start", d.Name)
	w.booted(b, 0)
}
