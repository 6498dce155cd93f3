package delta_test

import (
	"bytes"
	"flag"
	"os"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

var update = flag.Bool("update", false, "rewrite golden files")

// goldenSpec is small and uncompressed, so that its bytes depend on the format
// only.
func goldenSpec() *delta.Spec {
	s := testSpec()
	a := make([]byte, 8*4096)
	copy(a[4096:], bytes.Repeat([]byte("golden "), 1000))
	s.Header.Disks = []delta.Disk{{Name: "vda", Size: int64(len(a))}}
	s.Content = [][]byte{a}
	s.Changed = [][]block.Range{{{Off: 4096, Len: 4096}, {Off: 12288, Len: 8192}}}
	s.Options.Compression = delta.CompressNone
	return s
}

func TestVersion1StreamIsStillWrittenAndRead(t *testing.T) {
	b := build(t, goldenSpec())
	const name = "testdata/v1.delta"
	if *update {
		must(t, os.WriteFile(name, b.Bytes(), 0o644))
	}
	want, err := os.ReadFile(name)
	must(t, err)
	if !bytes.Equal(b.Bytes(), want) {
		t.Errorf("the format changed: %s is not what is written now", name)
	}
	must(t, drain(bytes.NewReader(want)))
}

// TestAnApplicationConsistentManifestSaysSo: the flag is in the manifest's body
// at 140, and covered by the position.
func TestAnApplicationConsistentManifestSaysSo(t *testing.T) {
	plain := build(t, goldenSpec())
	spec := goldenSpec()
	spec.Info.App = true
	b := build(t, spec)
	m, err := delta.ParseManifest(b.Manifest)
	must(t, err)
	if !m.App || m.Pos() != b.Pos || b.Pos == plain.Pos {
		t.Errorf("app %v at %v, the plain epoch is %v", m.App, b.Pos, plain.Pos)
	}
	if len(b.Manifest) != len(plain.Manifest) {
		t.Errorf("the flag changes the manifest's length")
	}
	m, err = delta.ParseManifest(plain.Manifest)
	must(t, err)
	if m.App {
		t.Error("a plain epoch is application-consistent")
	}
}
