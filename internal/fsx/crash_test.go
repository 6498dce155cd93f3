package fsx_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// value is long enough to span sectors, so that a torn write would show.
func value(i int) []byte { return bytes.Repeat([]byte{byte('a' + i)}, 900+300*i) }

func TestWriteAtomicLeavesOldOrNewAndNeverLessThanItAcknowledged(t *testing.T) {
	acked := 0
	scenario := func(h *blocktest.Host) error {
		acked = 0
		if err := h.FS.MkdirAll("state/vm"); err != nil {
			return err
		}
		for i := 1; i <= 3; i++ {
			if err := fsx.WriteAtomic(h.FS, "state/vm/conf", value(i)); err != nil {
				return err
			}
			acked = i
		}
		return nil
	}
	check := func(h *blocktest.Host) error {
		got, err := fsx.ReadFile(h.FS, "state/vm/conf", 1<<20)
		if errors.Is(err, fs.ErrNotExist) && acked == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		for i := acked; i <= 3; i++ {
			if bytes.Equal(got, value(i)) {
				return nil
			}
		}
		return fmt.Errorf("%d bytes of %q after %d writes were acknowledged", len(got), got[:min(1, len(got))], acked)
	}
	r := blocktest.Sweep(t, scenario, check)
	if r.Points < 15 || r.Exhaustive == 0 {
		t.Errorf("sweep covered too little: %v", r)
	}
	blocktest.SweepWith(t, blocktest.Options{Torn: true}, scenario, check)
	blocktest.FailSweep(t, scenario, check)
}

func TestLogKeepsEveryAcknowledgedRecord(t *testing.T) {
	acked := 0
	id := fsx.LogID{1, 2, 3}
	scenario := func(h *blocktest.Host) error {
		acked = 0
		l, err := fsx.CreateLog(h.FS, "log", id, fsx.LogOptions{})
		if err != nil {
			return err
		}
		for i := range 4 {
			if err := l.Append(value(i)); err != nil {
				return err
			}
			acked = i + 1
		}
		return l.Close()
	}
	verify := func(c fsx.LogContent) error {
		if len(c.Records) < acked || len(c.Records) > 4 {
			return fmt.Errorf("%d records, %d acknowledged", len(c.Records), acked)
		}
		for i, r := range c.Records {
			if !bytes.Equal(r, value(i)) {
				return fmt.Errorf("record %d is wrong", i)
			}
		}
		return nil
	}
	check := func(h *blocktest.Host) error {
		l, c, err := fsx.OpenLog(h.FS, "log", fsx.LogOptions{})
		if errors.Is(err, fs.ErrNotExist) && acked == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		if err := verify(c); err != nil {
			return err
		}
		n := len(c.Records)
		if err := l.Append([]byte("after the crash")); err != nil {
			return err
		}
		c, err = fsx.ReadLog(h.Cut(fsxtest.Oldest).FS, "log", fsx.LogOptions{})
		if err != nil {
			return err
		}
		if len(c.Records) != n+1 || string(c.Records[n]) != "after the crash" || c.Tail != 0 {
			return fmt.Errorf("append after the crash: %d records, tail %d", len(c.Records), c.Tail)
		}
		return nil
	}
	r := blocktest.Sweep(t, scenario, check)
	if r.Exhaustive == 0 {
		t.Errorf("sweep covered too little: %v", r)
	}
	blocktest.SweepWith(t, blocktest.Options{Torn: true}, scenario, check)
	blocktest.FailSweep(t, scenario, check)
}

func TestLogReportsDamageInTheMiddle(t *testing.T) {
	m := fsxtest.NewMem()
	l, err := fsx.CreateLog(m, "log", fsx.LogID{7}, fsx.LogOptions{}, []byte("one"), []byte("two"), []byte("three"))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	good, err := m.Content("log")
	if err != nil {
		t.Fatal(err)
	}
	const last = 3 * 512 // the third record
	want := []string{"one", "two", "three"}
	detected := 0
	for off := range good {
		for bit := range uint(8) {
			c := m.KillClone(fsxtest.Newest)
			if err := c.FlipBit("log", int64(off), bit); err != nil {
				t.Fatal(err)
			}
			got, err := fsx.ReadLog(c, "log", fsx.LogOptions{})
			harmless := err == nil && len(got.Records) == 3 && string(bytes.Join(got.Records, nil)) == strings.Join(want, "")
			switch {
			case harmless:
			case off < last && !errors.Is(err, fsx.ErrCorrupt):
				t.Fatalf("byte %d bit %d: %v, want ErrCorrupt", off, bit, err)
			case off >= last && (err != nil || got.Tail == 0 || len(got.Records) != 2):
				t.Fatalf("byte %d bit %d of the last record: %d records, tail %d, %v", off, bit, len(got.Records), got.Tail, err)
			default:
				detected++
			}
		}
	}
	if bytes := 32 + 3*20 + len("onetwothree"); detected != 8*bytes {
		t.Errorf("%d flips detected, want all in %d bytes", detected, bytes)
	}
}

func TestReadFileRefusesWhatIsTooLarge(t *testing.T) {
	m := fsxtest.NewMem()
	if err := fsx.WriteAtomic(m, "f", make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	if _, err := fsx.ReadFile(m, "f", 99); !errors.Is(err, fsx.ErrTooLarge) {
		t.Errorf("99 of 100 bytes: %v", err)
	}
	if b, err := fsx.ReadFile(m, "f", 100); err != nil || len(b) != 100 {
		t.Errorf("100 of 100 bytes: %d, %v", len(b), err)
	}
	if _, err := m.Open("f", os.O_RDWR|os.O_CREATE|os.O_EXCL); !errors.Is(err, fs.ErrExist) {
		t.Errorf("O_EXCL on an existing file: %v", err)
	}
}
