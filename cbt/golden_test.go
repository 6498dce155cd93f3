package cbt

import (
	"bytes"
	"encoding/binary"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/boundtest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

var update = flag.Bool("update", false, "write the golden files of this version")

// goldenSuper has a different value in every field.
func goldenSuper() *super {
	fill := func(b byte) (v id16) {
		for i := range v {
			v[i] = b + byte(i)
		}
		return v
	}
	return &super{
		compat: 1 << 40, seq: 77, set: fill(1), session: fill(2), vm: "vm-1", peer: "peer-1", boot: "boot-1", writer: "1.0.0",
		generation: fill(3), base: Position{Generation: fill(3), Epoch: 5, Digest: [32]byte{5}},
		parent: Position{Generation: fill(4), Epoch: 9, Digest: [32]byte{9}}, highest: 6, state: stateClean, reason: "because",
		exact: exactRef{id: fill(5), length: 61, digest: [32]byte{6}}, floor: 4,
		disks: []superDisk{
			{
				name: "vda", id: fill(6), size: 3 << 30, mapID: fill(7), granule: granuleShift, region: regionShift, hasID: true,
				ident: block.Identity{Kind: block.KindFile, Size: 3 << 30, Device: 11, Inode: 12, BirthTime: 13, MtimeNS: 14, CtimeNS: 15},
			},
			{
				name: "vdb", id: fill(8), size: 513, mapID: fill(9), granule: granuleShift, region: regionShift, hasID: true,
				ident: block.Identity{Kind: block.KindBlockDevice, Size: 513, Device: 21},
			},
		},
	}
}

func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("%s: the format changed; a new version needs a new magic and a new golden file", name)
	}
	return want
}

func TestTheFormatsOfVersion1StayReadable(t *testing.T) {
	sb := goldenSuper()
	b := make([]byte, superSize)
	sb.encode(b)
	back, err := decodeSuper(golden(t, "super.v1", b))
	if err != nil {
		t.Fatal(err)
	}
	again := make([]byte, superSize)
	back.encode(again)
	if !bytes.Equal(b, again) {
		t.Fatal("reading and writing changes the superblock")
	}
	words := make([]uint64, pageWords)
	for i := range words {
		words[i] = uint64(i) * 0x9e3779b97f4a7c15
	}
	page := make([]byte, pageSize)
	encodePage(page, sb.disks[0].mapID, 1, 3, 42, words)
	got := make([]uint64, pageWords)
	seq, err := decodePage(golden(t, "page.v1", page), sb.disks[0].mapID, 1, 3, got)
	if err != nil || seq != 42 {
		t.Fatal(seq, err)
	}
	for i := range words {
		if words[i] != got[i] {
			t.Fatal("word", i)
		}
	}
	for _, c := range []struct{ copyNo, page int }{{0, 3}, {1, 2}} {
		if _, err := decodePage(page, sb.disks[0].mapID, c.copyNo, c.page, got); err == nil {
			t.Fatal("a page is accepted where it does not belong")
		}
	}
}

// Every bit of a page and of a superblock is under its checksum.
func TestNoFlippedBitIsBelieved(t *testing.T) {
	sb := goldenSuper()
	page, words := make([]byte, pageSize), make([]uint64, pageWords)
	encodePage(page, sb.set, 0, 0, 1, words)
	for i := range page {
		for bit := range 8 {
			page[i] ^= 1 << bit
			if _, err := decodePage(page, sb.set, 0, 0, words); err == nil {
				t.Fatalf("page byte %d bit %d", i, bit)
			}
			page[i] ^= 1 << bit
		}
	}
	b := make([]byte, superSize)
	sb.encode(b)
	for i := range b {
		b[i] ^= 1 << (i % 8)
		if _, err := decodeSuper(b); err == nil {
			t.Fatalf("superblock byte %d", i)
		}
		b[i] ^= 1 << (i % 8)
	}
}

