package cbt_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// elastic is a device whose size the test sets.
type elastic struct {
	*blocktest.Crashable
	size int64
}

func (e *elastic) Size() int64 { return e.size }

// B5, B9: growing and shrinking over granule, region, page and 2^k borders,
// with a power cut at every step; what is new is dirty, what was dirty stays.
func TestResizingLosesNoBlockAtAnyBorder(t *testing.T) {
	const room = 40 << 30
	borders := []int64{granule, 1 << 20, 32256 << 20, 32 << 30}
	for _, border := range borders {
		for _, from := range []int64{-granule, -100, 0, 100} {
			for _, to := range []int64{-granule, -1, 0, 1, granule + 5, 3<<20 + 7} {
				a, b := border+from, border+to
				if a == b || a < 0 || b < 0 {
					continue
				}
				for _, touched := range []bool{true, false} {
					if err := resizeOnce(room, a, b, touched); err != nil {
						t.Fatalf("from %d to %d, written to: %v: %v", a, b, touched, err)
					}
				}
			}
		}
	}
}

func resizeOnce(room, a, b int64, touched bool) error {
	w := newWorld(map[string]int64{"vda": 0})
	h := blocktest.NewHost()
	dev := &elastic{h.Disk("big", room), a}
	w.edit = func(c *cbt.Config) { c.Disks[0].Device = dev }
	if err := w.create(h); err != nil {
		return err
	}
	edge := max(min(a, b)-1, 0)
	if a > 0 && touched {
		if _, err := w.g.Disk("vda").WriteAt([]byte{7}, edge); err != nil {
			return err
		}
	}
	dev.size = max(a, b)
	if err := w.g.Resize("vda", b); err != nil {
		return err
	}
	dev.size = b
	if got := w.g.Disk("vda").Size(); got != b {
		return fmt.Errorf("size is %d", got)
	}
	if b > 0 && touched {
		if _, err := w.g.Disk("vda").WriteAt([]byte{8}, b-1); err != nil {
			return err
		}
	}
	if _, err := w.g.Disk("vda").WriteAt([]byte{8}, b); !errors.Is(err, block.ErrRange) {
		return fmt.Errorf("write behind the end: %w", err)
	}
	want := func(set map[int64]bool) error {
		for g := min(a, b) / granule; g*granule < b; g++ {
			if !set[g] {
				return fmt.Errorf("granule %d must be dirty", g)
			}
		}
		if b > 0 && b < a && !set[(b-1)/granule] {
			return errors.New("no cut may be empty that has a new size")
		}
		if touched && a > 0 && b > 0 && edge < b && !set[edge/granule] {
			return fmt.Errorf("granule %d was dirty before", edge/granule)
		}
		return nil
	}
	set, e, err := dirty(w.g, "vda")
	if err != nil {
		return err
	}
	if err := errors.Join(want(set), e.Abandon()); err != nil {
		return err
	}
	cut := h.Cut(fsxtest.Oldest)
	w.edit = func(c *cbt.Config) { c.Disks[0].Device = &elastic{cut.Disk("big", room), b} }
	g, rep, err := cbt.Open(w.config(cut))
	if err != nil || rep.Source != cbt.SourceRegions {
		return fmt.Errorf("%v %w", rep, err)
	}
	set, _, err = dirty(g, "vda")
	return errors.Join(err, want(set))
}

// B5: a power cut at every step of growing, adding and removing.
func TestNoCutDuringAResizeLosesABlock(t *testing.T) {
	const room = 3 << 20
	var w *world
	var dev *elastic
	scenario := func(h *blocktest.Host) error {
		w = newWorld(map[string]int64{"vda": room, "vdb": 1 << 20})
		dev = &elastic{h.Disk("vda", room), 1<<20 + 100}
		w.edit = func(c *cbt.Config) { c.Disks[0].Device = dev }
		defer w.closing.Wait()
		return inTurn(
			func() error { return w.create(h) },
			func() error { return w.fill("vda", 5000, 512, 1) },
			func() error { dev.size = room; return w.g.Resize("vda", room) },
			func() error { return w.fill("vda", 1<<20+50, 512, 1) },
			func() error { return w.fill("vda", 2<<20, 512, 1) },
			func() error { return w.g.RemoveDisk("vdb") },
			func() error { return w.g.AddDisk(cbt.DiskConfig{Name: "vdb", Device: h.Disk("vdb", 1<<20)}) },
			func() error { return w.fill("vdb", 0, 512, 3) },
		)
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 16, Random: 8, NoKill: true}, scenario, func(h *blocktest.Host) error {
		size := dev.size
		w.edit = func(c *cbt.Config) { c.Disks[0].Device = &elastic{h.Disk("vda", room), size} }
		return w.judge(h, false)
	})
}

