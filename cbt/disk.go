package cbt

import (
	"errors"
	"fmt"
	"sync/atomic"

	"kvmreplica/internal/block"
)

// Disk is one tracked disk: the block.Device a server exports. Close refuses
// further I/O on it and leaves the real device open; the Group's owner closes
// that.
type Disk struct {
	g     *Group
	name  string
	id    id16
	dev   block.Device
	ident func() (block.Identity, error)
	try   block.TryWriter // nil if dev has no such thing
	tryR  block.TryReader

	ranges   rangeLock
	st       atomic.Pointer[diskState]
	compares atomic.Pointer[[]*Comparison]
	shut     atomic.Bool
	unsynced atomic.Bool // an image sync failed
	// seq detects a sequential writer: the first-touch region expected next,
	// and how often it came true.
	seqNext atomic.Uint64
	seqRun  atomic.Uint32
}

var (
	_ block.Device     = (*Disk)(nil)
	_ block.TryWriter  = (*Disk)(nil)
	_ block.TryReader  = (*Disk)(nil)
	_ block.Mapper     = (*Disk)(nil)
	_ block.FastZeroer = (*Disk)(nil)
	_ block.FileBacked = (*Disk)(nil)
)

// diskState is everything that depends on the disk's size. It is replaced as a
// whole while nothing is in flight.
type diskState struct {
	size     int64
	granules uint64
	fine     [2]*bitmap
	suspect  *bitmap
	done     *bitmap // of the open epoch: copied or released, see Epoch
	intent   *intentMap
	shm      *sharedDisk     // nil without shared memory
	lastTag  []atomic.Uint32 // per region: the last epoch that wrote to it
}

// ticket is a write in flight.
type ticket struct {
	st     *diskState
	lock   uint64
	lo, hi uint64 // granules
	parity int
	frozen *Epoch // the epoch whose content the write must not destroy
}

func granuleSpan(off, n int64) (lo, hi uint64) {
	return uint64(off) >> granuleShift, uint64(off+n+GranuleSize-1) >> granuleShift
}

func regionSpan(lo, hi uint64) (uint64, uint64) {
	return lo / granulesPerRegion, (hi + granulesPerRegion - 1) / granulesPerRegion
}

// Name is the disk's name in Config.
func (d *Disk) Name() string { return d.name }

// WriteAt implements block.Device. It waits for overlapping writes, for the
// intent record and for copies of frozen content, in this order, and for
// nothing else.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	t, err := d.begin(off, int64(len(p)))
	if err != nil || t.st == nil {
		return 0, err
	}
	n, err := d.dev.WriteAt(p, off)
	d.end(&t)
	return n, err
}

// TryWriteAt implements block.TryWriter: the whole write without waiting, or
// ErrWouldBlock and no byte written.
func (d *Disk) TryWriteAt(p []byte, off int64) (int, error) {
	t, err := d.tryBegin(off, int64(len(p)))
	if err != nil || t.st == nil {
		return 0, err
	}
	var n int
	if d.try != nil {
		n, err = d.try.TryWriteAt(p, off)
	} else {
		n, err = d.dev.WriteAt(p, off)
	}
	d.end(&t)
	return n, err
}

// ZeroAt implements block.Device, in pieces; the first error ends it.
func (d *Disk) ZeroAt(off, n int64, punch bool) error {
	if err := block.Check(off, n, d.Size()); err != nil {
		return err
	}
	for done := int64(0); done < n; {
		// Pieces end on region borders, so that none is marked twice.
		piece := min(n-done, zeroPiece-(off+done)%zeroPiece)
		t, err := d.begin(off+done, piece)
		if err != nil {
			return err
		}
		err = d.dev.ZeroAt(off+done, piece, punch)
		d.end(&t)
		if err != nil {
			return err
		}
		done += piece
	}
	return nil
}

// begin takes everything a write needs before its first byte may reach the
// kernel. A ticket without state means that there is nothing to do.
func (d *Disk) begin(off, n int64) (ticket, error) {
	if err := d.check(off, n); err != nil || n == 0 {
		return ticket{}, err
	}
	lo, hi := granuleSpan(off, n)
	t := ticket{lo: lo, hi: hi, lock: d.ranges.lock(lo, hi)}
	t.st = d.st.Load() // under the range lock: a resize holds all of it
	if err := d.arm(&t, off, n); err != nil {
		d.ranges.unlock(t.lock)
		return ticket{}, err
	}
	if t.frozen != nil {
		t.frozen.protect(d, t.st, lo, hi)
	}
	return t, nil
}

// arm marks the intent and takes the tag. Range lock held.
func (d *Disk) arm(t *ticket, off, n int64) error {
	if err := block.Check(off, n, t.st.size); err != nil {
		return err
	}
	if err := d.refused(); err != nil {
		return err
	}
	rlo, rhi := regionSpan(t.lo, t.hi)
	if !t.st.intent.has(rlo, rhi) {
		if err := t.st.intent.mark(rlo, rhi, d.ahead(t.st, rlo, rhi)); err != nil {
			return fmt.Errorf("disk %s: record intent: %w", d.name, err)
		}
	}
	d.g.gate.RLock()
	defer d.g.gate.RUnlock()
	return d.tag(t, rlo, rhi)
}

