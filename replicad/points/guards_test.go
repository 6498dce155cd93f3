package points_test

import (
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// A segment of undo that is gone: the points before it are refused, by the name
// of the file that is missing, and the ones behind it stay exact.
func TestB24AMissingSegmentRefusesTheOlderPointsOnly(t *testing.T) {
	p, h, s := started(t, 71)
	must(t, p.epochs(s, 6, 20*time.Second, true))
	pts := s.Points()
	must(t, s.Close())
	var segs []string
	for _, f := range h.FS.Files() {
		if strings.HasPrefix(f, "undo/") {
			segs = append(segs, f)
		}
	}
	if len(segs) != len(pts) || len(segs) < 5 {
		t.Fatalf("%d points in %d segments", len(pts), len(segs))
	}
	const gone = 2
	must(t, h.FS.Remove(segs[gone]))
	s, err := points.Open(p.config(h))
	must(t, err)
	defer s.Close() //nolint:errcheck // test
	for i, pt := range pts {
		if err := p.exact(s, pt.Pos); (err == nil) != (i > gone) {
			t.Errorf("point %d, %d is gone: %v", i, gone, err)
		}
	}
	left := s.Points()
	if len(left) != len(pts)-1 {
		t.Fatalf("%d points of %d are left", len(left), len(pts))
	}
	for i, pt := range left {
		var damage *points.DamageError
		switch {
		case i >= gone && pt.Damage != nil:
			t.Errorf("point %d behind the gap: %v", i, pt.Damage)
		case i < gone && (!errors.As(pt.Damage, &damage) || damage.File != segs[gone]):
			t.Errorf("point %d before the gap: %v, want %s to be missing", i, pt.Damage, segs[gone])
		}
		if i >= gone { // what is listed as damaged says so, whatever is asked of it
			continue
		}
		_, err := s.View(pt.Pos)
		_, sized := s.DisksAt(pt.Pos)
		_, promoted := s.PromoteAt(t.Context(), pt.Pos, delta.Generation{9})
		for what, err := range map[string]error{"a view": err, "its disks": sized, "a promotion": promoted} {
			if !errors.As(err, &damage) || damage.File != segs[gone] {
				t.Errorf("%s of point %d before the gap: %v, want %s to be missing", what, i, err, segs[gone])
			}
		}
	}
}

// An epoch that was on its way when the replica was promoted is not committed
// any more, nor is the committed one acknowledged again: whoever promoted knows
// where the generation ends.
func TestAnEpochOnItsWayIsNotCommittedBehindAPromotion(t *testing.T) {
	for _, again := range []bool{false, true} {
		p, h, s := started(t, 72)
		must(t, p.epochs(s, 2, time.Second, false))
		b := p.cut(p.touch(6))
		if again {
			must(t, p.send(s, b))
		}
		must(t, s.ApplyAll(t.Context()))
		hd, err := delta.ParseHeader(b.Header)
		must(t, err)
		r, err := s.Begin(hd)
		must(t, err)
		for i := int(r.Next()); i < len(b.Chunks); i++ {
			must(t, r.Chunk(b.Chunks[i]))
		}
		at := s.Committed()
		seal, err := s.Promote(delta.Generation{8}, false)
		must(t, err)
		if seal.At != at {
			t.Errorf("promoted at %v, committed was %v", seal.At, at)
		}
		if pos, err := r.Commit(b.Manifest); err == nil {
			t.Errorf("acknowledged %v behind a promotion at %v (committed before: %v)", pos, seal.At, again)
		}
		if c := s.Committed(); c != at {
			t.Errorf("committed %v behind a promotion at %v", c, seal.At)
		}
		must(t, p.basesAre(h, at))
		must(t, s.Close())
	}
}

// The cursor of a disk says that everything before it is here. A chunk that
// begins behind it is refused and moves nothing; with what is between, it is
// taken.
func TestASeedTakesNoChunkBehindItsCursor(t *testing.T) {
	p, h := newPrimary(73), blocktest.NewHost()
	s, err := points.Create(p.config(h), p.disks)
	must(t, err)
	defer s.Close() //nolint:errcheck // test
	part := func(lo, hi int64) (*delta.Header, []byte) {
		spec := delta.Spec{
			Header:  delta.Header{VM: p.vm, Generation: p.gen, Disks: p.disks, Seed: true},
			Content: p.content, Changed: [][]block.Range{{{Off: lo, Len: hi - lo}}, nil},
		}
		b, err := spec.Build()
		must(t, err)
		if len(b.Chunks) != 1 {
			t.Fatalf("%d chunks", len(b.Chunks))
		}
		return &spec.Header, b.Chunks[0]
	}
	const first, second = 4 * 4096, 8 * 4096
	for _, step := range []struct {
		lo, hi, cursor int64
		err            error
	}{
		{second, sizeA, 0, delta.ErrOrder},
		{0, first, first, nil},
		{first + 4096, sizeA, first, delta.ErrOrder},
		{first, second, second, nil},
		{second, sizeA, sizeA, nil},
	} {
		if err := s.SeedChunk(part(step.lo, step.hi)); !errors.Is(err, step.err) {
			t.Errorf("chunk [%d, %d): %v, want %v", step.lo, step.hi, err, step.err)
		}
		got, err := s.SeedFlush()
		must(t, err)
		if want := map[string]int64{"vda": step.cursor, "vdb": 0}; !maps.Equal(got, want) {
			t.Errorf("after the chunk [%d, %d) the cursors are %v, want %v", step.lo, step.hi, got, want)
		}
	}
	must(t, sameBytes(h.Disk("vda", sizeA).Content(), p.content[0]))
}
