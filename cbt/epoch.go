package cbt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"sync/atomic"

	"kvmreplica/internal/block"
)

// Epoch is one frozen cut over all disks. It has exactly two ends, Ack and
// Abandon. Until then the content of its granules as of the freeze can be
// read, however the guest writes: a granule about to be overwritten is copied
// first. Its methods are safe for concurrent use.
type Epoch struct {
	g      *Group
	number uint64
	slot   int // which bitmaps are this epoch's
	empty  bool
	byName map[string]*epochDisk
	byDisk map[*Disk]*epochDisk

	drained atomic.Bool // no write of this epoch is in flight
	over    atomic.Bool // ended or lost: nothing needs protection

	mu      sync.Mutex
	err     error // guarded by mu; why it is over
	failure bool  // guarded by mu; over without Ack or Abandon
}

// epochDisk is one disk of an epoch. A granule is copied when done has it and
// copies, too; released when only done has it.
type epochDisk struct {
	d      *Disk
	st     *diskState
	copies map[uint64]uint32 // guarded by Epoch.mu: granule to slot
}

// newEpoch prepares an epoch; cutMu held, so disks and sizes stand still.
func newEpoch(g *Group, number uint64) *Epoch {
	e := &Epoch{g: g, number: number, byName: map[string]*epochDisk{}, byDisk: map[*Disk]*epochDisk{}}
	for _, d := range g.disks {
		ed := &epochDisk{d: d, st: d.st.Load(), copies: map[uint64]uint32{}}
		e.byName[d.name], e.byDisk[d] = ed, ed
	}
	return e
}

// Number is the epoch's number. That of an empty epoch is not used up.
func (e *Epoch) Number() uint64 { return e.number }

// Empty reports that nothing had changed since the last ack: at the instant of
// the freeze every disk equalled the acknowledged position.
func (e *Epoch) Empty() bool { return e.empty }

// Generation is the generation the epoch belongs to.
func (e *Epoch) Generation() [16]byte { return e.g.Generation() }

// Disks lists the names of the disks in the cut.
func (e *Epoch) Disks() []string {
	var names []string
	for _, d := range e.g.all() {
		if e.byName[d.name] != nil {
			names = append(names, d.name)
		}
	}
	return names
}

// Err is nil while the epoch stands. ErrOverrun and read errors mean that it
// was lost; call Abandon.
func (e *Epoch) Err() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.err
}

// lost reports a failure that Abandon has not settled yet.
func (e *Epoch) lost() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.failure
}

// Ranges yields the frozen ranges of a disk in ascending order, none twice,
// clipped to the disk's size. It yields nothing once the epoch is over.
func (e *Epoch) Ranges(disk string) iter.Seq[block.Range] {
	return func(yield func(block.Range) bool) {
		ed := e.byName[disk]
		if ed == nil || e.empty {
			return
		}
		for s := range ed.st.fine[e.slot].runs() {
			if e.over.Load() {
				return
			}
			off := int64(s.lo) << granuleShift
			end := min(int64(s.hi)<<granuleShift, ed.st.size)
			if !yield(block.Range{Off: off, Len: end - off}) {
				return
			}
		}
	}
}

// DirtyBytes is the size of all frozen ranges together.
func (e *Epoch) DirtyBytes() (n int64) {
	for name := range e.byName {
		n += e.DiskBytes(name)
	}
	return n
}

// DiskBytes is the size of one disk's frozen ranges.
func (e *Epoch) DiskBytes(disk string) int64 {
	ed := e.byName[disk]
	if ed == nil || e.empty || e.over.Load() {
		return 0
	}
	return ed.st.fine[e.slot].bytes(ed.st.size)
}

// Drain returns once every write of the epoch has finished. ReadAt does it by
// itself.
func (e *Epoch) Drain(ctx context.Context) error {
	if e.drained.Load() {
		return nil
	}
	if err := e.g.flight.wait(ctx, int(e.number%2)); err != nil {
		return fmt.Errorf("epoch %d: wait for its writes: %w", e.number, err)
	}
	e.drained.Store(true)
	return nil
}

