package points_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// header is that of an encoded epoch.
func header(t *testing.T, b *delta.Built) delta.Header {
	t.Helper()
	h, err := delta.ParseHeader(b.Header)
	must(t, err)
	return h
}

// Another set of disks is the caller's decision; without one, or while seeding,
// it is refused, and what is refused leaves no trace.
func TestASetOfDisksIsTakenOnlyWithConsent(t *testing.T) {
	p, h, g, cfg, s := mixed(t, 93)
	must(t, s.Close())
	var asked [][]delta.Disk
	no := errors.New("no room for it")
	answer := error(nil)
	files := len(h.FS.Files())
	for _, set := range []func([]delta.Disk) error{nil, func([]delta.Disk) error { return no }} {
		cfg.Set = set
		s, err := points.Open(cfg)
		must(t, err)
		for _, want := range [][]delta.Disk{{onlyA, disk("vdb", 512)}, {disk("vdb", 512)}} {
			q := p.copy()
			_, err := s.Begin(header(t, q.become(want...)))
			if !errors.Is(err, points.ErrDisks) || set != nil && !errors.Is(err, no) {
				t.Errorf("%v: %v", want, err)
			}
		}
		if a := s.Status().Absent; a != nil || len(h.FS.Files()) != files {
			t.Errorf("a refused set left %v, %d files of %d", a, len(h.FS.Files()), files)
		}
		must(t, s.Close())
	}
	cfg.Set = func(d []delta.Disk) error { asked = append(asked, d); return answer }
	s, err := points.Open(cfg)
	must(t, err)
	must(t, p.epochs(s, 1, 0, true))
	if len(asked) != 0 {
		t.Errorf("asked about the same set: %v", asked)
	}
	b := p.become(onlyA, disk("vdb", 512))
	r, err := s.Begin(header(t, b))
	must(t, err)
	must(t, r.Chunk(b.Chunks[0]))
	answer = no
	if _, err := s.Begin(header(t, b)); !errors.Is(err, no) || r.Next() != 1 {
		t.Errorf("asked again: %v, %d chunks are kept", err, r.Next())
	}
	answer = nil
	must(t, p.send(s, b))
	must(t, p.epochs(s, 1, 0, true)) // the same set by now
	must(t, p.send(s, p.become(onlyA)))
	if len(asked) != 4 || !slices.Equal(asked[0], []delta.Disk{onlyA, disk("vdb", 512)}) || !slices.Equal(asked[3], []delta.Disk{onlyA}) {
		t.Errorf("asked %v", asked)
	}
	if err := p.sound(s); err != nil || len(g.disks) != 2 {
		t.Errorf("%v, %d images", err, len(g.disks))
	}
	must(t, s.Close())
}

func TestTheSetOfDisksStaysWhileSeeding(t *testing.T) {
	p := newPrimary(94).alone()
	s, err := p.create(blocktest.NewHost())
	must(t, err)
	if _, err := s.Begin(header(t, p.copy().become(onlyA, disk("vdb", 512)))); !errors.Is(err, points.ErrDisks) {
		t.Errorf("an epoch: %v", err)
	}
	if err := s.SeedResize([]delta.Disk{onlyA, disk("vdb", 512)}); !errors.Is(err, points.ErrDisks) {
		t.Errorf("resized: %v", err)
	}
	must(t, p.epochs(s, 1, 0, true))
	must(t, s.Close())
}

// A name is never forgotten: there is an end to new ones, and the error says
// what helps. Names that were there before go on.
func TestOnlySoManyDisksInALife(t *testing.T) {
	p, _, _, cfg, s := mixed(t, 95)
	for i := range delta.MaxDisks - 1 {
		must(t, p.send(s, p.become(onlyA, disk(fmt.Sprintf("vx%d", i), 512))))
		must(t, settle(s))
	}
	q := p.copy()
	_, err := s.Begin(header(t, q.become(onlyA, disk("vdb", 512))))
	if !errors.Is(err, points.ErrDisks) || !strings.Contains(err.Error(), "replicactl vm disable") {
		t.Errorf("one too many: %v", err)
	}
	must(t, s.Close())
	s, err = points.Open(cfg)
	must(t, err)
	must(t, p.send(s, p.become(onlyA, disk("vx0", 4096))))
	must(t, settle(s))
	must(t, p.sound(s))
	must(t, s.Close())
}

