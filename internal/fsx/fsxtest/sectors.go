package fsxtest

import (
	"bytes"
	"slices"
)

// SectorSize is the unit that survives or vanishes as one.
const SectorSize = 512

// maxVersions bounds the remembered values of one pending item. The durable
// one and the newest are always kept.
const maxVersions = 8

const (
	chunkSectors = 128
	pageSectors  = 8
)

type sector = [SectorSize]byte

// chunk is a piece of the clean content, shared between clones until written.
type chunk struct {
	owner *int
	sec   [chunkSectors]*sector
}

// pending is a sector with more than one possible value. nil means zeros.
type pending struct {
	vers  []*sector // vers[0] is the oldest that may be on the platter
	dirty bool      // false: a failed Sync marked it clean, a good one skips it
	shown *sector   // what a read returns
}

// Sectors is the content of one file or disk under the strict model of the
// package comment. It is a building block for doubles and not safe for
// concurrent use: call it within Power.Do or Power.Locked.
type Sectors struct {
	owner    *int
	chunks   map[int64]*chunk
	pend     map[int64]*pending
	inflight []int64 // sectors of the write during which the power went
}

// NewSectors returns content that reads as zeros everywhere.
func NewSectors() *Sectors {
	return &Sectors{owner: new(int), chunks: map[int64]*chunk{}, pend: map[int64]*pending{}}
}

func (s *Sectors) clean(i int64) *sector {
	if c := s.chunks[i/chunkSectors]; c != nil {
		return c.sec[i%chunkSectors]
	}
	return nil
}

func (s *Sectors) setClean(i int64, v *sector) {
	c := s.chunks[i/chunkSectors]
	if c == nil {
		if v == nil {
			return
		}
		c = &chunk{owner: s.owner}
		s.chunks[i/chunkSectors] = c
	} else if c.owner != s.owner {
		c = &chunk{owner: s.owner, sec: c.sec}
		s.chunks[i/chunkSectors] = c
	}
	c.sec[i%chunkSectors] = v
}

// get is what a read of sector i returns; nil is zeros.
func (s *Sectors) get(i int64) *sector {
	if p := s.pend[i]; p != nil {
		return p.shown
	}
	return s.clean(i)
}

// put adds a version of sector i that is not yet durable.
func (s *Sectors) put(i int64, v *sector) {
	p := s.pend[i]
	if p == nil {
		p = &pending{vers: []*sector{s.clean(i)}}
		s.pend[i] = p
	}
	if len(p.vers) == maxVersions {
		p.vers = append(p.vers[:1], p.vers[2:]...)
	}
	p.vers = append(p.vers, v)
	p.shown, p.dirty = v, true
}

// ReadAt fills b from off; what was never written reads as zeros.
func (s *Sectors) ReadAt(b []byte, off int64) {
	for len(b) > 0 {
		i, in := off/SectorSize, off%SectorSize
		n := min(int64(len(b)), SectorSize-in)
		if v := s.get(i); v != nil {
			copy(b[:n], v[in:])
		} else {
			clear(b[:n])
		}
		b, off = b[n:], off+n
	}
}

// WriteAt stores b at off, pending. dying marks its sectors as hit by the cut.
func (s *Sectors) WriteAt(b []byte, off int64, dying bool) {
	for len(b) > 0 {
		i, in := off/SectorSize, off%SectorSize
		n := min(int64(len(b)), SectorSize-in)
		v := new(sector)
		if old := s.get(i); old != nil {
			*v = *old
		}
		copy(v[in:], b[:n])
		s.put(i, v)
		if dying {
			s.inflight = append(s.inflight, i)
		}
		b, off = b[n:], off+n
	}
}

// Zero makes [off, off+n) read as zeros, pending. It costs nothing where
// nothing was ever written.
func (s *Sectors) Zero(off, n int64, dying bool) {
	end := off + n
	for _, i := range s.used(off/SectorSize, (end+SectorSize-1)/SectorSize) {
		lo, hi := max(off, i*SectorSize), min(end, (i+1)*SectorSize)
		switch {
		case hi-lo == SectorSize:
			s.put(i, nil)
			if dying {
				s.inflight = append(s.inflight, i)
			}
		case hi > lo:
			s.WriteAt(make([]byte, hi-lo), lo, dying)
		}
	}
}

// used lists the sectors in [from, to) that may read as something but zeros,
// by walking the shorter of the range and what was ever written.
func (s *Sectors) used(from, to int64) []int64 {
	var out []int64
	if to-from <= int64(len(s.pend)+len(s.chunks)*chunkSectors) {
		for i := from; i < to; i++ {
			if s.pend[i] != nil || s.clean(i) != nil {
				out = append(out, i)
			}
		}
		return out
	}
	for ci, c := range s.chunks {
		for k, v := range c.sec {
			i := ci*chunkSectors + int64(k)
			if v != nil && i >= from && i < to && s.pend[i] == nil {
				out = append(out, i)
			}
		}
	}
	for i := range s.pend {
		if i >= from && i < to {
			out = append(out, i)
		}
	}
	slices.Sort(out)
	return out
}