// ReadAt reads a range of a disk as it was at the freeze. Every granule of it
// must be frozen and not released. ctx bounds the wait for writes of the epoch
// still in flight. A failed read says nothing about the data: rule 8.
func (e *Epoch) ReadAt(ctx context.Context, disk string, p []byte, off int64) (int, error) {
	ed := e.byName[disk]
	if ed == nil {
		return 0, fmt.Errorf("epoch %d: disk %q: %w", e.number, disk, ErrNotFrozen)
	}
	if err := block.Check(off, int64(len(p)), ed.st.size); err != nil {
		return 0, err
	}
	if err := e.Drain(ctx); err != nil {
		return 0, err
	}
	lo, hi := granuleSpan(off, int64(len(p)))
	if err := e.Err(); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if !ed.st.fine[e.slot].all(lo, hi) {
		return 0, fmt.Errorf("epoch %d: %s at %d: %w", e.number, disk, off, ErrNotFrozen)
	}
	// No lock: whoever changes a granule meanwhile has published its old
	// content before, so it is found below.
	if n, err := ed.d.dev.ReadAt(p, off); n != len(p) {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return 0, fmt.Errorf("epoch %d: read %s at %d: %w", e.number, disk, off, err)
	}
	if err := e.overlay(ed, p, off, lo, hi); err != nil {
		return 0, err
	}
	return len(p), nil
}

// overlay puts copied granules over what the image holds now.
func (e *Epoch) overlay(ed *epochDisk, p []byte, off int64, lo, hi uint64) error {
	for g := lo; g < hi; g++ {
		if !ed.st.done.has(g) {
			continue
		}
		e.mu.Lock()
		if e.err != nil {
			err := e.err
			e.mu.Unlock()
			return err
		}
		slot, ok := ed.copies[g]
		if ok {
			old := e.g.store.at(slot)
			if at := int64(g)<<granuleShift - off; at >= 0 {
				copy(p[at:], old)
			} else {
				copy(p, old[-at:])
			}
		}
		e.mu.Unlock()
		if !ok {
			return fmt.Errorf("epoch %d: %s at %d was released: %w", e.number, ed.d.name, off, ErrNotFrozen)
		}
	}
	return e.Err()
}

// needsCopy reports whether writing granules [lo, hi) would destroy content
// the epoch still needs.
func (e *Epoch) needsCopy(d *Disk, st *diskState, lo, hi uint64) bool {
	return !e.over.Load() && st.fine[e.slot].any(lo, hi, st.done)
}

// protect copies the frozen content of granules [lo, hi), which the caller
// holds the range lock of and is about to overwrite. It never refuses: if a
// copy cannot be made the epoch is lost instead.
func (e *Epoch) protect(d *Disk, st *diskState, lo, hi uint64) {
	if !e.needsCopy(d, st, lo, hi) {
		return
	}
	buf := e.g.store.buffer()
	defer e.g.store.unbuffer(buf)
	const most = copyRun >> granuleShift
	frozen := st.fine[e.slot]
	for g := lo; g < hi && !e.over.Load(); {
		if !frozen.has(g) || st.done.has(g) {
			g++
			continue
		}
		n := uint64(1)
		for n < most && g+n < hi && frozen.has(g+n) && !st.done.has(g+n) {
			n++
		}
		if err := e.copyOut(d, st, buf, g, n); err != nil {
			e.lose(err)
			return
		}
		g += n
	}
}

// copyOut reads n granules at g and publishes them.
func (e *Epoch) copyOut(d *Disk, st *diskState, buf []byte, g, n uint64) error {
	off := int64(g) << granuleShift
	buf = buf[:min(int64(n)<<granuleShift, st.size-off)]
	if k, err := d.dev.ReadAt(buf, off); k != len(buf) {
		return fmt.Errorf("keep old content of %s at %d: %w", d.name, off, errors.Join(io.ErrUnexpectedEOF, err))
	}
	ed := e.byDisk[d]
	for i := range n {
		slot, ok := e.g.store.take()
		if !ok {
			return ErrOverrun
		}
		copy(e.g.store.at(slot), buf[i<<granuleShift:])
		e.mu.Lock()
		if e.err != nil {
			e.mu.Unlock()
			e.g.store.give(slot)
			return nil
		}
		if !st.fine[e.slot].has(g + i) { // kept back meanwhile
			e.mu.Unlock()
			e.g.store.give(slot)
			continue
		}
		ed.copies[g+i] = slot
		st.done.set(g+i, g+i+1)
		e.mu.Unlock()
	}
	return nil
}

