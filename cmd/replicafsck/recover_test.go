package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/vm"
)

const diskSize = 64*4096 + 512

// replica makes a replica directory with three committed epochs, the last one
// not applied, and returns it with the content after each.
func replica(t *testing.T) (dir string, cuts [][]byte, stream []byte) {
	t.Helper()
	dir = t.TempDir()
	now := time.Unix(1_700_000_000, 0)
	cfg := points.Config{VM: delta.VM{1}, Now: func() time.Time { return now }}
	d := &points.Dir{Path: dir}
	must(t, d.Configure(&cfg))
	disks := []delta.Disk{{Name: "vda", Size: diskSize}}
	s, err := points.Create(cfg, disks)
	must(t, err)
	must(t, s.SeedAssume("vda"))
	content := make([]byte, diskSize)
	var parent delta.Pos
	for e := uint64(1); e <= 3; e++ {
		now = now.Add(time.Minute)
		off := int64(e) * 3 * 4096
		copy(content[off:], bytes.Repeat([]byte{byte(e)}, 8192))
		content[diskSize-1] = byte(e)
		spec := delta.Spec{
			Header:  delta.Header{VM: cfg.VM, Generation: delta.Generation{2}, Epoch: e, Nonce: 1, Parent: parent, Disks: disks},
			Changed: [][]block.Range{{{Off: off, Len: 8192}, {Off: diskSize - 512, Len: 512}}}, Content: [][]byte{content},
			Info: delta.ManifestInfo{Cut: now},
		}
		b, err := spec.Build()
		must(t, err)
		r, err := s.Begin(spec.Header)
		must(t, err)
		for _, c := range b.Chunks {
			must(t, r.Chunk(c))
		}
		parent, err = r.Commit(b.Manifest)
		must(t, err)
		cuts, stream = append(cuts, bytes.Clone(content)), b.Bytes()
		if e < 3 {
			must(t, s.ApplyAll(t.Context()))
			_, err = s.Step(t.Context()) // makes the point
			must(t, err)
		}
	}
	must(t, s.Close())
	return dir, cuts, stream
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fsck runs the command and returns its exit status and both outputs.
func fsck(args ...string) (int, string) {
	var out bytes.Buffer
	code := run(args, &out, &out)
	return code, out.String()
}

func wantImage(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not the expected state", path)
	}
}

func TestReadOnlyCopyChangesNothing(t *testing.T) {
	dir, cuts, _ := replica(t)
	before := tree(t, dir)
	out := filepath.Join(t.TempDir(), "copy")
	if code, text := fsck("recover", dir, "--read-only-copy", out); code != 0 || !strings.Contains(text, "not promoted") {
		t.Fatalf("%d %s", code, text)
	}
	wantImage(t, out+"/vda.raw", cuts[2])
	if code, text := fsck("recover", "--point", "2", dir, "--read-only-copy", out+"2"); code != 0 {
		t.Fatalf("%d %s", code, text)
	}
	wantImage(t, out+"2/vda.raw", cuts[1])
	if code, text := fsck("check", dir); code != 0 || !strings.Contains(text, "backlog     1 epoch,") {
		t.Fatalf("%d %s", code, text)
	}
	if after := tree(t, dir); after != before {
		t.Error("the replica was changed")
	}
}

func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		b.WriteString(path + "\n" + string(data))
		return err
	}))
	return b.String()
}

func TestRecoverInPlaceRecordsAForcedPromotion(t *testing.T) {
	dir, cuts, _ := replica(t)
	code, first := fsck("recover", dir, "--in-place")
	if code != 0 || !strings.Contains(first, "(forced)") {
		t.Fatalf("%d %s", code, first)
	}
	wantImage(t, dir+"/vda.raw", cuts[2])
	if code, again := fsck("recover", dir, "--in-place"); code != 0 || again != first {
		t.Errorf("repeated: %d\n%s\nwant\n%s", code, again, first)
	}
	if code, text := fsck("check", dir); code != 0 || !strings.Contains(text, "state       promoted") {
		t.Errorf("%d %s", code, text)
	}
	if code, text := fsck("recover", dir, "--read-only-copy", t.TempDir()); code != 1 || !strings.Contains(text, "promoted") {
		t.Errorf("copy after the promotion: %d %s", code, text)
	}
}

