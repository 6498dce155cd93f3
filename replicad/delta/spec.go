package delta

import (
	"bytes"
	"fmt"
	"iter"
	"slices"

	"kvmreplica/internal/block"
)

// Spec is a whole epoch in memory, for tests and for small tools: Build runs
// it through the same planner and encoders as the product.
type Spec struct {
	Header   Header
	Changed  [][]block.Range // per disk, ascending
	Content  [][]byte        // per disk, as of the cut
	Info     ManifestInfo
	Options  ChunkOptions
	Trailing []byte // appended after the manifest; an honest stream has none
}

// Built is an encoded Spec.
type Built struct {
	Header   []byte
	Chunks   [][]byte
	Manifest []byte
	Pos      Pos
}

// Bytes is the whole stream.
func (b *Built) Bytes() []byte {
	return slices.Concat(b.Header, slices.Concat(b.Chunks...), b.Manifest)
}

// From is the stream of a resend that starts at chunk k.
func (b *Built) From(k uint32) []byte {
	return slices.Concat(b.Header, slices.Concat(b.Chunks[k:]...), b.Manifest)
}

// Build encodes the spec.
func (s *Spec) Build() (*Built, error) {
	enc, err := NewChunkEncoder(s.Options)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w := NewEncoder(&out, nil)
	take := func() []byte {
		b := bytes.Clone(out.Bytes())
		out.Reset()
		return b
	}
	if err := w.Header(s.Header, 0); err != nil {
		return nil, err
	}
	b := &Built{Header: take()}
	ranges := func(d int) iter.Seq[block.Range] { return slices.Values(s.Changed[d]) }
	for spec, err := range Plan(s.Header.Disks, ranges) {
		if err != nil {
			return nil, err
		}
		c, err := enc.Encode(spec, s.read)
		if err != nil {
			return nil, err
		}
		if err := w.Chunk(c); err != nil {
			return nil, err
		}
		b.Chunks = append(b.Chunks, take())
	}
	if s.Header.Seed {
		return b, nil
	}
	b.Pos, err = w.Manifest(s.Info)
	b.Manifest = append(take(), s.Trailing...)
	return b, err
}

func (s *Spec) read(disk uint16, p []byte, off int64) (int, error) {
	if int(disk) >= len(s.Content) || off > int64(len(s.Content[disk])) {
		return 0, fmt.Errorf("disk %d at %d: %w", disk, off, block.ErrRange)
	}
	return copy(p, s.Content[disk][off:]), nil
}
