package delta

import (
	"fmt"
	"iter"

	"kvmreplica/internal/block"
)

// ChunkSpec says which ranges of one disk a chunk covers: at most MaxRaw bytes
// in ascending order. It depends on the frozen ranges only, never on content,
// zeros or compression, so that chunk k is the same chunk in every attempt.
type ChunkSpec struct {
	Index  uint32
	Disk   uint16 // index into Header.Disks
	Ranges []block.Range
}

// Plan cuts the changed ranges of all disks into chunks, disk after disk. It
// rounds ranges out to granules, clips them to the disk and merges what then
// touches; ranges(i) must yield those of disks[i] in ascending order, else an
// error ends the sequence. Plan keeps one chunk in memory.
func Plan(disks []Disk, ranges func(disk int) iter.Seq[block.Range]) iter.Seq2[ChunkSpec, error] {
	return func(yield func(ChunkSpec, error) bool) {
		p := planner{yield: yield}
		for i, d := range disks {
			if !p.disk(uint16(i), d, ranges(i)) {
				return
			}
		}
	}
}

type planner struct {
	yield func(ChunkSpec, error) bool
	next  uint32
}

// disk plans one disk and reports whether to go on.
func (p *planner) disk(index uint16, d Disk, ranges iter.Seq[block.Range]) bool {
	cur := ChunkSpec{Disk: index}
	var room int64 = MaxRaw
	var end, last int64 // first byte not yet planned; end of the previous range
	flush := func() bool {
		cur.Index = p.next
		p.next++
		ok := p.yield(cur, nil)
		cur, room = ChunkSpec{Disk: index}, MaxRaw
		return ok
	}
	for r := range ranges {
		if r.Len == 0 {
			continue
		}
		if block.Check(r.Off, r.Len, (d.Size+Granule-1)/Granule*Granule) != nil || r.Off < last {
			p.yield(ChunkSpec{}, fmt.Errorf("plan disk %s: range [%d,+%d) is outside the disk or not ascending", d.Name, r.Off, r.Len))
			return false
		}
		last = r.End()
		off := max(r.Off/Granule*Granule, end)
		stop := min((r.End()+Granule-1)/Granule*Granule, d.Size)
		for off < stop {
			n := min(stop-off, room)
			cur.Ranges = appendRange(cur.Ranges, block.Range{Off: off, Len: n})
			room -= (n + Granule - 1) / Granule * Granule
			off += n
			if room == 0 && !flush() {
				return false
			}
		}
		end = max(end, stop)
	}
	return len(cur.Ranges) == 0 || flush()
}

func appendRange(rs []block.Range, r block.Range) []block.Range {
	if n := len(rs); n > 0 && rs[n-1].End() == r.Off {
		rs[n-1].Len += r.Len
		return rs
	}
	return append(rs, r)
}
