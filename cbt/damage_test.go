package cbt_test

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"kvmreplica/cbt"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// ends are the states a tracker can be found in.
var ends = map[string]func(w *world) error{
	"in use": func(*world) error { return nil },
	"clean":  func(w *world) error { return w.g.Close(ctx) },
}

// livedIn returns a machine whose tracker has been used and ended in a way.
func livedIn(t *testing.T, end string) *world {
	t.Helper()
	w := newWorld(map[string]int64{"vda": 1<<20 + 3*granule + 512, "vdb": 2*granule + 100})
	h := blocktest.NewHost()
	err := errors.Join(w.create(h), w.fill("vda", 5000, 512, 1), w.cycle(nil),
		w.fill("vda", 1<<20, 5000, 2), w.fill("vdb", 2*granule, 1, 3), ends[end](w))
	if err != nil {
		t.Fatal(err)
	}
	if end != "clean" {
		cbt.Kill(w.g)
	}
	return w
}

// interesting offsets: everything that holds something, and a sample of the
// padding. In full, every byte of every page that holds something.
func interesting(content []byte) (offs []int64) {
	used := map[int]bool{}
	for i, b := range content {
		if b != 0 && fsxtest.Full() {
			used[i/4096] = true
		}
	}
	for i, b := range content {
		if b != 0 || i%20011 == 0 || i < 70 || used[i/4096] || fsxtest.Full() && i%509 == 0 {
			offs = append(offs, int64(i))
		}
	}
	return offs
}

// A single damaged byte anywhere in the metadata is detected or harmless: the
// dirty set is still a superset. (With the superblock, single fault: the other
// slot carries on.)
func TestOneDamagedByteLosesNoBlock(t *testing.T) {
	for end := range ends {
		t.Run(end, func(t *testing.T) {
			w := livedIn(t, end)
			whole := w.h.Cut(fsxtest.Newest)
			cases, share := 0, fsxtest.Share(1)
			for _, name := range whole.FS.Files() {
				before := cases
				content, err := whole.FS.Content(name)
				if err != nil {
					t.Fatal(err)
				}
				for i, off := range interesting(content) {
					if !share(i) {
						continue
					}
					for _, fn := range damages(i, off) {
						h := whole.Cut(fsxtest.Newest)
						if err := h.FS.SetByte(name, off, fn); err != nil {
							t.Fatal(err)
						}
						cases++
						if err := w.judge(h, false); err != nil {
							t.Fatalf("%s byte %d: %v", name, off, err)
						}
					}
				}
				t.Logf("%s, %d bytes: %d damages", name, len(content), cases-before)
			}
			t.Logf("%d damages", cases)
		})
	}
}

// damages: one of the bit flips in turn, and 0xFF; all of them on a few bytes.
func damages(i int, off int64) []func(byte) byte {
	fns := []func(byte) byte{func(b byte) byte { return b ^ 1<<(i%8) }}
	if i%5 == 0 {
		fns = append(fns, func(b byte) byte { return ^b })
	}
	return fns
}

