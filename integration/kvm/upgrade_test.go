package kvm_test

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

// reinstall puts the program in place anew, as a package does: another file of
// the same name.
func reinstall(t *testing.T) {
	t.Helper()
	root, err := lab.RepoRoot()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(root, "bin", "replicad")
	from, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(name+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// sockets are the guest's process's, by inode: a new connection is a new one.
func (w *world) sockets(host string, d guest.Domain) string {
	w.t.Helper()
	out, err := w.Lab.Host(host).Exec(w.step(), "sh", "-c",
		"ls -l /proc/$(cat /run/libvirt/qemu/"+d.Name+".pid)/fd | grep -o 'socket:.[0-9]*' | sort")
	w.must(err)
	return string(out)
}

// A guest that libvirt started from the definition, so on Debian 12 without a
// reconnect delay, goes through upgrades under a load of fsyncs: the connection
// is the same one, nothing is compared, no error, and status says what runs.
func TestAGuestGoesThroughUpgradesOfItsDataPlaneOnOneConnection(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("upgraded", 5, 1, "lab.interval=5")
	c := w.start(d)
	w.protect(d, "1s")
	w.virsh("A", "shutdown", d.Name, "--mode", "acpi")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	w.wait(d, "off", func(v status.VM) bool { return !v.Running })
	c, err = w.Console("A", d, false)
	w.must(err)
	w.ctl("A", "vm", "start", d.Name)
	w.booted(c, last.Uint("n"))
	_, err = c.WaitSynced(w.step(), last.Uint("n")+10)
	w.must(err)
	w.replicating("A", d.Name)

	if out := w.ctl("A", "vm", "upgrade", d.Name); !strings.Contains(out, "runs the installed program already") {
		t.Fatalf("nothing to upgrade: %s", out)
	}
	n := 3
	if v, err := strconv.Atoi(os.Getenv("KVMREPLICA_UPGRADES")); err == nil && v > 0 {
		n = v
	}
	sockets := w.sockets("A", d)
	for i := range n {
		reinstall(t)
		before := w.status("A", d.Name)
		if before.Program == nil || !before.Program.Outdated {
			t.Fatalf("another program is installed and status does not say so: %+v", before.Program)
		}
		if i == 0 {
			if out := w.ctl("A", "vm", "upgrade", "--all", "--dry-run"); !strings.Contains(out, "could take over") {
				t.Fatalf("dry run: %s", out)
			}
		}
		out := w.ctl("A", "vm", "upgrade", d.Name)
		t.Logf("%s", strings.TrimSpace(out))
		at := c.Synced()
		_, err := c.WaitSynced(w.step(), at+20)
		w.must(err)
		after := w.status("A", d.Name)
		if after.Program == nil || after.Program.Outdated || after.Program.PID == before.Program.PID {
			t.Fatalf("after the upgrade: %+v, before: %+v", after.Program, before.Program)
		}
		if got := w.sockets("A", d); got != sockets {
			t.Fatalf("the guest connected anew:\n%s\nbefore:\n%s", got, sockets)
		}
	}
	begun := time.Now()
	v := w.wait(d, "replicating", func(v status.VM) bool { return v.State == status.Replicating && v.LastCommit.After(begun) })
	if v.Stats.RawBytes > v.Disks[0].Size/2 {
		t.Errorf("%d bytes were shipped, the disk has %d", v.Stats.RawBytes, v.Disks[0].Size)
	}
	w.noErrors("A", d, false)
	if l, ok := c.Last("SYNCED"); ok {
		t.Logf("longest fsync the guest saw: %s", l.Raw)
	}
}

// The daemon that asked for an upgrade is killed at each step of it, under the
// guest's load: the upgrade goes on or was not begun, one data plane serves, the
// guest sees no error, and the daemon that is started again takes up both and
// ships what changed, not the disk.
func TestADaemonKilledAtAnyStepOfAnUpgradeIsMissedByNobody(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("orphaned", 6, 1, "lab.interval=5")
	c := w.start(d)
	w.protect(d, "1s")
	for _, p := range []string{
		"started", "checked", "held", "rested", "sent", "ready", "committed", "gone", // of the data plane that is to go
		"succeeded", "keeperless", // of the daemon
	} {
		point := "upgrade/" + p
		if p != "succeeded" && p != "keeperless" {
			point += "@/run/replicad/control.sock"
		}
		// The data plane has the environment of the daemon that started it.
		w.must(w.Daemon("A").Kill())
		w.killKeeper("A", d)
		w.must(w.StartDaemon(w.step(), "A", "REPLICAD_CRASH_AT="+point))
		before := w.replicating("A", d.Name)
		armed := w.Daemon("A")
		out, err := w.Ctl(w.step(), "A", "vm", "upgrade", d.Name, "--force")
		if err == nil {
			t.Fatalf("%s: the daemon survived: %s", point, out)
		}
		select {
		case <-armed.Done():
		case <-w.step().Done():
			t.Fatalf("%s: the daemon lives: %v", point, err)
		}
		_, err = c.WaitSynced(w.step(), c.Synced()+10) // without a daemon
		w.must(err)
		begun := time.Now()
		w.must(w.StartDaemon(w.step(), "A"))
		after := w.wait(d, "replicating", func(v status.VM) bool { return v.State == status.Replicating && v.LastCommit.After(begun) })
		if after.Stats.RawBytes > after.Disks[0].Size/2 {
			t.Errorf("%s: %d bytes were shipped, the disk has %d", point, after.Stats.RawBytes, after.Disks[0].Size)
		}
		w.onePlane(d)
		t.Logf("%s: data plane %d, then %d", point, before.Program.PID, after.Program.PID)
	}
	w.must(w.Daemon("A").Kill())
	w.killKeeper("A", d)
	w.must(w.StartDaemon(w.step(), "A"))
	w.replicating("A", d.Name)
	w.ctl("A", "vm", "upgrade", d.Name, "--force")
	_, err := c.WaitSynced(w.step(), c.Synced()+10)
	w.must(err)
	w.onePlane(d)
	w.noErrors("A", d, false)
}

// onePlane waits until a VM has one data plane and one keeper on host A, those
// that their files name.
func (w *world) onePlane(d guest.Domain) {
	w.t.Helper()
	dir := "/run/replicad/vm/" + d.UUID
	var out string
	ok := waitFor(w.step(), func() bool {
		out, _ = w.Lab.Host("A").Exec(w.step(), "sh", "-c", "cd "+dir+" && cat keeper.pid dataplane.pid && "+
			"pgrep -f '^[^ ]*replicad keeper .*"+d.UUID+"'; pgrep -f '^[^ ]*replicad dataplane .*"+d.UUID+"'")
		f := strings.Fields(out)
		return len(f) == 4 && f[0] == f[2] && f[1] == f[3]
	})
	if ok != nil {
		w.t.Fatalf("keeper and data plane by their files, then those that run: %s", out)
	}
}

func (w *world) wait(d guest.Domain, what string, want func(status.VM) bool) status.VM {
	w.t.Helper()
	v, err := w.WaitStatus(w.step(), "A", d.Name, what, want)
	w.must(err)
	return v
}
