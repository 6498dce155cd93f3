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
