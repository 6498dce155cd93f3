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

func (w *world) wait(d guest.Domain, what string, want func(status.VM) bool) status.VM {
	w.t.Helper()
	v, err := w.WaitStatus(w.step(), "A", d.Name, what, want)
	w.must(err)
	return v
}
