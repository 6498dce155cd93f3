package cbt_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
)

func started(t *testing.T, sizes map[string]int64, edit func(*cbt.Config)) *world {
	t.Helper()
	w := newWorld(sizes)
	w.held, w.edit = nil, edit
	if err := w.create(blocktest.NewHost()); err != nil {
		t.Fatal(err)
	}
	return w
}

func one(size int64) map[string]int64 { return map[string]int64{"vda": size} }

// holdMap blocks syncs of intent maps until release is called; waiting gets a
// value for each sync that arrived.
func holdMap(p *fsxtest.Power) (waiting chan struct{}, release func()) {
	waiting = make(chan struct{}, 64)
	gate := make(chan struct{})
	p.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Sync && strings.HasPrefix(op.Path, "map-") {
			waiting <- struct{}{}
			<-gate
		}
		return nil
	})
	return waiting, func() { close(gate) }
}

func failMaps(op fsxtest.Op) error {
	if strings.HasPrefix(op.Path, "map-") {
		return syscall.EIO
	}
	return nil
}

func failAllFiles(op fsxtest.Op) error {
	if !strings.HasPrefix(op.Path, "disk:") {
		return syscall.EIO
	}
	return nil
}

func result(fn func() error) chan error {
	c := make(chan error, 1)
	go func() { c <- fn() }()
	return c
}

// B1: nobody overtakes the first writer's pending mark.
func TestASecondWriterWaitsForTheFirstOnesMark(t *testing.T) {
	w := started(t, one(4<<20), nil)
	waiting, release := holdMap(w.h.Power)
	first := result(func() error { return w.fill("vda", 0, 512, 1) })
	<-waiting
	d := w.g.Disk("vda")
	var landed atomic.Bool
	w2 := result(func() error {
		_, err := d.WriteAt(make([]byte, 512), 8192)
		landed.Store(true)
		return err
	})
	for range 100 {
		if _, err := d.TryWriteAt(make([]byte, 512), 16384); !errors.Is(err, block.ErrWouldBlock) {
			t.Fatalf("TryWriteAt during a pending mark: %v", err)
		}
	}
	cut := w.h.Cut(fsxtest.Newest)
	if c := cut.Disk("vda", 4<<20).Content(); landed.Load() || !bytes.Equal(c, make([]byte, len(c))) {
		t.Fatal("data was written before its mark was durable")
	}
	release()
	if err := errors.Join(<-first, <-w2); err != nil {
		t.Fatal(err)
	}
	if err := w.judge(w.h.Cut(fsxtest.Oldest), false); err != nil {
		t.Fatal(err)
	}
	in, err := cbt.Inspect(w.h.Cut(fsxtest.Oldest).FS)
	if err != nil || in.Disks[0].MarkedRegions != 1 {
		t.Fatal(in, err)
	}
}

// TryWriteAt gives up instead of waiting, whatever it would have waited for.
func TestTryWriteNeverWaits(t *testing.T) {
	w := started(t, one(4<<20), nil)
	d := w.g.Disk("vda")
	block512 := make([]byte, 512)
	try := func(off int64) error { _, err := d.TryWriteAt(block512, off); return err }
	if err := try(0); !errors.Is(err, block.ErrWouldBlock) {
		t.Fatal("unmarked region:", err)
	}
	if err := w.fill("vda", 0, 4096*4, 1); err != nil {
		t.Fatal(err)
	}
	if err := try(0); err != nil {
		t.Fatal("marked region:", err)
	}
	in, out := make(chan struct{}), make(chan struct{})
	w.h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Write && op.Off == 4096 {
			close(in)
			<-out
		}
		return nil
	})
	busy := result(func() error { return w.fill("vda", 4096, 512, 2) })
	<-in
	if err := try(4096 + 1024); !errors.Is(err, block.ErrWouldBlock) {
		t.Fatal("same granule in flight:", err)
	}
	if err := try(8192); err != nil {
		t.Fatal("other granule:", err)
	}
	close(out)
	if err := <-busy; err != nil {
		t.Fatal(err)
	}
	w.h.Power.SetHook(nil)
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := try(0); !errors.Is(err, block.ErrWouldBlock) {
		t.Fatal("frozen and not captured:", err)
	}
	e.Release("vda", block.Range{Off: 0, Len: 4096})
	if err := try(0); err != nil {
		t.Fatal("released:", err)
	}
	if err := w.fill("vda", 4096, 512, 3); err != nil {
		t.Fatal(err)
	}
	if err := try(4096); err != nil {
		t.Fatal("captured:", err)
	}
}

