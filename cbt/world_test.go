package cbt_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
)

const granule = cbt.GranuleSize

var ctx = context.Background()

// world is a primary with its guest, and the replica: an independent record of
// what the tracker must never lose.
type world struct {
	again bool // create replaces what a failed one left

	sizes map[string]int64
	names []string
	dir   string // shared memory, "" = none
	boot  string
	h     *blocktest.Host
	g     *cbt.Group
	edit  func(*cbt.Config)

	// The replica: content and position.
	content map[string][]byte
	pos     cbt.Position

	// Bounds of the exact set: granules that must, and that may be dirty.
	must, may map[string]map[int64]bool
	told      []string // what the peer was told
	guestErr  error    // of writes
	held      func()   // called when writes are held
	closing   sync.WaitGroup
}

var gen1 = [16]byte{1, 1, 1}

func newWorld(sizes map[string]int64) *world {
	w := &world{
		sizes: sizes, boot: "boot-1", content: map[string][]byte{},
		must: map[string]map[int64]bool{}, may: map[string]map[int64]bool{},
		pos: cbt.Position{Generation: [16]byte{9}, Epoch: 7, Digest: [32]byte{3}},
	}
	for n, size := range sizes {
		w.names = append(w.names, n)
		w.content[n] = make([]byte, size)
		w.must[n], w.may[n] = map[int64]bool{}, map[int64]bool{}
	}
	slices.Sort(w.names)
	w.held = func() { // the guest is stopped: nothing may hang
		w.closing.Add(1)
		go func(g *cbt.Group) {
			defer w.closing.Done()
			_ = g.Close(ctx) // storage is failing; what it leaves is judged
		}(w.g)
	}
	return w
}

// logHandler reacts to "writes are held".
type logHandler struct{ w *world }

func (l logHandler) Enabled(context.Context, slog.Level) bool { return true }
func (l logHandler) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l logHandler) WithGroup(string) slog.Handler            { return l }
func (l logHandler) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "writes are held" && l.w.held != nil {
		l.w.held()
	}
	return nil
}

func (w *world) config(h *blocktest.Host) cbt.Config {
	cfg := cbt.Config{
		FS: h.FS, VMID: "vm-1", PeerID: "peer", Writer: "test", BootID: w.boot, SharedDir: w.dir,
		Idle: -1, IdleEpochs: -1, PremarkRegions: -1, CaptureBytes: 1 << 20, RetryEvery: time.Millisecond,
		Log: slog.New(logHandler{w}),
	}
	for _, n := range w.names {
		cfg.Disks = append(cfg.Disks, cbt.DiskConfig{Name: n, Device: h.Disk(n, w.sizes[n])})
	}
	if w.edit != nil {
		w.edit(&cfg)
	}
	return cfg
}

func (w *world) create(h *blocktest.Host) error {
	w.h = h
	g, err := cbt.Create(w.config(h), cbt.Start{Generation: gen1, Base: w.pos, Parent: w.pos, Dirty: cbt.DirtyNone, Again: w.again})
	w.g = g
	return err
}

func (w *world) touch(disk string, off, n int64) {
	for g := off / granule; g*granule < off+n; g++ {
		w.may[disk][g] = true
	}
}

func (w *world) touched(disk string, off, n int64) {
	for g := off / granule; g*granule < off+n; g++ {
		w.must[disk][g] = true
	}
}

func (w *world) write(disk string, off int64, p []byte) error {
	w.touch(disk, off, int64(len(p)))
	n, err := w.g.Disk(disk).WriteAt(p, off)
	if err == nil && n != len(p) {
		return fmt.Errorf("short write of %d", n)
	}
	if err == nil {
		w.touched(disk, off, int64(n))
	}
	w.guestErr = errors.Join(w.guestErr, err)
	return err
}

func (w *world) fill(disk string, off int64, n int, b byte) error {
	return w.write(disk, off, bytes.Repeat([]byte{b}, n))
}

func (w *world) zero(disk string, off, n int64, punch bool) error {
	w.touch(disk, off, n)
	err := w.g.Disk(disk).ZeroAt(off, n, punch)
	if err == nil {
		w.touched(disk, off, n)
	}
	return err
}

