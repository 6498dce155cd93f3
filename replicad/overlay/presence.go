package overlay

import (
	"iter"
	"sync"
	"sync/atomic"

	"kvmreplica/internal/block"
)

// state says where a granule's content is.
type state byte

const (
	below   state = 0 // in the device below
	present state = 1 // in the overlay's data
	zeroed  state = 2 // nowhere: zeros
)

// presence is two bits per granule: 64 MiB for a disk of 1 TiB, of which the
// kernel provides what is touched. Words are atomic because granules under
// different locks share one.
type presence []atomic.Uint64

const perWord = 32

func newPresence(size int64) presence {
	return make(presence, (size/granule)/perWord+1)
}

func (p presence) get(g int64) state {
	return state(p[g/perWord].Load() >> (2 * (g % perWord)) & 3)
}

// set gives n granules from g on a state.
func (p presence) set(g, n int64, st state) {
	for end := g + n; g < end; {
		in := g % perWord
		k := min(perWord-in, end-g)
		mask := ^uint64(0) >> (64 - 2*k) << (2 * in)
		bits := 0x5555555555555555 * uint64(st) & mask
		w := &p[g/perWord]
		for {
			old := w.Load()
			if w.CompareAndSwap(old, old&^mask|bits) {
				break
			}
		}
		g += k
	}
}

// run is a range of one state.
type run struct {
	block.Range
	state state
}

// runs cuts [off, off+n) into the longest ranges of one state.
func (p presence) runs(off, n int64) iter.Seq[run] {
	return func(yield func(run) bool) {
		for end := off + n; off < end; {
			g := off / granule
			st := p.get(g)
			for g++; g*granule < end; {
				if g%perWord == 0 && p[g/perWord].Load() == 0x5555555555555555*uint64(st) {
					g += perWord // a whole word of it
					continue
				}
				if p.get(g) != st {
					break
				}
				g++
			}
			next := min(g*granule, end)
			if !yield(run{Range: block.Range{Off: off, Len: next - off}, state: st}) {
				return
			}
			off = next
		}
	}
}

// stripes are locks of ranges: regions of 1 MiB share a fixed set of locks.
type stripes [64]sync.RWMutex

const region = 1 << 20

// lock locks a range, for reading or writing, and returns what unlocks it.
// Locks are always taken in ascending order.
func (s *stripes) lock(off, n int64, write bool) func() {
	first, last := off/region, (off+max(n, 1)-1)/region
	if last-first+1 >= int64(len(s)) {
		first, last = 0, int64(len(s))-1
	}
	var want [len(s)]bool
	for r := first; r <= last; r++ {
		want[r%int64(len(s))] = true
	}
	for i := range s {
		switch {
		case !want[i]:
		case write:
			s[i].Lock()
		default:
			s[i].RLock()
		}
	}
	return func() {
		for i := range s {
			switch {
			case !want[i]:
			case write:
				s[i].Unlock()
			default:
				s[i].RUnlock()
			}
		}
	}
}

// all locks everything for writing.
func (s *stripes) all() func() { return s.lock(0, int64(len(s))*region, true) }
