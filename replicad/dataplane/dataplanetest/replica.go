package dataplanetest

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// Decoded is what a stream carried.
type Decoded struct {
	Header delta.Header
	Pos    delta.Pos // zero when no manifest came
	Chunks uint32
	Bytes  int64
}

// sized is d with another size; what is new is zero.
func sized(d *block.Mem, size int64) *block.Mem {
	if d != nil && d.Size() == size {
		return d
	}
	to := block.NewMem(size)
	if d != nil {
		p := make([]byte, min(size, d.Size()))
		_, _ = d.ReadAt(p, 0) // memory
		_, _ = to.WriteAt(p, 0)
	}
	return to
}

// Apply decodes a stream onto disks (made on demand) and checks its order, its
// digests and its manifest, with a tally that may have earlier chunks.
func Apply(r io.Reader, disks map[string]*block.Mem, tally *delta.Tally, from uint32) (Decoded, error) {
	var out Decoded
	count := &counter{r: r}
	d := delta.NewDecoder(count)
	h, err := d.Header()
	if err != nil {
		return out, fmt.Errorf("header: %w", err)
	}
	out.Header = h
	for _, x := range h.Disks {
		disks[x.Name] = sized(disks[x.Name], x.Size)
	}
	cd, err := delta.NewChunkDecoder()
	if err != nil {
		return out, err
	}
	defer cd.Close()
	next := from
	for {
		frame, typ, err := d.Next()
		out.Bytes = count.n
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		if typ == delta.FrameManifest {
			m, err := delta.ParseManifest(frame)
			if err != nil {
				return out, err
			}
			if err := errors.Join(m.Matches(&h), tally.Check(&m)); err != nil {
				return out, err
			}
			out.Pos = m.Pos()
			continue
		}
		c, err := cd.Decode(frame)
		if err != nil {
			return out, err
		}
		if c.Index != next {
			return out, fmt.Errorf("chunk %d where %d is due", c.Index, next)
		}
		if err := c.Check(&h); err != nil {
			return out, err
		}
		if tally != nil {
			if err := tally.Add(c.Index, c.Digest, c.Covered()); err != nil {
				return out, err
			}
		}
		next++
		out.Chunks = next
		dst := disks[h.Disks[c.Disk].Name]
		err = c.Each(func(e delta.Extent, data []byte) error {
			if e.Kind == delta.KindData {
				_, err := dst.WriteAt(data, e.Off)
				return err
			}
			return dst.ZeroAt(e.Off, e.Len, false)
		})
		if err != nil {
			return out, err
		}
	}
}

// MustApply is Apply for a whole stream.
func MustApply(t testing.TB, r io.ReadCloser, disks map[string]*block.Mem) Decoded {
	t.Helper()
	defer r.Close()
	d, err := Apply(r, disks, new(delta.Tally), 0)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
