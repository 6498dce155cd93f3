package cbt_test

import (
	"errors"
	"fmt"
	"testing"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// nullDev accepts everything; so that only tracking is measured.
type nullDev struct{ size int64 }

func (n nullDev) ReadAt(p []byte, off int64) (int, error) {
	return len(p), block.Check(off, int64(len(p)), n.size)
}

func (n nullDev) WriteAt(p []byte, off int64) (int, error) {
	return len(p), block.Check(off, int64(len(p)), n.size)
}
func (n nullDev) ZeroAt(off, l int64, _ bool) error { return block.Check(off, l, n.size) }
func (n nullDev) Sync() error                       { return nil }
func (n nullDev) Size() int64                       { return n.size }
func (n nullDev) Close() error                      { return nil }

func benchGroup(b testing.TB, fs fsx.FS, disks int, dir string) *cbt.Group {
	b.Helper()
	cfg := cbt.Config{FS: fs, VMID: "vm", BootID: "boot", SharedDir: dir}
	for i := range disks {
		cfg.Disks = append(cfg.Disks, cbt.DiskConfig{Name: fmt.Sprintf("vd%c", 'a'+i), Device: nullDev{100 << 30}})
	}
	g, err := cbt.Create(cfg, cbt.Start{Generation: gen1, Dirty: cbt.DirtyNone})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = g.Close(ctx) })
	return g
}

func BenchmarkTryWriteMarked4K(b *testing.B) {
	g := benchGroup(b, fsxtest.NewMem(), 1, shmDir(b))
	d := g.Disk("vda")
	p := make([]byte, 4096)
	for r := range int64(64) {
		if _, err := d.WriteAt(p, r<<20); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	i := int64(0)
	for b.Loop() {
		i += 4096 * 7
		if _, err := d.TryWriteAt(p, i%(64<<20)&^4095); err != nil {
			b.Fatal(err)
		}
	}
}

func TestTheDataPathDoesNotAllocate(t *testing.T) {
	g := benchGroup(t, fsxtest.NewMem(), 1, shmDir(t))
	d := g.Disk("vda")
	p := make([]byte, 4096)
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	for name, fn := range map[string]func(){
		"try":   func() { _, _ = d.TryWriteAt(p, 4096) },
		"write": func() { _, _ = d.WriteAt(p, 8192) },
		"zero":  func() { _ = d.ZeroAt(0, 4096, true) },
		"read":  func() { _, _ = d.ReadAt(p, 0) },
	} {
		if n := testing.AllocsPerRun(200, fn); n != 0 {
			t.Errorf("%s: %v allocations per request", name, n)
		}
	}
}

// What a freeze costs for a disk that is being added: all of it but the first
// slice is marked, and is kept back.
func BenchmarkKeepBackATebibyte(b *testing.B) {
	const size = 1 << 40
	cfg := cbt.Config{
		FS: fsxtest.NewMem(), VMID: "vm", BootID: "boot", SharedDir: shmDir(b),
		Disks: []cbt.DiskConfig{{Name: "vda", Device: nullDev{size}}},
	}
	g, err := cbt.Create(cfg, cbt.Start{Generation: gen1, Dirty: cbt.DirtyAll})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = g.Close(ctx) })
	for b.Loop() {
		b.StopTimer()
		e, err := g.FreezeForced(ctx)
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		kept := e.Keep("vda", 64<<20)
		b.StopTimer()
		if err := errors.Join(kept, e.Abandon()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