// ship reads an epoch and commits it at the replica, as the session would.
func (w *world) ship(e *cbt.Epoch) error {
	next := map[string][]byte{}
	for n, c := range w.content {
		next[n] = bytes.Clone(c)
	}
	for _, n := range w.names {
		for r := range e.Ranges(n) {
			for off := r.Off; off < r.End(); off += 256 << 10 {
				k := min(256<<10, r.End()-off)
				if _, err := e.ReadAt(ctx, n, next[n][off:off+k], off); err != nil {
					return err
				}
			}
		}
	}
	if err := e.Err(); err != nil {
		return err
	}
	w.content = next
	w.pos = cbt.Position{Generation: e.Generation(), Epoch: e.Number(), Digest: [32]byte{byte(e.Number()), 1}}
	return nil
}

// cycle freezes, ships and acks; between runs while the epoch is frozen.
func (w *world) cycle(between func() error) error { return w.cycleWithout(nil, between) }

// cycleWithout is cycle, but keeps back what the disks of keep have from there
// on.
func (w *world) cycleWithout(keep map[string]int64, between func() error) error {
	e, err := w.g.Freeze(ctx)
	if err != nil || e.Empty() {
		return err
	}
	for n, from := range keep {
		if err := e.Keep(n, from); err != nil {
			return errors.Join(err, e.Abandon())
		}
	}
	kept := func(n string, g int64) bool {
		from, ok := keep[n]
		return ok && g*granule >= from
	}
	frozen, maybe := w.must, map[string]map[int64]bool{}
	w.must = map[string]map[int64]bool{}
	for n := range frozen {
		w.must[n], maybe[n] = map[int64]bool{}, map[int64]bool{}
		for g := range frozen[n] {
			if kept(n, g) {
				w.must[n][g] = true
			}
		}
		for g := range w.may[n] {
			if kept(n, g) {
				maybe[n][g] = true
			}
		}
	}
	back := func() {
		for n := range frozen {
			for g := range frozen[n] {
				w.must[n][g] = true
			}
		}
	}
	if between != nil {
		if err := between(); err != nil {
			back()
			return err
		}
	}
	if err := w.ship(e); err != nil {
		back()
		return errors.Join(err, e.Abandon())
	}
	if err := e.Ack(w.pos); err != nil {
		back()
		return err
	}
	for n := range w.may {
		w.may[n] = maybe[n]
		for g := range w.must[n] {
			w.may[n][g] = true
		}
	}
	return nil
}

// dirty is the tracker's whole dirty set, read through a frozen epoch.
func dirty(g *cbt.Group, disk string) (map[int64]bool, *cbt.Epoch, error) {
	e, err := g.FreezeForced(ctx)
	if err != nil {
		return nil, nil, err
	}
	return dirtyOf(e, disk), e, nil
}

func dirtyOf(e *cbt.Epoch, disk string) map[int64]bool {
	set := map[int64]bool{}
	for r := range e.Ranges(disk) {
		for g := r.Off / granule; g*granule < r.End(); g++ {
			set[g] = true
		}
	}
	return set
}

// judge opens the tracker on a restarted machine and checks I1d: every granule
// that differs from the replica is in the recovered set. exact demands more.
func (w *world) judge(h *blocktest.Host, exact bool) error {
	created := slices.Contains(h.FS.Files(), "super")
	if !created {
		return w.judgeUncreated(h)
	}
	return h.Setup(func() error {
		g, rep, err := cbt.Open(w.config(h))
		if err != nil {
			return err
		}
		defer cbt.Kill(g)
		if rep.Source == cbt.SourceSealed {
			for _, n := range w.names {
				if !bytes.Equal(h.Disk(n, w.sizes[n]).Content(), w.content[n]) {
					return fmt.Errorf("disk %s is sealed and differs from the replica", n)
				}
			}
			return nil
		}
		err = g.Adopt(w.pos)
		if errors.Is(err, cbt.ErrLostBase) {
			// A damaged slot may have held a later base: starting over is right.
			err = g.Rebase(w.pos, "damaged superblock")
		}
		if err != nil {
			return fmt.Errorf("the replica's position is refused: %w", err)
		}
		if exact && rep.Source != cbt.SourceShared && rep.Source != cbt.SourceExact {
			return fmt.Errorf("source %s: %s", rep.Source, rep.Reason)
		}
		e, err := g.FreezeForced(ctx)
		if err != nil {
			return err
		}
		for _, n := range w.names {
			if err := w.judgeDisk(h, n, dirtyOf(e, n), exact); err != nil {
				return fmt.Errorf("%w (source %s: %s)", err, rep.Source, rep.Reason)
			}
		}
		return nil
	})
}

