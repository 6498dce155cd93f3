package points

import (
	"sort"

	"kvmreplica/internal/block"
)

var _ block.Mapper = (*viewDisk)(nil)

// Map implements block.Mapper: a range is a hole where the image has one and
// neither a spool nor undo has anything. What the image held at the state was
// synced before; what was written since is in the undo, which is asked second.
func (d *viewDisk) Map(off, n int64, fn func(block.Extent) bool) error {
	if err := block.Check(off, n, d.size); err != nil {
		return err
	}
	s := d.v.s
	var above []block.Range
	layers, err := s.layers(d.v.at.ordinal)
	if err != nil {
		return err
	}
	for pc := range overlay(layers, d.disk, off, off+n) {
		above = append(above, pc.Range)
	}
	s.unref(layers)
	base, err := s.mapBase(d.v.at.ordinal, d.disk, off, n)
	if err != nil {
		return err
	}
	segs, err := s.undoSince(d.v.at.ordinal)
	if err != nil {
		return err
	}
	defer s.unrefSegments(segs)
	for _, g := range segs {
		hits, err := g.within(keyOf(d.disk, off/granule), keyOf(d.disk, (off+n-1)/granule+1))
		if err != nil {
			return err
		}
		for _, e := range hits {
			above = append(above, block.Range{Off: e.key.granule() * granule, Len: granule})
		}
	}
	mapOver(base, above, off, off+n, fn)
	return nil
}

// mapBase asks the image; what lies beyond its end is a hole.
func (s *Store) mapBase(o uint64, disk int, off, n int64) (out []block.Extent, err error) {
	base, done, err := s.holdBase(disk)
	if err != nil {
		return nil, err
	}
	defer done()
	s.mu.Lock()
	err = s.alive(o)
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	have := int64(0)
	if base != nil {
		have = min(max(base.Size()-off, 0), n)
	}
	m, ok := base.(block.Mapper)
	switch {
	case have == 0:
	case !ok:
		out = append(out, block.Extent{Range: block.Range{Off: off, Len: have}})
	default:
		err = m.Map(off, have, func(e block.Extent) bool {
			out = append(out, e)
			return true
		})
	}
	if have < n {
		out = append(out, block.Extent{Range: block.Range{Off: off + have, Len: n - have}, Hole: true, Zero: true})
	}
	return out, err
}

// mapOver shows the holes of base that nothing in above covers; all else says
// nothing.
func mapOver(base []block.Extent, above []block.Range, off, end int64, fn func(block.Extent) bool) {
	sort.Slice(above, func(i, j int) bool { return above[i].Off < above[j].Off })
	at := off
	hole := func(from, to int64) bool { // the next hole; what is before it is data
		if from = max(from, at); to <= from {
			return true
		}
		if from > at && !fn(block.Extent{Range: block.Range{Off: at, Len: from - at}}) {
			return false
		}
		at = to
		return fn(block.Extent{Range: block.Range{Off: from, Len: to - from}, Hole: true, Zero: true})
	}
	i := 0
	covered := off // everything in above up to i ends at or before this
	for _, e := range base {
		if !e.Zero {
			continue
		}
		from := max(e.Off, covered)
		for ; i < len(above) && above[i].Off < e.End(); i++ {
			if !hole(from, min(above[i].Off, e.End())) {
				return
			}
			covered = max(covered, above[i].End())
			from = max(from, covered)
		}
		if !hole(from, e.End()) {
			return
		}
	}
	if at < end {
		fn(block.Extent{Range: block.Range{Off: at, Len: end - at}})
	}
}
