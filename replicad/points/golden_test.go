package points_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"flag"
	"io"
	"os"
	"testing"
	"time"

	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

var update = flag.Bool("update", false, "rewrite golden files")

// goldenStore is a store with points, a backlog and firmware, made from fixed
// seeds: its files depend on the format only.
func goldenStore(t *testing.T) (*primary, *blocktest.Host, map[string][]byte) {
	t.Helper()
	p, h := newPrimary(77), blocktest.NewHost()
	s, err := p.create(h)
	must(t, err)
	p.blob = []byte("nvram")
	must(t, p.epochs(s, 1, 20*time.Second, true))
	p.blob = nil
	must(t, p.epochs(s, 1, 20*time.Second, true))
	must(t, p.epochs(s, 1, 20*time.Second, false))
	must(t, s.Pin(s.Points()[0].Pos))
	must(t, s.Close())
	return p, h, goldenFiles(t, p, h)
}

// goldenSets is a store with a disk that was removed and one that joins in the
// backlog.
func goldenSets(t *testing.T) (*primary, *blocktest.Host, map[string][]byte) {
	t.Helper()
	p, h := newPrimary(78).alone(), blocktest.NewHost()
	p.room = sizeA
	s, err := p.create(h)
	must(t, err)
	must(t, p.epochs(s, 1, 20*time.Second, true))
	for _, set := range [][]delta.Disk{{onlyA, disk("vdb", 8192)}, {onlyA, disk("vdb", 4096)}, {onlyA}} {
		must(t, p.send(s, p.become(set...)))
		must(t, settle(s))
	}
	must(t, p.send(s, p.become(disk("vdc", 512), onlyA)))
	must(t, s.Pin(s.Points()[0].Pos))
	must(t, s.Close())
	return p, h, goldenFiles(t, p, h)
}

func goldenFiles(t *testing.T, p *primary, h *blocktest.Host) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for _, name := range h.FS.Files() {
		b, err := h.FS.Content(name)
		must(t, err)
		files[name] = b
	}
	for _, name := range h.Disks() {
		size := p.room
		for _, d := range p.disks {
			if p.room == 0 && d.Name == name {
				size = d.Size
			}
		}
		files["image/"+name] = h.Disk(name, size).Content()
	}
	return files
}

func TestVersion1StoreIsStillWrittenAndRead(t *testing.T) {
	p, _, now := goldenStore(t)
	p.isGolden(t, "testdata/v1.json.gz", now)
}

func TestVersion1StoreWithAnAbsentDiskIsStillWrittenAndRead(t *testing.T) {
	p, _, now := goldenSets(t)
	p.isGolden(t, "testdata/v1-sets.json.gz", now)
}

// isGolden compares the files of a store with those that were written when the
// format was made, and opens those.
func (p *primary) isGolden(t *testing.T, name string, now map[string][]byte) {
	t.Helper()
	if *update {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		must(t, json.NewEncoder(z).Encode(now))
		must(t, z.Close())
		must(t, os.WriteFile(name, b.Bytes(), 0o644))
	}
	raw, err := os.ReadFile(name)
	must(t, err)
	z, err := gzip.NewReader(bytes.NewReader(raw))
	must(t, err)
	text, err := io.ReadAll(z)
	must(t, err)
	var old map[string][]byte
	must(t, json.Unmarshal(text, &old))
	for n, b := range now {
		if !bytes.Equal(b, old[n]) {
			t.Errorf("%s is not written as in version 1", n)
		}
	}
	h := blocktest.NewHost()
	for _, dir := range []string{"spool", "undo", "firmware"} {
		must(t, h.FS.MkdirAll(dir))
	}
	for n, b := range old {
		if disk, ok := bytes.CutPrefix([]byte(n), []byte("image/")); ok {
			_, err := h.Disk(string(disk), int64(len(b))).WriteAt(b, 0)
			must(t, err)
			continue
		}
		must(t, fsx.WriteAtomic(h.FS, n, b))
	}
	s, err := points.Open(p.config(h))
	must(t, err)
	must(t, p.sound(s))
	must(t, settle(s))
	must(t, p.sound(s))
	if n := len(s.Points()); n < 3 || !s.Points()[0].Pinned {
		t.Errorf("%d points, the first pinned: %v", n, s.Points()[0].Pinned)
	}
	must(t, s.Close())
}
