package guest

import (
	"bytes"
	"encoding/xml"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"libvirt.org/go/libvirtxml"
)

func TestArchiveUnpacksToTheTree(t *testing.T) {
	if _, err := exec.LookPath("busybox"); err != nil {
		t.Skip("needs busybox")
	}
	tr := newTree()
	tr.content("/a/b/odd", []byte("12345"), 0o755)
	tr.content("/empty", nil, 0o644)
	tr.link("/bin/sh", "busybox")
	packed, err := tr.archive()
	if err != nil {
		t.Fatal(err)
	}
	again, err := tr.archive()
	if err != nil || !bytes.Equal(packed, again) {
		t.Errorf("the same tree makes two archives (%v)", err)
	}
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", "gzip -d | busybox cpio -i")
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(packed)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "a/b/odd")); string(got) != "12345" {
		t.Errorf("file reads %q, %v", got, err)
	}
	if got, err := os.Readlink(filepath.Join(dir, "bin/sh")); got != "busybox" {
		t.Errorf("link leads to %q, %v", got, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "a/b/odd")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	files, err := Build(t.Context())
	if err != nil {
		t.Skipf("needs apt-get and the guest's tools: %v", err)
	}
	k, err := fetchKernel(t.Context(), filepath.Dir(files.Initramfs))
	if err != nil {
		t.Fatal(err)
	}
	order, err := k.order(modules())
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range order {
		needs, err := depends(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range needs {
			if at := slices.Index(order, k.modules[moduleName(n)]); at < 0 || at >= i {
				t.Errorf("%s stands at %d, %s, which it needs, at %d", filepath.Base(p), i, n, at)
			}
		}
	}
	if _, err := k.order([]string{"no_such_module"}); err == nil {
		t.Error("an unknown module was found")
	}
}

func TestDefinitionSaysWhatTheDomainIs(t *testing.T) {
	d := Domain{
		Name: "g", UUID: "6f1e5a36-6e0b-4c53-9d3d-0c5f7a1f0001", Files: Files{Kernel: "/x/vmlinuz", Initramfs: "/x/i.gz"},
		Disks: []Disk{{File: "/a.raw", Serial: "s1"}, {NBD: "/s", Export: "e"}},
		UEFI:  true, IOThread: true, Agent: true, Network: "default", MAC: "52:54:00:00:00:01", Knobs: "lab.interval=10",
	}
	text, err := d.XML()
	if err != nil {
		t.Fatal(err)
	}
	var got libvirtxml.Domain
	if err := got.Unmarshal(text); err != nil {
		t.Fatal(err)
	}
	if d.Disks[0].Format != "" {
		t.Error("the caller's disks were changed")
	}
	disks := got.Devices.Disks
	facts := []string{
		got.Type, got.Name, got.OS.Kernel, got.OS.Cmdline, got.OS.NVRam.NVRam, got.OS.Type.Machine,
		disks[0].Source.File.File, disks[0].Driver.Type, disks[0].Target.Dev, disks[0].Serial,
		disks[1].Source.Network.Hosts[0].Socket, disks[1].Source.Network.Name, disks[1].Target.Dev,
		got.Devices.Interfaces[0].MAC.Address, got.Devices.Channels[0].Target.VirtIO.Name,
	}
	want := []string{
		"qemu", "g", "/var/lib/libvirt/boot/vmlinuz",
		"console=ttyS0 quiet mitigations=off edd=off lab.disks=2 lab.ga=1 lab.net=1 lab.interval=10",
		"/var/lib/libvirt/qemu/nvram/g_VARS.fd", "q35", "/a.raw", "raw", "vda", "s1", "/s", "e", "vdb",
		"52:54:00:00:00:01", "org.qemu.guest_agent.0",
	}
	if diff := cmp.Diff(want, facts); diff != "" {
		t.Error("-want +got", diff)
	}
	d.Disks = []Disk{{}}
	if _, err := d.XML(); err == nil || !strings.Contains(err.Error(), "disk 0") {
		t.Errorf("a disk without a source: %v", err)
	}
	if err := xml.Unmarshal([]byte(text), new(struct{})); err != nil {
		t.Error(err)
	}
}
