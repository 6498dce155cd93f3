package fsx_test

import (
	"bytes"
	"os"
	"testing"

	"kvmreplica/internal/boundtest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// FuzzLogOfAnyBytes: whatever a log file holds, reading it neither panics nor
// invents records, and a log that opens takes an append that reads back.
func FuzzLogOfAnyBytes(f *testing.F) {
	m := fsxtest.NewMem()
	if l, err := fsx.CreateLog(m, "log", fsx.LogID{1}, fsx.LogOptions{}, []byte("one"), make([]byte, 700), nil); err != nil {
		f.Fatal(err)
	} else if err := l.Close(); err != nil {
		f.Fatal(err)
	}
	good, err := m.Content("log")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-300])
	f.Add(append(bytes.Clone(good), good[512:1024]...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		defer boundtest.Input(t)()
		m := fsxtest.NewMem()
		w, err := m.Open("log", os.O_RDWR|os.O_CREATE)
		must(t, err)
		_, err = w.WriteAt(data, 0)
		must(t, err)
		o := fsx.LogOptions{MaxRecord: 4096, MaxSize: 1 << 20}
		l, c, err := fsx.OpenLog(m, "log", o)
		if err != nil {
			return
		}
		n := 0
		for _, r := range c.Records {
			if len(r) > o.MaxRecord || len(r) > 0 && !bytes.Contains(data, r) {
				t.Fatalf("record of %d bytes that is not in the file", len(r))
			}
			n += len(r)
		}
		if n > len(data) {
			t.Fatalf("%d bytes of records in %d bytes", n, len(data))
		}
		must(t, l.Append([]byte("next")))
		again, err := fsx.ReadLog(m.CrashClone(fsxtest.Oldest), "log", o)
		must(t, err)
		if len(again.Records) != len(c.Records)+1 || string(again.Records[len(c.Records)]) != "next" || again.Tail != 0 {
			t.Fatalf("%d records and an append make %d, tail %d", len(c.Records), len(again.Records), again.Tail)
		}
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
