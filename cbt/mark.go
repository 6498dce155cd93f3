package cbt

import "kvmreplica/internal/block"

// Mark marks a range as different, durably, as a write to it would, without
// writing anything. For ranges somebody else proved to differ.
func (d *Disk) Mark(off, n int64) error {
	if err := block.Check(off, n, d.Size()); err != nil {
		return err
	}
	for done := int64(0); done < n; {
		piece := min(n-done, zeroPiece-(off+done)%zeroPiece)
		t, err := d.begin(off+done, piece)
		if err != nil {
			return err
		}
		d.end(&t)
		done += piece
	}
	return nil
}

// Dirty yields the granules of a disk that are marked since the last freeze,
// as ascending ranges.
func (g *Group) Dirty(disk string) func(yield func(block.Range) bool) {
	return func(yield func(block.Range) bool) {
		d := g.Disk(disk)
		if d == nil {
			return
		}
		g.gate.RLock()
		st := d.st.Load()
		active := st.fine[g.slot]
		g.gate.RUnlock()
		for s := range active.runs() {
			off := int64(s.lo) << granuleShift
			if !yield(block.Range{Off: off, Len: min(int64(s.hi)<<granuleShift, st.size) - off}) {
				return
			}
		}
	}
}

// IsDirty reports whether any granule of a range is marked since the last
// freeze.
func (d *Disk) IsDirty(off, n int64) bool {
	st := d.st.Load()
	if n <= 0 || block.Check(off, n, st.size) != nil {
		return false
	}
	lo, hi := granuleSpan(off, n)
	d.g.gate.RLock()
	defer d.g.gate.RUnlock()
	return st.fine[d.g.slot].any(lo, hi, nil)
}
