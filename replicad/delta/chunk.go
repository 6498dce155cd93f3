package delta

import (
	"encoding/binary"
	"fmt"

	"github.com/zeebo/blake3"

	"kvmreplica/internal/block"
)

// Kind says what an extent holds.
type Kind uint8

// The kinds. Zero and discard are emitted only after a read of the cut
// returned zeros; discard merely permits the receiver to free storage.
const (
	KindData    Kind = 1
	KindZero    Kind = 2
	KindDiscard Kind = 3
)

func (k Kind) String() string {
	switch k {
	case KindData:
		return "data"
	case KindZero:
		return "zero"
	case KindDiscard:
		return "discard"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Codec is how a chunk's data is compressed.
type Codec uint8

// The codecs.
const (
	CodecNone Codec = 0
	CodecZstd Codec = 1
	CodecS2   Codec = 2
)

func (c Codec) String() string {
	switch c {
	case CodecNone:
		return "none"
	case CodecZstd:
		return "zstd"
	case CodecS2:
		return "s2"
	}
	return fmt.Sprintf("codec %d", uint8(c))
}

// Extent is one contiguous piece of a chunk.
type Extent struct {
	block.Range
	Kind Kind
}

// Chunk is a decoded chunk. Raw is the content of its data extents, one after
// the other; zero and discard extents have none.
type Chunk struct {
	Index   uint32
	Disk    uint16
	Extents []Extent
	Raw     []byte
	Digest  Digest
	Codec   Codec
	Stored  int // bytes of the compressed data
}

// Covered is the number of bytes of the disk the chunk says something about.
func (c *Chunk) Covered() int64 {
	var n int64
	for _, e := range c.Extents {
		n += e.Len
	}
	return n
}

// Each calls fn for every extent with its content (nil unless data) and stops
// at the first error.
func (c *Chunk) Each(fn func(e Extent, data []byte) error) error {
	raw := c.Raw
	for _, e := range c.Extents {
		var data []byte
		if e.Kind == KindData {
			data, raw = raw[:e.Len], raw[e.Len:]
		}
		if err := fn(e, data); err != nil {
			return err
		}
	}
	return nil
}

// Check holds the chunk against the stream's header: the disk exists, every
// extent lies in it and ends on a granule or with the disk, and an epoch's
// chunk covers no more than MaxRaw.
func (c *Chunk) Check(h *Header) error {
	if int(c.Disk) >= len(h.Disks) {
		return malformed("chunk %d: disk %d of %d", c.Index, c.Disk, len(h.Disks))
	}
	d := h.Disks[c.Disk]
	var covered int64
	for _, e := range c.Extents {
		if block.Check(e.Off, e.Len, d.Size) != nil {
			return malformed("chunk %d: [%d,+%d) is outside disk %s of %d bytes", c.Index, e.Off, e.Len, d.Name, d.Size)
		}
		if e.End()%Granule != 0 && e.End() != d.Size {
			return malformed("chunk %d: extent ends at %d, inside a granule", c.Index, e.End())
		}
		covered += (e.Len + Granule - 1) / Granule * Granule
	}
	if !h.Seed && covered > MaxRaw {
		return malformed("chunk %d covers %d bytes (at most %d)", c.Index, covered, MaxRaw)
	}
	return nil
}

const (
	chunkFixed  = 4 + 2 + 2 + 4 + 4 + 32
	chunkExtent = 8 + 4 + 1 + 3
	chunkPlain  = 12 // leading bytes of the body that the digest covers
)

// putPlain appends what the digest covers besides the raw bytes: index, disk,
// number of extents, raw length.
func (c *Chunk) putPlain(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, c.Index)
	b = binary.LittleEndian.AppendUint16(b, c.Disk)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(c.Extents)))
	return binary.LittleEndian.AppendUint32(b, uint32(len(c.Raw)))
}

func (c *Chunk) putExtents(b []byte) []byte {
	for _, e := range c.Extents {
		b = binary.LittleEndian.AppendUint64(b, uint64(e.Off))
		b = binary.LittleEndian.AppendUint32(b, uint32(e.Len))
		b = append(b, byte(e.Kind), 0, 0, 0)
	}
	return b
}

