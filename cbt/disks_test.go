package cbt_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"kvmreplica/cbt"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
)

// stop ends the tracker in one of three ways and returns the host as it is
// found then.
func (w *world) stop(how string) (*blocktest.Host, error) {
	switch how {
	case "clean":
		return w.h, w.g.Close(ctx)
	case "kill":
		cbt.Kill(w.g)
		return w.h.Kill(fsxtest.Newest), nil
	}
	cbt.Kill(w.g)
	w.boot += "-again"
	return w.h.Cut(fsxtest.Newest), nil
}

// reopen continues the tracker with these disks.
func (w *world) reopen(h *blocktest.Host, names ...string) (*cbt.OpenReport, error) {
	w.names, w.h = names, h
	g, rep, err := cbt.Open(w.config(h))
	w.g = g
	return rep, err
}

// After every kind of stop the tracker goes on with a disk more, a disk less
// or both, in another order: of the others it knows what it would have known,
// a new disk is all dirty and none of it suspect.
func TestDisksComeAndGoBetweenTwoRuns(t *testing.T) {
	const size = 3<<20 + 512
	sources := map[string]cbt.Source{"clean": cbt.SourceExact, "kill": cbt.SourceShared, "power": cbt.SourceRegions}
	for how, source := range sources {
		for _, names := range [][]string{{"vda", "vdb", "vdc"}, {"vda"}, {"vdb"}, {"vdc", "vda"}, {"vdc", "vdb", "vda"}} {
			t.Run(how+" "+strings.Join(names, ","), func(t *testing.T) {
				w := newWorld(map[string]int64{"vda": size, "vdb": size, "vdc": size})
				w.dir, w.held, w.names = shmDir(t), nil, []string{"vda", "vdb"}
				err := inTurn(
					func() error { return w.create(blocktest.NewHost()) },
					func() error { return w.fill("vda", 0, granule, 1) },
					func() error { return w.fill("vdb", 2<<20, granule, 1) },
					func() error { return w.cycle(nil) },
					func() error { return w.fill("vda", 1<<20, granule, 2) },
					func() error { return w.fill("vdb", 5, 2*granule, 2) },
				)
				if err != nil {
					t.Fatal(err)
				}
				h, err := w.stop(how)
				if err != nil {
					t.Fatal(err)
				}
				if err := w.comeAndGo(h, how, source, names); err != nil {
					t.Fatal(err)
				}
				if err := w.dropAndAdd(how, names); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}

func (w *world) comeAndGo(h *blocktest.Host, how string, source cbt.Source, names []string) error {
	rep, err := w.reopen(h, names...)
	if err != nil {
		return err
	}
	if rep.Source != source {
		return fmt.Errorf("opened from %s (%s), want %s", rep.Source, rep.Reason, source)
	}
	want := map[string]int64{"vda": granule, "vdb": 3 * granule, "vdc": w.sizes["vdc"]}
	suspect := map[string]int64{}
	if how == "power" { // the regions that were written to
		want["vda"], want["vdb"] = 2<<20, 2<<20
		suspect["vda"], suspect["vdb"] = 2<<20, 2<<20
	}
	for _, n := range names {
		if rep.DirtyBytes[n] != want[n] || rep.SuspectBytes[n] != suspect[n] {
			return fmt.Errorf("disk %s: %d bytes are dirty, want %d; %d suspect, want %d", n, rep.DirtyBytes[n], want[n], rep.SuspectBytes[n], suspect[n])
		}
	}
	if got := w.files("map-"); got != len(names) {
		return fmt.Errorf("%d maps for %d disks", got, len(names))
	}
	return nil
}

func (w *world) files(prefix string) (n int) {
	for _, f := range w.h.FS.Files() {
		if strings.HasPrefix(f, prefix) {
			n++
		}
	}
	return n
}

// dropAndAdd ships everything, drops a disk and adds it again: all of it is
// dirty, also after another stop of the same kind.
func (w *world) dropAndAdd(how string, names []string) error {
	last := names[len(names)-1]
	rest := append(slices.Clone(names[:len(names)-1]), "vdx")
	w.sizes["vdx"], w.content["vdx"] = granule, make([]byte, granule)
	w.must["vdx"], w.may["vdx"] = map[int64]bool{}, map[int64]bool{}
	if len(names) > 1 {
		rest = rest[:len(rest)-1]
	} else if _, err := w.stopAndOpen(how, "vdx", last); err != nil { // one of the disks must be known
		return err
	}
	if err := w.cycle(nil); err != nil {
		return err
	}
	if _, err := w.stopAndOpen(how, rest...); err != nil {
		return err
	}
	rep, err := w.stopAndOpen(how, append(rest, last)...)
	if err != nil {
		return err
	}
	for range 2 {
		if rep.DirtyBytes[last] != w.sizes[last] {
			return fmt.Errorf("disk %s came back with %d bytes dirty", last, rep.DirtyBytes[last])
		}
		for _, n := range rest {
			if how != "power" && rep.DirtyBytes[n] != 0 {
				return fmt.Errorf("disk %s: %d bytes are dirty, all was acknowledged", n, rep.DirtyBytes[n])
			}
		}
		if rep, err = w.stopAndOpen(how, append(rest, last)...); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) stopAndOpen(how string, names ...string) (*cbt.OpenReport, error) {
	h, err := w.stop(how)
	if err != nil {
		return nil, err
	}
	return w.reopen(h, names...)
}

// A power cut or a kill at every step of an Open with other disks: the next one
// finds the same.
func TestNoCrashWhileDisksComeAndGoLosesABlock(t *testing.T) {
	var w *world
	scenario := func(h *blocktest.Host) error {
		w = newWorld(storySizes())
		w.sizes["vdc"], w.content["vdc"] = 1<<20+granule, make([]byte, 1<<20+granule)
		w.must["vdc"], w.may["vdc"] = map[int64]bool{}, map[int64]bool{}
		again := func(names ...string) error {
			_, err := w.reopen(h, names...)
			return err
		}
		defer w.closing.Wait()
		return inTurn(
			func() error { return w.create(h) },
			func() error { return w.fill("vda", 100, 512, 1) },
			func() error { return w.fill("vdb", 100, 512, 1) },
			func() error { return w.g.Close(ctx) },
			func() error {
				return errors.Join(h.Disk("vdc", w.sizes["vdc"]).ZeroAt(0, 512, false), again("vda", "vdb", "vdc"))
			},
			func() error { return w.fill("vdc", 0, 512, 3) },
			func() error { return w.cycleWithout(map[string]int64{"vdc": granule}, nil) },
			func() error { return w.g.Close(ctx) },
			func() error { return again("vdc", "vda") },
			func() error { return w.fill("vda", 1<<20, 512, 4) },
			func() error { return w.cycle(nil) },
		)
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 16, Random: 8}, scenario, func(h *blocktest.Host) error {
		return w.judge(h, false)
	})
}