func TestRecoverOutAtAnOlderPoint(t *testing.T) {
	dir, cuts, _ := replica(t)
	out := filepath.Join(t.TempDir(), "out")
	if code, text := fsck("recover", dir, "--out", out, "--point=1"); code != 0 {
		t.Fatalf("%d %s", code, text)
	}
	wantImage(t, out+"/vda.raw", cuts[0])
	wantImage(t, dir+"/vda.raw", cuts[0])
}

// grow commits epochs to a replica in which a second disk has the sizes given,
// 0 = it is not listed, and makes points of them.
func grow(t *testing.T, dir string, vda, vdb []byte, sizes ...int64) {
	t.Helper()
	now := time.Unix(1_700_001_000, 0)
	cfg := points.Config{Now: func() time.Time { return now }, Set: func([]delta.Disk) error { return nil }}
	must(t, (&points.Dir{Path: dir}).Configure(&cfg))
	s, err := points.Open(cfg)
	must(t, err)
	must(t, s.ApplyAll(t.Context()))
	have := int64(0)
	for i, size := range sizes {
		now = now.Add(time.Minute)
		spec := delta.Spec{
			Header:  delta.Header{VM: delta.VM{1}, Generation: delta.Generation{2}, Epoch: uint64(4 + i), Nonce: 1, Parent: s.Committed(), Disks: []delta.Disk{{Name: "vda", Size: diskSize}}},
			Changed: [][]block.Range{nil}, Content: [][]byte{vda},
			Info: delta.ManifestInfo{Cut: now},
		}
		if size > 0 {
			spec.Header.Disks = append(spec.Header.Disks, delta.Disk{Name: "vdb", Size: size})
			spec.Changed, spec.Content = append(spec.Changed, []block.Range{{Off: have, Len: size - have}}), append(spec.Content, vdb[:size])
		}
		have = size
		b, err := spec.Build()
		must(t, err)
		r, err := s.Begin(spec.Header)
		must(t, err)
		for _, c := range b.Chunks {
			must(t, r.Chunk(c))
		}
		_, err = r.Commit(b.Manifest)
		must(t, err)
		for did := true; did; {
			did, err = s.Step(t.Context())
			must(t, err)
		}
	}
	must(t, s.Close())
}

// A disk of which the replica has only a part is not handed out as if it were
// whole: it was still being added.
func TestADiskThatWasStillBeingAddedIsLeftOutOfARecovery(t *testing.T) {
	made, cuts, _ := replica(t)
	vdb := bytes.Repeat([]byte("b"), 16384)
	grow(t, made, cuts[2], vdb, 4096, 8192)
	dir := filepath.Join(t.TempDir(), "store")
	must(t, os.Rename(made, dir))
	record := func(to uint64, size int64) {
		r := vm.Record{
			Version: 1, VM: testID, Name: "g", Lineage: lineage.New(testID, delta.Generation{}),
			Disks: []vm.Disk{
				{Name: "vda", Size: diskSize, Kind: "raw", Path: dir + "/vda.raw"},
				{Name: "vdb", Size: size, Kind: "raw", Path: dir + "/vdb.raw", State: "joining", Joins: []vm.Span{{From: 4, To: to}}},
			},
		}
		b, err := json.Marshal(r)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(filepath.Dir(dir), "record.json"), b, 0o600))
	}
	for _, c := range []struct {
		what, point string
		to          uint64
		size        int64
		want        bool
	}{
		{"the newest state has a part", "5", 0, 16384, false},
		{"the daemon did not see that it has all", "5", 0, 8192, true},
		{"an older point has a part", "4", 0, 8192, false},
		{"an older point, it was whole later", "4", 5, 8192, false},
		{"whole", "5", 5, 8192, true},
	} {
		record(c.to, c.size)
		out := filepath.Join(t.TempDir(), "copy")
		code, text := fsck("recover", dir, "--read-only-copy", out, "--point", c.point)
		_, err := os.Stat(out + "/vdb.raw")
		if code != 0 || (err == nil) != c.want || strings.Contains(text, "left out    vdb") == c.want {
			t.Errorf("%s: %d %s, %v", c.what, code, text, err)
		}
	}
	must(t, os.WriteFile(filepath.Join(filepath.Dir(dir), "record.json"), []byte("{"), 0o600))
	if code, text := fsck("recover", dir, "--read-only-copy", filepath.Join(t.TempDir(), "copy")); code != 0 || !strings.Contains(text, "warning     whether a disk") {
		t.Errorf("a damaged record: %d %s", code, text)
	}
	record(0, 16384)
	for range 2 {
		code, text := fsck("recover", dir, "--in-place")
		if code != 0 || !strings.Contains(text, "left out    vdb") || strings.Contains(text, "image       vdb") || !strings.Contains(text, "image       vda") {
			t.Errorf("%d %s", code, text)
		}
	}
}

