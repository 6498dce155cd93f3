package kvm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"libvirt.org/go/libvirtxml"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// bait is a file of a host that nobody has a reason to open.
const bait = "/var/lib/libvirt/bait"

// watchdog tells whether anybody opens a bait.
type watchdog struct {
	w  *world
	fd int
	of map[int32]string // host, by watch
}

// layBait puts a bait on both hosts.
func (w *world) layBait() *watchdog {
	w.t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	w.must(err)
	w.t.Cleanup(func() { _ = unix.Close(fd) })
	d := &watchdog{w: w, fd: fd, of: map[int32]string{}}
	for _, h := range []string{"A", "B"} {
		p := w.Lab.Host(h).Path(bait)
		w.must(os.MkdirAll(filepath.Dir(p), 0o755))
		w.must(os.WriteFile(p, make([]byte, 64<<10), 0o644))
		wd, err := unix.InotifyAddWatch(fd, p, unix.IN_OPEN|unix.IN_ACCESS|unix.IN_MODIFY)
		w.must(err)
		d.of[int32(wd)] = h
	}
	return d
}

// bites returns the hosts on which the bait was opened since the last call.
func (d *watchdog) bites() map[string]int {
	d.w.t.Helper()
	found := map[string]int{}
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Read(d.fd, b)
		if err == unix.EAGAIN {
			return found
		}
		d.w.must(err)
		for at := 0; at+unix.SizeofInotifyEvent <= n; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&b[at]))
			if e.Mask&unix.IN_Q_OVERFLOW != 0 {
				d.w.t.Fatal("events were lost")
			}
			found[d.of[e.Wd]]++
			at += unix.SizeofInotifyEvent + int(e.Len)
		}
	}
}

// untouched fails when a bait was opened.
func (d *watchdog) untouched(after string) {
	d.w.t.Helper()
	if b := d.bites(); len(b) > 0 {
		d.w.t.Errorf("%s: somebody opened a file that only a guest's header names: %v", after, b)
	}
}

// explicit fails when a disk of any domain of a host is not said to be raw, in
// the definitions and on the command lines of QEMU.
func (w *world) explicit(host string) {
	w.t.Helper()
	for _, name := range strings.Fields(w.virsh(host, "list", "--all", "--name")) {
		for _, args := range [][]string{{"dumpxml", name}, {"dumpxml", "--inactive", name}} {
			text := w.virsh(host, args...)
			var x libvirtxml.Domain
			w.must(x.Unmarshal(text))
			for _, k := range x.Devices.Disks {
				if k.Driver == nil || k.Driver.Type != "raw" || k.BackingStore != nil && k.BackingStore.Format != nil {
					w.t.Errorf("%s on %s: disk %s is not plainly raw:\n%s", name, host, k.Target.Dev, text)
				}
			}
			if strings.Contains(text, "'"+bait+"'") {
				w.t.Errorf("%s on %s: what a guest wrote is in its definition:\n%s", name, host, text)
			}
		}
	}
	lines, err := w.Lab.Host(host).Exec(w.step(), "sh", "-c", `for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline 2>/dev/null | grep '^[^ ]*qemu'; done; true`)
	w.must(err)
	for _, bad := range []string{`"driver":"qcow2"`, `"driver":"vmdk"`, "format=qcow2", `"` + bait + `"`, "file=" + bait} {
		if strings.Contains(lines, bad) {
			w.t.Errorf("QEMU on %s was told %s:\n%s", host, bad, lines)
		}
	}
}

// A guest writes headers of other image formats to the start of its disks, with
// a file of the host as backing file or extent. Whoever guessed a format would
// open that file, as qemu-img does when nobody tells it the format. Nothing of
// ours, libvirt's or QEMU's does, through protection, comparison, points,
// mounts, exports, a test copy, failovers and the way back; and the guest's disk
// is what it wrote.
func TestAGuestsImageHeadersAreNeverBelieved(t *testing.T) {
	w := up(t, estate.Options{})
	dog := w.layBait()
	d := w.guest("headers", 62, 3, "lab.header="+bait)
	c := w.start(d)
	dog.untouched("the start")
	w.protect(d, "1s")
	w.explicit("A")
	w.ctl("A", "vm", "resync", d.Name, "--background")
	_, err := w.WaitStatus(w.step(), "A", d.Name, "compared", func(v status.VM) bool { return v.Compare != nil && !v.Compare.Ended.IsZero() })
	w.must(err)
	dog.untouched("protection and comparison")

	to := "/var/lib/libvirt/exports"
	w.must(os.MkdirAll(w.Lab.Host("B").Path(to), 0o755))
	w.ctl("B", "point", "pin", d.Name, "latest")
	w.ctl("B", "point", "export", d.Name, "--point", "oldest", "--to", to)
	m := w.mountOn("B", "point", "mount", d.Name, "--point", "oldest")
	w.ctl("B", "point", "unmount", d.Name, m.ID)
	one, cc := w.copyOf(d.Name, "--isolated")
	w.booted(cc, 0)
	w.explicit("B")
	w.ctl("B", "failover", "test-stop", d.Name, "--test", one.ID)
	dog.untouched("points and a test copy")

	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	safe := w.booted(b, last.Uint("n"))
	w.explicit("B")
	w.replicating("B", d.Name)
	dog.untouched("a planned failover")

	a, err := w.Console("A", d, false)
	w.must(err)
	w.must(w.Lab.Host("B").Crash())
	w.ctl("A", "failover", "unplanned", d.Name, "--force", "--yes")
	w.booted(a, safe)
	w.explicit("A")
	w.ctl("A", "failover", "commit", d.Name, "--yes")
	_, err = w.WaitStatus(w.step(), "A", d.Name, "plain images", func(v status.VM) bool { return v.Failover == nil })
	w.must(err)
	w.restart("B")
	dog.untouched("an unplanned failover")
	w.ctl("A", "vm", "disable", d.Name, "--force", "--yes")
	w.explicit("A")
	dog.untouched("the end of protection")
	w.noErrors("A", d, false)

	// The watch works, and the headers are what they pretend to be.
	for i := range d.Disks {
		file := fmt.Sprintf("%s/%s-vd%c.raw", to, d.Name, 'a'+i)
		out, err := w.Lab.Host("B").Exec(w.step(), "qemu-img", "info", "--backing-chain", file)
		w.must(err)
		if b := dog.bites(); b["B"] == 0 {
			t.Errorf("disk %d: a header that nobody would fall for (%v):\n%s", i, b, out)
		}
	}
}
