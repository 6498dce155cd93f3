package delta_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"iter"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func build(t testing.TB, s *delta.Spec) *delta.Built {
	t.Helper()
	b, err := s.Build()
	must(t, err)
	return b
}

// drain reads a whole stream as a receiver does and returns the first error.
func drain(r io.Reader) error {
	d := delta.NewDecoder(r)
	h, err := d.Header()
	if err != nil {
		return err
	}
	cd, err := delta.NewChunkDecoder()
	if err != nil {
		return err
	}
	defer cd.Close()
	var tally delta.Tally
	for {
		frame, typ, err := d.Next()
		if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if typ == delta.FrameManifest {
			m, err := delta.ParseManifest(frame)
			if err := errors.Join(err, m.Matches(&h), tally.Check(&m)); err != nil {
				return err
			}
			continue
		}
		c, err := cd.Decode(frame)
		if err != nil {
			return err
		}
		if err := errors.Join(c.Check(&h), tally.Add(c.Index, c.Digest, c.Covered())); err != nil {
			return err
		}
	}
}

func TestEveryDamagedByteAndEveryCutIsRefused(t *testing.T) {
	s := testSpec()
	s.Changed = [][]block.Range{{{Off: 4096, Len: 8192}}, {{Off: 0, Len: 4096}}}
	whole := build(t, s).Bytes()
	must(t, drain(bytes.NewReader(whole)))
	for i := range whole {
		b := bytes.Clone(whole)
		b[i] ^= 1 << (i % 8)
		if drain(bytes.NewReader(b)) == nil {
			t.Errorf("byte %d of %d may be damaged", i, len(whole))
		}
		if err := drain(bytes.NewReader(whole[:i])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("stream cut at byte %d: %v", i, err)
		}
	}
	if err := drain(bytes.NewReader(append(whole, 0))); !errors.Is(err, delta.ErrFormat) {
		t.Errorf("trailing byte: %v", err)
	}
}

// reseal recomputes a frame's CRC, as an attacker would.
func reseal(frame []byte) []byte {
	binary.LittleEndian.PutUint32(frame[8:], uint32(len(frame)-16))
	end := len(frame) - 4
	binary.LittleEndian.PutUint32(frame[end:], crc32.Checksum(frame[:end], crc32.MakeTable(crc32.Castagnoli)))
	return frame
}

func TestLyingLengthsAreRefusedBeforeAllocation(t *testing.T) {
	b := build(t, testSpec())
	for _, frame := range [][]byte{b.Header, b.Chunks[0], b.Manifest} {
		lie := bytes.Clone(frame)
		binary.LittleEndian.PutUint32(lie[8:], 1<<31)
		if _, _, err := delta.FrameLen(lie); !errors.Is(err, delta.ErrFormat) {
			t.Errorf("frame of 2 GiB: %v", err)
		}
	}
	// A manifest that claims 20 MiB and sends nothing costs nothing.
	lie := bytes.Clone(b.Manifest)
	binary.LittleEndian.PutUint32(lie[8:], 20<<20)
	allocated := testing.AllocsPerRun(1, func() {
		if err := drain(bytes.NewReader(slices.Concat(b.Header, lie))); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("short manifest: %v", err)
		}
	})
	if allocated > 400 {
		t.Errorf("%v allocations", allocated)
	}
}

func TestDecompressionBombsAreRefused(t *testing.T) {
	enc, err := zstd.NewWriter(nil)
	must(t, err)
	bomb := enc.EncodeAll(make([]byte, 256<<20), nil)
	b := build(t, testSpec())
	frame := bytes.Clone(b.Chunks[0])
	const payloadAt = 12 + 48
	n := int(binary.LittleEndian.Uint16(frame[12+6:]))
	frame = append(frame[:payloadAt+16*n], bomb...)
	frame[5] = byte(delta.CodecZstd)
	binary.LittleEndian.PutUint32(frame[12+12:], uint32(len(bomb)))
	frame = reseal(append(frame, 0, 0, 0, 0))
	cd, err := delta.NewChunkDecoder()
	must(t, err)
	defer cd.Close()
	if _, err := cd.Decode(frame); !errors.Is(err, delta.ErrFormat) {
		t.Errorf("bomb: %v", err)
	}
}

