package kvm_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

// anyClient lets qemu-io stand in for a guest.
const anyClient = "any_client = true\n"

// poke writes a pattern into a protected disk through its export, as the guest
// would.
func (w *world) poke(host string, d guest.Domain, disk string, off, n int, pattern byte) {
	w.t.Helper()
	uri := fmt.Sprintf("nbd+unix:///%s?socket=/run/replicad/vm/%s/nbd.sock", disk, d.UUID)
	_, err := w.Lab.Host(host).Exec(w.step(), "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P %d %d %d", pattern, off, n), "-c", "flush", uri)
	w.must(err)
}

// pokeRandom writes what cannot be compressed.
func (w *world) pokeRandom(host string, d guest.Domain, disk string, off, n int) {
	w.t.Helper()
	uri := fmt.Sprintf("nbd+unix:///%s?socket=/run/replicad/vm/%s/nbd.sock", disk, d.UUID)
	script := fmt.Sprintf("set -e; head -c %d /dev/urandom >/run/random; qemu-io -f raw -c 'write -s /run/random %d %d' -c flush '%s'; rm /run/random", n, off, n, uri)
	_, err := w.Lab.Host(host).Exec(w.step(), "sh", "-c", script)
	w.must(err)
}

// same waits until a disk has the same content on both hosts.
func (w *world) same(a, b string) {
	w.t.Helper()
	err := waitFor(w.step(), func() bool {
		x, err := os.ReadFile(a)
		w.must(err)
		y, err := os.ReadFile(b)
		return err == nil && bytes.Equal(x, y)
	})
	if err != nil {
		w.t.Fatalf("%s and %s differ: %v", a, b, err)
	}
}

// onReplica is a disk's image on the replica host, from outside; the directory
// may be a file system that only the host has mounted.
func (w *world) onReplica(d guest.Domain, disk string) string {
	return fmt.Sprintf("/proc/%d/root%s/%s/%s.raw", w.Lab.Host("B").Pid(), replicaRoot, d.UUID, disk)
}

// A full replica is an alarm on both hosts that names the remedy. It loses
// nothing, and goes on by itself when there is room: during the initial copy,
// while changes arrive, and while they are applied.
func TestAFullReplicaGoesOnByItselfWhenThereIsRoomAgain(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	w.small("B", replicaRoot, "3m")
	w.small("B", stateDir, "48m")
	d := w.smallGuest("full", 30, 4<<20)
	image := w.Lab.Host("A").Path(d.Disks[0].File)
	w.must(os.Truncate(image, 40<<20))
	w.must(w.Define(w.step(), "A", d))

	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.condition("A", d.Name, "no-space", "the replica is full", "free space on the replica's storage root")
	w.room("B", replicaRoot, "64m")
	w.replicating("A", d.Name)
	w.same(image, w.onReplica(d, "vda"))

	w.fill("B", replicaRoot)
	w.poke("A", d, "vda", 5<<20, 2<<20, 0x5a)
	w.condition("B", d.Name, "apply-failed", "no space left on device", "df -h")
	w.unfill("B", replicaRoot)
	w.same(image, w.onReplica(d, "vda"))
	w.well("B", d.Name)

	w.fill("B", stateDir)
	w.pokeRandom("A", d, "vda", 8<<20, 30<<20)
	w.condition("A", d.Name, "no-space", "the replica is full", "free space on the replica's storage root")
	w.unfill("B", stateDir)
	w.replicating("A", d.Name)
	w.same(image, w.onReplica(d, "vda"))
}

// room changes the size of a host's small file system.
func (w *world) room(host, dir, size string) {
	w.t.Helper()
	_, err := w.Lab.Host(host).Exec(w.step(), "mount", "-o", "remount,size="+size, dir)
	w.must(err)
}

// well waits until a host shows no condition of a VM.
func (w *world) well(host, vm string) {
	w.t.Helper()
	v, err := w.WaitStatus(w.step(), host, vm, "well", func(v status.VM) bool { return v.Health == "normal" })
	if err != nil {
		w.t.Fatalf("%v\nconditions: %+v", err, v.Conditions)
	}
}

