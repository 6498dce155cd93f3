package lab_test

import (
	"os/exec"
	"strings"
	"testing"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/labtest"
)

// nbdServer starts qemu-nbd inside the host as the disk's server.
func nbdServer(t *testing.T, h *lab.Host, sock, image string) {
	t.Helper()
	d, err := h.StartDaemon("qemu-nbd", []string{
		"-k", sock, "-t", "-e", "8", "-x", "disk", "-f", "raw", "--cache=writeback", "--discard=unmap", image,
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Exec(labtest.Step(t), "sh", "-c", "for i in $(seq 200); do test -S "+sock+" && exit 0; sleep 0.05; done; exit 1"); err != nil {
		t.Fatalf("qemu-nbd makes no socket: %v (it ended: %v)", err, d.LogPath)
	}
}

// A copy of two disks made while the guest is frozen must boot on the other
// host after the first one lost its power, with every record that was
// announced before the copy. It proves the lab, not the product: the server
// under the guest is QEMU's own.
func TestFrozenCopyBootsOnTheOtherHostAfterAPowerCut(t *testing.T) {
	if _, err := exec.LookPath("qemu-nbd"); err != nil {
		t.Skip("needs qemu-nbd")
	}
	l, files := labtest.Up(t, lab.Options{})
	a, b := l.Host("A"), l.Host("B")
	const socks, images = "/run/nbd-", "/var/lib/libvirt/images/disk"
	d := guest.Domain{
		Name: "g1", UUID: "6f1e5a36-6e0b-4c53-9d3d-0c5f7a1f0001", Files: files, Agent: true,
		Knobs: "lab.interval=10", Disks: []guest.Disk{{NBD: socks + "0", Export: "disk"}, {NBD: socks + "1", Export: "disk"}},
	}
	for _, n := range []string{"0", "1"} {
		if err := guest.BlankImage(a.Path(images+n), 128<<20); err != nil {
			t.Fatal(err)
		}
		nbdServer(t, a, socks+n, images+n)
	}
	con := labtest.Start(t, a, d)
	if _, err := con.WaitSynced(labtest.Step(t), 50); err != nil {
		t.Fatal(err)
	}
	freeze(t, a, d.Name)
	safe := con.Synced()
	for _, n := range []string{"0", "1"} {
		if out, err := exec.Command("cp", "--sparse=always", a.Path(images+n), b.Path(images+n)).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v: %s", err, out)
		}
	}
	labtest.Virsh(t, a, "domfsthaw", d.Name)
	if _, err := con.WaitSynced(labtest.Step(t), safe+20); err != nil {
		t.Fatalf("after the thaw: %v", err)
	}
	if err := a.Crash(); err != nil {
		t.Fatal(err)
	}

	d.Knobs += " lab.fsck=1"
	for _, n := range []string{"0", "1"} {
		nbdServer(t, b, socks+n, images+n)
	}
	con = labtest.Start(t, b, d)
	for range 2 {
		if fsck, err := con.WaitWord(labtest.Step(t), "FSCK"); err != nil || fsck.Args["clean"] != "true" {
			t.Errorf("file system of the copy: %v %v", fsck.Raw, err)
		}
	}
	boot, err := con.WaitBoot(labtest.Step(t))
	if err != nil {
		t.Fatal(err)
	}
	if boot.Int("bad") != -1 || boot.Uint("highest") < safe {
		t.Errorf("copy holds %s, want bad=-1 and highest >= %d", boot.Text, safe)
	}
	labtest.Virsh(t, b, "shutdown", d.Name, "--mode", "acpi")
	if last, err := con.WaitWord(labtest.Step(t), "LAST"); err != nil || last.Args["powerkey"] != "true" {
		t.Errorf("end of the guest: %q %v", last.Raw, err)
	}
	labtest.WaitVirsh(t, b, "shut off", "domstate", d.Name)

	if err := a.Start(labtest.Step(t)); err != nil {
		t.Fatal(err)
	}
	if out := labtest.Virsh(t, a, "domstate", d.Name); out != "shut off" {
		t.Errorf("after the power cut the guest is %q on A, want it defined and off", out)
	}
}

// freeze freezes the guest's file systems, waiting for the agent to be there.
func freeze(t *testing.T, h *lab.Host, name string) {
	t.Helper()
	labtest.WaitVirsh(t, h, `{"return":{}}`, "qemu-agent-command", name, `{"execute":"guest-ping"}`)
	if out := labtest.Virsh(t, h, "domfsfreeze", name); !strings.Contains(out, "2 filesystem(s)") {
		t.Fatalf("domfsfreeze: %q, want both file systems", out)
	}
}
