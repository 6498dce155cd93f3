package delta

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"kvmreplica/internal/block"
)

// Compression chooses how a ChunkEncoder compresses.
type Compression uint8

// The choices. Auto is zstd's fastest level after a probe that skips what does
// not shrink.
const (
	CompressAuto Compression = iota
	CompressNone
	CompressZstd
	CompressS2
)

// ChunkOptions tune a ChunkEncoder. The zero value is good.
type ChunkOptions struct {
	Compression Compression
	// Discard marks ranges read as zeros as discarded, which permits the
	// receiver to free their storage.
	Discard bool
}

// ReadFunc reads the content of a disk as of the cut. It must fill p or fail;
// a short read is an error, never data.
type ReadFunc func(disk uint16, p []byte, off int64) (int, error)

// Encoded is one encoded chunk. Frame belongs to the ChunkEncoder and is valid
// until its next call.
type Encoded struct {
	Frame   []byte
	Index   uint32
	Digest  Digest
	Covered int64 // bytes of the disk
	Raw     int   // bytes that were not zero
	Stored  int   // the same, compressed
}

// ChunkEncoder turns specs into chunk frames. It holds a few MiB of buffers
// and one compressor, reused; not safe for concurrent use.
type ChunkEncoder struct {
	opt  ChunkOptions
	raw  []byte
	out  []byte
	comp []byte
	zero [Granule]byte
	zstd *zstd.Encoder
	hash hasher
}

const (
	probeLen  = 16 << 10 // bytes tried before a chunk is compressed
	probeGain = 16       // the probe must save at least 1/probeGain
)

// NewChunkEncoder returns an encoder.
func NewChunkEncoder(opt ChunkOptions) (*ChunkEncoder, error) {
	e := &ChunkEncoder{opt: opt, hash: newHasher()}
	if opt.Compression == CompressAuto || opt.Compression == CompressZstd {
		z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(MaxRaw), zstd.WithLowerEncoderMem(true))
		if err != nil {
			return nil, fmt.Errorf("make zstd encoder: %w", err)
		}
		e.zstd = z
	}
	return e, nil
}

// Encode reads the ranges of spec and encodes them. Every failed or short read
// fails the chunk (and with it the epoch).
func (e *ChunkEncoder) Encode(spec ChunkSpec, read ReadFunc) (Encoded, error) {
	c := Chunk{Index: spec.Index, Disk: spec.Disk, Extents: make([]Extent, 0, len(spec.Ranges))}
	if err := checkSpec(spec); err != nil {
		return Encoded{}, err
	}
	e.raw = e.raw[:0]
	var covered int64
	for _, r := range spec.Ranges {
		at := len(e.raw)
		e.raw = grow(e.raw, int(r.Len))
		if err := readFull(read, spec.Disk, e.raw[at:], r.Off); err != nil {
			return Encoded{}, fmt.Errorf("read chunk %d: disk %d at %d: %w", spec.Index, spec.Disk, r.Off, err)
		}
		kept := e.split(&c, r, e.raw[at:])
		e.raw = e.raw[:at+kept]
		covered += r.Len
	}
	c.Raw = e.raw
	frame := e.frame(&c)
	return Encoded{Frame: frame, Index: c.Index, Digest: c.Digest, Covered: covered, Raw: len(c.Raw), Stored: c.Stored}, nil
}

// EncodeHole encodes a range of a seed stream that was never written, without
// reading it: at most MaxHole bytes. Only for a base known to be all zero.
func (e *ChunkEncoder) EncodeHole(index uint32, disk uint16, r block.Range) (Encoded, error) {
	if r.Len <= 0 || r.Len > MaxHole || r.Off < 0 || r.Off%Granule != 0 || r.Len%512 != 0 {
		return Encoded{}, fmt.Errorf("encode hole [%d,+%d): %w", r.Off, r.Len, block.ErrRange)
	}
	c := Chunk{Index: index, Disk: disk, Extents: []Extent{{Range: r, Kind: KindDiscard}}}
	frame := e.frame(&c)
	return Encoded{Frame: frame, Index: index, Digest: c.Digest, Covered: r.Len}, nil
}

