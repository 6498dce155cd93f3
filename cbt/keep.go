package cbt

import (
	"fmt"

	"kvmreplica/internal/block"
)

// Keep takes what is frozen of a disk from byte from on out of the epoch: it
// goes back to the active bitmap and is part of the next cut. from is a
// multiple of the granule or the disk's size; 0 keeps the whole disk back. Call
// it before anything of the epoch was read. What is left is an epoch even when
// that is nothing: its number is used.
//
// A write that is still in flight to what is kept belongs to the next cut like
// any other: that one waits for it.
func (e *Epoch) Keep(disk string, from int64) error {
	g := e.g
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	ed := e.byName[disk]
	switch {
	case ed == nil:
		return fmt.Errorf("epoch %d: keep back disk %q: %w", e.number, disk, ErrMismatch)
	case from < 0 || from > ed.st.size || from%GranuleSize != 0 && from != ed.st.size:
		return fmt.Errorf("epoch %d: keep back %s from byte %d of %d: %w", e.number, disk, from, ed.st.size, block.ErrRange)
	case e.empty:
		return nil
	}
	if err := e.Err(); err != nil {
		return fmt.Errorf("epoch %d: keep back %s: %w", e.number, disk, err)
	}
	lo := uint64(from+GranuleSize-1) >> granuleShift
	kept, err := e.keep(ed, lo)
	g.store.spillLess(kept)
	if err != nil {
		return fmt.Errorf("epoch %d: keep back %s: %w", e.number, disk, err)
	}
	return nil
}

// keep moves granules from lo on. cutMu held, so the epoch does not end by Ack
// or Abandon and the number of new writes stands still.
func (e *Epoch) keep(ed *epochDisk, lo uint64) (kept int64, err error) {
	g, st := e.g, ed.st
	g.gate.RLock()
	next := uint32(g.epoch)
	g.gate.RUnlock()
	frozen, active := st.fine[e.slot], st.fine[e.slot^1]
	before := frozen.count.Load()
	defer func() { kept = before - frozen.count.Load() }()
	for blk := range frozen.blocks() {
		e.mu.Lock() // whoever makes a copy looks again under it
		if e.err != nil {
			e.mu.Unlock()
			return 0, e.err
		}
		for w := max(blk.lo, lo/64); w < blk.hi; w++ {
			v := frozen.word(w) & mask(w, lo, st.granules)
			if v == 0 {
				continue
			}
			// In this order: an ack of this epoch does not cover the region any
			// more, and at every instant, also for who finds the shared memory
			// after a kill, the bits are in one of the two.
			st.lastTag[w*64/granulesPerRegion].Store(next)
			active.or(w, v)
			frozen.andNot(w, v)
		}
		e.mu.Unlock()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for gr, slot := range ed.copies {
		if gr >= lo {
			delete(ed.copies, gr)
			g.store.give(slot)
		}
	}
	for s := range st.done.runs() {
		st.done.clear(max(s.lo, lo), s.hi)
	}
	return 0, nil
}

// spillLess takes n slots off what the present epoch may spill: they are not
// frozen any more.
func (s *captureStore) spillLess(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spill != nil && s.spill.slots > 0 {
		s.spill.slots = max(s.spill.slots-int(n), granulesPerRegion)
	}
}