// Both superblocks damaged: refused with the way out, never guessed.
func TestBothSuperblocksDamagedIsRefused(t *testing.T) {
	w := livedIn(t, "in use")
	h := w.h.Cut(fsxtest.Newest)
	for _, off := range []int64{100, 64<<10 + 5000} {
		if err := h.FS.FlipBit("super", off, 3); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := cbt.Open(w.config(h)); !errors.Is(err, cbt.ErrCorrupt) {
		t.Fatal(err)
	}
}

// Every 4 KiB block zeroed or swapped with another of the same file.
func TestAMisplacedBlockLosesNoBlock(t *testing.T) {
	for end := range ends {
		w := livedIn(t, end)
		whole := w.h.Cut(fsxtest.Newest)
		for _, name := range whole.FS.Files() {
			content, _ := whole.FS.Content(name)
			var used []int64
			for b := int64(0); (b+1)*4096 <= int64(len(content)); b++ {
				if strings.Trim(string(content[b*4096:(b+1)*4096]), "\x00") != "" {
					used = append(used, b)
				}
			}
			for _, a := range used {
				for _, b := range append(used, -1) {
					if a == b {
						continue
					}
					h := whole.Cut(fsxtest.Newest)
					err := h.FS.Damage(name, func(c []byte) []byte {
						if b < 0 {
							clear(c[a*4096 : (a+1)*4096])
						} else {
							copy(c[a*4096:(a+1)*4096], content[b*4096:]) // the other stays: misdirected write
						}
						return c
					})
					if err != nil {
						t.Fatal(err)
					}
					if err := w.judge(h, false); err != nil && !errors.Is(err, cbt.ErrCorrupt) {
						t.Fatalf("%s (%s): block %d replaced by %d: %v", name, end, a, b, err)
					}
				}
			}
		}
	}
}

// Every truncation, and every file missing.
func TestATruncatedFileLosesNoBlock(t *testing.T) {
	for end := range ends {
		w := livedIn(t, end)
		whole := w.h.Cut(fsxtest.Newest)
		for _, name := range whole.FS.Files() {
			content, _ := whole.FS.Content(name)
			cases, share := 0, fsxtest.Share(1)
			for i, n := range cuts(content) {
				if !share(i) {
					continue
				}
				cases++
				h := whole.Cut(fsxtest.Newest)
				if err := h.FS.Damage(name, func(c []byte) []byte { return c[:n] }); err != nil {
					t.Fatal(err)
				}
				if err := w.judge(h, false); err != nil && !errors.Is(err, cbt.ErrCorrupt) {
					t.Fatalf("%s (%s) cut to %d: %v", name, end, n, err)
				}
			}
			t.Logf("%s (%s), %d bytes: %d truncations", name, end, len(content), cases)
			h := whole.Cut(fsxtest.Newest)
			if err := h.Setup(func() error { return h.FS.Remove(name) }); err != nil {
				t.Fatal(err)
			}
			if name == "super" {
				if _, _, err := cbt.Open(w.config(h)); !errors.Is(err, cbt.ErrNoTracker) {
					t.Fatal(err)
				}
				continue
			}
			if err := w.judge(h, false); err != nil {
				t.Fatalf("%s missing: %v", name, err)
			}
		}
	}
}

// cuts are lengths a file may be cut to: a sample. In full, every length that
// ends in a page that holds something, and every sector elsewhere.
func cuts(content []byte) (lens []int) {
	if !fsxtest.Full() {
		for n := len(content) - 1; n >= 0; n -= max(len(content)/97, 1) {
			lens = append(lens, n)
		}
		return lens
	}
	used := map[int]bool{}
	for i, b := range content {
		used[i/4096] = used[i/4096] || b != 0
	}
	for n := range content {
		if used[n/4096] || n%512 == 0 {
			lens = append(lens, n)
		}
	}
	return lens
}

// An older version of a single file coming back (a lost write, a restored
// file) must not lose a block either where it is a single fault of the map.
func TestAStaleMapCopyLosesNoBlock(t *testing.T) {
	w := newWorld(one(2 << 20))
	h := blocktest.NewHost()
	if err := errors.Join(w.create(h), w.fill("vda", 0, 512, 1)); err != nil {
		t.Fatal(err)
	}
	var name string
	for _, n := range h.FS.Files() {
		if strings.HasPrefix(n, "map-") {
			name = n
		}
	}
	old, err := h.FS.Content(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.fill("vda", 1<<20, 512, 2); err != nil {
		t.Fatal(err)
	}
	for c := range 2 {
		cut := w.h.Cut(fsxtest.Newest)
		err := cut.FS.Damage(name, func(b []byte) []byte {
			copy(b[c<<20:c<<20+4096], old[c<<20:])
			return b
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.judge(cut, false); err != nil {
			t.Fatalf("copy %d is stale: %v", c, err)
		}
		in, err := cbt.Inspect(w.h.Cut(fsxtest.Newest).FS)
		if err != nil || fmt.Sprint(in.Alarms) != "[]" {
			t.Fatal(in.Alarms, err)
		}
	}
}

// The newest superblock slot is lost: the epoch it alone recorded is not used
// again, and a base it may have held is respected (I9, I10).
func TestALostSlotReusesNoNumberAndNoBase(t *testing.T) {
	w := newWorld(one(2 << 20))
	h := blocktest.NewHost()
	var before cbt.Position
	err := inTurn(
		func() error { return w.create(h) },
		func() error { return w.fill("vda", 0, 512, 1) },
		func() error { return w.cycle(nil) },
		func() error { before = w.pos; return w.fill("vda", 0, 512, 2) },
		func() error { return w.cycle(nil) },
		func() error { return w.fill("vda", 0, 512, 3) },
		func() error { _, err := w.g.Freeze(ctx); return err },
	)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{100, 64<<10 + 100} { // one of the two is the newest
		cut := h.Cut(fsxtest.Newest)
		if err := cut.FS.FlipBit("super", off, 0); err != nil {
			t.Fatal(err)
		}
		g, _, err := cbt.Open(w.config(cut))
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Adopt(before); !errors.Is(err, cbt.ErrPosition) {
			t.Fatal("a later base may be lost:", err)
		}
		e, err := g.FreezeForced(ctx)
		if err != nil || e.Number() <= 3 {
			t.Fatalf("slot at %d lost: epoch %d frozen again, %v", off, e.Number(), err)
		}
		cbt.Kill(g)
	}
}

// A mark the killed process had written but not synced is no mark for the next
// one: the page cache is not the disk.
func TestAMarkInThePageCacheOnlyIsNotBelieved(t *testing.T) {
	w := newWorld(one(2 << 20))
	w.held = nil
	if err := w.create(blocktest.NewHost()); err != nil {
		t.Fatal(err)
	}
	waiting, release := holdMap(w.h.Power)
	d := w.g.Disk("vda")
	busy := result(func() error { _, err := d.WriteAt(make([]byte, 512), 0); return err })
	<-waiting
	next := w.h.Kill(fsxtest.Newest)
	release()
	if err := <-busy; err != nil {
		t.Fatal(err)
	}
	cbt.Kill(w.g)
	g, _, err := cbt.Open(w.config(next))
	if err != nil {
		t.Fatal(err)
	}
	w.h, w.g = next, g
	if err := w.fill("vda", 0, 512, 7); err != nil {
		t.Fatal(err)
	}
	if err := w.g.Disk("vda").Sync(); err != nil {
		t.Fatal(err)
	}
	if err := w.judge(next.Cut(fsxtest.Oldest), false); err != nil {
		t.Fatal(err)
	}
}

// unreadableFS cannot read one file's content, now.
type unreadableFS struct {
	fsx.FS
	name string
}

func (u unreadableFS) Open(name string, flag int) (fsx.File, error) {
	f, err := u.FS.Open(name, flag)
	if err == nil && name == u.name {
		f = unreadableFile{f}
	}
	return f, err
}

type unreadableFile struct{ fsx.File }

func (unreadableFile) ReadAt([]byte, int64) (int, error) { return 0, syscall.EIO }

// A disk that hiccups has lost nothing: the tracker must not be replaced.
func TestASuperblockThatCannotBeReadNowIsNotLost(t *testing.T) {
	w := livedIn(t, "in use")
	h := w.h.Cut(fsxtest.Newest)
	cfg := w.config(h)
	cfg.FS = unreadableFS{h.FS, "super"}
	if _, _, err := cbt.Open(cfg); !errors.Is(err, syscall.EIO) || errors.Is(err, cbt.ErrCorrupt) || errors.Is(err, cbt.ErrNoTracker) {
		t.Fatal(err)
	}
	if err := w.judge(h, false); err != nil {
		t.Fatal(err)
	}
}