// Release says that a range needs no protection any more: the replica has
// verified it and it will not be read again. What it took of the memory for
// copies is free for the rest of the epoch. Only granules wholly inside r count.
func (e *Epoch) Release(disk string, r block.Range) {
	ed := e.byName[disk]
	if ed == nil || e.empty || block.Check(r.Off, r.Len, ed.st.size) != nil {
		return
	}
	lo, hi := wholeGranules(ed.st, r)
	frozen := ed.st.fine[e.slot]
	for g := lo; g < hi; g++ {
		if !frozen.has(g) {
			continue
		}
		e.mu.Lock()
		if e.err == nil {
			if slot, ok := ed.copies[g]; ok {
				delete(ed.copies, g)
				e.g.store.give(slot)
			}
			ed.st.done.set(g, g+1)
		}
		e.mu.Unlock()
	}
}

// Pressed reports that more than half of the memory for copies is in use: what
// can be released should be.
func (e *Epoch) Pressed() bool { return e.g.store.bytes() > e.g.cfg.CaptureBytes/2 }

// lose ends the epoch because of err; the guest goes on at once. Abandon then
// merges its bits back.
func (e *Epoch) lose(err error) {
	if !e.end(err) {
		return
	}
	e.mu.Lock()
	e.failure = true
	e.mu.Unlock()
	e.g.abandoned.Add(1)
	if errors.Is(err, ErrOverrun) {
		e.g.overruns.Add(1)
	}
	e.g.cfg.Log.Warn("epoch lost", "epoch", e.number, "reason", err)
}

// end makes the epoch over and frees its copies; false when it was already.
func (e *Epoch) end(err error) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return false
	}
	// In this order: a reader that met data a writer no longer protected must
	// find err when it looks.
	e.err = err
	e.over.Store(true)
	for _, ed := range e.byName {
		for _, slot := range ed.copies {
			e.g.store.give(slot)
		}
		ed.copies = nil
	}
	return true
}

// Ack says that the replica durably holds exactly this epoch: its digest was
// compared with the one computed here. The epoch's bitmaps are dropped and
// nothing else; what was written since stays dirty.
func (e *Epoch) Ack(pos Position) error {
	g := e.g
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	if err := e.Err(); err != nil {
		return fmt.Errorf("ack epoch %d: %w", e.number, err)
	}
	if pos.Generation != e.Generation() || pos.Epoch != e.number {
		return fmt.Errorf("ack epoch %d with %v: %w", e.number, pos, ErrPosition)
	}
	if g.flight.n[e.number%2].Load() != 0 {
		return fmt.Errorf("ack epoch %d: %w", e.number, ErrNotDrained)
	}
	if vm := g.share.Load(); vm != nil {
		vm.setAcked(pos) // before the bits go: after a kill they are relative to it
	}
	if !e.end(ErrEpochEnded) {
		return fmt.Errorf("ack epoch %d: %w", e.number, e.Err())
	}
	g.unfreeze()
	for _, ed := range e.byName {
		ed.st.suspect.subtract(ed.st.fine[e.slot])
		ed.st.fine[e.slot].reset()
		ed.st.done.reset()
	}
	g.acked, g.openEp = pos, nil
	g.overruns.Store(0)
	g.show()
	return nil
}

// Abandon ends the epoch unshipped: its bits return to the active bitmaps and
// its number is never used again.
func (e *Epoch) Abandon() error {
	g := e.g
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	if g.openEp != e {
		if e.empty {
			return nil
		}
		return fmt.Errorf("abandon epoch %d: %w", e.number, ErrEpochEnded)
	}
	if e.end(ErrEpochEnded) {
		g.abandoned.Add(1)
	}
	g.mergeBack(e)
	return nil
}

// mergeBack returns the bits of an epoch that is over. cutMu held.
func (g *Group) mergeBack(e *Epoch) {
	g.unfreeze()
	for _, ed := range e.byName {
		ed.st.fine[e.slot^1].merge(ed.st.fine[e.slot], true)
		ed.st.done.reset()
	}
	e.mu.Lock()
	e.failure = false
	e.mu.Unlock()
	g.openEp = nil
	g.show()
}

// unfreeze takes the epoch away from the writers and overtakes comparisons.
func (g *Group) unfreeze() {
	g.gate.Lock()
	g.frozen.Store(nil)
	g.cutSeq++
	g.gate.Unlock()
}
