package blocktest_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// recorder catches the verdict of a sweep that is meant to fail.
type recorder struct {
	testing.TB
	failed string
}

func (r *recorder) Helper()             {}
func (r *recorder) Logf(string, ...any) {}
func (r *recorder) Fatal(args ...any)   { r.failed = fmt.Sprint(args...); runtime.Goexit() }
func (r *recorder) Fatalf(f string, args ...any) {
	r.failed = fmt.Sprintf(f, args...)
	runtime.Goexit()
}

// verdict runs a sweep on its own goroutine and returns what it complained of.
func verdict(t *testing.T, sweep func(tb testing.TB)) string {
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		sweep(r)
	}()
	<-done
	return r.failed
}

// store is a value that is kept once in a file and once on a disk: the file
// says how much of the disk counts.
type store struct {
	syncDisk, syncFile, syncDir, inPlace, swallow bool
}

func (s store) put(h *blocktest.Host, d *blocktest.Crashable, i int) error {
	if _, err := d.WriteAt(bytes.Repeat([]byte{byte(i)}, 1024), int64(i)*1024); err != nil {
		return err
	}
	if s.syncDisk {
		if err := d.Sync(); err != nil && !s.swallow {
			return err
		}
	}
	name := "n.tmp"
	if s.inPlace {
		name = "n"
	}
	f, err := h.FS.Open(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt([]byte{byte(i)}, 0); err != nil {
		return err
	}
	if s.syncFile {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	if !s.inPlace {
		if err := h.FS.Rename(name, "n"); err != nil {
			return err
		}
	}
	if s.syncDir {
		return h.FS.SyncDir(".")
	}
	return nil
}

func (s store) sweep(tb testing.TB, fail bool) {
	acked := 0
	scenario := func(h *blocktest.Host) error {
		acked = 0
		d := h.Disk("vda", 64<<10)
		for i := 1; i <= 3; i++ {
			if err := s.put(h, d, i); err != nil {
				return err
			}
			acked = i
		}
		return nil
	}
	check := func(h *blocktest.Host) error {
		b, err := fsx.ReadFile(h.FS, "n", 10)
		if errors.Is(err, fs.ErrNotExist) && acked == 0 {
			return nil
		}
		if err != nil || len(b) != 1 || int(b[0]) < acked {
			return fmt.Errorf("count is %v, %v; %d acknowledged", b, err, acked)
		}
		got := make([]byte, 1024)
		for i := 1; i <= int(b[0]); i++ {
			if _, err := h.Disk("vda", 64<<10).ReadAt(got, int64(i)*1024); err != nil {
				return err
			}
			if !bytes.Equal(got, bytes.Repeat([]byte{byte(i)}, 1024)) {
				return fmt.Errorf("value %d of %d is not on the disk", i, b[0])
			}
		}
		return nil
	}
	if fail {
		blocktest.FailSweep(tb, scenario, check)
	} else {
		blocktest.Sweep(tb, scenario, check)
	}
}

func TestSweepsPassCorrectCodeAndFindEachMistake(t *testing.T) {
	good := store{syncDisk: true, syncFile: true, syncDir: true}
	for _, c := range []struct {
		name   string
		change func(s *store)
		fail   bool
	}{
		{"no sync of the disk", func(s *store) { s.syncDisk = false }, false},
		{"no sync of the file", func(s *store) { s.syncFile = false }, false},
		{"no sync of the directory", func(s *store) { s.syncDir = false }, false},
		{"overwritten in place", func(s *store) { s.inPlace = true }, false},
		{"sync error swallowed", func(s *store) { s.swallow = true }, true},
	} {
		s := good
		c.change(&s)
		if v := verdict(t, func(tb testing.TB) { s.sweep(tb, c.fail) }); v == "" {
			t.Errorf("%s: not found", c.name)
		} else if !c.fail && !strings.Contains(v, "KVMREPLICA_SWEEP=") {
			t.Errorf("%s: the verdict does not say how to replay it: %s", c.name, v)
		}
	}
	for _, fail := range []bool{false, true} {
		if v := verdict(t, func(tb testing.TB) { good.sweep(tb, fail) }); v != "" {
			t.Errorf("correct code: %s", v)
		}
	}
}

func TestSweepReplaysTheCaseItPrinted(t *testing.T) {
	bad := store{syncFile: true, syncDir: true}
	v := verdict(t, func(tb testing.TB) { bad.sweep(tb, false) })
	_, key, ok := strings.Cut(v, "KVMREPLICA_SWEEP=")
	if !ok {
		t.Fatalf("no replay in %q", v)
	}
	t.Setenv("KVMREPLICA_SWEEP", key)
	if again := verdict(t, func(tb testing.TB) { bad.sweep(tb, false) }); again == "" {
		t.Error("the replayed case passes")
	}
	t.Setenv("KVMREPLICA_SWEEP", "cut@1:")
	if v := verdict(t, func(tb testing.TB) { bad.sweep(tb, false) }); v != "" {
		t.Errorf("another case fails: %s", v)
	}
}

func TestSweepCrashesRecoveryToo(t *testing.T) {
	scenario := func(h *blocktest.Host) error { return fsx.WriteAtomic(h.FS, "a", []byte("a")) }
	sound := func(h *blocktest.Host) error { return fsx.WriteAtomic(h.FS, "b", []byte("b")) }
	unsound := func(h *blocktest.Host) error {
		// Once begun it refuses to begin again.
		f, err := h.FS.Open("b", os.O_RDWR|os.O_CREATE|os.O_EXCL)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), h.FS.SyncDir("."), f.Close())
	}
	check := func(h *blocktest.Host) error { _, err := fsx.ReadFile(h.FS, "b", 10); return err }
	var rep blocktest.Report
	if v := verdict(t, func(tb testing.TB) {
		rep = blocktest.SweepWith(tb, blocktest.Options{Recover: sound}, scenario, check)
	}); v != "" || rep.Nested == 0 {
		t.Errorf("sound recovery: %q, %v", v, rep)
	}
	if v := verdict(t, func(tb testing.TB) {
		blocktest.SweepWith(tb, blocktest.Options{Recover: unsound}, scenario, check)
	}); !strings.Contains(v, "in recovery") {
		t.Errorf("unsound recovery: %q", v)
	}
}

