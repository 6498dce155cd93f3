package dataplane

import (
	"context"
	"sync"

	"github.com/zeebo/blake3"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/replicad/wire"
)

// Limits of a window.
const (
	maxSpan       = 64 << 20 // first to last byte; the tracker watches all of it
	maxRangesList = wire.MaxDigestRanges
	maxRange      = 1 << 20
)

// windows holds the one comparison that is open.
type windows struct {
	mu   sync.Mutex
	next uint64          // guarded by mu
	disk wire.DiskName   // guarded by mu
	c    *cbt.Comparison // guarded by mu; nil when none is open
}

// ranges lists marked ranges that fit one window.
func (p *Plane) ranges(r RangesRequest) (RangesReply, error) {
	g, err := p.tracker()
	if err != nil {
		return RangesReply{}, err
	}
	_, img, err := p.image(r.Disk)
	if err != nil {
		return RangesReply{}, err
	}
	size := p.size(img)
	if r.Offset < 0 || r.Offset > size || r.Bytes < 0 || r.Max < 0 {
		return RangesReply{}, invalid("ranges of %s from %d", r.Disk, r.Offset)
	}
	if r.Bytes == 0 || r.Bytes > maxSpan {
		r.Bytes = maxSpan
	}
	if r.Max == 0 || r.Max > maxRangesList {
		r.Max = maxRangesList
	}
	seq := g.Dirty(string(r.Disk))
	if r.Suspect {
		seq = g.Suspect(string(r.Disk))
	}
	a := RangesReply{Next: size, Done: true}
	var limit int64 // end of the window, known with its first range
	for x := range seq {
		if x.Off < r.Offset {
			x.Len = x.End() - r.Offset
			x.Off = r.Offset
		}
		if x.Len <= 0 {
			continue
		}
		if len(a.Ranges) == 0 {
			limit = x.Off + r.Bytes
		}
		if x.Off >= limit || len(a.Ranges) == r.Max {
			a.Next, a.Done = x.Off, false
			break
		}
		n := min(x.Len, limit-x.Off)
		a.Ranges = append(a.Ranges, wire.Range{Off: x.Off, Len: n})
		if n < x.Len {
			a.Next, a.Done = x.Off+n, false
			break
		}
	}
	return a, nil
}

// check validates the ranges of a window: ascending, bounded, inside the disk.
func (r CompareRequest) check(size int64) error {
	if len(r.Ranges) == 0 || len(r.Ranges) > maxRangesList {
		return invalid("a comparison of %d ranges; 1 to %d are possible", len(r.Ranges), maxRangesList)
	}
	last := r.Ranges[0].Off
	for _, x := range r.Ranges {
		if x.Len <= 0 || x.Len > maxRange || x.Off < last || block.Check(x.Off, x.Len, size) != nil {
			return invalid("comparison of %s: range [%d,+%d)", r.Disk, x.Off, x.Len)
		}
		last = x.Off + x.Len
	}
	if last-r.Ranges[0].Off > maxSpan {
		return invalid("a comparison from %d to %d; %d bytes are possible", r.Ranges[0].Off, last, maxSpan)
	}
	return nil
}

// compare opens a window and hashes the live ranges.
func (p *Plane) compare(ctx context.Context, r CompareRequest) (CompareReply, error) {
	g, err := p.tracker()
	if err != nil {
		return CompareReply{}, err
	}
	_, img, err := p.image(r.Disk)
	if err != nil {
		return CompareReply{}, err
	}
	if err := r.check(p.size(img)); err != nil {
		return CompareReply{}, err
	}
	id, err := p.openWindow(g, r)
	if err != nil {
		return CompareReply{}, err
	}
	a := CompareReply{Window: id, Digests: make([][16]byte, len(r.Ranges))}
	h, err := blake3.NewKeyed(r.Key[:])
	if err != nil {
		return a, err
	}
	buf := make([]byte, maxRange)
	var sum [32]byte
	for i, x := range r.Ranges {
		if err := ctx.Err(); err != nil {
			return a, err
		}
		if _, err := img.dev.ReadAt(buf[:x.Len], x.Off); err != nil {
			return a, err
		}
		h.Reset()
		_, _ = h.Write(buf[:x.Len]) // a hash never fails
		copy(a.Digests[i][:], h.Sum(sum[:0]))
	}
	return a, nil
}

// openWindow begins to notice writes; a window left open is dropped.
func (p *Plane) openWindow(g *cbt.Group, r CompareRequest) (uint64, error) {
	w := &p.window
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.c != nil {
		g.CancelCompare(w.c)
		w.c = nil
	}
	if err := p.adopt(g, r.Pos); err != nil {
		return 0, err
	}
	off, last := r.Ranges[0].Off, r.Ranges[len(r.Ranges)-1]
	c, err := g.BeginCompare(string(r.Disk), off, last.Off+last.Len-off)
	if err != nil {
		return 0, err
	}
	w.next++
	w.c, w.disk = c, r.Disk
	return w.next, nil
}

// endCompare closes a window.
func (p *Plane) endCompare(r CompareEnd) (CompareResult, error) {
	g, err := p.tracker()
	if err != nil {
		return CompareResult{}, err
	}
	w := &p.window
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.c == nil || w.next != r.Window {
		return CompareResult{}, &wire.Error{Kind: wire.KindNotFound, Text: "the comparison is not open any more"}
	}
	d := g.Disk(string(w.disk))
	// Whatever is unmarked now was equal by all we know, and was not written
	// since the window opened: its bit would be set.
	var missed []wire.Range
	for _, x := range r.Differ {
		if block.Check(x.Off, x.Len, d.Size()) != nil {
			return CompareResult{}, invalid("comparison of %s: range [%d,+%d)", w.disk, x.Off, x.Len)
		}
		for off := x.Off; off < x.Off+x.Len; off += cbt.GranuleSize {
			n := min(int64(cbt.GranuleSize), x.Off+x.Len-off)
			if !d.IsDirty(off, n) {
				missed = append(missed, wire.Range{Off: off, Len: n})
			}
		}
	}
	equal := make([]block.Range, len(r.Equal))
	for i, x := range r.Equal {
		equal[i] = block.Range{Off: x.Off, Len: x.Len}
	}
	before := dirtyBytes(g, w.disk)
	c := w.c
	w.c = nil
	if err := g.EndCompare(c, equal); err != nil {
		g.CancelCompare(c)
		return CompareResult{}, err
	}
	res := CompareResult{Cleared: max(0, before-dirtyBytes(g, w.disk))}
	for _, x := range missed {
		res.Mismatched += x.Len
	}
	if len(missed) > 0 {
		p.log.Error("bytes differ from the replica although they were not marked", "disk", w.disk, "at", missed[0].Off, "bytes", res.Mismatched)
		return res, markRanges(g, w.disk, missed)
	}
	return res, nil
}

func dirtyBytes(g *cbt.Group, disk wire.DiskName) int64 {
	for _, d := range g.Status().Disks {
		if d.Name == string(disk) {
			return d.DirtyBytes
		}
	}
	return 0
}
