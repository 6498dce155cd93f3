package lab_test

import (
	"testing"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/labtest"
)

// One guest shows all the rarer ways at once: a root file system of its own,
// UEFI with a variable store, an I/O thread, background load, and a QEMU that
// is not root.
func TestGuestOnItsOwnRootStartsThroughUEFIUnderAnUnprivilegedQEMU(t *testing.T) {
	l, files := labtest.Up(t, lab.Options{NonRootQEMU: []string{"B"}})
	b := l.Host("B")
	const images = "/var/lib/libvirt/images/"
	d := guest.Domain{
		Name: "root1", UUID: "6f1e5a36-6e0b-4c53-9d3d-0c5f7a1f0002", Files: files, Root: true, UEFI: true, IOThread: true,
		Knobs: "lab.interval=10 lab.load=1024 lab.loadsize=4 lab.fsck=1",
		Disks: []guest.Disk{{File: images + "a.raw"}, {File: images + "b.raw"}},
	}
	if err := guest.RootImage(t.Context(), files, b.Path(images+"a.raw"), 128<<20); err != nil {
		t.Fatal(err)
	}
	if err := guest.BlankImage(b.Path(images+"b.raw"), 64<<20); err != nil {
		t.Fatal(err)
	}
	con := labtest.Start(t, b, d)
	if _, err := con.WaitSynced(labtest.Step(t), 100); err != nil {
		t.Fatal(err)
	}
	if user := in(t, b, "sh", "-c", "stat -c %U /proc/$(cat /run/libvirt/qemu/root1.pid)"); user != "libvirt-qemu" {
		t.Errorf("QEMU runs as %s", user)
	}
	labtest.Virsh(t, b, "shutdown", d.Name, "--mode", "acpi")
	last, err := con.WaitWord(labtest.Step(t), "LAST")
	if err != nil {
		t.Fatal(err)
	}
	labtest.WaitVirsh(t, b, "shut off", "domstate", d.Name)

	d.UEFI = false // once is enough, it takes long under emulation
	con = labtest.Start(t, b, d)
	for _, dev := range []string{"vda", "vdb"} {
		if fsck, err := con.WaitWord(labtest.Step(t), "FSCK"); err != nil || fsck.Args["clean"] != "true" {
			t.Errorf("%s: %q %v", dev, fsck.Raw, err)
		}
	}
	for range d.Disks {
		if load, err := con.WaitWord(labtest.Step(t), "LOAD"); err != nil || load.Uint("blocks") != 1024 || load.Uint("bad") != 0 {
			t.Errorf("background load: %q %v", load.Raw, err)
		}
	}
	boot, err := con.WaitBoot(labtest.Step(t))
	if err != nil || boot.Int("bad") != -1 || boot.Uint("highest") != last.Uint("n") {
		t.Errorf("after an orderly end at %d: %q %v", last.Uint("n"), boot.Raw, err)
	}
	labtest.Virsh(t, b, "destroy", d.Name)
}
