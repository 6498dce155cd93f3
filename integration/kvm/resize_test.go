package kvm_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

// resizedTo waits until a host's status names a size for vda.
func (w *world) resizedTo(host, vm string, size int64) {
	w.t.Helper()
	_, err := w.WaitStatus(w.step(), host, vm, fmt.Sprintf("%d bytes", size), func(v status.VM) bool { return v.Disks[0].Size == size })
	w.must(err)
}

// guestSees waits for the guest kernel's word that a disk has another size.
func (w *world) guestSees(d guest.Domain, size int64) {
	w.t.Helper()
	want := fmt.Sprintf("new size: %d 512-byte", size/512)
	w.eventually("the guest's kernel says "+want, func() bool {
		b, err := os.ReadFile(w.Lab.Host("A").Path(d.ConsoleFile()))
		return err == nil && strings.Contains(string(b), want)
	})
}

// B4: a disk grows under a guest that writes, which sees it at once and no
// error; an image that is made longer while the guest is off is taken up; the
// copy follows, points keep their size, and a failover has all of it.
func TestADiskGrowsUnderARunningGuest(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("grow", 90, 1, "lab.load=16 loglevel=6") // the kernel says on the console what it sees
	const was, live, off = 256 << 20, 300 << 20, 310<<20 + 512
	c := w.start(d)
	w.protect(d, "1s")
	w.ctl("B", "point", "pin", d.Name, "latest")

	if out := w.ctl("A", "vm", "resize", d.Name, "vda", "300M"); !strings.Contains(out, "the guest sees it now") {
		t.Errorf("it was not said that the guest sees it:\n%s", out)
	}
	w.guestSees(d, live)
	w.resizedTo("B", d.Name, live)
	w.replicating("A", d.Name)
	_, err := c.WaitSynced(w.step(), 10)
	w.must(err)
	w.noErrors("A", d, false)
	w.refused("A", 6, "vm", "resize", d.Name, "vda", "100M")
	w.refused("B", 6, "vm", "resize", d.Name, "vda", "400M")

	w.ctl("A", "vm", "sync", d.Name)
	last := w.powerOff("A", d, c)
	w.must(os.Truncate(w.Lab.Host("A").Path(d.Disks[0].File), off))
	w.resizedTo("A", d.Name, off)
	w.resizedTo("B", d.Name, off)
	w.ctl("A", "vm", "start", d.Name)
	w.booted(c, last)

	w.ctl("A", "failover", "planned", d.Name, "--yes")
	w.replicating("B", d.Name)
	w.noErrors("B", d, true)
	st, err := os.Stat(w.Lab.Host("B").Path(w.status("B", d.Name).Disks[0].Path))
	w.must(err)
	if st.Size() != off {
		t.Errorf("the image on B has %d bytes", st.Size())
	}
}

// A disk whose end nobody uses becomes shorter while its guest is off: refused
// while it runs and without the word for it. The copy follows; the point from
// before keeps its size, as a file and under a test copy's guest.
func TestADiskShrinksWhileItsGuestIsOff(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("shrink", 91, 1, "loglevel=6")
	const was, now = 300 << 20, 280<<20 + 1536
	c := w.start(d)
	w.powerOff("A", d, c)
	w.must(os.Truncate(w.Lab.Host("A").Path(d.Disks[0].File), was)) // its file system ends at 256 MiB
	w.virsh("A", "start", d.Name)
	_, err := c.WaitSynced(w.step(), 20)
	w.must(err)
	w.protect(d, "1s")
	w.ctl("B", "point", "pin", d.Name, "latest")

	size := fmt.Sprint(now)
	w.refused("A", 6, "vm", "resize", d.Name, "vda", size, "--shrink", "--yes")
	w.ctl("A", "vm", "sync", d.Name)
	last := w.powerOff("A", d, c)
	w.refused("A", 6, "vm", "resize", d.Name, "vda", size, "--yes")
	w.ctl("A", "vm", "resize", d.Name, "vda", size, "--shrink", "--yes")
	w.resizedTo("B", d.Name, now)
	w.ctl("A", "vm", "start", d.Name)
	w.booted(c, last)
	w.replicating("A", d.Name)

	const out = "/var/lib/libvirt/exports"
	w.must(os.MkdirAll(w.Lab.Host("B").Path(out), 0o755))
	for point, want := range map[string]int64{"oldest": was, "latest": now} {
		w.ctl("B", "point", "export", d.Name, "--point", point, "--to", out)
		file := w.Lab.Host("B").Path(out + "/" + d.Name + "-vda.raw")
		st, err := os.Stat(file)
		w.must(err)
		if st.Size() != want {
			t.Errorf("the %s state has %d bytes, want %d", point, st.Size(), want)
		}
		w.must(os.Remove(file))
	}
	one, c1 := w.copyOf(d.Name, "--point", "oldest")
	w.booted(c1, 10)
	info := w.virsh("B", "domblkinfo", one.Name, "vda")
	if !strings.Contains(info, fmt.Sprint(was)) {
		t.Errorf("the copy's disk:\n%s", info)
	}
	w.ctl("B", "failover", "test-stop", d.Name, "--all")

	w.ctl("A", "failover", "planned", d.Name, "--yes")
	w.replicating("B", d.Name)
	w.noErrors("A", d, false)
	w.noErrors("B", d, true)
	st, err := os.Stat(w.Lab.Host("B").Path(w.status("B", d.Name).Disks[0].Path))
	w.must(err)
	if st.Size() != now {
		t.Errorf("the image on B has %d bytes", st.Size())
	}
}