func TestTheExactFileOfVersion1StaysReadable(t *testing.T) {
	g := &Group{}
	sb := goldenSuper()
	want := [][]span{{{0, 1}, {5, 64}, {127, 129}, {786000, 786432}}, {{0, 1}}}
	for i, e := range sb.disks {
		n := uint64(e.size+GranuleSize-1) >> granuleShift
		d := &Disk{id: e.id}
		d.st.Store(&diskState{size: e.size, granules: n, fine: [2]*bitmap{newBitmap(n, nil), newBitmap(n, nil)}})
		for _, s := range want[i] {
			d.st.Load().fine[0].set(s.lo, s.hi)
		}
		g.disks = append(g.disks, d)
	}
	var buf bytes.Buffer
	if err := g.encodeExact(newWriter(&buf), sb.set); err != nil {
		t.Fatal(err)
	}
	var got [2][]span
	err := decodeExact(newReader(golden(t, "exact.v1", buf.Bytes())), sb, func(i int, s span) { got[i] = append(got[i], s) })
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		if len(want[i]) != len(got[i]) {
			t.Fatal(want[i], got[i])
		}
		for k := range want[i] {
			if want[i][k] != got[i][k] {
				t.Fatal(want[i], got[i])
			}
		}
	}
}

func TestAnUnknownFeatureIsRefused(t *testing.T) {
	for _, change := range []func(*super){
		func(s *super) { s.incompat = 1 << 63 },
		func(s *super) { s.roCompat = 1 },
	} {
		sb := goldenSuper()
		change(sb)
		b := make([]byte, superSize)
		sb.encode(b)
		if _, err := decodeSuper(b); err == nil || !isFeature(err) {
			t.Fatal(err)
		}
	}
}

func FuzzDecodeSuper(f *testing.F) {
	b := make([]byte, superSize)
	goldenSuper().encode(b)
	f.Add(b, []byte{3}, uint16(100))
	f.Fuzz(func(t *testing.T, b, patch []byte, at uint16) {
		defer boundtest.Input(t)()
		if len(b) != superSize {
			return
		}
		copy(b[min(int(at), len(b)):], patch)
		for _, s := range resealed(b) {
			sb, err := decodeSuper(s)
			if err != nil {
				continue
			}
			again := make([]byte, superSize)
			sb.encode(again)
			if _, err := decodeSuper(again); err != nil {
				t.Fatal("what was read cannot be written:", err)
			}
		}
	})
}

func FuzzDecodeExact(f *testing.F) {
	good, err := os.ReadFile("testdata/exact.v1")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		sb := goldenSuper()
		_ = decodeExact(newReader(b), sb, func(i int, s span) {
			if n := uint64(sb.disks[i].size+GranuleSize-1) >> granuleShift; s.lo >= s.hi || s.hi > n {
				t.Fatal("run outside the disk", s)
			}
		})
	})
}

// FuzzDecodePage mends the checksum, so that the fuzzer reaches what is behind.
func FuzzDecodePage(f *testing.F) {
	good, err := os.ReadFile("testdata/page.v1")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, uint32(0), uint32(0))
	f.Fuzz(func(t *testing.T, b []byte, copyNo, page uint32) {
		defer boundtest.Input(t)()
		if len(b) != pageSize {
			return
		}
		binary.LittleEndian.PutUint32(b[pageHead-4:], pageCRC(b))
		var id id16
		copy(id[:], b[8:])
		words := make([]uint64, pageWords)
		seq, err := decodePage(b, id, int(copyNo), int(page), words)
		if err != nil {
			return
		}
		again := make([]byte, pageSize)
		encodePage(again, id, int(copyNo), int(page), seq, words)
		got := make([]uint64, pageWords)
		if _, err := decodePage(again, id, int(copyNo), int(page), got); err != nil || !slices.Equal(got, words) {
			t.Fatal("what was read cannot be written:", err)
		}
	})
}

// FuzzMarker: a marker that is there distrusts, whatever it holds.
func FuzzMarker(f *testing.F) {
	f.Add([]byte("the image was recovered\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		m := fsxtest.NewMem()
		if err := fsx.WriteAtomic(m, markerName("vm"), b); err != nil {
			t.Fatal(err)
		}
		if readDistrust(m, "vm") == "" {
			t.Fatalf("%q is no marker", b)
		}
	})
}
