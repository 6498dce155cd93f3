package cbt_test

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx/fsxtest"
)

// B4: while intents are not recorded, a crash makes every granule of every
// disk dirty.
func TestACrashWhileDegradedVerifiesEverything(t *testing.T) {
	w := started(t, storySizes(), nil)
	w.h.Power.SetHook(failMaps)
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal("the guest must not notice:", err)
	}
	if s := w.g.Status(); !s.Degraded || s.State != "verify-all" {
		t.Fatalf("%+v", s)
	}
	for _, c := range []fsxtest.Chooser{fsxtest.Oldest, fsxtest.Newest} {
		h := w.h.Cut(c)
		g, rep, err := cbt.Open(w.config(h))
		if err != nil || rep.Source != cbt.SourceAll {
			t.Fatal(rep, err)
		}
		for n, size := range w.sizes {
			if rep.DirtyBytes[n] != size {
				t.Fatalf("%s: %d of %d bytes dirty", n, rep.DirtyBytes[n], size)
			}
		}
		cbt.Kill(g)
	}
	w.h.Power.SetHook(nil)
	if err := w.g.CleanStep(ctx, time.Now()); err != nil {
		t.Fatal(err)
	}
	if s := w.g.Status(); s.Degraded || s.State != "in-use" {
		t.Fatalf("not healed: %+v", s)
	}
	if err := w.judge(w.h.Cut(fsxtest.Oldest), false); err != nil {
		t.Fatal(err)
	}
	if in, err := cbt.Inspect(w.h.Cut(fsxtest.Oldest).FS); err != nil || in.Disks[0].MarkedRegions != 1 {
		t.Fatal("a healed map must hold what was written meanwhile:", in, err)
	}
}

// A write that waits for its mark when the tracker ends fails: it never goes
// through without one.
func TestAHeldWriteThatIsGivenUpTouchesNothing(t *testing.T) {
	w := started(t, one(2<<20), nil)
	held := make(chan struct{}, 1)
	w.held = func() {
		select {
		case held <- struct{}{}:
		default:
		}
	}
	w.h.Power.SetHook(failAllFiles)
	done := result(func() error { return w.fill("vda", 0, 512, 1) })
	<-held
	_ = w.g.Close(t.Context()) // what it keeps nowhere it cannot write either
	if err := <-done; err == nil {
		t.Error("the write is answered with success")
	}
	if c := w.h.Disk("vda", 2<<20).Content(); c[0] != 0 {
		t.Error("the write went through unmarked")
	}
}

// I14, all combinations of channels: a write is let through only if some
// durable place says "verify everything".
func TestWritesAreHeldUntilSomePlaceKnows(t *testing.T) {
	for mask := range 8 {
		super, marker, peer := mask&1 != 0, mask&2 != 0, mask&4 != 0
		t.Run(fmt.Sprintf("super=%v marker=%v peer=%v", super, marker, peer), func(t *testing.T) {
			second := fsxtest.NewMem()
			told := 0
			w := started(t, one(2<<20), func(c *cbt.Config) {
				c.SecondFS = second
				c.TellPeer = func(context.Context, string) error {
					if !peer {
						return syscall.ENETDOWN
					}
					told++
					return nil
				}
			})
			held := make(chan struct{}, 100)
			w.held = func() {
				select {
				case held <- struct{}{}:
				default:
				}
			}
			if super {
				w.h.Power.SetHook(failMaps)
			} else {
				w.h.Power.SetHook(failAllFiles)
			}
			if !marker {
				second.Power().SetHook(func(fsxtest.Op) error { return syscall.EIO })
			}
			done := result(func() error { return w.fill("vda", 0, 512, 1) })
			if mask == 0 {
				<-held
				<-held // it keeps trying
				if c := w.h.Disk("vda", 2<<20).Content(); c[0] != 0 || !w.g.Status().Held {
					t.Fatal("a write went through unmarked")
				}
				w.h.Power.SetHook(nil)
				if err := <-done; err != nil {
					t.Fatal("storage is back:", err)
				}
				if w.g.Status().Held {
					t.Fatal("still held")
				}
				return
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			w.h.Power.SetHook(nil)
			w.edit = func(c *cbt.Config) { c.SecondFS = second.CrashClone(fsxtest.Oldest) }
			g, rep, err := cbt.Open(w.config(w.h.Cut(fsxtest.Oldest)))
			if err != nil {
				t.Fatal(err)
			}
			defer cbt.Kill(g)
			if rep.Source != cbt.SourceAll && told == 0 {
				t.Fatal(rep.Source, told)
			}
		})
	}
}

func TestCloseEndsHeldWrites(t *testing.T) {
	w := started(t, one(2<<20), nil)
	held := make(chan struct{}, 1)
	w.held = func() {
		select {
		case held <- struct{}{}:
		default:
		}
	}
	w.h.Power.SetHook(failAllFiles)
	done := result(func() error { return w.fill("vda", 0, 512, 1) })
	<-held
	if err := w.g.Close(ctx); err == nil {
		t.Fatal("a clean stop cannot be recorded, Close must say so")
	}
	if err := <-done; !errors.Is(err, block.ErrClosed) {
		t.Fatal(err)
	}
	w.h.Power.SetHook(nil)
	if err := w.judge(w.h.Cut(fsxtest.Oldest), false); err != nil {
		t.Fatal(err)
	}
}
