package cbt_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
)

// cleaned runs a clean step and says how many regions are marked behind it.
func cleaned(t *testing.T, w *world) int64 {
	t.Helper()
	if err := w.g.CleanStep(ctx, time.Now()); err != nil {
		t.Fatal(err)
	}
	return w.g.Status().Disks[0].MarkedRegions
}

// I6: a region's mark waits for the ack of the last epoch that wrote to it, also
// when a comparison left nothing dirty in it: until then the base does not cover
// that epoch.
func TestAMarkWaitsForTheAckAlsoWhenNothingIsDirty(t *testing.T) {
	w := started(t, one(4<<20), nil)
	err := inTurn(
		func() error { return w.fill("vda", 2<<20, 512, 1) },
		func() error { return w.cycle(nil) }, // a position of this generation is acknowledged
		func() error { return w.fill("vda", 0, 512, 0) },
		func() error { return w.fill("vda", 1<<20, 512, 1) },
	)
	if err != nil {
		t.Fatal(err)
	}
	c, err := w.g.BeginCompare("vda", 0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.g.EndCompare(c, []block.Range{{Off: 0, Len: 1 << 20}}); err != nil {
		t.Fatal(err)
	}
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if n := e.DirtyBytes(); n != granule {
		t.Fatalf("%d bytes frozen: the comparison cleared nothing", n)
	}
	if n := cleaned(t, w); n != 2 {
		t.Fatalf("before the ack %d regions are marked, want the two of the open epoch", n)
	}
	if err := errors.Join(w.ship(e), e.Ack(w.pos)); err != nil {
		t.Fatal(err)
	}
	if n := cleaned(t, w); n != 0 {
		t.Fatalf("after the ack %d regions are marked", n)
	}
}

// I6: what is dirty is marked, also when its epoch is at or below the acknowledged
// one: it was abandoned because the ack was lost, and adopting the position makes
// nothing clean.
func TestADirtyRegionStaysMarkedWhateverIsAcknowledged(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal(err)
	}
	e, err := w.g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := inTurn(func() error { return w.ship(e) }, e.Abandon, func() error { return w.g.Adopt(w.pos) }); err != nil {
		t.Fatal(err)
	}
	if n := cleaned(t, w); n != 1 || w.g.Status().Disks[0].DirtyBytes != granule {
		t.Fatalf("%d regions marked: %+v", n, w.g.Status().Disks[0])
	}
	if err := w.g.Close(ctx); err != nil {
		t.Fatal(err)
	}
	g, rep, err := cbt.Open(w.config(w.h))
	if err != nil || rep.Source != cbt.SourceExact || len(rep.Alarms) > 0 {
		t.Fatal(rep, err)
	}
	cbt.Kill(g)
}

// A write that found its mark has only its range until it has its tag: that is
// what keeps the mark.
func TestAMarkStaysUnderAWriteThatHasNoTagYet(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := inTurn(func() error { return w.fill("vda", 0, 512, 1) }, func() error { return w.cycle(nil) }); err != nil {
		t.Fatal(err)
	}
	release := cbt.HoldRange(w.g.Disk("vda"), 1<<20-512, 512)
	if n := cleaned(t, w); n != 1 {
		t.Errorf("%d regions marked under a write, want 1", n)
	}
	release()
	if n := cleaned(t, w); n != 0 {
		t.Errorf("%d regions marked after it", n)
	}
}