// parseChunk reads the structure of a chunk's body; Raw is only sized in
// rawLen, payload is still compressed. Nothing was verified but bounds.
func parseChunk(b []byte, codec Codec) (c Chunk, payload []byte, rawLen int, err error) {
	if len(b) < chunkFixed {
		return c, nil, 0, malformed("chunk body of %d bytes", len(b))
	}
	c.Index = binary.LittleEndian.Uint32(b)
	c.Disk = binary.LittleEndian.Uint16(b[4:])
	n := int(binary.LittleEndian.Uint16(b[6:]))
	rawLen = int(binary.LittleEndian.Uint32(b[8:]))
	c.Stored = int(binary.LittleEndian.Uint32(b[12:]))
	copy(c.Digest[:], b[16:])
	c.Codec = codec
	switch {
	case codec > CodecS2:
		return c, nil, 0, malformed("chunk %d: %v", c.Index, codec)
	case n == 0 || n > MaxExtents:
		return c, nil, 0, malformed("chunk %d: %d extents", c.Index, n)
	case rawLen < 0 || rawLen > MaxRaw:
		return c, nil, 0, malformed("chunk %d: %d raw bytes", c.Index, rawLen)
	case c.Stored < 0 || c.Stored > len(b) || len(b) != chunkFixed+n*chunkExtent+c.Stored:
		return c, nil, 0, malformed("chunk %d: body of %d bytes for %d extents and %d stored bytes", c.Index, len(b), n, c.Stored)
	case (rawLen == 0) != (c.Stored == 0) || (codec == CodecNone && rawLen != c.Stored) || (rawLen == 0 && codec != CodecNone):
		return c, nil, 0, malformed("chunk %d: %d raw bytes in %d stored bytes (%v)", c.Index, rawLen, c.Stored, codec)
	}
	c.Extents, err = parseExtents(b[chunkFixed:chunkFixed+n*chunkExtent], c.Index, rawLen)
	return c, b[chunkFixed+n*chunkExtent:], rawLen, err
}

func parseExtents(b []byte, index uint32, rawLen int) ([]Extent, error) {
	es := make([]Extent, 0, len(b)/chunkExtent)
	var last, data int64
	for ; len(b) > 0; b = b[chunkExtent:] {
		off := binary.LittleEndian.Uint64(b)
		e := Extent{Range: block.Range{Off: int64(off), Len: int64(binary.LittleEndian.Uint32(b[8:]))}, Kind: Kind(b[12])}
		limit := int64(MaxRaw)
		if e.Kind != KindData {
			limit = MaxHole
		} else {
			data += e.Len
		}
		switch {
		case e.Kind < KindData || e.Kind > KindDiscard || b[13]|b[14]|b[15] != 0:
			return nil, malformed("chunk %d: extent of %v", index, e.Kind)
		case off > MaxDiskSize || off%Granule != 0 || e.Len == 0 || e.Len%512 != 0 || e.Len > limit:
			return nil, malformed("chunk %d: extent [%d,+%d)", index, off, e.Len)
		case e.Off < last:
			return nil, malformed("chunk %d: extent at %d before %d", index, e.Off, last)
		}
		last = e.End()
		es = append(es, e)
	}
	if data != int64(rawLen) {
		return nil, malformed("chunk %d: extents hold %d bytes of data, the chunk %d", index, data, rawLen)
	}
	return es, nil
}

// hasher computes chunk digests; one per encoder or decoder, reused.
type hasher struct {
	h       *blake3.Hasher
	scratch []byte
}

func newHasher() hasher {
	return hasher{h: blake3.NewDeriveKey("kvmreplica delta v1 chunk")}
}

// digest is BLAKE3-256 over index, disk, extents and raw bytes: never over
// compressed ones.
func (x *hasher) digest(c *Chunk) Digest {
	x.h.Reset()
	x.scratch = c.putExtents(c.putPlain(x.scratch[:0]))
	_, _ = x.h.Write(x.scratch) // a hash never fails
	_, _ = x.h.Write(c.Raw)
	var d Digest
	x.h.Sum(d[:0])
	return d
}