func TestCallsOutOfOrderAreRefused(t *testing.T) {
	b := build(t, testSpec())
	e := delta.NewEncoder(io.Discard, nil)
	if err := e.Chunk(delta.Encoded{}); !errors.Is(err, delta.ErrOrder) {
		t.Errorf("chunk before header: %v", err)
	}
	if err := e.Header(testSpec().Header, 3); !errors.Is(err, delta.ErrOrder) {
		t.Errorf("resume beyond what was encoded: %v", err)
	}
	must(t, e.Header(testSpec().Header, 0))
	if err := e.Header(testSpec().Header, 0); !errors.Is(err, delta.ErrOrder) {
		t.Errorf("second header: %v", err)
	}
	if err := e.Chunk(delta.Encoded{Index: 1}); !errors.Is(err, delta.ErrOrder) {
		t.Errorf("skipped chunk: %v", err)
	}
	for name, stream := range map[string][]byte{
		"no header":      slices.Concat(b.Chunks...),
		"two headers":    slices.Concat(b.Header, b.Header),
		"chunk skipped":  slices.Concat(b.Header, b.Chunks[1], b.Manifest),
		"chunk twice":    slices.Concat(b.Header, b.Chunks[0], b.Chunks[0], b.Manifest),
		"chunks swapped": slices.Concat(b.Header, b.Chunks[1], b.Chunks[0], b.Manifest),
		"chunk missing":  slices.Concat(b.Header, b.Chunks[0], b.Manifest),
	} {
		if drain(bytes.NewReader(stream)) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestB18ReadErrorsAndShortReadsFailTheChunk(t *testing.T) {
	enc, err := delta.NewChunkEncoder(delta.ChunkOptions{})
	must(t, err)
	spec := delta.ChunkSpec{Ranges: []block.Range{{Off: 0, Len: 8192}, {Off: 16384, Len: 4096}}}
	boom := errors.New("boom")
	for at := range 2 {
		for name, read := range map[string]delta.ReadFunc{
			"error":              func(uint16, []byte, int64) (int, error) { return 0, boom },
			"error with content": func(_ uint16, p []byte, _ int64) (int, error) { return len(p), boom },
			"short":              func(_ uint16, p []byte, _ int64) (int, error) { return len(p) - 1, nil },
			"short at the end":   func(_ uint16, p []byte, _ int64) (int, error) { return len(p) - 1, io.EOF },
		} {
			calls := 0
			_, err := enc.Encode(spec, func(d uint16, p []byte, off int64) (int, error) {
				if calls++; calls == at+1 {
					return read(d, p, off)
				}
				return len(p), nil
			})
			if err == nil {
				t.Errorf("%s at read %d: encoded", name, at)
			}
		}
	}
}

func TestResendIsIdenticalAndChangedContentIsRefused(t *testing.T) {
	s := testSpec()
	first, again := build(t, s), build(t, s)
	if diff := cmp.Diff(first.Chunks, again.Chunks); diff != "" {
		t.Fatal("two encodings of one cut differ")
	}
	var tally delta.Tally
	must(t, tally.Add(0, delta.Digest{1}, 4096))
	must(t, tally.Add(0, delta.Digest{1}, 4096))
	if err := tally.Add(0, delta.Digest{2}, 4096); !errors.Is(err, delta.ErrChecksum) {
		t.Errorf("resend with other content: %v", err)
	}
}

func TestPlanCoversTheRangesOnceInBoundedChunks(t *testing.T) {
	disks := []delta.Disk{{Name: "vda", Size: 8<<20 + 512}, {Name: "vdb", Size: 4096}}
	in := [][]block.Range{{{Off: 100, Len: 1}, {Off: 4000, Len: 200}, {Off: 1 << 20, Len: 3<<20 + 5}, {Off: 8<<20 + 1, Len: 1}}, {{Off: 0, Len: 4096}}}
	var next uint32
	got := map[uint16][]block.Range{}
	for c, err := range delta.Plan(disks, func(d int) iter.Seq[block.Range] { return slices.Values(in[d]) }) {
		must(t, err)
		if c.Index != next {
			t.Errorf("chunk %d, want %d", c.Index, next)
		}
		next++
		var n int64
		for _, r := range c.Ranges {
			n += r.Len
			if rs := got[c.Disk]; len(rs) > 0 && rs[len(rs)-1].End() == r.Off {
				rs[len(rs)-1].Len += r.Len
			} else {
				got[c.Disk] = append(got[c.Disk], r)
			}
		}
		if n > delta.MaxRaw || n == 0 {
			t.Errorf("chunk of %d bytes", n)
		}
	}
	want := map[uint16][]block.Range{
		0: {{Off: 0, Len: 8192}, {Off: 1 << 20, Len: 3<<20 + 4096}, {Off: 8 << 20, Len: 512}},
		1: {{Off: 0, Len: 4096}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("plan (-want +got):\n%s", diff)
	}
	for _, bad := range [][]block.Range{{{Off: 8192, Len: 1}, {Off: 0, Len: 1}}, {{Off: 8 << 20, Len: 8192}}, {{Off: -1, Len: 2}}} {
		failed := false
		for _, err := range delta.Plan(disks[:1], func(int) iter.Seq[block.Range] { return slices.Values(bad) }) {
			failed = failed || err != nil
		}
		if !failed {
			t.Errorf("ranges %v were planned", bad)
		}
	}
}

func TestHeadersAreValidatedBothWays(t *testing.T) {
	good := testSpec().Header
	for name, change := range map[string]func(h *delta.Header){
		"no vm":             func(h *delta.Header) { h.VM = delta.VM{} },
		"no generation":     func(h *delta.Header) { h.Generation = delta.Generation{} },
		"epoch 0":           func(h *delta.Header) { h.Epoch = 0 },
		"parent is itself":  func(h *delta.Header) { h.Parent.Epoch = h.Epoch },
		"parent half":       func(h *delta.Header) { h.Parent.Digest = delta.Digest{} },
		"no disks":          func(h *delta.Header) { h.Disks = nil },
		"disk twice":        func(h *delta.Header) { h.Disks = []delta.Disk{h.Disks[0], h.Disks[0]} },
		"disk name":         func(h *delta.Header) { h.Disks = []delta.Disk{{Name: "../x", Size: 512}} },
		"disk size":         func(h *delta.Header) { h.Disks = []delta.Disk{{Name: "vda", Size: 511}} },
		"seed with epoch":   func(h *delta.Header) { h.Seed = true },
		"disk size too big": func(h *delta.Header) { h.Disks = []delta.Disk{{Name: "vda", Size: delta.MaxDiskSize + 512}} },
	} {
		h := good
		h.Disks = slices.Clone(good.Disks)
		change(&h)
		if _, err := h.AppendFrame(nil); !errors.Is(err, delta.ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	frame, err := good.AppendFrame(nil)
	must(t, err)
	back, err := delta.ParseHeader(frame)
	must(t, err)
	if diff := cmp.Diff(good, back); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	frame[4]++
	if _, err := delta.ParseHeader(frame); !errors.Is(err, delta.ErrVersion) {
		t.Errorf("other version: %v", err)
	}
}

func TestSeedStreamEndsBetweenChunksAndCarriesHoles(t *testing.T) {
	s := testSpec()
	s.Header = delta.Header{VM: delta.VM{1}, Generation: delta.Generation{2}, Disks: []delta.Disk{{Name: "vda", Size: 1 << 30}}, Seed: true}
	enc, err := delta.NewChunkEncoder(delta.ChunkOptions{})
	must(t, err)
	var out bytes.Buffer
	w := delta.NewEncoder(&out, nil)
	must(t, w.Header(s.Header, 0))
	c, err := enc.EncodeHole(0, 0, block.Range{Off: 0, Len: delta.MaxHole})
	must(t, err)
	must(t, w.Chunk(c))
	if _, err := w.Manifest(delta.ManifestInfo{}); !errors.Is(err, delta.ErrOrder) {
		t.Errorf("manifest of a seed: %v", err)
	}
	must(t, drain(bytes.NewReader(out.Bytes())))
	// The same chunk in an epoch covers too much.
	h := testSpec().Header
	h.Disks = s.Header.Disks
	head, err := h.AppendFrame(nil)
	must(t, err)
	if err := drain(bytes.NewReader(slices.Concat(head, c.Frame))); !errors.Is(err, delta.ErrFormat) {
		t.Errorf("hole in an epoch: %v", err)
	}
}

// A manifest closes the chunks that came and the header before it, and no
// others.
func TestAManifestIsHeldAgainstItsChunksAndItsHeader(t *testing.T) {
	s := testSpec()
	whole := build(t, s)
	m, err := delta.ParseManifest(whole.Manifest)
	must(t, err)
	h, err := delta.ParseHeader(whole.Header)
	must(t, err)
	cd, err := delta.NewChunkDecoder()
	must(t, err)
	defer cd.Close()
	var tally, other delta.Tally
	for i, f := range whole.Chunks {
		c, err := cd.Decode(f)
		must(t, err)
		must(t, tally.Add(c.Index, c.Digest, c.Covered()))
		if i == 0 {
			c.Digest[5] ^= 1 // as many chunks and bytes, of other content
		}
		must(t, other.Add(c.Index, c.Digest, c.Covered()))
	}
	must(t, errors.Join(m.Matches(&h), tally.Check(&m)))
	if err := other.Check(&m); !errors.Is(err, delta.ErrChecksum) {
		t.Errorf("other content under the manifest's counts: %v", err)
	}
	for name, change := range map[string]func(h *delta.Header){
		"VM":         func(h *delta.Header) { h.VM[0] ^= 1 },
		"generation": func(h *delta.Header) { h.Generation[0] ^= 1 },
		"epoch":      func(h *delta.Header) { h.Epoch++ },
		"nonce":      func(h *delta.Header) { h.Nonce++ },
		"parent":     func(h *delta.Header) { h.Parent.Digest[0] ^= 1 },
		"disk name":  func(h *delta.Header) { h.Disks = []delta.Disk{{Name: "vdz", Size: h.Disks[0].Size}, h.Disks[1]} },
		"disk size":  func(h *delta.Header) { h.Disks = []delta.Disk{{Name: "vda", Size: h.Disks[0].Size + 4096}, h.Disks[1]} },
	} {
		was := h
		change(&was)
		if err := m.Matches(&was); err == nil {
			t.Errorf("a header with another %s", name)
		}
	}
}