// A full disk below the primary's state is an error of the command that needs
// it; the guest's writes go on, and nothing of them is missing afterwards.
func TestAFullStateDiskOfThePrimaryDoesNotStopTheGuest(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	w.small("A", stateDir, "16m")
	d := w.smallGuest("state", 31, 4<<20)
	image := w.Lab.Host("A").Path(d.Disks[0].File)
	w.must(w.Define(w.step(), "A", d))
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.replicating("A", d.Name)
	w.fill("A", stateDir)
	w.poke("A", d, "vda", 1<<20, 2<<20, 0x11)
	w.same(image, w.onReplica(d, "vda"))
	w.unfill("A", stateDir)
	w.poke("A", d, "vda", 2<<20, 1<<20, 0x12)
	w.replicating("A", d.Name)
	w.same(image, w.onReplica(d, "vda"))
}

// An image that was cut off or made longer behind our back is an alarm that
// says so and how to mend it; when it is mended replication goes on.
func TestAnImageOfTheWrongSizeIsAnAlarmWithItsRemedy(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	d := w.smallGuest("size", 32, 4<<20)
	image := w.Lab.Host("A").Path(d.Disks[0].File)
	w.must(w.Define(w.step(), "A", d))
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.replicating("A", d.Name)

	// cut off below a data plane that has changes to read
	w.ctl("A", "vm", "pause", d.Name)
	w.poke("A", d, "vda", 3<<20, 64<<10, 0x33)
	w.must(os.Truncate(image, 2<<20))
	w.ctl("A", "vm", "resume", d.Name)
	w.condition("A", d.Name, "source-error", "somebody cut the image off", "it had 4194304", "replicactl vm resync "+d.Name)
	w.must(os.Truncate(image, 4<<20))
	w.ctl("A", "vm", "resync", d.Name)
	w.replicating("A", d.Name)
	w.same(image, w.onReplica(d, "vda"))

	// made longer while the host was off
	w.must(w.Lab.Host("A").Crash())
	w.must(os.Truncate(image, 5<<20))
	w.restart("A")
	w.resizedTo("A", d.Name, 5<<20)
	w.resizedTo("B", d.Name, 5<<20)
	w.replicating("A", d.Name)

	// made shorter while the host was off
	w.must(w.Lab.Host("A").Crash())
	w.must(os.Truncate(image, 4<<20))
	w.restart("A")
	w.condition("A", d.Name, "data-plane-down", "the image has 4194304 bytes, 5242880 are configured", "qemu-img resize")
	w.must(os.Truncate(image, 5<<20))
	w.replicating("A", d.Name)

	// away altogether
	w.must(w.Lab.Host("A").Crash())
	w.must(os.Rename(image, image+".away"))
	w.restart("A")
	w.condition("A", d.Name, "data-plane-down", filepath.Base(image), "no such file")
	w.must(os.Rename(image+".away", image))
	w.replicating("A", d.Name)
	w.same(image, w.onReplica(d, "vda"))
}

// With the other host gone for good, --force ends the protection on either
// side; what is left there is taken away there.
func TestForceEndsTheProtectionWithoutTheOtherHost(t *testing.T) {
	w := upErrors(t)
	before := w.virsh("A", "dumpxml", "--inactive", keptVM)
	w.must(w.Daemon("B").Stop(w.step()))
	w.refused("A", 1, "vm", "disable", keptVM, "--yes")
	w.ctl("A", "vm", "disable", keptVM, "--yes", "--force")
	if after := w.virsh("A", "dumpxml", "--inactive", keptVM); after == before {
		t.Fatal("the definition still stands on the exports")
	}
	w.must(w.StartDaemon(w.step(), "B"))
	w.refused("B", 6, "vm", "disable", keptVM, "--yes")
	w.ctl("B", "vm", "disable", keptVM, "--yes", "--force", "--delete-replica")
	for _, h := range []string{"A", "B"} {
		if l := decode[[]status.VM](t, w.ctl(h, "--json", "vm", "list")); len(l) != 0 {
			t.Errorf("still listed on %s: %+v", h, l)
		}
	}
	if out := w.virsh("B", "list", "--all", "--name"); out != "" {
		t.Errorf("left on B: %s", out)
	}
	// and the hosts may part now
	w.ctl("A", "peer", "remove", estate.Peer("B"))
	w.refused("A", 1, "peer", "test", estate.Peer("B"))
	out := w.refused("B", 1, "peer", "test", estate.Peer("A"))
	t.Log(out)
}