func checkSpec(s ChunkSpec) error {
	var last, n int64
	for _, r := range s.Ranges {
		if r.Len <= 0 || r.Off < last || r.Off%Granule != 0 || r.Len%512 != 0 || r.Len > MaxRaw {
			return fmt.Errorf("encode chunk %d: range [%d,+%d): %w", s.Index, r.Off, r.Len, block.ErrRange)
		}
		last = r.End()
		n += (r.Len + Granule - 1) / Granule * Granule
	}
	if n == 0 || n > MaxRaw {
		return fmt.Errorf("encode chunk %d of %d bytes: %w", s.Index, n, block.ErrRange)
	}
	return nil
}

func grow(b []byte, n int) []byte {
	if cap(b)-len(b) < n {
		nb := make([]byte, len(b), max(MaxRaw, len(b)+n))
		copy(nb, b)
		b = nb
	}
	return b[:len(b)+n]
}

func readFull(read ReadFunc, disk uint16, p []byte, off int64) error {
	n, err := read(disk, p, off)
	if err != nil && (n != len(p) || !errors.Is(err, io.EOF)) {
		return err
	}
	if n != len(p) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// split finds the zero granules of one range that was read into p, appends the
// extents, moves the data together and returns how much of p it is.
func (e *ChunkEncoder) split(c *Chunk, r block.Range, p []byte) int {
	zero := KindZero
	if e.opt.Discard {
		zero = KindDiscard
	}
	kept := 0
	for at := 0; at < len(p); at += Granule {
		g := p[at:min(at+Granule, len(p))]
		kind := KindData
		if bytes.Equal(g, e.zero[:len(g)]) {
			kind = zero
		} else {
			if kept != at {
				copy(p[kept:], g)
			}
			kept += len(g)
		}
		piece := Extent{Range: block.Range{Off: r.Off + int64(at), Len: int64(len(g))}, Kind: kind}
		if n := len(c.Extents); n > 0 && c.Extents[n-1].Kind == kind && c.Extents[n-1].End() == piece.Off {
			c.Extents[n-1].Len += piece.Len
		} else {
			c.Extents = append(c.Extents, piece)
		}
	}
	return kept
}

// frame digests and compresses c and builds its frame.
func (e *ChunkEncoder) frame(c *Chunk) []byte {
	c.Digest = e.hash.digest(c)
	payload := e.compress(c)
	c.Stored = len(payload)
	b := startFrame(e.out[:0], FrameChunk, byte(c.Codec))
	b = c.putPlain(b)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = append(b, c.Digest[:]...)
	b = c.putExtents(b)
	b = append(b, payload...)
	e.out = endFrame(b)
	return e.out
}

// compress returns the payload and sets c.Codec; what does not shrink stays
// as it is.
func (e *ChunkEncoder) compress(c *Chunk) []byte {
	c.Codec = CodecNone
	if len(c.Raw) == 0 || e.opt.Compression == CompressNone {
		return c.Raw
	}
	if e.opt.Compression == CompressAuto && len(c.Raw) > probeLen && !e.shrinks(c.Raw) {
		return c.Raw
	}
	codec := CodecZstd
	if e.opt.Compression == CompressS2 {
		codec = CodecS2
	}
	if out := e.pack(codec, c.Raw); len(out) < len(c.Raw) {
		c.Codec = codec
		return out
	}
	return c.Raw
}

// shrinks probes pieces from the start, the middle and the end with s2, which
// costs little: a chunk gathers unrelated extents.
func (e *ChunkEncoder) shrinks(raw []byte) bool {
	const piece = probeLen / 4
	saved := 0
	for i := range 4 {
		at := i * (len(raw) - piece) / 3
		saved += piece - min(piece, len(e.pack(CodecS2, raw[at:at+piece])))
	}
	return saved >= probeLen/probeGain
}

func (e *ChunkEncoder) pack(codec Codec, raw []byte) []byte {
	if codec == CodecS2 {
		if need := s2.MaxEncodedLen(len(raw)); cap(e.comp) < need {
			e.comp = make([]byte, need)
		}
		return s2.Encode(e.comp[:cap(e.comp)], raw)
	}
	e.comp = e.zstd.EncodeAll(raw, e.comp[:0])
	return e.comp
}
