package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/standby"
)

// A failover to an older point was on trial when the daemon was lost: its
// guest's writes are never dropped unasked, and can be kept without a daemon.
func TestAFailoverOnTrialIsMadeFinalWithoutTheDaemon(t *testing.T) {
	from, cuts, _ := replica(t)
	vm := t.TempDir()
	store := filepath.Join(vm, "store")
	must(t, os.Rename(from, store))
	over := filepath.Join(vm, "overlay")
	must(t, os.Mkdir(over, 0o700))
	fsys, err := fsx.OS(over)
	must(t, err)

	d := &points.Dir{Path: store}
	var cfg standby.Config
	must(t, d.Configure(&cfg.Store))
	s, err := points.Open(cfg.Store)
	must(t, err)
	p, err := s.Choose("oldest")
	must(t, err)
	must(t, s.Close())
	must(t, overlay.Create(fsys, overlay.Head{VM: delta.VM{1}, Generation: delta.Generation{3}, At: p.Pos, Disks: []delta.Disk{{Name: "vda", Size: diskSize}}}))
	must(t, os.WriteFile(filepath.Join(store, "vda.raw.overlay"), nil, 0o600))
	must(t, os.Truncate(filepath.Join(store, "vda.raw.overlay"), diskSize))
	image, err := block.OpenFile(d.ImagePath("vda"), block.FileOptions{})
	must(t, err)
	cfg.Image = func(string) (block.Device, error) { return image, nil }
	cfg.Store.Identity = func(string) (points.Identity, error) {
		id, err := image.Identity()
		return points.FileIdentity(id), err
	}
	cfg.Overlay = overlay.Config{FS: fsys, Data: func(string, int64) (block.Device, error) {
		return block.OpenFile(filepath.Join(store, "vda.raw.overlay"), block.FileOptions{})
	}}
	g, err := standby.Open(cfg)
	must(t, err)
	want := bytes.Clone(cuts[0])
	copy(want[5000:], "written by the guest")
	_, err = g.Disk("vda").WriteAt([]byte("written by the guest"), 5000)
	must(t, err)
	must(t, g.Disk("vda").Sync())
	must(t, g.Close())
	must(t, image.Close())

	if code, text := fsck("recover", store, "--in-place"); code != 1 || !strings.Contains(text, "--keep-writes") {
		t.Fatalf("%d %s", code, text)
	}
	if code, text := fsck("recover", store, "--in-place", "--keep-writes"); code != 0 || !strings.Contains(text, "final") {
		t.Fatalf("%d %s", code, text)
	}
	wantImage(t, filepath.Join(store, "vda.raw"), want)
	if code, text := fsck("recover", store, "--in-place"); code != 0 || !strings.Contains(text, delta.Generation{3}.String()) {
		t.Fatalf("again: %d %s", code, text)
	}
	wantImage(t, filepath.Join(store, "vda.raw"), want)
}
