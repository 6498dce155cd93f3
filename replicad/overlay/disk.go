package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"kvmreplica/internal/block"
)

// mode says where a disk's reads and writes go.
const (
	modeOver  int32 = iota // writes beside the disk below
	modeMerge              // writes to both; what was never beside, below alone
	modePlain              // everything below
)

// Disk is one disk of a durable overlay.
type Disk struct {
	o        *Durable
	index    int
	name     string
	size     int64
	sharedAt int64
	data     block.Device
	in       presence

	// below and mode change under swap and all of locks; requests hold some of
	// locks, Sync holds swap.
	swap  sync.RWMutex
	locks stripes
	below block.Device
	mode  atomic.Int32
	shut  atomic.Bool
	used  atomic.Int64 // bytes of granules that are not below

	syncing sync.Mutex
	mu      sync.Mutex
	pending map[int]bool // words that changed since they were logged; guarded by mu
	failed  error        // guarded by mu: a sync failed, no later one counts
}

var (
	_ block.Device     = (*Disk)(nil)
	_ block.TryReader  = (*Disk)(nil)
	_ block.TryWriter  = (*Disk)(nil)
	_ block.Mapper     = (*Disk)(nil)
	_ block.FastZeroer = (*Disk)(nil)
	_ block.FileBacked = (*Disk)(nil)
)

// Size implements block.Device.
func (d *Disk) Size() int64 { return d.size }

// Close implements block.Device; it does nothing: the overlay closes its disks.
func (d *Disk) Close() error { return nil }

// still keeps every request and every sync out until the returned function is
// called.
func (d *Disk) still() func() {
	d.swap.Lock()
	unlock := d.locks.all()
	return func() { unlock(); d.swap.Unlock() }
}

// plain is the disk below once it holds everything, else nil.
func (d *Disk) plain() block.Device {
	if d.mode.Load() != modePlain || d.shut.Load() {
		return nil
	}
	return d.below // never replaced again
}

func (d *Disk) enter(off, n int64, write bool) (leave func(), err error) {
	if err := block.Check(off, n, d.size); err != nil {
		return nil, err
	}
	leave = d.locks.lock(off, n, write)
	if d.shut.Load() {
		leave()
		return nil, block.ErrClosed
	}
	return leave, nil
}

