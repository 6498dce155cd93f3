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
	_, err := w.WaitStatus(w.step(), host, vm, "vdb "+want, func(v status.VM) bool {
		for _, d := range v.Disks {
			if d.Name == "vdb" {
				return d.State == want
			}
		}
		return want == "none"
	})
	w.must(err)
}

// B4: a guest writes its records over two disks, of which one is protected. The
// other one is added under it, and then a test copy boots with both and finds
// them cut at one moment; it is removed and added again, and planned failovers
// there and back lose nothing. The guest sees no error, and nothing is copied
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

	w.ctl("A", "vm", "add-disk", d.Name, "vdb")
	w.secondDisk("A", d.Name, "")
	w.secondDisk("B", d.Name, "")
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
