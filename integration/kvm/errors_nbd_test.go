package kvm_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

// upstreams are an NBD server on a socket and one on TCP, both on host A, and
// a block device when this machine has loop devices.
type upstreams struct {
	files []string // outside
	guest guest.Domain
}

const (
	nbdSocket = "/run/upstream.sock"
	nbdFail   = "/run/upstream.fail"
)

func (w *world) upstreams(n int) upstreams {
	w.t.Helper()
	for _, tool := range []string{"nbdkit", "qemu-nbd"} {
		if _, err := exec.LookPath(tool); err != nil {
			w.t.Skip("needs ", tool, " (make deps): ", err)
		}
	}
	a := w.Lab.Host("A")
	var u upstreams
	for i := range 2 {
		p := fmt.Sprintf("/var/lib/libvirt/images/up-%d.raw", i)
		w.must(os.MkdirAll(a.Path("/var/lib/libvirt/images"), 0o755))
		w.must(os.WriteFile(a.Path(p), pattern(4<<20), 0o644))
		u.files = append(u.files, a.Path(p))
	}
	w.serve("nbdkit", "-f", "-U", nbdSocket, "--filter=error", "file", "/var/lib/libvirt/images/up-0.raw",
		"error-pread=EIO", "error-pread-rate=100%", "error-pread-file="+nbdFail)
	w.serve("qemu-nbd", "--persistent", "-f", "raw", "-b", "127.0.0.1", "-p", "10811", "-x", "second", "/var/lib/libvirt/images/up-1.raw")
	u.guest = guest.Domain{
		Name: "upstream", UUID: errorUUID(n), Files: w.Files, Disks: []guest.Disk{{NBD: nbdSocket}},
		Extra: "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='second'><host name='127.0.0.1' port='10811'/></source><target dev='vdb' bus='virtio'/></disk>",
	}
	u.loop(w)
	w.must(waitFor(w.step(), func() bool {
		_, err := a.Exec(w.step(), "sh", "-c", "nbdinfo 'nbd+unix:///?socket="+nbdSocket+"' && nbdinfo nbd://127.0.0.1:10811/second")
		return err == nil
	}))
	return u
}

// loop adds a block device as third disk.
func (u *upstreams) loop(w *world) {
	a := w.Lab.Host("A")
	file := a.Path("/var/lib/libvirt/images/up-2.raw")
	w.must(os.WriteFile(file, pattern(4<<20), 0o644))
	out, err := exec.Command("losetup", "-f", "--show", file).CombinedOutput()
	if err != nil {
		w.t.Logf("without a block device: %v: %s", err, out)
		return
	}
	dev := strings.TrimSpace(string(out))
	w.t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			w.t.Errorf("losetup -d %s: %v: %s", dev, err, out)
		}
	})
	u.files = append(u.files, dev)
	u.guest.Extra += "<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='" + dev + "'/><target dev='vdc' bus='virtio'/></disk>"
}

// serve runs a server on host A until the test ends.
func (w *world) serve(argv ...string) {
	w.t.Helper()
	cmd := w.Lab.Host("A").Command(w.t.Context(), argv[0], argv[1:]...)
	w.must(cmd.Start())
	w.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// A VM whose disks are other NBD servers, on a socket and on TCP, and a block
// device replicates, fails over and comes back; a server that cannot read is
// an alarm, and its recovery is noticed; a disk that grew there is taken up.
func TestDisksOnNBDServersAndBlockDevicesAreProtected(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	u := w.upstreams(50)
	d := u.guest
	w.must(w.Define(w.step(), "A", d))
	before := w.virsh("A", "dumpxml", "--inactive", d.Name)

	w.virsh("A", "start", "--paused", d.Name)
	if out := w.refused("A", 6, enable(d.Name)...); !strings.Contains(out, "network-nbd") || !strings.Contains(out, "shut the guest down") {
		t.Errorf("a running guest's NBD disk is refused without reason or remedy:\n%s", out)
	}
	w.virsh("A", "destroy", d.Name)
	w.ctl("A", enable(d.Name)...)
	w.replicating("A", d.Name)
	same := func() {
		t.Helper()
		for i, f := range u.files {
			w.same(f, w.onReplica(d, "vd"+string(rune('a'+i))))
		}
	}
	same()
	for i := range u.files {
		w.poke("A", d, "vd"+string(rune('a'+i)), 1<<20, 64<<10, byte(0x40+i))
	}
	same()

	w.must(os.WriteFile(w.Lab.Host("A").Path(nbdFail), nil, 0o644))
	w.poke("A", d, "vda", 2<<20, 64<<10, 0x51)
	w.condition("A", d.Name, "source-error", "EIO", "storage")
	w.must(os.Remove(w.Lab.Host("A").Path(nbdFail)))
	w.replicating("A", d.Name)
	same()

	// grown on its server while the guest is off: taken up by the next data plane
	const grown = 6<<20 + 512
	w.must(os.Truncate(u.files[0], grown))
	w.killPlane("A", d)
	w.resizedTo("A", d.Name, grown)
	w.resizedTo("B", d.Name, grown)
	w.poke("A", d, "vda", 5<<20, 64<<10, 0x52)
	w.replicating("A", d.Name)
	same()

	w.ctl("A", "failover", "planned", d.Name, "--yes")
	w.replicating("B", d.Name)
	for i := range u.files {
		w.poke("B", d, "vd"+string(rune('a'+i)), 3<<20, 64<<10, byte(0x60+i))
	}
	same()
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	w.replicating("A", d.Name)
	same()
	w.ctl("A", "vm", "disable", d.Name, "--yes")
	if after := w.virsh("A", "dumpxml", "--inactive", d.Name); after != before {
		t.Errorf("the definition did not come back:\n--- before\n%s\n--- after\n%s", before, after)
	}
	if l := decode[[]status.VM](t, w.ctl("A", "--json", "vm", "list")); len(l) != 0 {
		t.Errorf("still listed: %+v", l)
	}
}