// ReadAt implements block.Device.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if b := d.plain(); b != nil {
		return b.ReadAt(p, off)
	}
	leave, err := d.enter(off, int64(len(p)), false)
	if err != nil {
		return 0, err
	}
	defer leave()
	if b := d.plain(); b != nil {
		return b.ReadAt(p, off)
	}
	done := 0
	for r := range d.in.runs(off, int64(len(p))) {
		part := p[r.Off-off : r.End()-off]
		switch r.state {
		case zeroed:
			clear(part)
		case present:
			_, err = d.data.ReadAt(part, r.Off)
		default:
			_, err = d.below.ReadAt(part, r.Off)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// WriteAt implements block.Device.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	if b := d.plain(); b != nil {
		return b.WriteAt(p, off)
	}
	leave, err := d.enter(off, int64(len(p)), true)
	if err != nil {
		return 0, err
	}
	defer leave()
	if b := d.plain(); b != nil {
		return b.WriteAt(p, off)
	}
	merging := d.mode.Load() == modeMerge
	done := 0
	for r := range d.in.runs(off, int64(len(p))) {
		part := p[r.Off-off : r.End()-off]
		if !merging || r.state != below {
			err = d.writeOver(part, r.Off)
		}
		if merging && err == nil {
			_, err = d.below.WriteAt(part, r.Off)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// writeOver puts p into the overlay.
func (d *Disk) writeOver(p []byte, at int64) error {
	for len(p) > 0 {
		g := at / granule
		n := wholeOf(at, int64(len(p)), d.size)
		if n == 0 {
			n = min(int64(len(p)), (g+1)*granule-at)
			if err := d.patch(g, p[:n], at); err != nil {
				return err
			}
		} else if _, err := d.data.WriteAt(p[:n], at); err != nil {
			return err
		}
		if err := d.mark(g, (n+granule-1)/granule, present); err != nil {
			return err
		}
		p, at = p[n:], at+n
	}
	return nil
}

// patch puts p into one granule, completing it from below.
func (d *Disk) patch(g int64, p []byte, at int64) error {
	st := d.in.get(g)
	if st == present {
		_, err := d.data.WriteAt(p, at)
		return err
	}
	var buf [granule]byte
	b := buf[:min(granule, d.size-g*granule)]
	if st == below {
		if _, err := d.below.ReadAt(b, g*granule); err != nil {
			return fmt.Errorf("read below the overlay: %w", err)
		}
	}
	copy(b[at-g*granule:], p)
	_, err := d.data.WriteAt(b, g*granule)
	return err
}

// mark gives granules a state that outlives this process. The range is locked.
func (d *Disk) mark(g, n int64, st state) error {
	first, last := g/perWord, (g+n-1)/perWord
	var changed, fresh int64
	for x := g; x < g+n; x++ {
		switch d.in.get(x) {
		case st:
			continue
		case below:
			fresh++
		}
		changed++
	}
	if changed == 0 {
		return nil
	}
	d.used.Add(fresh * granule)
	d.in.set(g, n, st)
	d.mu.Lock()
	for w := first; w <= last; w++ {
		d.pending[int(w)] = true
	}
	d.mu.Unlock()
	for w := first; w <= last; w++ {
		if err := d.share(int(w)); err != nil {
			return err
		}
	}
	return nil
}

// share writes a word into the boot's copy.
func (d *Disk) share(w int) error {
	f := d.o.shared
	if f == nil {
		return nil
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], d.in[w].Load())
	if _, err := f.WriteAt(b[:], d.sharedAt+int64(w)*8); err != nil {
		return fmt.Errorf("keep what is present for the next process: %w", err)
	}
	return nil
}

// ZeroAt implements block.Device.
func (d *Disk) ZeroAt(off, n int64, punch bool) error {
	if b := d.plain(); b != nil {
		return b.ZeroAt(off, n, punch)
	}
	leave, err := d.enter(off, n, true)
	if err != nil {
		return err
	}
	defer leave()
	if b := d.plain(); b != nil {
		return b.ZeroAt(off, n, punch)
	}
	merging := d.mode.Load() == modeMerge
	for r := range d.in.runs(off, n) {
		if !merging || r.state != below {
			if err := d.zeroOver(r.Off, r.Len, punch); err != nil {
				return err
			}
		}
		if merging {
			if err := d.below.ZeroAt(r.Off, r.Len, punch); err != nil {
				return err
			}
		}
	}
	return nil
}

// zeroOver marks whole granules and writes zeros into the parts.
func (d *Disk) zeroOver(off, n int64, punch bool) error {
	for n > 0 {
		g := off / granule
		whole := wholeOf(off, n, d.size)
		if whole == 0 {
			part := min(n, (g+1)*granule-off)
			if d.in.get(g) != zeroed {
				if err := d.writeOver(make([]byte, part), off); err != nil {
					return err
				}
			}
			off, n = off+part, n-part
			continue
		}
		if err := d.mark(g, (whole+granule-1)/granule, zeroed); err != nil {
			return err
		}
		if punch { // only to give space back: the mark says that it is zeros
			if err := d.data.ZeroAt(off, whole, true); err != nil {
				return err
			}
		}
		off, n = off+whole, n-whole
	}
	return nil
}

// Sync implements block.Device: data, then the log that says it is there. The
// states are taken before the data is synced, so that none is logged whose data
// may be missing.
func (d *Disk) Sync() error {
	if b := d.plain(); b != nil {
		return b.Sync()
	}
	d.syncing.Lock()
	defer d.syncing.Unlock()
	if d.shut.Load() {
		return block.ErrClosed
	}
	d.mu.Lock()
	words, failed := d.pending, d.failed
	d.pending = map[int]bool{}
	ws := make(map[wordKey]uint64, len(words))
	for w := range words {
		ws[keyOf(d.index, w)] = d.in[w].Load()
	}
	d.mu.Unlock()
	err := failed
	if err == nil {
		err = d.sync(ws)
	}
	if err != nil {
		d.mu.Lock()
		for w := range words {
			d.pending[w] = true
		}
		if d.failed == nil && !errors.Is(err, block.ErrClosed) {
			d.failed = fmt.Errorf("%w: %w", block.ErrSyncFailed, err)
		}
		d.mu.Unlock()
	}
	return err
}

func (d *Disk) sync(ws map[wordKey]uint64) error {
	d.swap.RLock() // the disk below is not replaced meanwhile
	defer d.swap.RUnlock()
	if b := d.plain(); b != nil {
		return b.Sync()
	}
	if err := d.data.Sync(); err != nil {
		return err
	}
	if len(ws) > 0 {
		if err := d.o.log.words(ws); err != nil {
			return err
		}
	}
	if d.mode.Load() == modeMerge {
		return d.below.Sync()
	}
	return nil
}

// wholeOf is the length of the whole granules at the beginning of [at, at+n);
// the last one of the disk may be short.
func wholeOf(at, n, size int64) int64 {
	switch {
	case at%granule != 0:
		return 0
	case at+n == size:
		return n
	}
	return n / granule * granule
}

// TryReadAt implements block.TryReader: what is below may be slow.
func (d *Disk) TryReadAt(p []byte, off int64) (int, error) {
	if b := d.plain(); b != nil {
		if t, ok := b.(block.TryReader); ok {
			return t.TryReadAt(p, off)
		}
		return b.ReadAt(p, off)
	}
	return 0, block.ErrWouldBlock
}

// TryWriteAt implements block.TryWriter: a granule may have to be completed.
func (d *Disk) TryWriteAt(p []byte, off int64) (int, error) {
	if b := d.plain(); b != nil {
		if t, ok := b.(block.TryWriter); ok {
			return t.TryWriteAt(p, off)
		}
		return b.WriteAt(p, off)
	}
	return 0, block.ErrWouldBlock
}

// Map implements block.Mapper: while there is an overlay, zeros are known and
// nothing else.
func (d *Disk) Map(off, n int64, fn func(block.Extent) bool) error {
	if m, ok := d.plain().(block.Mapper); ok {
		return m.Map(off, n, fn)
	}
	if err := block.Check(off, n, d.size); err != nil {
		return err
	}
	for r := range d.in.runs(off, n) {
		z := r.state == zeroed && d.mode.Load() != modePlain
		if !fn(block.Extent{Range: r.Range, Hole: z, Zero: z}) {
			return nil
		}
	}
	return nil
}

// FastZero implements block.FastZeroer.
func (d *Disk) FastZero() bool {
	if b := d.plain(); b != nil {
		f, ok := b.(block.FastZeroer)
		return ok && f.FastZero()
	}
	return d.mode.Load() == modeOver
}

// ReadFD implements block.FileBacked: only when everything is below.
func (d *Disk) ReadFD() (int, bool) {
	if f, ok := d.plain().(block.FileBacked); ok {
		return f.ReadFD()
	}
	return -1, false
}
