package dataplane

import (
	"context"
	"fmt"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// seeder streams a piece of one live disk. Whatever the guest writes meanwhile
// is marked by the tracker and sent again with the first epoch, so a torn read
// does no harm.
type seeder struct {
	p     *Plane
	img   *image
	index uint16
	head  delta.Header
	req   SeedRequest
}

// seed checks a request before anything is read.
func (p *Plane) seed(r SeedRequest) (*seeder, error) {
	g, err := p.tracker()
	if err != nil {
		return nil, err
	}
	i, img, err := p.image(r.Disk)
	if err != nil {
		return nil, err
	}
	if size := p.size(img); r.Offset > size || r.Offset%delta.Granule != 0 && r.Offset != size {
		return nil, invalid("seed of %s from byte %d of %d", r.Disk, r.Offset, size)
	}
	s := &seeder{p: p, img: img, index: uint16(i), head: p.header(nil), req: r}
	s.head.Generation, s.head.Seed = g.Generation(), true
	return s, s.head.Validate()
}

// stream writes header and chunks from the offset on, without a gap.
func (s *seeder) stream(ctx context.Context, w *streamWriter) error {
	defer context.AfterFunc(ctx, w.interrupt)()
	comp, err := delta.NewChunkEncoder(delta.ChunkOptions{Discard: true})
	if err != nil {
		return err
	}
	enc := delta.NewEncoder(w, nil)
	if err := enc.Header(s.head, 0); err != nil {
		return err
	}
	holes := s.req.Holes && s.img.trustsHoles()
	if holes {
		// Only what was synced is known to the file system's map.
		if err := s.img.dev.Sync(); err != nil {
			return fmt.Errorf("sync before looking for holes: %w", err)
		}
	}
	size := s.head.Disks[s.index].Size
	var index uint32
	var sent int64
	for off := s.req.Offset; off < size && (s.req.Max == 0 || sent < s.req.Max); {
		if err := ctx.Err(); err != nil {
			return err
		}
		c, err := s.chunk(comp, index, off, size, holes)
		if err != nil {
			return err
		}
		if err := enc.Chunk(c); err != nil {
			return err
		}
		off += c.Covered
		sent += int64(c.Raw)
		index++
	}
	return nil
}

// chunk encodes what stands at off: a hole, or up to 1 MiB that was read.
func (s *seeder) chunk(comp *delta.ChunkEncoder, index uint32, off, size int64, holes bool) (delta.Encoded, error) {
	n := min(delta.MaxRaw, size-off)
	if holes {
		hole, data, err := s.look(off, size)
		if err != nil {
			return delta.Encoded{}, err
		}
		if hole > 0 {
			return comp.EncodeHole(index, s.index, block.Range{Off: off, Len: hole})
		}
		n = min(n, data)
	}
	spec := delta.ChunkSpec{Index: index, Disk: s.index, Ranges: []block.Range{{Off: off, Len: n}}}
	return comp.Encode(spec, func(_ uint16, p []byte, at int64) (int, error) { return s.img.dev.ReadAt(p, at) })
}

// look returns the length of the hole at off, or that of the data; both in
// whole granules, data rounded up.
func (s *seeder) look(off, size int64) (hole, data int64, err error) {
	end := min(size, off+delta.MaxHole)
	first := true
	err = s.img.file.Map(off, end-off, func(e block.Extent) bool {
		if first {
			first = false
			if e.Hole {
				hole = e.Len
			} else {
				data = e.Len
			}
			return true
		}
		switch {
		case hole > 0 && e.Hole:
			hole += e.Len
			return true
		case hole == 0 && !e.Hole:
			data += e.Len
			return true
		}
		return false
	})
	if err != nil {
		return 0, 0, fmt.Errorf("look for holes at %d: %w", off, err)
	}
	if off+hole < size {
		hole = hole / delta.Granule * delta.Granule
	}
	if hole > 0 {
		return hole, 0, nil
	}
	data = (max(data, 1) + delta.Granule - 1) / delta.Granule * delta.Granule
	return 0, min(data, size-off), nil
}
