// Package cutdisk is a disk with a volatile write cache whose power can be cut,
// served to QEMU over NBD. It shares no code with the product.
//
// What a guest wrote and did not flush is at a cut kept or lost sector by
// sector (512 bytes), any subset in any order, chosen by seed; what was
// answered before a flush that was received, and what was written with FUA, is
// always kept. That is all a disk promises, and as much as file systems rely
// on. A sector is never torn.
//
// The caller must not cut while QEMU lives: a disk without power answers
// nothing.
package cutdisk

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
)

// Sector is what survives as a whole or not at all.
const Sector = 512

// page is the unit of memory.
const page = 4096

// Disk is a sparse disk in memory. Safe for concurrent use.
type Disk struct {
	size int64

	mu      sync.Mutex
	durable map[int64]*[page]byte // what survives for certain, by page number
	now     map[int64]*[page]byte // what a read shows
	pending []write               // since the last flush, in order
	stats   Stats
	left    int           // writes until the power goes, when armed
	armed   chan struct{} // closed when it has gone; nil = not armed
}

// write is one pending write; zeros have no data.
type write struct {
	off, n int64
	data   []byte
	fua    bool
}

// Stats count what a disk has seen.
type Stats struct {
	Writes, Flushes, FUA int64
	// Kept and Lost are pending sectors at all cuts so far.
	Kept, Lost int64
}

// New makes a disk of zeros. Size is a multiple of the sector.
func New(size int64) *Disk {
	return &Disk{size: size, durable: map[int64]*[page]byte{}, now: map[int64]*[page]byte{}}
}

// Size in bytes.
func (d *Disk) Size() int64 { return d.size }

// Stats returns the counters.
func (d *Disk) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

var errRange = errors.New("outside the disk")

func (d *Disk) check(off, n int64) error {
	if off < 0 || n < 0 || off > d.size-n || off%Sector != 0 || n%Sector != 0 {
		return fmt.Errorf("%d bytes at %d: %w", n, off, errRange)
	}
	return nil
}

// Arm lets the power go after n more writes: from then on nothing is executed
// or answered, until Cut. The channel is closed at that moment.
func (d *Disk) Arm(n int) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left, d.armed = n, make(chan struct{})
	return d.armed
}

// off counts a write and reports whether the power has gone; d.mu is held.
func (d *Disk) off(writes int) bool {
	if d.armed == nil {
		return false
	}
	select {
	case <-d.armed:
		return true
	default:
	}
	if d.left -= writes; d.left < 0 {
		close(d.armed)
		return true
	}
	return false
}

// errOff: the power is gone; there is no answer.
var errOff = errors.New("the disk has no power")

// read fills p with what was written last.
func (d *Disk) read(p []byte, off int64) error {
	if err := d.check(off, int64(len(p))); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.off(0) {
		return errOff
	}
	load(d.now, p, off)
	return nil
}

// write takes a copy of data; nil data writes n zeros.
func (d *Disk) write(off, n int64, data []byte, fua bool) error {
	if err := d.check(off, n); err != nil {
		return err
	}
	w := write{off: off, n: n, fua: fua}
	if data != nil {
		w.data = append([]byte(nil), data...)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.off(1) {
		return errOff
	}
	d.stats.Writes++
	if fua {
		d.stats.FUA++
	}
	store(d.now, w.data, w.off, w.n)
	d.pending = append(d.pending, w)
	return nil
}

// flush makes everything so far durable.
func (d *Disk) flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.off(0) {
		return errOff
	}
	d.stats.Flushes++
	for _, w := range d.pending {
		store(d.durable, w.data, w.off, w.n)
	}
	d.pending = nil
	return nil
}

// Cut takes the power away and gives it back: the disk then holds one legal
// survivor, chosen by rng. The text says which kind.
func (d *Disk) Cut(rng *rand.Rand) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	kind, keep := survivor(rng, len(d.pending))
	var kept, lost int64
	for i, w := range d.pending {
		for at := int64(0); at < w.n; at += Sector {
			if !w.fua && !keep(i, at/Sector) {
				lost++
				continue
			}
			kept++
			var data []byte
			if w.data != nil {
				data = w.data[at : at+Sector]
			}
			store(d.durable, data, w.off+at, Sector)
		}
	}
	writes := len(d.pending)
	d.pending, d.armed = nil, nil
	d.stats.Kept, d.stats.Lost = d.stats.Kept+kept, d.stats.Lost+lost
	d.now = make(map[int64]*[page]byte, len(d.durable))
	for i, p := range d.durable {
		c := *p
		d.now[i] = &c
	}
	return fmt.Sprintf("%s: %d writes pending, %d sectors kept, %d lost", kind, writes, kept, lost)
}

// survivor chooses how pending sectors survive: the extremes, an orderly disk,
// and disorder of several degrees.
func survivor(rng *rand.Rand, writes int) (string, func(write int, sector int64) bool) {
	switch rng.IntN(6) {
	case 0:
		return "nothing unflushed survives", func(int, int64) bool { return false }
	case 1:
		return "everything survives", func(int, int64) bool { return true }
	case 2:
		n, torn := rng.IntN(writes+1), rng.Int64N(64)
		return "in order up to a torn write", func(w int, s int64) bool { return w < n || w == n && s < torn }
	case 3:
		return "whole writes, in any order", func() func(int, int64) bool {
			choice := map[int]bool{}
			return func(w int, _ int64) bool {
				if _, ok := choice[w]; !ok {
					choice[w] = rng.IntN(2) == 0
				}
				return choice[w]
			}
		}()
	case 4:
		return "half of the sectors", func(int, int64) bool { return rng.IntN(2) == 0 }
	}
	p := rng.Float64()
	return fmt.Sprintf("sectors with probability %.2f", p), func(int, int64) bool { return rng.Float64() < p }
}

// load copies from pages, store copies to them (zeros when data is nil).
func load(pages map[int64]*[page]byte, p []byte, off int64) {
	for len(p) > 0 {
		in := off % page
		n := min(int64(len(p)), page-in)
		if pg := pages[off/page]; pg != nil {
			copy(p[:n], pg[in:in+n])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

func store(pages map[int64]*[page]byte, data []byte, off, n int64) {
	for n > 0 {
		in := off % page
		k := min(n, page-in)
		pg := pages[off/page]
		switch {
		case data == nil && pg == nil:
		case data == nil && k == page:
			delete(pages, off/page)
		case data == nil:
			clear(pg[in : in+k])
		default:
			if pg == nil {
				pg = new([page]byte)
				pages[off/page] = pg
			}
			copy(pg[in:in+k], data[:k])
		}
		if data != nil {
			data = data[k:]
		}
		off, n = off+k, n-k
	}
}
