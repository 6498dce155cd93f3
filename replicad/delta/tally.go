package delta

import (
	"fmt"

	"github.com/zeebo/blake3"
)

// Tally remembers the digests of an epoch's chunks: 32 bytes per MiB. The
// sender keeps one per epoch across link cuts, the receiver one per partial
// spool. The zero value is an empty epoch.
type Tally struct {
	digests []Digest
	covered uint64
}

// Len is the number of chunks counted so far.
func (t *Tally) Len() uint32 { return uint32(len(t.digests)) }

// Covered is the number of bytes the counted chunks cover.
func (t *Tally) Covered() uint64 { return t.covered }

// Add counts chunk index. A chunk already counted must have the same digest
// (a resend is identical or the epoch is broken); one beyond the next is
// refused.
func (t *Tally) Add(index uint32, d Digest, covered int64) error {
	switch n := t.Len(); {
	case index > n:
		return fmt.Errorf("%w: chunk %d after %d chunks", ErrOrder, index, n)
	case index < n:
		if t.digests[index] != d {
			return fmt.Errorf("chunk %d sent again with other content: %w", index, ErrChecksum)
		}
		return nil
	}
	t.digests = append(t.digests, d)
	t.covered += uint64(covered)
	return nil
}

// Digest of chunk index, which must have been counted.
func (t *Tally) Digest(index uint32) Digest { return t.digests[index] }

// Total is the BLAKE3-256 over all chunks' digests in order.
func (t *Tally) Total() Digest {
	x := blake3.NewDeriveKey("kvmreplica delta v1 total")
	for i := range t.digests {
		_, _ = x.Write(t.digests[i][:]) // a hash never fails
	}
	var d Digest
	x.Sum(d[:0])
	return d
}

// Check holds a manifest against the counted chunks.
func (t *Tally) Check(m *Manifest) error {
	if m.Chunks != t.Len() || m.Covered != t.covered {
		return malformed("manifest for %d chunks of %d bytes, %d of %d are here", m.Chunks, m.Covered, t.Len(), t.covered)
	}
	if m.Total != t.Total() {
		return fmt.Errorf("digest over all chunks: %w", ErrChecksum)
	}
	return nil
}
