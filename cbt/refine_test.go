package cbt_test

import (
	"bytes"
	"errors"
	"testing"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx/fsxtest"
)

// B14 and the refinement rule: a write at any place, at any moment of a
// comparison that walks over the disk, keeps its granule dirty.
func TestAWriteDuringAComparisonStaysDirty(t *testing.T) {
	const granules = 6
	for at := range granules {
		for cursor := range granules {
			for moment := range 3 { // before begin, between begin and end, after end
				w := started(t, one(granules*granule), nil)
				if err := w.g.MarkAll("test"); err != nil {
					t.Fatal(err)
				}
				for c := range granules {
					poke := func(m int) {
						if c == cursor && m == moment {
							if err := w.fill("vda", int64(at)*granule+7, 30, 5); err != nil {
								t.Fatal(err)
							}
						}
					}
					poke(0)
					cmp, err := w.g.BeginCompare("vda", int64(c)*granule, granule)
					if err != nil {
						t.Fatal(err)
					}
					p := make([]byte, granule)
					if _, err := w.h.Disk("vda", granules*granule).ReadAt(p, int64(c)*granule); err != nil {
						t.Fatal(err)
					}
					poke(1)
					var equal []block.Range
					if bytes.Equal(p, make([]byte, granule)) {
						equal = []block.Range{{Off: int64(c) * granule, Len: granule}}
					}
					if err := w.g.EndCompare(cmp, equal); err != nil {
						t.Fatal(err)
					}
					poke(2)
				}
				set, _, err := dirty(w.g, "vda")
				if err != nil || !set[int64(at)] || len(set) != 1 {
					t.Fatal(at, cursor, moment, set, err)
				}
				if s := w.g.Status().Disks[0].SuspectBytes; s != 0 {
					t.Fatal("still suspect:", s)
				}
			}
		}
	}
}

// A write in flight since before the comparison counts as during.
func TestAWriteInFlightAtBeginCompareStaysDirty(t *testing.T) {
	w := started(t, one(1<<20), nil)
	if err := w.g.MarkAll("test"); err != nil {
		t.Fatal(err)
	}
	in, out := make(chan struct{}), make(chan struct{})
	w.h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Write && op.Path == "disk:vda" {
			close(in)
			<-out
		}
		return nil
	})
	busy := result(func() error { return w.fill("vda", 4096, 512, 2) })
	<-in
	c, err := w.g.BeginCompare("vda", 0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.g.EndCompare(c, []block.Range{{Off: 0, Len: 1 << 20}}); err != nil {
		t.Fatal(err)
	}
	close(out)
	if err := <-busy; err != nil {
		t.Fatal(err)
	}
	if set, _, err := dirty(w.g, "vda"); err != nil || len(set) != 1 || !set[1] {
		t.Fatal(set, err)
	}
}

// A comparison overtaken by a cut, a mark or another end clears nothing.
func TestAStaleComparisonClearsNothing(t *testing.T) {
	overtake := map[string]func(w *world) error{
		"freeze":  func(w *world) error { _, err := w.g.Freeze(ctx); return err },
		"ack":     func(w *world) error { return w.cycle(nil) },
		"mark":    func(w *world) error { return w.g.MarkAll("again") },
		"rebase":  func(w *world) error { return w.g.Rebase(cbt.Position{Epoch: 5}, "test") },
		"abandon": func(w *world) error { e, err := w.g.Freeze(ctx); return errors.Join(err, e.Abandon()) },
	}
	for name, fn := range overtake {
		w := started(t, one(1<<20), nil)
		if err := w.fill("vda", 0, 8192, 1); err != nil {
			t.Fatal(err)
		}
		c, err := w.g.BeginCompare("vda", 0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if err := fn(w); err != nil {
			t.Fatal(name, err)
		}
		before := w.g.Status().Disks[0].DirtyBytes
		if err := w.g.EndCompare(c, []block.Range{{Off: 0, Len: 1 << 20}}); !errors.Is(err, cbt.ErrStale) {
			t.Fatal(name, err)
		}
		if after := w.g.Status().Disks[0].DirtyBytes; after != before {
			t.Fatal(name, before, after)
		}
	}
}
