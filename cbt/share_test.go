package cbt_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"kvmreplica/cbt"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
)

// Memory running out costs the exact copy, with a reason: no SIGBUS, no wrong
// set.
func TestAFullTmpfsCostsOnlyTheExactCopy(t *testing.T) {
	for _, size := range []string{"size=4k", "size=8k", "size=12k", "size=16k", "size=20k"} {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, size); err != nil {
			t.Skipf("cannot mount a small tmpfs: %v", err)
		}
		defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
		w := newWorld(one(3 << 20))
		w.dir = dir
		err := inTurn(
			func() error { return w.create(blocktest.NewHost()) },
			func() error { return w.fill("vda", 100, 512, 1) },
			func() error { return w.cycle(func() error { return w.fill("vda", 0, 8192, 2) }) },
			func() error { return w.fill("vda", 2<<20, 512, 3) },
		)
		if err != nil {
			t.Fatal(size, err)
		}
		exact := w.g.Status().SharedExact
		if !exact && len(w.g.Status().Reasons) == 0 {
			t.Fatal(size, "no reason given")
		}
		if want := size == "size=20k"; exact != want {
			t.Fatal(size, "exact:", exact)
		}
		cbt.Kill(w.g)
		if err := w.judge(w.h.Kill(fsxtest.Newest), exact); err != nil {
			t.Fatal(size, err)
		}
	}
}

// A copy from another boot, another run or with a flipped header byte is not
// believed.
func TestAForeignSharedCopyIsNotBelieved(t *testing.T) {
	w := newWorld(one(3 << 20))
	w.dir = shmDir(t)
	err := inTurn(
		func() error { return w.create(blocktest.NewHost()) },
		func() error { return w.fill("vda", 100, 512, 1) },
	)
	if err != nil {
		t.Fatal(err)
	}
	cbt.Kill(w.g)
	h := w.h.Kill(fsxtest.Newest)
	w.boot = "boot-2"
	_, rep, err := cbt.Open(w.config(h))
	if err != nil || rep.Source != cbt.SourceRegions {
		t.Fatal(rep, err)
	}
}

// A sequential stream of first touches waits for few syncs.
func TestASequentialStreamIsMarkedAhead(t *testing.T) {
	cfg := cbt.Config{FS: fsxtest.NewMem(), VMID: "vm", Disks: []cbt.DiskConfig{{Name: "vda", Device: nullDev{100 << 30}}}}
	g, err := cbt.Create(cfg, cbt.Start{Generation: gen1, Dirty: cbt.DirtyNone})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 256<<10)
	for i := range int64(4 * 512) { // 512 MiB, 512 regions
		if _, err := g.Disk("vda").WriteAt(p, 7<<30+i*256<<10); err != nil {
			t.Fatal(err)
		}
	}
	if n := g.Status().Disks[0]; n.IntentSyncs > 12 || n.MarkedRegions > 512+64 {
		t.Fatalf("%d syncs, %d regions marked", n.IntentSyncs, n.MarkedRegions)
	}
}

// I14: without memory for its bits a write is not recorded, and so it fails: it
// does not reach the image. With memory it goes through.
func TestAWriteWithoutMemoryForItsBitsTouchesNothing(t *testing.T) {
	dir := shmDir(t)
	w := started(t, one(4<<20), func(c *cbt.Config) { c.SharedDir = dir })
	mend, err := cbt.ExhaustShared(w.g.Disk("vda"))
	if err != nil {
		t.Fatal(err)
	}
	err = w.fill("vda", 0, 512, 1)
	mend()
	if err == nil {
		t.Error("the write is answered with success")
	}
	if c := w.h.Disk("vda", 4<<20).Content(); c[0] != 0 {
		t.Error("the write went through unmarked")
	}
	if n := w.g.Status().Disks[0].MarkedRegions; n != 0 {
		t.Errorf("%d regions marked", n)
	}
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Error("with memory:", err)
	}
	cbt.Kill(w.g)
}
