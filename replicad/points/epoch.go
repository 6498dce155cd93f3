package points

import (
	"fmt"
	"iter"
	"sort"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// epoch is one epoch in the spool: partial while it is received, then
// committed and immutable until it is applied and its slot recycled.
type epoch struct {
	slot *slot
	slotHead
	disks []int // store's disk for each disk of the header
	recs  []record
	tally delta.Tally
	index [][]spoolExtent // per store disk known then, ascending
	sizes []int64         // per store disk known then, as of this epoch; 0 = absent
	end   int64           // file offset behind the last record

	// Set when committed.
	mark     mark
	manifest record // zero while partial
	bytes    int64

	refs int // readers; guarded by Store.mu
}

// spoolExtent is where one extent's content is.
type spoolExtent struct {
	off   int64
	len   int32
	raw   int32 // offset in the chunk's raw data
	chunk uint32
	kind  delta.Kind
}

func (x *spoolExtent) end() int64 { return x.off + int64(x.len) }

// add indexes one verified chunk whose record is r. It checks that the chunk
// follows everything before it.
func (e *epoch) add(c *delta.Chunk, r record) error {
	disk := e.disks[c.Disk]
	ix := e.index[disk]
	for later := int(c.Disk) + 1; later < len(e.disks); later++ {
		if len(e.index[e.disks[later]]) > 0 {
			return fmt.Errorf("%w: chunk %d goes back to disk %d", delta.ErrOrder, c.Index, c.Disk)
		}
	}
	if n := len(ix); n > 0 && c.Extents[0].Off < ix[n-1].end() {
		return fmt.Errorf("%w: chunk %d at %d overlaps the one before", delta.ErrOrder, c.Index, c.Extents[0].Off)
	}
	if err := e.tally.Add(c.Index, c.Digest, c.Covered()); err != nil {
		return err
	}
	var raw int32
	for _, x := range c.Extents {
		ix = append(ix, spoolExtent{off: x.Off, len: int32(x.Len), raw: raw, chunk: c.Index, kind: x.Kind})
		if x.Kind == delta.KindData {
			raw += int32(x.Len)
		}
	}
	e.index[disk] = ix
	e.recs = append(e.recs, r)
	e.end = r.end()
	return nil
}

// piece is a part of an epoch's extent, newest epoch first where they overlap.
type piece struct {
	block.Range
	kind  delta.Kind
	epoch *epoch
	chunk uint32
	raw   int32
}

// cursor walks one epoch's extents of one disk.
type cursor struct {
	e  *epoch
	ix []spoolExtent
}

// overlay yields, in ascending order, the pieces of [off, end) that any of the
// epochs (given oldest first) says something about; the newest one wins.
func overlay(epochs []*epoch, disk int, off, end int64) iter.Seq[piece] {
	return func(yield func(piece) bool) {
		cs := make([]cursor, 0, len(epochs))
		for i := len(epochs) - 1; i >= 0; i-- { // newest first
			if disk >= len(epochs[i].index) {
				continue // it is older than the disk
			}
			ix := epochs[i].index[disk]
			from := sort.Search(len(ix), func(k int) bool { return ix[k].end() > off })
			if ix = ix[from:]; len(ix) > 0 && ix[0].off < end {
				cs = append(cs, cursor{e: epochs[i], ix: ix})
			}
		}
		for at := off; at < end; {
			p, next := pick(cs, at, end)
			if p.Len > 0 {
				if !yield(p) {
					return
				}
			}
			at = next
		}
	}
}

// pick finds what counts at position at: a piece that starts there, or the
// next position to look at.
func pick(cs []cursor, at, end int64) (piece, int64) {
	limit := end
	for i := range cs {
		c := &cs[i]
		for len(c.ix) > 0 && c.ix[0].end() <= at {
			c.ix = c.ix[1:]
		}
		if len(c.ix) == 0 {
			continue
		}
		x := c.ix[0]
		if x.off > at {
			limit = min(limit, x.off)
			continue
		}
		n := min(x.end(), limit) - at
		p := piece{Range: block.Range{Off: at, Len: n}, kind: x.kind, epoch: c.e, chunk: x.chunk}
		if x.kind == delta.KindData {
			p.raw = x.raw + int32(at-x.off)
		}
		return p, at + n
	}
	return piece{}, limit
}

// chunkReader reads pieces, keeping the last chunks it opened. Not safe for
// concurrent use.
type chunkReader struct {
	dec   *delta.ChunkDecoder
	keep  []openChunk
	max   int
	frame []byte
}

type openChunk struct {
	e   *epoch
	n   uint32
	raw []byte
}

func newChunkReader(keep int) (*chunkReader, error) {
	dec, err := delta.NewChunkDecoder()
	if err != nil {
		return nil, err
	}
	return &chunkReader{dec: dec, max: keep}, nil
}

// read fills p with the content of the piece's first len(p) bytes.
func (c *chunkReader) read(pc piece, p []byte) error {
	if pc.kind != delta.KindData {
		clear(p)
		return nil
	}
	raw, err := c.open(pc.epoch, pc.chunk)
	if err != nil {
		return err
	}
	copy(p, raw[pc.raw:int(pc.raw)+len(p)])
	return nil
}

// open returns the raw bytes of a chunk, verified again.
func (c *chunkReader) open(e *epoch, n uint32) ([]byte, error) {
	for i, o := range c.keep {
		if o.e == e && o.n == n {
			copy(c.keep[1:i+1], c.keep[:i])
			c.keep[0] = o
			return o.raw, nil
		}
	}
	r := e.recs[n]
	if cap(c.frame) < r.len {
		c.frame = make([]byte, max(r.len, delta.MaxFrame))
	}
	frame := c.frame[:r.len]
	if err := e.slot.readFrame(frame, r.off); err != nil {
		return nil, err
	}
	ck, err := c.dec.Decode(frame)
	if err == nil && (ck.Index != n || ck.Digest != e.tally.Digest(n)) {
		err = delta.ErrChecksum
	}
	if err != nil {
		return nil, &DamageError{File: slotName(e.slot.number), Text: fmt.Sprintf("chunk %d of epoch %d: %v", n, e.head.Epoch, err)}
	}
	var o openChunk
	if len(c.keep) < c.max {
		c.keep = append(c.keep, o)
	} else {
		o = c.keep[len(c.keep)-1]
	}
	o = openChunk{e: e, n: n, raw: append(o.raw[:0], ck.Raw...)}
	copy(c.keep[1:], c.keep)
	c.keep[0] = o
	return o.raw, nil
}

func (c *chunkReader) close() { c.dec.Close() }
