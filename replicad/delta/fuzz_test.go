package delta_test

import (
	"bytes"
	"testing"

	"kvmreplica/internal/boundtest"
	"kvmreplica/replicad/delta"
)

func seeds(f *testing.F) *delta.Built {
	f.Helper()
	b := build(f, goldenSpec())
	s := goldenSpec()
	s.Options.Compression = delta.CompressZstd
	f.Add(b.Bytes())
	f.Add(build(f, s).Bytes())
	s.Options.Compression = delta.CompressS2
	f.Add(build(f, s).Bytes())
	f.Add(b.From(1))
	return b
}

func FuzzStream(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		_ = drain(bytes.NewReader(b))
	})
}

// FuzzFrame mends lengths and CRC, so that the fuzzer reaches what is behind.
func FuzzFrame(f *testing.F) {
	b := seeds(f)
	f.Add(b.Header)
	f.Add(b.Chunks[0])
	f.Add(b.Manifest)
	h, err := delta.ParseHeader(b.Header)
	must(f, err)
	f.Fuzz(func(t *testing.T, frame []byte) {
		defer boundtest.Input(t)()
		if len(frame) < 16 || len(frame) > 1<<20 {
			return
		}
		copy(frame, "KRD")
		frame[4] = delta.Version
		frame = reseal(frame)
		if h, err := delta.ParseHeader(frame); err == nil {
			again, err := h.AppendFrame(nil)
			must(t, err)
			if !bytes.Equal(again, frame) {
				t.Fatal("header does not survive a round trip")
			}
		}
		if m, err := delta.ParseManifest(frame); err == nil {
			again, err := m.AppendFrame(nil)
			must(t, err)
			if !bytes.Equal(again, frame) {
				t.Fatal("manifest does not survive a round trip")
			}
		}
		cd, err := delta.NewChunkDecoder()
		must(t, err)
		defer cd.Close()
		if c, err := cd.Decode(frame); err == nil {
			_ = c.Check(&h)
		}
		_, _ = delta.ParseChunk(frame)
	})
}