// Digests of a disk that is not there are no error and equal nothing: the first
// slice of a disk that comes back is compared before it is there.
func TestDigestsOfAnAbsentDiskEqualNothing(t *testing.T) {
	p, _, _, _, s := mixed(t, 96)
	must(t, p.send(s, p.become(onlyA, disk("vdb", 4096))))
	must(t, p.send(s, p.become(onlyA)))
	for range 2 {
		ds, err := s.Digests(t.Context(), s.Committed(), "vdb", [32]byte{1}, []block.Range{{Off: 0, Len: 4096}, {Off: 4096, Len: 512}})
		must(t, err)
		if ds[0] != [16]byte{} || ds[1] != [16]byte{} {
			t.Errorf("digests %x", ds)
		}
		must(t, settle(s))
	}
	if _, err := s.Digests(t.Context(), s.Committed(), "vdz", [32]byte{1}, nil); !errors.Is(err, points.ErrDisks) {
		t.Errorf("a disk that never was: %v", err)
	}
	must(t, s.Close())
}

// A process dies with a backlog in which disks join and leave; the next one
// finds every state, and applies it.
func TestABacklogOfSetsOfDisksIsRecovered(t *testing.T) {
	p := newPrimary(97).alone()
	p.room = sizeA
	h := blocktest.NewHost()
	s, err := p.create(h)
	must(t, err)
	must(t, p.epochs(s, 2, 0, true))
	for _, set := range [][]delta.Disk{{onlyA, disk("vdb", 4096)}, {onlyA, disk("vdb", 3*4096)}, {disk("vdc", 512), onlyA}, {onlyA}, {onlyA, disk("vdb", 8192)}} {
		must(t, p.send(s, p.become(set...)))
		next, err := points.Open(p.config(h.Kill(fsxtest.Newest)))
		must(t, err)
		for range 2 {
			if got := next.Disks(); !sameDisks(got, set) {
				t.Errorf("disks %v, not %v", got, set)
			}
			must(t, p.sound(next))
			must(t, settle(next))
		}
		must(t, next.Close())
	}
	must(t, p.recheck(h.Cut(fsxtest.Oldest)))
	b := p.become(onlyA, disk("vdd", 512)) // begun, and no more
	r, err := s.Begin(header(t, b))
	must(t, err)
	must(t, r.Chunk(b.Chunks[0]))
	left := h.Kill(fsxtest.Newest)
	next, err := points.Open(p.config(left))
	must(t, err)
	if got := next.Absent(); slices.Contains(got, "vdd") {
		t.Errorf("%v may be deleted while an epoch with it is being received", got)
	}
	must(t, p.send(next, b))
	must(t, settle(next))
	must(t, p.sound(next))
	must(t, errors.Join(next.Close(), s.Close()))
}

// On real files: what the identity of a removed disk's image is does not
// matter, the copy of a store has what points need, and an image that nothing
// needs can be deleted.
func TestARemovedDisksFile(t *testing.T) {
	p := newPrimary(98).alone()
	d := &points.Dir{Path: t.TempDir()}
	open := func(d *points.Dir) *points.Store {
		t.Helper()
		cfg := p.config(blocktest.NewHost())
		must(t, d.Configure(&cfg))
		s, err := points.Open(cfg)
		if errors.Is(err, os.ErrNotExist) {
			s, err = points.Create(cfg, p.disks)
		}
		must(t, err)
		return s
	}
	s := open(d)
	must(t, p.seed(s))
	for _, set := range [][]delta.Disk{{onlyA}, {onlyA, disk("vdb", 4*4096)}, {onlyA, disk("vdb", 8192+512)}, {onlyA}, {onlyA}} {
		must(t, p.send(s, p.become(set...)))
		must(t, settle(s))
	}
	must(t, s.Close())
	s = open(d)
	must(t, p.sound(s))
	kept := filepath.Join(t.TempDir(), "kept")
	_, err := s.CopyTo(t.Context(), kept)
	must(t, err)
	c := open(&points.Dir{Path: kept})
	must(t, p.sound(c))
	must(t, c.Close())
	s.SetPolicy(points.Policy{Grid: []points.Row{}}, 0)
	must(t, settle(s))
	if got := s.Absent(); !slices.Equal(got, []string{"vdb"}) {
		t.Fatalf("%v may be deleted", got)
	}
	must(t, os.Remove(d.ImagePath("vdb")))
	must(t, p.epochs(s, 1, 0, true))
	must(t, s.Close())
	s = open(d)
	must(t, p.sound(s))
	if _, err := os.Stat(d.ImagePath("vdb")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the image of a disk that was removed is made again: %v", err)
	}
	must(t, s.Close())
}