// Rule 10: a flush of the guest's that failed is final. No later good one proves
// anything, everything marked is dirty again, and no stop counts as clean.
func TestAFailedFlushOfTheGuestsIsNotForgotten(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := inTurn(func() error { return w.fill("vda", 0, 512, 1) }, func() error { return w.cycle(nil) }); err != nil {
		t.Fatal(err)
	}
	bad := errors.New("bad sector")
	w.h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Sync && op.Path == "disk:vda" {
			return bad
		}
		return nil
	})
	if err := w.g.Disk("vda").Sync(); !errors.Is(err, bad) {
		t.Fatal("the guest is not told:", err)
	}
	w.h.Power.SetHook(nil)
	if s := w.g.Status(); !s.Unsynced || s.Disks[0].DirtyBytes != cbt.RegionSize {
		t.Fatalf("%+v", s)
	}
	if err := inTurn(w.g.Disk("vda").Sync, func() error { return w.cycle(nil) }); err != nil {
		t.Fatal(err)
	}
	if n := cleaned(t, w); n != 1 {
		t.Fatalf("%d regions marked", n)
	}
	if err := w.g.Close(ctx); err != nil {
		t.Fatal(err)
	}
	g, rep, err := cbt.Open(w.config(w.h))
	if err != nil || rep.Source != cbt.SourceRegions {
		t.Fatal(rep, err)
	}
	cbt.Kill(g)
}

// A clean stop says that the images are as recorded: they are synced before. What
// was shipped and acknowledged may be in the page cache only.
func TestAPowerCutBehindACleanStopLosesNothing(t *testing.T) {
	w := started(t, one(4<<20), nil)
	err := inTurn(
		func() error { return w.fill("vda", 0, 512, 1) },
		func() error { return w.cycle(nil) },
		func() error { return w.g.Close(ctx) },
	)
	if err != nil {
		t.Fatal(err)
	}
	for name, choose := range map[string]fsxtest.Chooser{"oldest": fsxtest.Oldest, "newest": fsxtest.Newest} {
		if err := w.judge(w.h.Cut(choose), true); err != nil {
			t.Error(name, err)
		}
	}
}

// The pages of another tracker's map, whole and in their place, are not this
// one's: its regions are taken as marked, and it says so.
func TestAMapOfAnotherTrackerIsNotBelieved(t *testing.T) {
	mapOf := func(w *world) (name string, content []byte) {
		for _, f := range w.h.FS.Files() {
			if strings.HasPrefix(f, "map-") {
				name = f
			}
		}
		content, err := w.h.FS.Content(name)
		if err != nil {
			t.Fatal(name, err)
		}
		return name, content
	}
	other := started(t, one(4<<20), nil)
	if err := other.fill("vda", 1<<20, 512, 1); err != nil {
		t.Fatal(err)
	}
	w := started(t, one(4<<20), nil)
	if err := w.fill("vda", 2<<20, 512, 1); err != nil {
		t.Fatal(err)
	}
	_, foreign := mapOf(other)
	name, own := mapOf(w)
	if bytes.Equal(foreign, own) {
		t.Fatal("the maps do not differ")
	}
	damaged := func() *blocktest.Host {
		h := w.h.Cut(fsxtest.Newest)
		if err := h.FS.Damage(name, func([]byte) []byte { return foreign }); err != nil {
			t.Fatal(err)
		}
		return h
	}
	g, rep, err := cbt.Open(w.config(damaged()))
	if err != nil {
		t.Fatal(err)
	}
	if rep.DirtyBytes["vda"] != 4<<20 || len(rep.Alarms) == 0 {
		t.Errorf("%+v", rep)
	}
	cbt.Kill(g)
	if err := w.judge(damaged(), false); err != nil {
		t.Error(err)
	}
}

// F18: an image that became shorter while nobody tracked it is doubted, also
// where nothing but its size tells.
func TestAnImageThatBecameShorterIsVerified(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := inTurn(func() error { return w.fill("vda", 0, 512, 1) }, func() error { return w.g.Close(ctx) }); err != nil {
		t.Fatal(err)
	}
	cfg := w.config(w.h)
	cfg.Disks[0].Device = block.NewMem(3 << 20)
	g, rep, err := cbt.Open(cfg)
	if err != nil || rep.Source != cbt.SourceAll || rep.DirtyBytes["vda"] != 3<<20 {
		t.Fatal(rep, err)
	}
	cbt.Kill(g)
}
