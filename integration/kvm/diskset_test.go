package kvm_test

import (
	"fmt"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// secondDisk waits until a host's status says where the guest's second disk
// stands; "none" = it is not listed.
func (w *world) secondDisk(host, vm, want string) {
	w.t.Helper()
	w.diskIs(host, vm, "vdb", want)
}

// diskIs is the same for any disk.
func (w *world) diskIs(host, vm, disk, want string) {
	w.t.Helper()
	_, err := w.WaitStatus(w.step(), host, vm, disk+" "+want, func(v status.VM) bool {
		for _, d := range v.Disks {
			if string(d.Name) == disk {
				return d.State == want
			}
		}
		return want == "none"
	})
	w.must(err)
}

// B4: a guest writes its records over two disks, of which one is protected. The
// other one is added under it, and then a test copy boots with both and finds
// them cut at one moment; it is removed, and added again while the guest is
// suspended, and planned failovers there and back lose nothing. The guest sees no error, and nothing is copied
// anew but that disk.
func TestADiskIsAddedUnderARunningGuestAndRemoved(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("disks", 91, 2, "lab.load=16")
	c := w.start(d)
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--disk", "vda", "--yes")
	w.replicating("A", d.Name)
	w.ctl("B", "point", "pin", d.Name, "latest")

	w.ctl("A", "vm", "add-disk", d.Name, "vdb", "--dry-run")
	w.secondDisk("A", d.Name, "none")
	w.ctl("A", "vm", "add-disk", d.Name, "vdb")
	w.secondDisk("A", d.Name, "")
	w.secondDisk("B", d.Name, "")
	w.noErrors("A", d, false)
	_, err := c.WaitSynced(w.step(), c.Synced()+10)
	w.must(err)
	before := c.Synced()
	w.ctl("A", "vm", "sync", d.Name)
	one, cc := w.copyOf(d.Name)
	w.booted(cc, before)
	w.ctl("B", "failover", "test-stop", d.Name, "--test", one.ID)

	if out := w.ctl("A", "vm", "remove-disk", d.Name, "vdb", "--yes"); !strings.Contains(out, "Recovery points") {
		t.Errorf("it was not said what happens to the recovery points:\n%s", out)
	}
	w.secondDisk("A", d.Name, "none")
	w.secondDisk("B", d.Name, "left")
	_, err = c.WaitSynced(w.step(), c.Synced()+10)
	w.must(err)
	w.noErrors("A", d, false)
	if got := w.virsh("A", "domblklist", d.Name); !strings.Contains(got, fmt.Sprint(d.Disks[1].File)) {
		t.Errorf("the guest's second disk is not on its own image:\n%s", got)
	}

	w.virsh("A", "suspend", d.Name) // the disk joins under a guest that stands still, too
	w.ctl("A", "vm", "add-disk", d.Name, "vdb")
	w.secondDisk("A", d.Name, "")
	w.secondDisk("B", d.Name, "")
	w.virsh("A", "resume", d.Name)
	_, err = c.WaitSynced(w.step(), c.Synced()+10)
	w.must(err)
	w.noErrors("A", d, false)
	before = c.Synced()
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	b, err := w.Console("B", d, true)
	w.must(err)
	w.booted(b, before)
	w.replicating("B", d.Name)
	_, err = b.WaitSynced(w.step(), before+10)
	w.must(err)
	before = b.Synced()
	w.ctl("B", "failover", "planned", d.Name, "--yes")
	w.replicating("A", d.Name)
	w.booted(c, before)
	w.noErrors("B", d, true)
}

// B4: disks that are another NBD server and a block device are added: the first
// while the guest is off, as such a disk cannot be put on an export under a
// running one, which says so; the second under a paused guest. What they held
// and what is written meanwhile arrives, there and back.
func TestDisksOfOtherKindsAreAdded(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	u := w.upstreams(93)
	d := u.guest
	w.must(w.Define(w.step(), "A", d))
	same := func() {
		t.Helper()
		for i, f := range u.files {
			w.same(f, w.onReplica(d, d.Target(i)))
		}
	}
	w.ctl("A", append(enable(d.Name), "--disk", "vda")...)
	w.replicating("A", d.Name)

	w.virsh("A", "start", "--paused", d.Name)
	if out := w.refused("A", 6, "vm", "add-disk", d.Name, "vdb"); !strings.Contains(out, "shut the guest down") {
		t.Errorf("a running guest's NBD disk is refused without the way out:\n%s", out)
	}
	if len(u.files) == 3 {
		w.ctl("A", "vm", "add-disk", d.Name, "vdc")
		w.diskIs("A", d.Name, "vdc", "")
		w.diskIs("B", d.Name, "vdc", "")
		w.same(u.files[2], w.onReplica(d, "vdc"))
	}
	w.virsh("A", "destroy", d.Name)
	w.ctl("A", "vm", "add-disk", d.Name, "vdb")
	w.diskIs("A", d.Name, "vdb", "")
	w.diskIs("B", d.Name, "vdb", "")
	for i := range u.files {
		w.poke("A", d, d.Target(i), 1<<20, 64<<10, byte(0x40+i))
	}
	same()

	w.ctl("A", "failover", "planned", d.Name, "--yes")
	w.replicating("B", d.Name)
	for i := range u.files {
		w.poke("B", d, d.Target(i), 3<<20, 64<<10, byte(0x60+i))
	}
	w.ctl("B", "failover", "planned", d.Name, "--yes")
	w.replicating("A", d.Name)
	same()
}
