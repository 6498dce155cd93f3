package standby_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/overlay/overlaytest"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/standby"
)

// How long the disks of a failover take to be there: 1 GiB with a short history
// against 200 GiB (sparse) with a long one. Run with KVMREPLICA_MEASURE=1 -v.
func TestMeasureTheStartBySizeAndHistory(t *testing.T) {
	if os.Getenv("KVMREPLICA_MEASURE") == "" {
		t.Skip("a measurement: set KVMREPLICA_MEASURE=1")
	}
	for _, c := range []struct {
		name   string
		size   int64
		points int
	}{{"1 GiB, 3 points", 1 << 30, 3}, {"200 GiB sparse, 3 points", 200 << 30, 3}, {"200 GiB sparse, 300 points", 200 << 30, 300}} {
		for _, state := range []string{"latest", "oldest"} {
			t.Run(c.name+", "+state, func(t *testing.T) { measureStart(t, c.size, c.points, state) })
		}
	}
}

func measureStart(t *testing.T, size int64, n int, state string) {
	vm := t.TempDir()
	dir := filepath.Join(vm, "store")
	must(t, os.MkdirAll(filepath.Join(vm, "overlay"), 0o700))
	must(t, os.MkdirAll(dir, 0o700))
	d := &points.Dir{Path: dir}
	now := time.Unix(1_700_000_000, 0)
	cfg := points.Config{VM: delta.VM{1}, Now: func() time.Time { return now }}
	must(t, d.Configure(&cfg))
	disks := []delta.Disk{{Name: "vda", Size: size}}
	s, err := points.Create(cfg, disks)
	must(t, err)
	must(t, s.SeedAssume("vda"))
	var parent delta.Pos
	content := overlaytest.Random(1, 1<<20) // every epoch changes another MiB of the first GiB
	for e := range n {
		now = now.Add(20 * time.Second)
		parent = shipAt(t, s, disks, parent, uint64(e+1), int64(e%1000)<<20, content)
		must(t, s.ApplyAll(t.Context()))
		for did := true; did; {
			did, err = s.Step(t.Context())
			must(t, err)
		}
	}
	p, err := s.Choose(state)
	must(t, err)
	must(t, s.Close())

	begun := time.Now()
	over, err := fsx.OS(filepath.Join(vm, "overlay"))
	must(t, err)
	file := filepath.Join(vm, "vda.overlay")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, size))
	must(t, overlay.Create(over, overlay.Head{VM: delta.VM{1}, Generation: newGn, At: p.Pos, Disks: disks}))
	image, err := block.OpenFile(d.ImagePath("vda"), block.FileOptions{})
	must(t, err)
	defer image.Close()
	cfg.Identity = func(string) (points.Identity, error) {
		id, err := image.Identity()
		return points.FileIdentity(id), err
	}
	b, err := standby.Open(standby.Config{
		Store: cfg, Image: func(string) (block.Device, error) { return image, nil },
		Overlay: overlay.Config{FS: over, Data: func(string, int64) (block.Device, error) { return block.OpenFile(file, block.FileOptions{}) }},
	})
	must(t, err)
	buf := make([]byte, 4096)
	_, err = b.Disk("vda").ReadAt(buf, 0)
	must(t, err)
	_, err = b.Disk("vda").WriteAt(buf, 8192)
	must(t, err)
	must(t, b.Disk("vda").Sync())
	t.Logf("overlay made, store opened, first read, write and flush: %v", time.Since(begun))
	must(t, b.Close())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// shipAt commits an epoch that changes content at an offset.
func shipAt(t *testing.T, s *points.Store, disks []delta.Disk, parent delta.Pos, e uint64, off int64, content []byte) delta.Pos {
	t.Helper()
	h := delta.Header{VM: delta.VM{1}, Generation: oldGn, Epoch: e, Nonce: e, Parent: parent, Disks: disks}
	comp, err := delta.NewChunkEncoder(delta.ChunkOptions{})
	must(t, err)
	r, err := s.Begin(h)
	must(t, err)
	var tally delta.Tally
	spec := delta.ChunkSpec{Ranges: []block.Range{{Off: off, Len: int64(len(content))}}}
	c, err := comp.Encode(spec, func(_ uint16, p []byte, at int64) (int, error) { return copy(p, content[at-off:]), nil })
	must(t, err)
	must(t, r.Chunk(c.Frame))
	must(t, tally.Add(c.Index, c.Digest, c.Covered))
	m := delta.NewManifest(&h, &tally, delta.ManifestInfo{})
	frame, err := m.AppendFrame(nil)
	must(t, err)
	pos, err := r.Commit(frame)
	must(t, err)
	return pos
}