// tryBegin is begin without waiting.
func (d *Disk) tryBegin(off, n int64) (t ticket, err error) {
	if err := d.check(off, n); err != nil || n == 0 {
		return ticket{}, err
	}
	t.lo, t.hi = granuleSpan(off, n)
	id, ok := d.ranges.tryLock(t.lo, t.hi)
	if !ok {
		return ticket{}, block.ErrWouldBlock
	}
	t.lock, t.st = id, d.st.Load()
	if err := d.tryArm(&t, off, n); err != nil {
		d.ranges.unlock(id)
		return ticket{}, err
	}
	return t, nil
}

func (d *Disk) tryArm(t *ticket, off, n int64) error {
	if err := block.Check(off, n, t.st.size); err != nil {
		return err
	}
	rlo, rhi := regionSpan(t.lo, t.hi)
	if !t.st.intent.has(rlo, rhi) || !d.g.gate.TryRLock() {
		return block.ErrWouldBlock
	}
	defer d.g.gate.RUnlock()
	if e := d.g.frozen.Load(); e != nil && e.needsCopy(d, t.st, t.lo, t.hi) {
		return block.ErrWouldBlock
	}
	return d.tag(t, rlo, rhi)
}

// tag gives the write its place in history and sets its bits. Gate held.
func (d *Disk) tag(t *ticket, rlo, rhi uint64) error {
	g := d.g
	if g.refuse != nil {
		return g.refuse
	}
	if list := d.compares.Load(); list != nil {
		for _, c := range *list {
			c.touch(t.lo, t.hi)
		}
	}
	t.st.fine[g.slot].set(t.lo, t.hi)
	for r := rlo; r < rhi; r++ {
		t.st.lastTag[r].Store(uint32(g.epoch))
	}
	t.parity = int(g.epoch % 2)
	g.flight.begin(t.parity)
	t.frozen = g.frozen.Load()
	return nil
}

// end gives everything back. The bits stay, whatever became of the write.
func (d *Disk) end(t *ticket) {
	d.g.flight.end(t.parity)
	d.ranges.unlock(t.lock)
}

func (d *Disk) check(off, n int64) error {
	if d.shut.Load() {
		return block.ErrClosed
	}
	return block.Check(off, n, d.st.Load().size)
}

func (d *Disk) refused() error {
	d.g.gate.RLock()
	defer d.g.gate.RUnlock()
	return d.g.refuse
}

// ahead is the end of the regions to mark together with [rlo, rhi): more, the
// longer the first touches have been sequential.
func (d *Disk) ahead(st *diskState, rlo, rhi uint64) uint64 {
	limit := uint64(max(d.g.cfg.PremarkRegions, 0))
	if limit == 0 {
		return rhi
	}
	run := d.seqRun.Load()
	if expect := d.seqNext.Load(); rlo == expect || (rhi > 1 && rlo+1 == expect) {
		run = min(run+1, 4)
	} else {
		run = 0
	}
	var more uint64
	if run > 0 {
		more = min(4<<run, limit)
	}
	end := min(rhi+more, st.intent.geo.regions)
	d.seqNext.Store(end)
	d.seqRun.Store(run)
	return end
}

// ReadAt implements block.Device; reads pass straight through.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	return d.dev.ReadAt(p, off)
}

// TryReadAt implements block.TryReader. A device that cannot tell is read
// at once.
func (d *Disk) TryReadAt(p []byte, off int64) (int, error) {
	if err := d.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	if d.tryR != nil {
		return d.tryR.TryReadAt(p, off)
	}
	return d.dev.ReadAt(p, off)
}

// Sync implements block.Device: everything answered before is durable. An
// error is final: from then on nothing is taken for clean any more.
func (d *Disk) Sync() error {
	if d.shut.Load() {
		return block.ErrClosed
	}
	err := d.dev.Sync()
	if err != nil && !errors.Is(err, block.ErrClosed) {
		d.g.syncFailed(d, err)
	}
	return err
}

// Size implements block.Device.
func (d *Disk) Size() int64 { return d.st.Load().size }

// Close implements block.Device: the disk refuses I/O from now on.
func (d *Disk) Close() error {
	d.shut.Store(true)
	return nil
}

// Map implements block.Mapper; without help from below nothing is known.
func (d *Disk) Map(off, n int64, fn func(block.Extent) bool) error {
	if err := d.check(off, n); err != nil {
		return err
	}
	if m, ok := d.dev.(block.Mapper); ok {
		return m.Map(off, n, fn)
	}
	if n > 0 {
		fn(block.Extent{Range: block.Range{Off: off, Len: n}})
	}
	return nil
}

// FastZero implements block.FastZeroer.
func (d *Disk) FastZero() bool {
	f, ok := d.dev.(block.FastZeroer)
	return ok && f.FastZero()
}

// ReadFD implements block.FileBacked: reads are not changed by tracking.
func (d *Disk) ReadFD() (int, bool) {
	if f, ok := d.dev.(block.FileBacked); ok && !d.shut.Load() {
		return f.ReadFD()
	}
	return -1, false
}

func (d *Disk) status(slot int) DiskStatus {
	st := d.st.Load()
	return DiskStatus{
		Name: d.name, Size: st.size,
		DirtyBytes:    min((st.fine[0].count.Load()+st.fine[1].count.Load())<<granuleShift, st.size),
		FrozenBytes:   st.fine[slot^1].bytes(st.size),
		SuspectBytes:  st.suspect.bytes(st.size),
		MarkedRegions: st.intent.marked.Load(),
		Regions:       int64(st.intent.geo.regions),
		IntentSyncs:   st.intent.syncs.Load(),
	}
}