// B13: in every state a write that reaches the disk sets its bit.
func TestAWriteSetsItsBitInEveryState(t *testing.T) {
	states := map[string]func(w *world) error{
		"fresh":      func(*world) error { return nil },
		"epoch open": func(w *world) error { _, err := w.g.FreezeForced(ctx); return err },
		"epoch lost": func(w *world) error {
			if err := w.fill("vda", 0, 64<<10, 1); err != nil {
				return err
			}
			e, err := w.g.Freeze(ctx)
			if err == nil {
				err = w.fill("vda", 0, 64<<10, 2)
			}
			if !errors.Is(e.Err(), cbt.ErrOverrun) {
				return fmt.Errorf("not lost: %w", e.Err())
			}
			return err
		},
		"degraded": func(w *world) error {
			w.h.Power.SetHook(failMaps)
			return w.fill("vda", 0, 512, 1)
		},
		"sync failed": func(w *world) error {
			w.h.Power.SetHook(func(op fsxtest.Op) error {
				if op.Kind == fsxtest.Sync && op.Path == "disk:vda" {
					return syscall.EIO
				}
				return nil
			})
			if w.g.Disk("vda").Sync() == nil {
				return errors.New("sync must fail")
			}
			return nil
		},
		"marked": func(w *world) error { return w.g.MarkAll("test") },
		"unsealed": func(w *world) error {
			return errors.Join(w.g.Seal(ctx), w.g.Unseal())
		},
		"comparing": func(w *world) error { _, err := w.g.BeginCompare("vda", 0, 1<<20); return err },
		"acked":     func(w *world) error { return w.cycle(nil) },
		"cleaned": func(w *world) error {
			return errors.Join(w.fill("vda", 1<<20, 512, 1), w.cycle(nil), w.g.CleanStep(ctx, time.Now()))
		},
	}
	for name, enter := range states {
		t.Run(name, func(t *testing.T) {
			w := started(t, one(4<<20), func(c *cbt.Config) { c.CaptureBytes = 2 * granule })
			if err := enter(w); err != nil {
				t.Fatal(err)
			}
			if err := w.fill("vda", 1<<20+100, 512, 9); err != nil {
				t.Fatal(err)
			}
			if err := w.zero("vda", 2<<20+5000, 10, false); err != nil {
				t.Fatal(err)
			}
			w.h.Power.SetHook(nil)
			set, _, err := dirty(w.g, "vda")
			if errors.Is(err, cbt.ErrEpochOpen) {
				return // judged below by bytes
			}
			if err != nil || !set[256] || !set[513] {
				t.Fatal(set, err)
			}
		})
	}
}

// B15, I10: positions that are not on the tracker's history are refused; an
// older one, down to the base, makes every marked region dirty.
func TestOnlyPositionsOfThisHistoryAreAdopted(t *testing.T) {
	w := started(t, one(4<<20), nil)
	pos := map[uint64]cbt.Position{}
	for i := range 3 {
		if err := errors.Join(w.fill("vda", int64(i)<<20, 512, byte(i+1)), w.cycle(nil)); err != nil {
			t.Fatal(err)
		}
		pos[w.pos.Epoch] = w.pos
	}
	forged := pos[3]
	forged.Digest[9]++
	other := pos[2]
	other.Generation[3]++
	future := pos[3]
	future.Epoch = 9
	for _, p := range []cbt.Position{forged, other, future, {}} {
		if err := w.g.Adopt(p); !errors.Is(err, cbt.ErrPosition) {
			t.Fatalf("%v: %v", p, err)
		}
	}
	if err := w.g.Adopt(pos[1]); err != nil {
		t.Fatal(err)
	}
	if n := w.g.Status().Disks[0].DirtyBytes; n != 3<<20 {
		t.Fatalf("%d bytes dirty, want three regions", n)
	}
	if err := errors.Join(w.cycle(nil), w.g.CleanStep(ctx, time.Now())); err != nil {
		t.Fatal(err)
	}
	if b := w.g.Status().Base; b != w.pos {
		t.Fatal("base", b)
	}
	if err := w.g.Adopt(pos[3]); !errors.Is(err, cbt.ErrPosition) {
		t.Fatal("before the base:", err)
	}
}

