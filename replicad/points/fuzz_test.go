package points

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"kvmreplica/internal/boundtest"
	"kvmreplica/replicad/delta"
)

// FuzzBlocks reaches what is behind the seals of superblock, spool slot, undo
// segment and list of rolled-back granules: the fuzzer's block is sealed again
// before it is parsed. What is accepted can be written and read again.
func FuzzBlocks(f *testing.F) {
	for _, b := range goldenBlocks(f) {
		f.Add(b, []byte{1}, uint16(5))
	}
	f.Fuzz(func(t *testing.T, b, patch []byte, at uint16) {
		defer boundtest.Input(t)()
		b = append(bytes.Clone(b), make([]byte, max(0, rolledHead+40-len(b)))...)
		copy(b[min(int(at), len(b)):], patch)
		sealBlock(b)
		if s := decodeSuper(b); s != nil {
			again := decodeSuper(s.encode())
			if again == nil || again.applied != s.applied || !slices.Equal(again.disks, s.disks) {
				t.Fatal("a superblock that was read cannot be written")
			}
		}
		store := [16]byte(b[8:24])
		if h := decodeSlotHead(b, store, 1); h != nil {
			if _, err := h.encode(); err != nil {
				t.Fatal("a slot header that was read cannot be written:", err)
			}
		}
		g := &segment{store: store, lo: 1, hi: 1}
		if len(b) == undoBlock && g.parseHeader(b, store) == nil && len(g.sizes) > delta.MaxDisks {
			t.Fatalf("%d disks", len(g.sizes))
		}
		if foot, ok := g.parseFooter(b, 1<<20); ok && foot.indexAt > 1<<20 {
			t.Fatalf("an index at %d in front of %d", foot.indexAt, 1<<20)
		}
		if keys, ok := decodeRolled(b, store, delta.ParsePos(b[24:])); ok && len(keys) > len(b) {
			t.Fatalf("%d granules from %d bytes", len(keys), len(b))
		}
	})
}

// FuzzRecords: a record header that is accepted lies where it says.
func FuzzRecords(f *testing.F) {
	r := record{typ: delta.FrameManifest, index: 3, off: 4096, len: 100}
	f.Add(r.appendHead(nil, 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		if r, ok := parseRecord(b, 7, 4096); ok && (r.off != 4096 || r.len < 0) {
			t.Fatalf("%+v", r)
		}
		_, _ = parseSlotName(string(b))
		if lo, hi, ok := parseSegmentName(string(b)); ok && segmentName(lo, hi) != undoDir+"/"+string(bytes.ToLower(b)) {
			t.Fatalf("%q is segment %d-%d", b, lo, hi)
		}
	})
}

// goldenBlocks are the first and last blocks of the files of a store.
func goldenBlocks(f *testing.F) [][]byte {
	f.Helper()
	var out [][]byte
	for _, name := range []string{"testdata/v1.json.gz", "testdata/v1-sets.json.gz"} {
		files := map[string][]byte{}
		raw, err := os.Open(name)
		if err != nil {
			f.Fatal(err)
		}
		defer raw.Close()
		z, err := gzip.NewReader(raw)
		if err == nil {
			err = json.NewDecoder(io.LimitReader(z, 64<<20)).Decode(&files)
		}
		if err != nil {
			f.Fatal(err)
		}
		for _, b := range files {
			if len(b) >= superBlock {
				out = append(out, b[:superBlock], b[len(b)-superBlock:])
			}
		}
	}
	return out
}

// FuzzParsePolicy: an accepted retention is written the way it is read, and
// keeps at least nothing of nothing.
func FuzzParsePolicy(f *testing.F) {
	for _, s := range []string{"", "0", "24", "all:1h,1h:24h", "15m:4h,1d:4w", "1w:99999999999w"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		defer boundtest.Input(t)()
		p, err := ParsePolicy(s)
		if err != nil {
			return
		}
		for _, r := range p.Grid {
			if r.Every < 0 || r.For < 0 {
				t.Fatalf("%q became %+v", s, p)
			}
		}
		if keep := p.Retain(nil, time.Unix(0, 0)); len(keep) != 0 {
			t.Fatalf("%q keeps %d of no points", s, len(keep))
		}
	})
}