// A disk that was removed from the VM is shown, comes back with the points that
// have it, and is no trouble otherwise.
func TestARemovedDiskIsShownAndRecoveredWithItsPoints(t *testing.T) {
	dir, cuts, _ := replica(t)
	vdb := bytes.Repeat([]byte("b"), 8192)
	grow(t, dir, cuts[2], vdb, 8192, 0)
	if code, text := fsck("check", dir); code != 0 || !strings.Contains(text, "absent      vdb, in 1 recovery point\n") || strings.Contains(text, "disk        vdb") {
		t.Errorf("%d %s", code, text)
	}
	if code, text := fsck("dump", dir); code != 0 || !strings.Contains(text, ", vda 262656 bytes, vdb 8192 bytes\n") {
		t.Errorf("%d %s", code, text)
	}
	for point, want := range map[string]bool{"4": true, "5": false} {
		out := filepath.Join(t.TempDir(), "copy")
		if code, text := fsck("recover", dir, "--read-only-copy", out, "--point", point); code != 0 {
			t.Fatalf("%d %s", code, text)
		}
		if _, err := os.Stat(out + "/vdb.raw"); (err == nil) != want {
			t.Errorf("point %s: %v", point, err)
		}
		if want {
			wantImage(t, out+"/vdb.raw", vdb)
		}
	}
	if code, text := fsck("recover", dir, "--in-place"); code != 0 || !strings.Contains(text, "absent      vdb "+dir+"/vdb.raw may be deleted") {
		t.Errorf("%d %s", code, text)
	}
	must(t, os.Remove(dir+"/vdb.raw"))
	for range 2 {
		if code, text := fsck("recover", dir, "--in-place"); code != 0 || strings.Contains(text, "vdb") {
			t.Errorf("again: %d %s", code, text)
		}
	}
}

func TestCheckFindsDamageAndOutsideChanges(t *testing.T) {
	dir, _, _ := replica(t)
	segs, err := filepath.Glob(dir + "/undo/u*")
	must(t, err)
	f, err := os.OpenFile(segs[0], os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("x"), 4096+70)
	must(t, err)
	st, err := f.Stat()
	must(t, err)
	_, err = f.WriteAt([]byte("x"), st.Size()-8192)
	must(t, err)
	must(t, f.Close())
	if code, text := fsck("check", dir); code != 1 || !strings.Contains(text, "damage: undo/") {
		t.Errorf("%d %s", code, text)
	}
	img, err := os.OpenFile(dir+"/vda.raw", os.O_RDWR, 0)
	must(t, err)
	_, err = img.WriteAt([]byte("x"), 100)
	must(t, err)
	must(t, img.Close())
	if code, text := fsck("check", dir); code != 1 || !strings.Contains(text, "changed from outside") {
		t.Errorf("%d %s", code, text)
	}
	if code, text := fsck("recover", dir, "--in-place"); code != 1 {
		t.Errorf("recover of a suspect replica: %d %s", code, text)
	}
}

func TestDumpShowsStoreAndStream(t *testing.T) {
	dir, _, stream := replica(t)
	if code, text := fsck("dump", dir); code != 0 || !strings.Contains(text, "point       epoch 2") {
		t.Errorf("%d %s", code, text)
	}
	file := filepath.Join(t.TempDir(), "epoch.delta")
	must(t, os.WriteFile(file, stream, 0o600))
	if code, text := fsck("dump", file); code != 0 || !strings.Contains(text, "manifest    1 chunk,") {
		t.Errorf("%d %s", code, text)
	}
	must(t, os.WriteFile(file, stream[:len(stream)-1], 0o600))
	if code, text := fsck("dump", file); code != 1 {
		t.Errorf("cut stream: %d %s", code, text)
	}
}

func TestWrongUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"check"}, {"mend", "x"}, {"recover", "x"}, {"recover", "x", "--in-place", "--out", "y"}, {"check", "x", "--disk", "y"}} {
		if code, _ := fsck(args...); code != 2 {
			t.Errorf("%v: exit status %d", args, code)
		}
	}
	if code, text := fsck("check", t.TempDir()); code != 1 || !strings.Contains(text, "directory of a replica") {
		t.Errorf("empty directory: %d %s", code, text)
	}
}
