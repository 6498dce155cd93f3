package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"testing"

	"kvmreplica/integration/lab/record"
)

// guestWith is a guest whose "disks" are folders.
func guestWith(t *testing.T, disks int) *guest {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = null.Close() })
	g := newGuest()
	g.console = null
	for range disks {
		d := disk{mount: t.TempDir()}
		if err := os.MkdirAll(d.file(""), 0o755); err != nil {
			t.Fatal(err)
		}
		g.disks = append(g.disks, d)
	}
	return g
}

func TestWriterGoesOnBehindTheLastGoodRecord(t *testing.T) {
	for disks := 1; disks <= 3; disks++ {
		g := guestWith(t, disks)
		for end := uint64(1); end <= 7; end++ {
			v, err := g.verify()
			if err != nil || v.Highest != end-1 || v.Bad != -1 {
				t.Fatalf("%d disks: %v, %v; want highest=%d", disks, v, err, end-1)
			}
			g.knobs.max = end
			g.write(v)
			// A power cut in the middle of the next record leaves part of it.
			torn := filepath.Join(g.disks[record.Disk(end+1, disks)].file("log"))
			f, err := os.OpenFile(torn, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Write(make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestLoadFileIsCheckedBlockByBlock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "load")
	f, err := prepareLoad(path, 8, 5)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int64{3, 3, 7} {
		if _, err := f.WriteAt(loadContent(uint64(n), 6), n*loadBlock); err != nil {
			t.Fatal(err)
		}
	}
	count := func() (uint64, uint64) { return countLoad(io.NewSectionReader(f, 0, 8*loadBlock)) }
	if blocks, bad := count(); blocks != 8 || bad != 0 {
		t.Errorf("%d blocks, %d bad; want 8, 0", blocks, bad)
	}
	if _, err := f.WriteAt([]byte{1}, 2*loadBlock+100); err != nil { // one byte of block 2
		t.Fatal(err)
	}
	if _, err := f.WriteAt(loadContent(4, 6), 5*loadBlock); err != nil { // a block in the wrong place
		t.Fatal(err)
	}
	if blocks, bad := count(); blocks != 8 || bad != 2 {
		t.Errorf("%d blocks, %d bad; want 8, 2", blocks, bad)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestOnlyThePressOfThePowerKeyCounts(t *testing.T) {
	var events bytes.Buffer
	event := func(kind, code uint16, value uint32) {
		var ev [24]byte
		binary.LittleEndian.PutUint16(ev[16:], kind)
		binary.LittleEndian.PutUint16(ev[18:], code)
		binary.LittleEndian.PutUint32(ev[20:], value)
		events.Write(ev[:])
	}
	event(1, 115, 1) // another key
	event(1, 116, 0) // the release
	event(0, 116, 1) // no key at all
	if err := waitPowerKey(&events); err != io.EOF {
		t.Errorf("got %v, want the end of the events", err)
	}
	event(1, 116, 1)
	if err := waitPowerKey(&events); err != nil {
		t.Error(err)
	}
}

func TestDatabaseVerdictIsGoodOnlyWhenNothingIsMissing(t *testing.T) {
	for out, want := range map[string]string{
		"ok\n50|5000\n17|17\n":                     "ok=true highest=17",
		"ok\n50|5000\n0|0\n":                       "ok=true highest=0",
		"ok\n50|4999\n17|17\n":                     "ok=false ok 50|4999 17|17",
		"ok\n49|5000\n17|17\n":                     "ok=false ok 49|5000 17|17",
		"ok\n50|5000\n16|17\n":                     "ok=false ok 50|5000 16|17",
		"row 3 missing from index\n50|5000\n1|1":   "ok=false row 3 missing from index 50|5000 1|1",
		"ok\n50|5000\n":                            "ok=false ok 50|5000",
		"ok\nno such table: account\n":             "ok=false ok no such table: account",
		"*** in database main ***\n\n50|5000\n1|1": "ok=false *** in database main *** 50|5000 1|1",
	} {
		if got := databaseVerdict(out); got != want {
			t.Errorf("%q: %q, want %q", out, got, want)
		}
	}
}