func TestOneCrashPointSpansFilesAndDisks(t *testing.T) {
	h := blocktest.NewHost()
	a, b := h.Disk("vda", 4096), h.Disk("vdb", 4096)
	h.Power.CrashAt(3)
	if _, err := a.WriteAt([]byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.FS.Open("f", os.O_RDWR|os.O_CREATE); err != nil {
		t.Fatal(err)
	}
	if _, err := b.WriteAt([]byte("3"), 0); !blocktest.IsPowerLost(err) {
		t.Fatalf("third operation: %v", err)
	}
	if err := a.Sync(); !blocktest.IsPowerLost(err) {
		t.Errorf("after the cut: %v", err)
	}
	for _, c := range []struct {
		choose fsxtest.Chooser
		want   [2]byte
		files  int
	}{{fsxtest.Oldest, [2]byte{}, 0}, {fsxtest.Newest, [2]byte{'1', '3'}, 1}} {
		r := h.Cut(c.choose)
		got := [2]byte{r.Disk("vda", 4096).Content()[0], r.Disk("vdb", 4096).Content()[0]}
		if got != c.want || len(r.FS.Files()) != c.files {
			t.Errorf("survived: %v and %d files, want %v and %d", got, len(r.FS.Files()), c.want, c.files)
		}
	}
}

func TestFaultyHoldsAnOperationUntilReleased(t *testing.T) {
	f := blocktest.NewFaulty(blocktest.NewCrashable("x", 4096), "x")
	g := blocktest.NewGate()
	f.SetHook(g.HoldMatching(func(op fsxtest.Op) bool { return op.Kind == fsxtest.Write }))
	done := make(chan error)
	go func() {
		_, err := f.WriteAt([]byte("x"), 0)
		done <- err
	}()
	<-g.Held()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 0); err != nil || b[0] != 0 {
		t.Errorf("while the write is held: %v, %v", b, err)
	}
	g.Open()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(b, 0); err != nil || b[0] != 'x' {
		t.Errorf("after it: %v, %v", b, err)
	}
}

func TestFaultyFailsWhatTheHookSays(t *testing.T) {
	f := blocktest.NewFaulty(blocktest.NewCrashable("x", 4096), "x")
	f.SetHook(blocktest.Once(func(op fsxtest.Op) bool { return op.Kind == fsxtest.Write }, fsxtest.Short(3, syscall.EIO)))
	if n, err := f.WriteAt([]byte("abcdef"), 0); n != 3 || !errors.Is(err, syscall.EIO) {
		t.Errorf("first write: %d, %v", n, err)
	}
	if n, err := f.WriteAt([]byte("x"), 100); n != 1 || err != nil {
		t.Errorf("second write: %d, %v", n, err)
	}
	f.SetHook(blocktest.Always(func(op fsxtest.Op) bool { return op.Kind == fsxtest.Sync }, syscall.EIO))
	for range 2 {
		if err := f.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("sync: %v", err)
		}
	}
}
