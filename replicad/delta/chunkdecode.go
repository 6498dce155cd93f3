package delta

import (
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// ChunkDecoder opens chunk frames. Its memory is bounded: one chunk of raw
// bytes and the decompressor's window. Not safe for concurrent use.
type ChunkDecoder struct {
	raw  []byte
	zstd *zstd.Decoder
	hash hasher
}

// NewChunkDecoder returns a decoder; the decompressor is made when the first
// frame needs it.
func NewChunkDecoder() (*ChunkDecoder, error) {
	return &ChunkDecoder{hash: newHasher()}, nil
}

// unzstd unpacks into dst's capacity and no further.
func (d *ChunkDecoder) unzstd(payload, dst []byte) ([]byte, error) {
	if d.zstd == nil {
		z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxMemory(MaxRaw), zstd.WithDecoderMaxWindow(MaxRaw), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return nil, fmt.Errorf("make zstd decoder: %w", err)
		}
		d.zstd = z
	}
	return d.zstd.DecodeAll(payload, dst)
}

// Decode verifies a whole chunk frame (bounds, CRC32C, digest) and returns its
// content. Raw is valid until the next call.
func (d *ChunkDecoder) Decode(frame []byte) (Chunk, error) {
	b, aux, err := openFrame(frame, FrameChunk)
	if err != nil {
		return Chunk{}, err
	}
	c, payload, rawLen, err := parseChunk(b, Codec(aux))
	if err != nil {
		return Chunk{}, err
	}
	if c.Raw, err = d.unpack(c.Codec, payload, rawLen); err != nil {
		return Chunk{}, fmt.Errorf("chunk %d: %w", c.Index, err)
	}
	if d.hash.digest(&c) != c.Digest {
		return Chunk{}, fmt.Errorf("chunk %d: content: %w", c.Index, ErrChecksum)
	}
	return c, nil
}

// ParseChunk verifies bounds and CRC32C of a chunk frame only and returns it
// without content (Raw is nil). Use it where the digest was checked before.
func ParseChunk(frame []byte) (Chunk, error) {
	b, aux, err := openFrame(frame, FrameChunk)
	if err != nil {
		return Chunk{}, err
	}
	c, _, _, err := parseChunk(b, Codec(aux))
	return c, err
}

func (d *ChunkDecoder) unpack(codec Codec, payload []byte, rawLen int) ([]byte, error) {
	if codec == CodecNone {
		return payload, nil
	}
	if cap(d.raw) < rawLen {
		d.raw = make([]byte, min(MaxRaw, max(2*rawLen, 64<<10)))
	}
	var out []byte
	var err error
	switch codec {
	case CodecS2:
		if n, lerr := s2.DecodedLen(payload); lerr != nil || n != rawLen {
			return nil, malformed("s2 data of another length than %d", rawLen)
		}
		out, err = s2.Decode(d.raw[:rawLen], payload)
	default:
		out, err = d.unzstd(payload, d.raw[:0:rawLen])
	}
	if err != nil {
		return nil, malformed("%v data: %v", codec, err)
	}
	if len(out) != rawLen {
		return nil, malformed("%v data unpacks to %d bytes, not %d", codec, len(out), rawLen)
	}
	return out, nil
}

// Close releases the decompressor.
func (d *ChunkDecoder) Close() {
	if d.zstd != nil {
		d.zstd.Close()
	}
}
