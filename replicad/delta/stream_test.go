package delta_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// testSpec is an epoch of two disks with data, zeros and incompressible bytes.
func testSpec() *delta.Spec {
	rng := rand.New(rand.NewPCG(1, 2))
	a := bytes.Repeat([]byte("kvm replica "), 4<<20/12+1)[:4<<20]
	for i := 1 << 20; i < 2<<20; i++ {
		a[i] = byte(rng.Uint32())
	}
	clear(a[2<<20 : 2<<20+64<<10])
	b := bytes.Repeat([]byte{7}, 10*4096+1536)
	return &delta.Spec{
		Header: delta.Header{
			VM: delta.VM{1}, Generation: delta.Generation{2}, Epoch: 9, Nonce: 77,
			Parent: delta.Pos{Generation: delta.Generation{2}, Epoch: 7, Digest: delta.Digest{3}},
			Disks:  []delta.Disk{{Name: "vda", Size: int64(len(a))}, {Name: "vdb", Size: int64(len(b))}},
		},
		Changed: [][]block.Range{
			{{Off: 4096, Len: 4096}, {Off: 16384, Len: 3 << 20}},
			{{Off: 0, Len: 512}, {Off: 10 * 4096, Len: 1536}},
		},
		Content: [][]byte{a, b},
		Info:    delta.ManifestInfo{Cut: time.Unix(1700000000, 5).UTC(), Config: delta.Digest{9}, Firmware: []delta.Blob{{Kind: delta.BlobNVRAM, Data: []byte("vars")}}},
	}
}

// replay applies a stream to zeroed disks and returns them with the position.
func replay(t *testing.T, stream []byte, disks int) ([][]byte, delta.Pos) {
	t.Helper()
	d := delta.NewDecoder(bytes.NewReader(stream))
	h, err := d.Header()
	if err != nil {
		t.Fatal(err)
	}
	out := make([][]byte, disks)
	for i := range out {
		out[i] = make([]byte, h.Disks[i].Size)
	}
	cd, err := delta.NewChunkDecoder()
	if err != nil {
		t.Fatal(err)
	}
	defer cd.Close()
	var tally delta.Tally
	for {
		frame, typ, err := d.Next()
		if err != nil {
			t.Fatal(err)
		}
		if typ == delta.FrameManifest {
			m, err := delta.ParseManifest(frame)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(m.Matches(&h), tally.Check(&m)); err != nil {
				t.Fatal(err)
			}
			if _, _, err := d.Next(); !errors.Is(err, io.EOF) {
				t.Fatalf("after the manifest: %v", err)
			}
			return out, m.Pos()
		}
		c, err := cd.Decode(frame)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.Check(&h), tally.Add(c.Index, c.Digest, c.Covered())); err != nil {
			t.Fatal(err)
		}
		_ = c.Each(func(e delta.Extent, data []byte) error {
			copy(out[c.Disk][e.Off:e.End()], data)
			return nil
		})
	}
}

// One byte is enough: a granule is zero when all of it is.
func TestAGranuleWithASingleByteIsNoZeroGranule(t *testing.T) {
	for _, at := range []int{0, 1, 511, 512, 2047, 2048, 2049, 4094, 4095} {
		s := testSpec()
		disk := make([]byte, 3*4096)
		disk[4096+at] = 1
		s.Header.Disks = []delta.Disk{{Name: "vda", Size: int64(len(disk))}}
		s.Changed, s.Content = [][]block.Range{{{Off: 0, Len: int64(len(disk))}}}, [][]byte{disk}
		b, err := s.Build()
		if err != nil {
			t.Fatal(err)
		}
		if got, _ := replay(t, b.Bytes(), 1); !bytes.Equal(got[0], disk) {
			t.Errorf("the only byte at %d of its granule is lost", at)
		}
	}
}

func TestStreamCarriesChangedRangesWithEveryCodec(t *testing.T) {
	for _, comp := range []delta.Compression{delta.CompressAuto, delta.CompressNone, delta.CompressZstd, delta.CompressS2} {
		s := testSpec()
		s.Options.Compression = comp
		b, err := s.Build()
		if err != nil {
			t.Fatal(err)
		}
		got, pos := replay(t, b.Bytes(), 2)
		want := [][]byte{make([]byte, len(s.Content[0])), make([]byte, len(s.Content[1]))}
		for d, rs := range s.Changed {
			for _, r := range rs {
				lo, hi := r.Off/4096*4096, min((r.End()+4095)/4096*4096, int64(len(want[d])))
				copy(want[d][lo:hi], s.Content[d][lo:hi])
			}
		}
		for d := range want {
			if !bytes.Equal(got[d], want[d]) {
				t.Errorf("codec %d: disk %d differs", comp, d)
			}
		}
		if pos != b.Pos {
			t.Errorf("codec %d: position %v, sender has %v", comp, pos, b.Pos)
		}
	}
}

func TestPositionDoesNotDependOnCompression(t *testing.T) {
	a, b := testSpec(), testSpec()
	b.Options.Compression = delta.CompressNone
	x, err := a.Build()
	if err != nil {
		t.Fatal(err)
	}
	y, err := b.Build()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(x.Pos, y.Pos); diff != "" {
		t.Errorf("positions differ (-auto +none):\n%s", diff)
	}
}
