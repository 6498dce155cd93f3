package overlay_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/boundtest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/overlay"
)

const goldenLog = "testdata/v1.log"

// The log of a small overlay, byte for byte, and what it is read as.
func TestTheLogOfVersion1IsWrittenAndRead(t *testing.T) {
	fsys := fsxtest.NewMem()
	h := durHead()
	h.Set = [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(overlay.Create(fsys, h))
	o, err := overlay.Open(overlay.Config{
		FS:    fsys,
		Below: func(disk string) (block.Device, error) { return block.NewMem(sizeOf(disk)), nil },
		Data:  func(_ string, n int64) (block.Device, error) { return block.NewMem(n), nil },
	})
	must(err)
	_, err = o.Disk("vda").WriteAt(make([]byte, 8192), 4096)
	must(errors.Join(err, o.Disk("vda").ZeroAt(64<<10, 8192, true), o.Disk("vda").Sync()))
	_, err = o.Disk("vdb").WriteAt([]byte{1}, 700)
	must(errors.Join(err, o.Disk("vdb").Sync(), o.Commit(), o.Close()))
	got, err := fsys.Content(overlay.LogName)
	must(err)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		must(errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(goldenLog, got, 0o644)))
	}
	want, err := os.ReadFile(goldenLog)
	must(err)
	if !bytes.Equal(got, want) {
		t.Fatal("the log is not what version 1 writes; a new format needs a new version")
	}
	info, err := overlay.Read(fsys)
	must(err)
	if info.Phase != overlay.Committed || info.Bytes["vda"] != 16384 || info.Bytes["vdb"] != 4096 || info.Head.At != h.At {
		t.Fatalf("read as %+v", info)
	}
}

func FuzzALogThatIsNotOneIsRefused(f *testing.F) {
	b, err := os.ReadFile(goldenLog)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:600])
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		fsys := fsxtest.NewMem()
		file, err := fsys.Open(overlay.LogName, os.O_RDWR|os.O_CREATE)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		_, _ = overlay.Read(fsys) // it must end, whatever it says
	})
}