// B5: a disk that became longer while nobody tracked it, with a power cut at
// every step of taking that up. What somebody wrote behind the old end is sent.
func TestNoCutWhileAGrowthIsTakenUpLosesABlock(t *testing.T) {
	const room, old = 3 << 20, 1<<20 + 512
	for _, clean := range []bool{false, true} {
		var w *world
		var dev *elastic
		scenario := func(h *blocktest.Host) error {
			w = newWorld(one(room))
			dev = &elastic{h.Disk("vda", room), old}
			w.edit = func(c *cbt.Config) { c.Disks[0].Device = dev }
			defer w.closing.Wait()
			return inTurn(
				func() error { return w.create(h) },
				func() error { return w.fill("vda", 5000, 512, 1) },
				func() error { return w.cycle(nil) },
				func() error { return w.fill("vda", 9000, 512, 1) },
				func() error {
					if clean {
						return w.g.Close(ctx)
					}
					cbt.Kill(w.g)
					return nil
				},
				func() error { _, err := dev.WriteAt([]byte{5}, old+100); return errors.Join(err, dev.Sync()) },
				func() (err error) { dev.size = room; w.g, _, err = cbt.Open(w.config(h)); return err },
				func() error { return w.fill("vda", 2<<20, 512, 1) },
				func() error { return w.cycle(nil) },
			)
		}
		blocktest.SweepWith(t, blocktest.Options{MaxAll: 16, Random: 8, NoKill: true}, scenario, func(h *blocktest.Host) error {
			size := dev.size
			w.edit = func(c *cbt.Config) { c.Disks[0].Device = &elastic{h.Disk("vda", room), size} }
			if size != room {
				return nil // the write behind its end was nobody's yet
			}
			return w.judge(h, false)
		})
	}
}

// Only what is new is dirty when a file was made longer under a tracker that was
// killed: its marks stand for everything else.
func TestOnlyTheNewPartOfAGrownImageIsDirty(t *testing.T) {
	w, img, open := fileWorld(t, 3<<20)
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal(err)
	}
	cbt.Kill(w.g)
	if err := os.Truncate(img, 5<<20); err != nil {
		t.Fatal(err)
	}
	g, rep := open()
	if rep.Source != cbt.SourceRegions || rep.DirtyBytes["vda"] != 3<<20 || g.Disk("vda").Size() != 5<<20 { // its region, and what is new
		t.Fatalf("%+v", rep)
	}
}

