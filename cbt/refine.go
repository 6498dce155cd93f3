package cbt

import (
	"fmt"
	"sync/atomic"

	"kvmreplica/internal/block"
)

// maxCompare bounds one comparison: its memory and the hold of the gate.
const maxCompare = 64 << 20

// Comparison is one range being compared with the replica's committed content.
// The zero moment is BeginCompare: what is written after it cannot be cleared.
type Comparison struct {
	d       *Disk
	st      *diskState
	lo, hi  uint64 // granules
	cutSeq  uint64
	touched []atomic.Uint64 // granules written since; from word lo/64
}

// touch notes a write to granules [lo, hi).
func (c *Comparison) touch(lo, hi uint64) {
	lo, hi = max(lo, c.lo), min(hi, c.hi)
	for w := lo / 64; lo < hi && w <= (hi-1)/64; w++ {
		c.touched[w-c.lo/64].Or(mask(w, lo, hi))
	}
}

// BeginCompare starts the comparison of a range with what the replica has at
// the acknowledged position. Read the disk only after it returned, and end it
// with EndCompare. At most 64 MiB at a time; no epoch may be open.
func (g *Group) BeginCompare(disk string, off, n int64) (*Comparison, error) {
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	d := g.Disk(disk)
	if d == nil {
		return nil, fmt.Errorf("compare disk %q: %w", disk, ErrMismatch)
	}
	st := d.st.Load()
	if err := block.Check(off, n, st.size); err != nil {
		return nil, err
	}
	if n > maxCompare {
		return nil, fmt.Errorf("compare %d bytes at once, at most %d: %w", n, maxCompare, block.ErrRange)
	}
	if g.openEp != nil {
		return nil, ErrEpochOpen
	}
	c := &Comparison{d: d, st: st}
	c.lo, c.hi = wholeGranules(st, block.Range{Off: off, Len: n})
	c.touched = make([]atomic.Uint64, (c.hi+63)/64-c.lo/64+1)
	g.gate.Lock()
	c.cutSeq = g.cutSeq
	d.watch(c, true)
	g.gate.Unlock()
	// A write that has its range lock by now may not have seen the watch: it
	// counts as touching. One that takes its lock later will see it.
	d.ranges.inFlight(func(s span) { c.touch(s.lo, s.hi) })
	return c, nil
}

// wholeGranules is the granules that lie wholly in r; the last one of a disk
// counts as whole when r reaches the disk's end.
func wholeGranules(st *diskState, r block.Range) (lo, hi uint64) {
	lo, hi = uint64(r.Off+GranuleSize-1)>>granuleShift, uint64(r.End())>>granuleShift
	if r.End() == st.size {
		hi = st.granules
	}
	return lo, max(lo, hi)
}

// watch adds or removes a comparison from what writers look at. Gate held.
func (d *Disk) watch(c *Comparison, add bool) {
	var list []*Comparison
	if old := d.compares.Load(); old != nil {
		for _, o := range *old {
			if o != c {
				list = append(list, o)
			}
		}
	}
	if add {
		list = append(list, c)
	}
	if len(list) == 0 {
		d.compares.Store(nil)
		return
	}
	d.compares.Store(&list)
}

// EndCompare ends a comparison. equal lists what proved to be equal by digest;
// granules wholly inside it and not written since BeginCompare become clean.
// The whole range stops being suspect: what differs is simply dirty. ErrStale
// means that the acknowledged position or the marks changed meanwhile and
// nothing was cleared. A nil Comparison is refused.
func (g *Group) EndCompare(c *Comparison, equal []block.Range) error {
	if c == nil || c.d.g != g {
		return ErrStale
	}
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	g.gate.Lock()
	defer g.gate.Unlock()
	c.d.watch(c, false)
	if g.openEp != nil || c.cutSeq != g.cutSeq || c.d.st.Load() != c.st {
		return ErrStale
	}
	active := c.st.fine[g.slot]
	for _, r := range equal {
		if err := block.Check(r.Off, r.Len, c.st.size); err != nil {
			return err
		}
		lo, hi := wholeGranules(c.st, r)
		lo, hi = max(lo, c.lo), min(hi, c.hi)
		for w := lo / 64; lo < hi && w <= (hi-1)/64; w++ {
			active.andNot(w, mask(w, lo, hi)&^c.touched[w-c.lo/64].Load())
		}
	}
	c.st.suspect.clear(c.lo, c.hi)
	c.cutSeq = ^uint64(0) // a comparison counts once
	return nil
}

// CancelCompare ends a comparison without a result.
func (g *Group) CancelCompare(c *Comparison) {
	if c == nil || c.d.g != g {
		return
	}
	g.gate.Lock()
	c.d.watch(c, false)
	c.cutSeq = ^uint64(0)
	g.gate.Unlock()
}

// Suspect yields the suspect granules of a disk as ascending ranges: dirty
// only because nobody knows better.
func (g *Group) Suspect(disk string) func(yield func(block.Range) bool) {
	return func(yield func(block.Range) bool) {
		d := g.Disk(disk)
		if d == nil {
			return
		}
		st := d.st.Load()
		for s := range st.suspect.runs() {
			off := int64(s.lo) << granuleShift
			if !yield(block.Range{Off: off, Len: min(int64(s.hi)<<granuleShift, st.size) - off}) {
				return
			}
		}
	}
}
