package delta_test

import (
	"bytes"
	"errors"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// A frame may be whole and its content wrong: damaged in memory before the
// frame's checksum was made.
func TestContentThatDoesNotMatchItsDigestIsRefusedInAWholeFrame(t *testing.T) {
	enc, err := delta.NewChunkEncoder(delta.ChunkOptions{Compression: delta.CompressNone})
	must(t, err)
	spec := delta.ChunkSpec{Ranges: []block.Range{{Off: 0, Len: 2 * delta.Granule}}}
	c, err := enc.Encode(spec, func(_ uint16, p []byte, _ int64) (int, error) {
		for i := range p {
			p[i] = byte(i*7 + 1)
		}
		return len(p), nil
	})
	must(t, err)
	dec, err := delta.NewChunkDecoder()
	must(t, err)
	defer dec.Close()
	if _, err := dec.Decode(reseal(bytes.Clone(c.Frame))); err != nil {
		t.Fatalf("the frame as it was made: %v", err)
	}
	for _, back := range []int{5, 5 + delta.Granule} {
		bad := bytes.Clone(c.Frame)
		bad[len(bad)-back] ^= 0x10
		if _, err := dec.Decode(reseal(bad)); !errors.Is(err, delta.ErrChecksum) {
			t.Errorf("a wrong byte %d from the end: %v", back, err)
		}
	}
}
