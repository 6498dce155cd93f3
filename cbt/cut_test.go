package cbt_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx/fsxtest"
)

// holdFirstWrite blocks the next write to vda until release is called; others
// counts what reached the disk meanwhile.
func holdFirstWrite(w *world) (arrived, others chan struct{}, release func()) {
	arrived, others = make(chan struct{}), make(chan struct{}, 64)
	gate := make(chan struct{})
	first := make(chan struct{}, 1)
	first <- struct{}{}
	w.h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Path != "disk:vda" {
			return nil
		}
		select {
		case <-first:
			close(arrived)
			<-gate
		default:
			others <- struct{}{}
		}
		return nil
	})
	return arrived, others, func() { close(gate) }
}

// briefly waits for c, or long enough that what would come has come.
func briefly(c <-chan struct{}) bool {
	t := time.NewTimer(50 * time.Millisecond)
	defer t.Stop()
	select {
	case <-c:
		return true
	case <-t.C:
		return false
	}
}

// A write of the next epoch to a granule waits for one of the frozen epoch
// that is still under way, even if they share no byte; the cut shows the older.
func TestANewerWriteWaitsForTheOlderOneInTheSameGranule(t *testing.T) {
	w := started(t, one(1<<20), nil)
	if err := w.fill("vda", 0, 8192, 1); err != nil {
		t.Fatal(err)
	}
	arrived, others, release := holdFirstWrite(w)
	old := result(func() error { return w.fill("vda", 0, 512, 2) })
	<-arrived
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	d := w.g.Disk("vda")
	young := result(func() error { _, err := d.WriteAt(bytes.Repeat([]byte{3}, 512), 1024); return err })
	if briefly(others) {
		t.Error("the newer write touched the disk while the older one was under way")
	}
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if _, err := e.ReadAt(short, "vda", make([]byte, 512), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Error("the cut was read while one of its writes was under way:", err)
	}
	if err := e.Ack(cbt.Position{Generation: gen1, Epoch: 1}); !errors.Is(err, cbt.ErrNotDrained) {
		t.Error("acked while a write of the epoch was under way:", err)
	}
	release()
	if err := errors.Join(<-old, <-young); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, granule)
	if _, err := e.ReadAt(ctx, "vda", p, 0); err != nil {
		t.Fatal(err)
	}
	if p[0] != 2 || p[1024] != 1 {
		t.Fatalf("the cut shows %d and %d, want 2 and 1", p[0], p[1024])
	}
}

// A clean step and a write across two regions at the same time: both end, and no
// mark of the write is missing after a cut. Which comes first is the machine's;
// TestAMarkStaysUnderAWriteThatHasNoTagYet holds the one order that matters.
func TestACleanStepBesideAWriteLosesNoMark(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := errors.Join(w.fill("vda", 0, 512, 1), w.cycle(nil)); err != nil {
		t.Fatal(err)
	}
	// The write holds its range and its mark, but has no tag yet: it waits for
	// another region's mark.
	waiting, release := holdMap(w.h.Power)
	busy := result(func() error { return w.fill("vda", 1<<20-512, 1024, 2) })
	<-waiting
	clean := result(func() error { return w.g.CleanStep(ctx, time.Now()) })
	release()
	if err := errors.Join(<-busy, <-clean); err != nil {
		t.Fatal(err)
	}
	if err := w.judge(w.h.Cut(fsxtest.Oldest), false); err != nil {
		t.Fatal(err)
	}
	if err := w.judge(w.h.Cut(fsxtest.Newest), false); err != nil {
		t.Fatal(err)
	}
	if n := w.g.Status().Disks[0].MarkedRegions; n != 2 {
		t.Fatalf("%d regions marked, want 2", n)
	}
}

// A capture read that fails or comes up short ends in an error, never in data
// (rules 8); a copy that fails costs the epoch, not the guest.
func TestAFailedReadIsNeverData(t *testing.T) {
	for _, fault := range []error{errors.New("bad sector"), fsxtest.Short(100, errors.New("bad sector"))} {
		w := started(t, one(1<<20), nil)
		if err := w.fill("vda", 0, 8192, 1); err != nil {
			t.Fatal(err)
		}
		e, err := w.g.Freeze(ctx)
		if err != nil {
			t.Fatal(err)
		}
		w.h.Power.SetHook(func(op fsxtest.Op) error {
			if op.Kind == fsxtest.Read && op.Path == "disk:vda" {
				return fault
			}
			return nil
		})
		if _, err := e.ReadAt(ctx, "vda", make([]byte, 8192), 0); err == nil || e.Err() != nil {
			t.Fatal("one failed read:", err, e.Err())
		}
		if err := w.fill("vda", 0, 512, 2); err != nil {
			t.Fatal("the guest must not notice:", err)
		}
		if e.Err() == nil {
			t.Fatal("the old content is lost, the epoch must be, too")
		}
		w.h.Power.SetHook(nil)
		if _, err := e.ReadAt(ctx, "vda", make([]byte, 512), 0); err == nil {
			t.Fatal("a lost epoch still gives data")
		}
		e, err = w.g.Freeze(ctx) // settles the lost one
		if err != nil || e.Number() != 2 || e.DirtyBytes() != 8192 {
			t.Fatal(e.Number(), e.DirtyBytes(), err)
		}
		if s := w.g.Status(); s.Abandoned != 1 || s.CaptureBytes != 0 {
			t.Fatalf("%+v", s)
		}
	}
}

// Only frozen, unreleased ranges can be read through an epoch.
func TestOnlyFrozenRangesAreReadable(t *testing.T) {
	w := started(t, one(1<<20), nil)
	if err := w.fill("vda", 4096, 8192, 1); err != nil {
		t.Fatal(err)
	}
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	read := func(off, n int64) error { _, err := e.ReadAt(ctx, "vda", make([]byte, n), off); return err }
	for _, r := range []block.Range{{Off: 0, Len: 4096}, {Off: 4000, Len: 200}, {Off: 8192, Len: 8192}, {Off: 500000, Len: 1}} {
		if err := read(r.Off, r.Len); !errors.Is(err, cbt.ErrNotFrozen) {
			t.Fatal(r, err)
		}
	}
	if err := read(1<<20-1, 2); !errors.Is(err, block.ErrRange) {
		t.Fatal(err)
	}
	e.Release("vda", block.Range{Off: 4097, Len: 8191}) // whole granules only
	if err := errors.Join(read(4096, 4096), read(5000, 10)); err != nil {
		t.Fatal(err)
	}
	if err := read(8192, 10); !errors.Is(err, cbt.ErrNotFrozen) {
		t.Fatal(err)
	}
}

// A stalled write of the guest holds up a freeze, at most until ctx ends, and
// never the status.
func TestAHungGuestWriteHoldsUpOnlyTheSecondNextFreeze(t *testing.T) {
	w := started(t, one(1<<20), nil)
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal(err)
	}
	arrived, _, release := holdFirstWrite(w)
	hung := result(func() error { return w.fill("vda", 8192, 512, 2) })
	<-arrived
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Abandon(); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	frozen := result(func() error { _, err := w.g.Freeze(short); return err })
	if s := w.g.Status(); s.Current != 2 || s.WritesInFlight != 1 {
		t.Fatalf("%+v", s)
	}
	if err := <-frozen; !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	release()
	if err := <-hung; err != nil {
		t.Fatal(err)
	}
	if err := w.cycle(nil); err != nil {
		t.Fatal(err)
	}
	if w.content["vda"][8192] != 2 {
		t.Fatal("the hung write is missing")
	}
}