func (w *world) judgeUncreated(h *blocktest.Host) error {
	for _, n := range w.names {
		if c := h.Disk(n, w.sizes[n]).Content(); !bytes.Equal(c, make([]byte, len(c))) {
			return fmt.Errorf("disk %s was written before its tracker was durable", n)
		}
	}
	return nil
}

func (w *world) judgeDisk(h *blocktest.Host, n string, set map[int64]bool, exact bool) error {
	now, then := h.Disk(n, w.sizes[n]).Content(), w.content[n]
	for g := int64(0); g*granule < int64(len(now)); g++ {
		end := min((g+1)*granule, int64(len(now)))
		if !set[g] && !bytes.Equal(now[g*granule:end], then[g*granule:end]) {
			return fmt.Errorf("MISSED: disk %s granule %d differs from the replica and is not dirty", n, g)
		}
		if exact && w.must[n][g] && !set[g] {
			return fmt.Errorf("disk %s granule %d must be dirty", n, g)
		}
		if exact && set[g] && !w.may[n][g] {
			return fmt.Errorf("disk %s granule %d must not be dirty", n, g)
		}
	}
	return nil
}

// story is the scripted life used by the sweeps.
func (w *world) story(h *blocktest.Host) error {
	defer w.closing.Wait()
	a, b := w.names[0], w.names[1]
	clean := func() error { return w.g.CleanStep(ctx, time.Now()) }
	steps := []func() error{
		func() error { return w.create(h) },
		func() error { return w.fill(a, 4000, 200, 1) }, // crosses a granule
		func() error { return w.fill(a, 1<<20-600, 1200, 2) },
		func() error { return w.fill(b, w.sizes[b]-700, 700, 3) }, // partial last granule
		func() error {
			return w.cycle(func() error {
				if err := w.fill(a, 4096, 4096, 4); err != nil { // overwrites frozen content
					return err
				}
				return w.fill(b, 0, 512, 5)
			})
		},
		clean,
		func() error { return w.cycle(nil) },
		func() error { return w.g.Disk(a).Sync() },
		clean,
		func() error { return w.fill(a, 8192, 512, 6) },
		func() error { return w.zero(a, 3<<20, w.sizes[a]-3<<20, true) },
		func() error { return w.fill(a, 3<<20, 100, 7) },
		func() error {
			e, err := w.g.Freeze(ctx)
			if err != nil {
				return err
			}
			if err := w.fill(a, 8192, 512, 8); err != nil {
				return err
			}
			return e.Abandon()
		},
		func() error { // a disk that goes piece by piece; the rest stays
			return w.cycleWithout(map[string]int64{a: 3 << 20, b: 0}, func() error {
				return errors.Join(w.fill(a, 3<<20, 300, 12), w.fill(a, 8192, 100, 13))
			})
		},
		clean,
		func() error { return w.cycleWithout(map[string]int64{a: w.sizes[a]}, nil) },
		func() error { return w.g.Disk(b).Sync() },
		clean,
		func() error { return w.fill(a, 2<<20, 512, 9) },
		func() error { return w.cycleWithout(map[string]int64{a: 1 << 20}, nil) },
		func() error { return w.g.Close(ctx) },
		func() error {
			g, _, err := cbt.Open(w.config(h))
			if err == nil {
				w.g = g
			}
			return err
		},
		func() error { return w.fill(b, 4096, 100, 10) },
		func() error { return w.cycle(nil) },
		clean,
		func() error { return w.fill(b, 4096, 100, 11) },
	}
	for i, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return nil
}

func storySizes() map[string]int64 {
	return map[string]int64{"vda": 3<<20 + 1536, "vdb": 1<<20 + 5*granule + 100}
}

// copyDir copies a flat directory, so that one kill can be judged many times.
func copyDir(t testing.TB, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(from, n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, n.Name()), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func shmDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "cbt-test-")
	if err != nil {
		t.Skipf("no tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

var _ block.Device = (*cbt.Disk)(nil)

func (w *world) tellPeer() {
	w.edit = func(c *cbt.Config) {
		c.TellPeer = func(_ context.Context, reason string) error {
			w.told = append(w.told, reason)
			return nil
		}
	}
}
