package cbt_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"kvmreplica/cbt"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
)

// A power cut at any persistence operation, whatever survives it, loses no
// changed block.
func TestNoPowerCutLosesABlock(t *testing.T) {
	var w *world
	scenario := func(h *blocktest.Host) error {
		w = newWorld(storySizes())
		defer func() {
			if w.g != nil {
				cbt.Kill(w.g)
			}
		}()
		return w.story(h)
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 64, Random: 16, NoKill: true}, scenario, func(h *blocktest.Host) error {
		return w.judge(h, false)
	})
}

// The same with garbage in the sector that was hit.
func TestNoTornSectorLosesABlock(t *testing.T) {
	var w *world
	scenario := func(h *blocktest.Host) error {
		w = newWorld(storySizes())
		return w.story(h)
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 16, Random: 6, NoKill: true, Torn: true, Seed: 5}, scenario, func(h *blocktest.Host) error {
		return w.judge(h, false)
	})
}

// Recovery that is itself cut, again and again, recovers the same (B2).
func TestRecoveryMayCrashAtEveryStep(t *testing.T) {
	var w *world
	scenario := func(h *blocktest.Host) error {
		w = newWorld(storySizes())
		return w.story(h)
	}
	recover := func(h *blocktest.Host) error {
		if !slices.Contains(h.FS.Files(), "super") {
			return nil
		}
		g, _, err := cbt.Open(w.config(h))
		if err != nil {
			return err
		}
		cbt.Kill(g)
		return nil
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 2, Random: 2, Every: 13, Recover: recover}, scenario, func(h *blocktest.Host) error {
		return w.judge(h, false)
	})
}

// After a kill the exact set is found, A and F both, nothing more or less.
func TestAKillCostsNothing(t *testing.T) {
	var w *world
	shm := shmDir(t)
	fresh := func(name string) string {
		dir := filepath.Join(shm, name)
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	scenario := func(h *blocktest.Host) error {
		w = newWorld(storySizes())
		w.dir = fresh("live")
		died := &death{fn: func() { copyDir(t, w.dir, filepath.Join(shm, "left")) }}
		w.edit = func(c *cbt.Config) { mortal(c, died) }
		defer func() {
			died.once.Do(died.fn)
			if w.g != nil {
				cbt.Kill(w.g)
			}
		}()
		return w.story(h)
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 2, Random: 2, NoCut: true}, scenario, func(h *blocktest.Host) error {
		copyDir(t, filepath.Join(shm, "left"), filepath.Join(shm, "copy"))
		w.dir, w.edit = filepath.Join(shm, "copy"), nil
		return w.judge(h, true)
	})
}

// Whatever storage call fails, once or for good: no block is missed. (Every
// fifth here; all of them take a minute.)
func TestNoFailingCallLosesABlock(t *testing.T) {
	for _, peer := range []bool{true, false} {
		var w *world
		scenario := func(h *blocktest.Host) error {
			w = newWorld(storySizes())
			if peer {
				w.tellPeer()
			}
			return w.story(h)
		}
		blocktest.FailSweepWith(t, blocktest.Options{Every: 5}, scenario, func(h *blocktest.Host) error {
			if len(w.told) > 0 {
				return nil // the peer demands that everything is verified
			}
			return w.judge(h, false)
		})
	}
}

// Any single failing call on the tracker's files passes the guest by (I13).
func TestOneFailingFileCallNeverFailsAGuestWrite(t *testing.T) {
	probe := blocktest.NewHost()
	if err := newWorld(storySizes()).story(probe); err != nil {
		t.Fatal(err)
	}
	ops, _ := probe.Power.Counts()
	for n := range ops {
		h := blocktest.NewHost()
		var failed fsxtest.Op
		h.Power.SetHook(func(op fsxtest.Op) error {
			if op.Index != n || strings.HasPrefix(op.Path, "disk:") {
				return nil
			}
			failed = op
			return syscall.EIO
		})
		w := newWorld(storySizes())
		_ = w.story(h) // cuts and stops may report it, writes may not
		if w.guestErr != nil {
			t.Fatalf("%v: a guest's write failed: %v", failed, w.guestErr)
		}
	}
}

// What a Create that failed has left behind, at whatever call, is replaced when
// the caller says that it knows; the new tracker misses nothing. Without that
// word a tracker of the same generation stays as it is.
func TestACreateThatFailedIsMadeAgain(t *testing.T) {
	probe := blocktest.NewHost()
	w := newWorld(storySizes())
	if err := w.create(probe); err != nil {
		t.Fatal(err)
	}
	ops, _ := probe.Power.Counts()
	cbt.Kill(w.g)
	left := 0
	for n := range ops {
		h, w := blocktest.NewHost(), newWorld(storySizes())
		h.Power.SetHook(func(op fsxtest.Op) error {
			if op.Index == n && !strings.HasPrefix(op.Path, "disk:") {
				return syscall.EIO
			}
			return nil
		})
		err := w.create(h)
		h.Power.SetHook(nil)
		if err == nil { // a call whose failure costs nothing
			cbt.Kill(w.g)
			continue
		}
		if err := w.create(h); errors.Is(err, cbt.ErrPosition) {
			left++
		} else if err != nil {
			t.Fatalf("op %d, without a word: %v", n, err)
		} else {
			cbt.Kill(w.g)
		}
		w.again = true
		if err := w.create(h); err != nil {
			t.Fatalf("op %d, again: %v", n, err)
		}
		w.again = false
		if err := errors.Join(w.fill("vda", 0, granule, 7), w.guestErr); err != nil {
			t.Fatal(err)
		}
		cbt.Kill(w.g)
		if err := w.judge(h, false); err != nil {
			t.Fatalf("op %d: %v", n, err)
		}
	}
	if left == 0 {
		t.Error("no failed call has left a tracker behind")
	}
	t.Logf("%d operations, %d left what looks like a tracker", ops, left)
}
