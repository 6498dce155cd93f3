package cbt_test

import (
	"errors"
	"testing"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
)

// What is kept back is not in the epoch, needs no copy, is not acked, and goes
// with the next one.
func TestWhatIsKeptBackGoesWithTheNextCut(t *testing.T) {
	w := started(t, map[string]int64{"vda": 4 << 20, "vdb": 1<<20 + 700}, nil)
	err := errors.Join(w.fill("vda", 0, 8192, 1), w.fill("vda", 2<<20, 3*granule, 2), w.fill("vdb", 0, 1<<20+700, 3))
	if err != nil {
		t.Fatal(err)
	}
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.fill("vda", 2<<20, granule, 4); err != nil { // copied, and no longer needed
		t.Fatal(err)
	}
	if err := errors.Join(e.Keep("vda", 2<<20+granule), e.Keep("vdb", 1<<20+700), e.Keep("vdb", 1<<20)); err != nil {
		t.Fatal(err)
	}
	if a, b := e.DiskBytes("vda"), e.DiskBytes("vdb"); a != 3*granule || b != 1<<20 || e.DirtyBytes() != a+b {
		t.Fatalf("the epoch has %d and %d bytes, %d in all", a, b, e.DirtyBytes())
	}
	if err := errors.Join(e.Keep("vda", 2<<20), w.fill("vda", 2<<20, 2*granule, 5)); err != nil {
		t.Fatal(err)
	}
	st := w.g.Status()
	if st.CaptureBytes != 0 || st.Disks[0].FrozenBytes != 8192 || st.Disks[0].DirtyBytes != 5*granule {
		t.Fatalf("%d bytes of old content are held, %+v", st.CaptureBytes, st.Disks[0])
	}
	if _, err := e.ReadAt(ctx, "vda", make([]byte, granule), 2<<20); !errors.Is(err, cbt.ErrNotFrozen) {
		t.Errorf("what was kept back can be read: %v", err)
	}
	if err := errors.Join(w.ship(e), e.Ack(w.pos)); err != nil {
		t.Fatal(err)
	}
	next, err := w.g.Freeze(ctx)
	if err != nil || next.Number() != e.Number()+1 {
		t.Fatal(next, err)
	}
	if a, b := next.DiskBytes("vda"), next.DiskBytes("vdb"); a != 3*granule || b != granule {
		t.Errorf("the next epoch has %d and %d bytes", a, b)
	}
	if err := errors.Join(w.ship(next), next.Ack(w.pos)); err != nil {
		t.Fatal(err)
	}
	if e, err := w.g.Freeze(ctx); err != nil || !e.Empty() {
		t.Errorf("something is dirty at the end: %v", err)
	}
	for _, n := range w.names {
		if string(w.content[n]) != string(w.h.Disk(n, w.sizes[n]).Content()) {
			t.Errorf("disk %s: the replica differs", n)
		}
	}
}

// An epoch of which everything was kept back is one; so is the next, and an
// epoch given back has everything again.
func TestAnEpochOfWhichNothingIsLeftUsesItsNumber(t *testing.T) {
	w := started(t, one(3<<20+512), nil)
	if err := w.fill("vda", 0, 3<<20+512, 1); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		e, err := w.g.Freeze(ctx)
		if err != nil || e.Empty() {
			t.Fatal(e, err)
		}
		if err := e.Keep("vda", 0); err != nil || e.DirtyBytes() != 0 || e.Empty() {
			t.Fatal(e.DirtyBytes(), err)
		}
		if err := errors.Join(w.ship(e), e.Ack(w.pos)); err != nil {
			t.Fatal(err)
		}
	}
	e, err := w.g.Freeze(ctx)
	if err != nil || e.Number() != 3 || e.DirtyBytes() != 3<<20+512 {
		t.Fatal(e, err)
	}
	if err := errors.Join(e.Keep("vda", 1<<20), e.Abandon()); err != nil {
		t.Fatal(err)
	}
	if err := e.Keep("vda", 0); !errors.Is(err, cbt.ErrEpochEnded) {
		t.Errorf("keep of an epoch that is over: %v", err)
	}
	if n := w.g.Status().Disks[0].DirtyBytes; n != 3<<20+512 {
		t.Errorf("%d bytes are dirty", n)
	}
}

func TestOnlyGranulesAreKeptBack(t *testing.T) {
	w := started(t, one(1<<20+700), nil)
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal(err)
	}
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range []int64{-granule, 512, 1<<20 + 512, 1<<20 + granule} {
		if err := e.Keep("vda", from); !errors.Is(err, block.ErrRange) {
			t.Errorf("from byte %d: %v", from, err)
		}
	}
	if err := e.Keep("vdx", 0); !errors.Is(err, cbt.ErrMismatch) {
		t.Error("an unknown disk:", err)
	}
	if e.DirtyBytes() != granule {
		t.Error("something was kept back all the same")
	}
}

// An ack of the epoch does not cover a region of which something was kept back.
func TestARegionOfWhichSomethingIsKeptBackCountsAsWrittenAfterTheCut(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := errors.Join(w.fill("vda", 0, 512, 1), w.fill("vda", 2<<20, 512, 1)); err != nil {
		t.Fatal(err)
	}
	e, err := w.g.Freeze(ctx)
	if err == nil {
		err = e.Keep("vda", 1<<20)
	}
	if err != nil {
		t.Fatal(err)
	}
	d := w.g.Disk("vda")
	if a, b := cbt.LastWriter(d, 0), cbt.LastWriter(d, 2); uint64(a) != e.Number() || uint64(b) != e.Number()+1 {
		t.Fatalf("epoch %d: the regions count as written in %d and %d", e.Number(), a, b)
	}
}

// A bit is active before it is not frozen any more: whoever finds the bitmaps
// after a kill finds it in one of the two.
func TestAKillWhileSomethingIsKeptBackLosesNoBit(t *testing.T) {
	dir := shmDir(t)
	w := started(t, one(4<<20), func(c *cbt.Config) { c.SharedDir = dir })
	if err := w.fill("vda", 0, 4<<20, 1); err != nil {
		t.Fatal(err)
	}
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if missing, died := e.KeepAndDie("vda"); missing != 0 || !died {
		t.Fatalf("died: %v; %d granules are in neither bitmap", died, missing)
	}
}