// Sync makes everything written durable, except what an earlier failed Sync
// marked clean and nobody wrote again.
func (s *Sectors) Sync() {
	for i, p := range s.pend {
		if p.dirty {
			s.setClean(i, p.shown)
			delete(s.pend, i)
		}
	}
}

// SyncFailed is a Sync that reported an error: pages are clean, the platter
// holds old or new. With drop, reads return the oldest value from now on.
func (s *Sectors) SyncFailed(drop bool) {
	for _, p := range s.pend {
		if p.dirty && drop {
			p.shown = p.vers[0]
		}
		p.dirty = false
	}
}

// Pending is the number of sectors that a cut might leave in more than one way.
func (s *Sectors) Pending() int { return len(s.pend) }

func (s *Sectors) share() *Sectors {
	s.owner = new(int) // neither side owns the shared chunks any more
	c := &Sectors{owner: new(int), chunks: make(map[int64]*chunk, len(s.chunks)), pend: make(map[int64]*pending, len(s.pend))}
	for k, v := range s.chunks {
		c.chunks[k] = v
	}
	return c
}

// Cut returns the content as a power cut might leave it, all of it durable.
// With torn, at most one sector of the write hit by the cut is garbage.
func (s *Sectors) Cut(choose Chooser, torn bool) *Sectors {
	c := s.share()
	for _, i := range s.pendingInOrder() {
		vers := distinct(s.pend[i].vers)
		k := 0
		if len(vers) > 1 {
			k = choose(len(vers))
		}
		c.setClean(i, vers[k])
	}
	if torn && len(s.inflight) > 0 {
		if k := choose(len(s.inflight) + 1); k > 0 {
			c.setClean(s.inflight[k-1], garbage(s.inflight[k-1]))
		}
	}
	return c
}

// Kill returns the content after the process died: the page cache stays, with
// its pending versions; of a write under way, choose decides how many of its
// 4 KiB pages arrived, from the first on.
func (s *Sectors) Kill(choose Chooser) *Sectors {
	c := s.share()
	for i, p := range s.pend {
		c.pend[i] = &pending{vers: append([]*sector(nil), p.vers...), dirty: p.dirty, shown: p.shown}
	}
	var pages []int64
	for _, i := range s.inflight {
		if pg := i / pageSectors; len(pages) == 0 || pages[len(pages)-1] != pg {
			pages = append(pages, pg)
		}
	}
	if len(pages) == 0 {
		return c
	}
	arrived := choose(len(pages) + 1)
	for _, i := range s.inflight {
		p := c.pend[i]
		if p == nil || arrived == len(pages) || i/pageSectors < pages[arrived] {
			continue
		}
		p.vers = p.vers[:len(p.vers)-1]
		p.shown = p.vers[len(p.vers)-1]
		if len(p.vers) == 1 {
			delete(c.pend, i)
		}
	}
	return c
}

func (s *Sectors) pendingInOrder() []int64 {
	out := make([]int64, 0, len(s.pend))
	for i := range s.pend {
		out = append(out, i)
	}
	slices.Sort(out)
	return out
}

// distinct drops repeated values but keeps the oldest first and the newest last.
func distinct(vers []*sector) []*sector {
	var out []*sector
	same := func(a, b *sector) bool { return bytes.Equal(bytesOf(a), bytesOf(b)) }
	for i, v := range vers {
		dup := slices.ContainsFunc(out, func(o *sector) bool { return same(o, v) })
		if !dup || i == len(vers)-1 && len(out) > 1 && !same(out[len(out)-1], v) {
			out = append(out, v)
		}
	}
	return out
}

func bytesOf(v *sector) []byte {
	if v == nil {
		return make([]byte, SectorSize)
	}
	return v[:]
}

func garbage(i int64) *sector {
	v := new(sector)
	x := uint64(i)*0x9e3779b97f4a7c15 + 0xbadc0ffee
	for k := range v {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		v[k] = byte(x)
	}
	return v
}

// end is the last sector that may hold something, or -1.
func (s *Sectors) end() int64 {
	last := int64(-1)
	for ci := range s.chunks {
		last = max(last, ci*chunkSectors+chunkSectors-1)
	}
	for i := range s.pend {
		last = max(last, i)
	}
	return last
}

// Replace stores b at off as durable content, as damage at rest does.
func (s *Sectors) Replace(b []byte, off int64) {
	s.WriteAt(b, off, false)
	for i := off / SectorSize; i <= (off+int64(len(b))-1)/SectorSize; i++ {
		if p := s.pend[i]; p != nil {
			s.setClean(i, p.shown)
			delete(s.pend, i)
		}
	}
}