// B16: a piece that fails ends a large zeroing, wherever it is.
func TestTheFirstFailingPieceIsReported(t *testing.T) {
	const size = 80 << 20
	for fail := range 5 {
		w := started(t, one(size), nil)
		n := 0
		w.h.Power.SetHook(func(op fsxtest.Op) error {
			if op.Kind == fsxtest.Zero {
				n++
				if n-1 == fail {
					return syscall.EIO
				}
			}
			return nil
		})
		if err := w.g.Disk("vda").ZeroAt(100, size-200, true); !errors.Is(err, syscall.EIO) {
			t.Fatal(fail, err)
		}
		if n != fail+1 {
			t.Fatal("went on after an error")
		}
		set, _, err := dirty(w.g, "vda")
		if err != nil || !set[int64(fail)*16<<20/granule] {
			t.Fatal("the failed piece must be dirty", err)
		}
	}
}

// B23: writes of any alignment never leak into a frozen cut.
func TestOddWritesDoNotLeakIntoTheCut(t *testing.T) {
	const size = 5*granule + 300
	offs := []int64{0, 1, 511, 512, 4095, 4096, 4097, 8191, 8192, 12287, 16384, 5*granule - 1, 5 * granule, 5*granule + 299}
	for _, off := range offs {
		for _, n := range []int{1, 2, 511, 512, 513, 4095, 4096, 4097, 8193} {
			if off+int64(n) > size {
				continue
			}
			w := started(t, one(size), nil)
			if err := w.fill("vda", 0, size, 7); err != nil {
				t.Fatal(err)
			}
			err := w.cycle(func() error {
				if n%2 == 0 {
					return w.zero("vda", off, int64(n), true)
				}
				return w.fill("vda", off, n, 8)
			})
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(w.content["vda"], bytes.Repeat([]byte{7}, size)) {
				t.Fatalf("write [%d+%d] shows in the cut", off, n)
			}
			if err := w.cycle(nil); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(w.content["vda"], w.h.Disk("vda", size).Content()) {
				t.Fatalf("write [%d+%d] is missing in the next cut", off, n)
			}
		}
	}
}

// Rule 3: nothing is cleared before the image was synced after the freeze.
func TestNothingIsClearedWithoutAnImageSync(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := errors.Join(w.fill("vda", 0, 512, 1), w.cycle(nil)); err != nil {
		t.Fatal(err)
	}
	w.h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Sync && op.Path == "disk:vda" {
			return syscall.EIO
		}
		return nil
	})
	if err := w.g.CleanStep(ctx, time.Now()); err == nil {
		t.Fatal("the sync failed")
	}
	w.h.Power.SetHook(nil)
	for range 3 { // and never again: a later good sync proves nothing
		if err := errors.Join(w.cycle(nil), w.g.CleanStep(ctx, time.Now())); err != nil {
			t.Fatal(err)
		}
	}
	if s := w.g.Status(); s.Disks[0].MarkedRegions != 1 || !s.Unsynced {
		t.Fatalf("%+v", s)
	}
	if err := w.g.Close(ctx); err != nil {
		t.Fatal(err)
	}
	_, rep, err := cbt.Open(w.config(w.h))
	if err != nil || rep.Source != cbt.SourceRegions {
		t.Fatal(rep, err)
	}
}

// Late and repeated acks clear nothing (B8).
func TestOnlyTheOpenEpochCanBeAcked(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal(err)
	}
	e1, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.g.Freeze(ctx); !errors.Is(err, cbt.ErrEpochOpen) {
		t.Fatal(err)
	}
	p := cbt.Position{Generation: gen1, Epoch: e1.Number()}
	for _, bad := range []cbt.Position{{}, {Generation: gen1, Epoch: 2}, {Generation: gen1}, {Epoch: 1}} {
		if err := e1.Ack(bad); !errors.Is(err, cbt.ErrPosition) {
			t.Fatal(bad, err)
		}
	}
	if err := e1.Abandon(); err != nil {
		t.Fatal(err)
	}
	if err := e1.Ack(p); !errors.Is(err, cbt.ErrEpochEnded) {
		t.Fatal(err)
	}
	e2, err := w.g.Freeze(ctx)
	if err != nil || e2.Number() != 2 || e2.DirtyBytes() != granule {
		t.Fatal("number burnt, bits back:", e2.Number(), e2.DirtyBytes(), err)
	}
	if err := e1.Ack(p); err == nil || e1.Abandon() == nil {
		t.Fatal("an ended epoch acts again")
	}
	if err := e2.Ack(cbt.Position{Generation: gen1, Epoch: 2}); err != nil {
		t.Fatal(err)
	}
	if err := e2.Ack(cbt.Position{Generation: gen1, Epoch: 2}); err == nil {
		t.Fatal("acked twice")
	}
}