// fileWorld tracks a real file on a real file system.
func fileWorld(t *testing.T, size int64) (*world, string, func() (*cbt.Group, *cbt.OpenReport)) {
	t.Helper()
	dir := t.TempDir()
	img := filepath.Join(dir, "img")
	if err := os.WriteFile(img, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	meta := filepath.Join(dir, "meta")
	if err := os.Mkdir(meta, 0o700); err != nil {
		t.Fatal(err)
	}
	w := newWorld(one((size + 511) &^ 511))
	w.edit = func(c *cbt.Config) {
		fs, err := fsx.OS(meta)
		if err != nil {
			t.Fatal(err)
		}
		f, err := block.OpenFile(img, block.FileOptions{NoLock: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		c.FS, c.Disks[0].Device, c.Disks[0].Identity = fs, f, f.Identity
	}
	if err := w.create(blocktest.NewHost()); err != nil {
		t.Fatal(err)
	}
	return w, img, func() (*cbt.Group, *cbt.OpenReport) {
		g, rep, err := cbt.Open(w.config(blocktest.NewHost()))
		if err != nil {
			t.Fatal(err)
		}
		return g, rep
	}
}

// F16, F17: an image changed behind our back is noticed; one left alone is not
// doubted.
func TestATouchedImageIsVerified(t *testing.T) {
	touch := map[string]struct {
		fn   func(img string) error
		want cbt.Source
		soft bool
	}{
		"left alone": {func(string) error { return nil }, cbt.SourceExact, false},
		"relabelled": {func(img string) error { return os.Chmod(img, 0o640) }, cbt.SourceExact, true},
		"written": {func(img string) error {
			f, err := os.OpenFile(img, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte{1}, 2<<20)
			return errors.Join(err, f.Close())
		}, cbt.SourceAll, false},
		"copied": {func(img string) error {
			b, err := os.ReadFile(img)
			return errors.Join(err, os.WriteFile(img+"2", b, 0o600), os.Rename(img+"2", img))
		}, cbt.SourceAll, false},
		"grown": {func(img string) error { return os.Truncate(img, 4<<20) }, cbt.SourceAll, false},
	}
	for name, c := range touch {
		t.Run(name, func(t *testing.T) {
			w, img, open := fileWorld(t, 3<<20)
			if err := errors.Join(w.fill("vda", 0, 512, 1), w.g.Close(ctx), c.fn(img)); err != nil {
				t.Fatal(err)
			}
			_, rep := open()
			if rep.Source != c.want || (len(rep.Soft) > 0) != c.soft {
				t.Fatalf("%+v", rep)
			}
		})
	}
}

// After a boot the image's file system may stand on a device of another number
// (btrfs, NFS, disks found in another order). That alone is no reason to compare
// everything; within one boot it is, and so is another file.
func TestADeviceOfAnotherNumberAfterABootIsNotDoubted(t *testing.T) {
	for name, c := range map[string]struct {
		boot   string
		kill   bool
		change func(*block.Identity)
		want   cbt.Source
		soft   bool
	}{
		"another number":             {"boot-2", false, func(id *block.Identity) { id.Device++ }, cbt.SourceExact, true},
		"another number after a cut": {"boot-2", true, func(id *block.Identity) { id.Device++ }, cbt.SourceRegions, false},
		"another file":               {"boot-2", false, func(id *block.Identity) { id.Device++; id.Inode++ }, cbt.SourceAll, false},
		"written to":                 {"boot-2", false, func(id *block.Identity) { id.Device++; id.MtimeNS++ }, cbt.SourceAll, false},
		"the same boot":              {"", false, func(id *block.Identity) { id.Device++ }, cbt.SourceAll, false},
	} {
		t.Run(name, func(t *testing.T) {
			w, _, open := fileWorld(t, 3<<20)
			if err := w.fill("vda", 0, 512, 1); err != nil {
				t.Fatal(err)
			}
			if c.kill {
				cbt.Kill(w.g)
			} else if err := w.g.Close(ctx); err != nil {
				t.Fatal(err)
			}
			if c.boot != "" {
				w.boot = c.boot
			}
			edit := w.edit
			w.edit = func(cfg *cbt.Config) {
				edit(cfg)
				id := cfg.Disks[0].Identity
				cfg.Disks[0].Identity = func() (block.Identity, error) {
					i, err := id()
					c.change(&i)
					return i, err
				}
			}
			if _, rep := open(); rep.Source != c.want || (len(rep.Soft) > 0) != c.soft {
				t.Fatalf("%+v", rep)
			}
		})
	}
}

// A guest that writes the last sector of an image of odd size grows the file;
// that is no reason to doubt it after a kill.
func TestAGrownTailIsNotDoubted(t *testing.T) {
	w, _, open := fileWorld(t, 3<<20+100)
	if err := w.fill("vda", 3<<20, 512, 1); err != nil {
		t.Fatal(err)
	}
	cbt.Kill(w.g)
	if _, rep := open(); rep.Source != cbt.SourceRegions || rep.DirtyBytes["vda"] != granule {
		t.Fatalf("%+v", rep)
	}
}

// A planned failover and back: nothing is dirty, writes are refused, a restart
// stays sealed, and only an untouched image is trusted when it is taken back.
func TestASealedDiskStaysSealedUntilTakenBack(t *testing.T) {
	for _, touched := range []bool{false, true} {
		w, img, open := fileWorld(t, 3<<20)
		if err := w.fill("vda", 0, 512, 1); err != nil {
			t.Fatal(err)
		}
		if err := w.g.Seal(ctx); !errors.Is(err, cbt.ErrDirty) {
			t.Fatal(err)
		}
		if err := errors.Join(w.cycle(nil), w.g.Seal(ctx)); err != nil {
			t.Fatal(err)
		}
		if err := w.fill("vda", 0, 512, 2); !errors.Is(err, cbt.ErrSealed) {
			t.Fatal(err)
		}
		if err := w.g.Close(ctx); err != nil {
			t.Fatal(err)
		}
		g, rep := open()
		if rep.Source != cbt.SourceSealed {
			t.Fatalf("%+v", rep)
		}
		w.g = g
		if err := w.fill("vda", 0, 512, 2); !errors.Is(err, cbt.ErrSealed) {
			t.Fatal(err)
		}
		if touched {
			later := time.Now().Add(time.Second)
			if err := os.Chtimes(img, later, later); err != nil {
				t.Fatal(err)
			}
		}
		if err := g.Unseal(); err != nil {
			t.Fatal(err)
		}
		want := int64(0)
		if touched {
			want = 3 << 20
		}
		if n := g.Status().Disks[0].DirtyBytes; n != want {
			t.Fatalf("touched=%v: %d bytes dirty", touched, n)
		}
		if err := errors.Join(w.fill("vda", 1<<20, 512, 2), w.g.Close(ctx)); err != nil {
			t.Fatal(err)
		}
		if _, rep := open(); rep.Source != cbt.SourceExact {
			t.Fatalf("%+v", rep)
		}
	}
}

// Sealing and taking back, cut at every step: nothing is lost; sealed only when
// nothing differs.
func TestASealIsAtomic(t *testing.T) {
	var w *world
	scenario := func(h *blocktest.Host) error {
		w = newWorld(one(1 << 20))
		defer w.closing.Wait()
		err := inTurn(
			func() error { return w.create(h) },
			func() error { return w.fill("vda", 0, 512, 1) },
			func() error { return w.cycle(nil) },
			func() error { return w.g.Seal(ctx) },
		)
		if err != nil {
			return err
		}
		if err := w.g.Unseal(); err != nil {
			return err
		}
		return w.fill("vda", 4096, 512, 2)
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 16, Random: 8}, scenario, func(h *blocktest.Host) error {
		return w.judge(h, false) // whichever state it is in, nothing is lost
	})
}

// inTurn runs steps until one fails.
func inTurn(steps ...func() error) error {
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

// A distrust marker left by others counts, whatever it holds, once.
func TestADistrustMarkerMakesEverythingDirty(t *testing.T) {
	second := fsxtest.NewMem()
	w := started(t, one(2<<20), func(c *cbt.Config) { c.SecondFS = second })
	if err := errors.Join(w.g.Close(ctx), cbt.WriteDistrust(second, "vm-1", "released to the operator")); err != nil {
		t.Fatal(err)
	}
	for i, want := range []cbt.Source{cbt.SourceAll, cbt.SourceExact} {
		g, rep, err := cbt.Open(w.config(w.h))
		if err != nil || rep.Source != want || rep.DirtyBytes["vda"] != 2<<20 {
			t.Fatal(i, rep, err)
		}
		if err := g.Close(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// Distrust stays until the next start, whatever is healed or closed meanwhile.
func TestDistrustOutlivesACleanStop(t *testing.T) {
	w := started(t, one(2<<20), nil)
	if err := errors.Join(w.g.Distrust("released"), w.g.CleanStep(ctx, time.Now()), w.g.Close(ctx)); err != nil {
		t.Fatal(err)
	}
	_, rep, err := cbt.Open(w.config(w.h))
	if err != nil || rep.Source != cbt.SourceAll {
		t.Fatal(rep, err)
	}
}

// A full shared memory costs the exact copy, not the process, not a block.
func TestAKillWithFullSharedMemoryFallsBackToRegions(t *testing.T) {
	w := newWorld(one(3 << 20))
	w.dir = filepath.Join(t.TempDir(), "absent")
	if err := errors.Join(w.create(blocktest.NewHost()), w.fill("vda", 0, 512, 1)); err != nil {
		t.Fatal(err)
	}
	if s := w.g.Status(); s.SharedExact || len(s.Reasons) == 0 {
		t.Fatalf("%+v", s)
	}
	h := w.h.Kill(fsxtest.Newest)
	_, rep, err := cbt.Open(w.config(h))
	if err != nil || rep.Source != cbt.SourceRegions || rep.SuspectBytes["vda"] != 1<<20 {
		t.Fatal(rep, err)
	}
}

// What is cleared was idle long enough, in time and in epochs.
func TestAHotRegionStaysMarked(t *testing.T) {
	w := started(t, one(4<<20), func(c *cbt.Config) { c.Idle, c.IdleEpochs = 5*time.Minute, 5 })
	now := time.Unix(1000, 0)
	step := func(d time.Duration) int64 {
		now = now.Add(d)
		if err := w.g.CleanStep(ctx, now); err != nil {
			t.Fatal(err)
		}
		return w.g.Status().Disks[0].MarkedRegions
	}
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		if err := errors.Join(w.fill("vda", 1<<20, 512, byte(i)), w.cycle(nil)); err != nil {
			t.Fatal(err)
		}
		if n := step(30 * time.Second); n != 2 {
			t.Fatalf("after %d epochs: %d marked", i+1, n)
		}
	}
	if n := step(100 * time.Second); n != 1 {
		t.Fatalf("the idle region must go, the hot one stay: %d marked", n)
	}
	if n := step(10 * time.Minute); n != 1 {
		t.Fatalf("five epochs must have passed, too: %d marked", n)
	}
	if err := w.judge(w.h.Cut(fsxtest.Oldest), false); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.content["vda"], w.h.Disk("vda", 4<<20).Content()) {
		t.Fatal("the replica differs")
	}
}

// A freeze costs one sync; an empty one none (M8).
func TestAFreezeCostsOneSync(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal(err)
	}
	syncs := 0
	w.h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Sync || op.Kind == fsxtest.SyncDir {
			syncs++
		}
		return nil
	})
	if err := w.cycle(nil); err != nil || syncs != 1 {
		t.Fatal(syncs, err)
	}
	e, err := w.g.Freeze(ctx)
	if err != nil || !e.Empty() || syncs != 1 {
		t.Fatal(e, syncs, err)
	}
	if err := w.fill("vda", 0, 512, 1); err != nil {
		t.Fatal(err)
	}
	if e, err = w.g.Freeze(ctx); err != nil || e.Empty() || e.Number() != 2 {
		t.Fatal(e, err)
	}
}

// I10: without a durable base nothing is cleared.
func TestNothingIsClearedWithoutADurableBase(t *testing.T) {
	w := started(t, one(4<<20), nil)
	if err := inTurn(func() error { return w.fill("vda", 0, 512, 1) }, func() error { return w.cycle(nil) }); err != nil {
		t.Fatal(err)
	}
	w.h.Power.SetHook(func(op fsxtest.Op) error {
		if strings.HasPrefix(op.Path, "super") {
			return syscall.EIO
		}
		return nil
	})
	if err := w.g.CleanStep(ctx, time.Now()); err == nil {
		t.Fatal("the base could not be written")
	}
	if in, err := cbt.Inspect(w.h.Cut(fsxtest.Newest).FS); err != nil || in.Disks[0].MarkedRegions != 1 {
		t.Fatal(in, err)
	}
	w.h.Power.SetHook(nil)
	if err := w.g.CleanStep(ctx, time.Now()); err != nil || w.g.Status().Disks[0].MarkedRegions != 0 {
		t.Fatal(err, w.g.Status())
	}
}
