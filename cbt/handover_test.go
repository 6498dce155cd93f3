package cbt_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
)

// handOn gives the tracker to a successor, or takes the attempt back.
func (w *world) handOn(commit bool) error {
	_, points := w.h.Power.Counts()
	h, back, err := w.g.HandOver()
	if err != nil {
		return err
	}
	if err := w.g.Disk(w.names[0]).Mark(0, 512); err == nil {
		return errors.New("a tracker at rest took a mark")
	}
	next, err := cbt.TakeOver(w.config(w.h), h)
	if err != nil {
		back()
		return err
	}
	if _, n := w.h.Power.Counts(); n != points {
		return fmt.Errorf("the hand-over wrote or synced %d times", n-points)
	}
	if !commit {
		cbt.Kill(next) // the successor died before anybody wrote through it
		back()
		return nil
	}
	w.g = next // the old one is never touched again
	return nil
}

// seeds is how many a test runs: few, or as many as the environment asks for.
func seeds(few uint64) uint64 {
	if n, err := strconv.ParseUint(os.Getenv("KVMREPLICA_UPGRADES"), 10, 16); err == nil {
		return n
	}
	return few
}

// handStep makes one random thing happen.
func (w *world) handStep(r *rand.Rand) error {
	disk := w.names[r.IntN(len(w.names))]
	off := r.Int64N(w.sizes[disk])
	n := 1 + r.IntN(int(min(w.sizes[disk]-off, 20000)))
	switch r.IntN(12) {
	case 0, 1, 2, 3:
		return w.fill(disk, off, n, byte(r.Uint32())|1)
	case 4:
		return w.zero(disk, off, int64(n), r.IntN(2) == 0)
	case 5:
		return w.cycle(func() error { return w.fill(disk, off, n, byte(r.Uint32())|1) })
	case 6:
		return w.g.CleanStep(ctx, time.Now())
	case 7: // with an epoch that is frozen: abandoned, its bits must be there
		e, err := w.g.Freeze(ctx)
		if err != nil {
			return err
		}
		if err := w.fill(disk, off, n, byte(r.Uint32())|1); err != nil {
			return err
		}
		if err := w.handOn(r.IntN(2) == 0); err != nil {
			return err
		}
		if !e.Empty() && !errors.Is(e.Err(), cbt.ErrEpochEnded) {
			return fmt.Errorf("the frozen epoch is %w", e.Err())
		}
		return nil
	case 8:
		return w.handOn(false)
	}
	return w.handOn(true)
}

func TestATrackerHandedOnIsExactAfterEveryHandOver(t *testing.T) {
	for seed := range seeds(12) {
		r := rand.New(rand.NewPCG(seed, 1))
		w := newWorld(storySizes())
		w.dir = shmDir(t)
		if err := w.create(blocktest.NewHost()); err != nil {
			t.Fatal(err)
		}
		for step := range 60 {
			if err := w.handStep(r); err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, step, err)
			}
		}
		var err error
		if seed%2 == 0 {
			cbt.Kill(w.g)
		} else {
			err = w.g.Close(ctx)
		}
		if err == nil {
			err = w.judge(w.h.Kill(fsxtest.Newest), true)
		}
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

// Power fails right behind a hand-over: what the successor trusted was durable.
func TestAPowerCutBehindAHandOverMissesNothing(t *testing.T) {
	for seed := range seeds(6) {
		r := rand.New(rand.NewPCG(seed, 2))
		w := newWorld(storySizes())
		w.dir = shmDir(t)
		if err := w.create(blocktest.NewHost()); err != nil {
			t.Fatal(err)
		}
		for step := range 30 {
			if err := w.handStep(r); err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, step, err)
			}
		}
		cbt.Kill(w.g)
		w.boot = "boot-2"
		if err := w.judge(w.h.Cut(fsxtest.Random(seed)), false); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func TestAHandOverThatCannotBeExactIsRefused(t *testing.T) {
	fresh := func(dir string) *world {
		w := newWorld(one(3 << 20))
		w.dir = dir
		if err := w.create(blocktest.NewHost()); err != nil {
			t.Fatal(err)
		}
		return w
	}
	refused := func(w *world, why string) {
		t.Helper()
		if _, _, err := w.g.HandOver(); !errors.Is(err, cbt.ErrUnsound) {
			t.Errorf("%s: %v", why, err)
		}
	}
	refused(fresh(""), "no shared memory")
	w := fresh(shmDir(t))
	if err := w.g.Distrust("test"); err != nil {
		t.Fatal(err)
	}
	refused(w, "distrusted")
	w = fresh(shmDir(t))
	h, back, err := w.g.HandOver()
	if err != nil {
		t.Fatal(err)
	}
	for what, spoil := range map[string]func(*cbt.Handed){
		"another epoch":   func(h *cbt.Handed) { h.Epoch++ },
		"another session": func(h *cbt.Handed) { h.Session[3]++ },
		"a wrong count":   func(h *cbt.Handed) { h.Disks[0].Dirty++ },
		"another slot":    func(h *cbt.Handed) { h.Slot = 2 },
		"another map":     func(h *cbt.Handed) { h.Disks[0].Map[0]++ },
		"no disks":        func(h *cbt.Handed) { h.Disks = nil },
	} {
		bad := h
		bad.Disks = append([]cbt.HandedDisk(nil), h.Disks...)
		spoil(&bad)
		if g, err := cbt.TakeOver(w.config(w.h), bad); !errors.Is(err, cbt.ErrUnsound) {
			t.Errorf("%s: taken over: %v %v", what, g, err)
		}
	}
	back()
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatalf("after an attempt that was taken back: %v", err)
	}
	w.g.Disk("vda").Close()
	if err := w.g.Close(ctx); err != nil {
		t.Fatal(err)
	}
	refused(w, "closed")
}
