package block_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
)

func TestOwnLockAdmitsOneWriterOrManyReaders(t *testing.T) {
	path := image(t, 4096)
	w := open(t, path, block.FileOptions{})
	for _, readOnly := range []bool{false, true} {
		_, err := block.OpenFile(path, block.FileOptions{ReadOnly: readOnly})
		var locked *block.LockedError
		if !errors.As(err, &locked) || !errors.Is(err, block.ErrLocked) {
			t.Fatalf("second open, read-only %v: %v", readOnly, err)
		}
	}
	if _, err := block.OpenFile(path, block.FileOptions{NoLock: true}); err != nil {
		t.Errorf("open without a lock: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path, block.FileOptions{ReadOnly: true})
	open(t, path, block.FileOptions{ReadOnly: true})
	if _, err := block.OpenFile(path, block.FileOptions{}); !errors.Is(err, block.ErrLocked) {
		t.Fatalf("writer beside readers: %v", err)
	}
}

// qemuIO runs commands on a raw image and returns the output and success.
func qemuIO(path string, args ...string) (string, bool) {
	out, err := exec.Command("qemu-io", append(args, path)...).CombinedOutput()
	return string(out), err == nil && !strings.Contains(string(out), "lock")
}

func TestQEMURefusesAnImageWeHold(t *testing.T) {
	requires(t, "qemu-io")
	requires(t, "qemu-img")
	path := image(t, 1<<20)
	f := open(t, path, block.FileOptions{})
	if out, ok := qemuIO(path, "-f", "raw", "-c", "write 0 4k"); !ok {
		t.Fatalf("without the lock qemu-io must work: %s", out)
	}
	for range 2 { // twice is harmless
		if err := f.LockQEMU(); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{
		{"qemu-io", "-f", "raw", "-c", "write 0 4k", path},
		{"qemu-img", "convert", "-f", "raw", "-O", "raw", path, path + ".copy"},
		{"qemu-img", "resize", "-f", "raw", path, "2M"},
		{"qemu-nbd", "-f", "raw", "--socket", path + ".sock", path},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // an admitted server would stay
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
		cancel()
		if err == nil || !strings.Contains(string(out), "lock") {
			t.Errorf("%v was not refused: %v: %s", args, err, out)
		}
	}
	if err := f.UnlockQEMU(); err != nil {
		t.Fatal(err)
	}
	if out, ok := qemuIO(path, "-f", "raw", "-c", "write 0 4k"); !ok {
		t.Fatalf("after unlocking: %s", out)
	}
	if err := errors.Join(f.LockQEMU(), f.Close()); err != nil {
		t.Fatal(err)
	}
	if out, ok := qemuIO(path, "-f", "raw", "-c", "write 0 4k"); !ok {
		t.Fatalf("after Close: %s", out)
	}
}

func TestReaderLockLetsQEMUReadButNotWrite(t *testing.T) {
	requires(t, "qemu-io")
	path := image(t, 1<<20)
	f := open(t, path, block.FileOptions{ReadOnly: true})
	if err := f.LockQEMU(); err != nil {
		t.Fatal(err)
	}
	if out, ok := qemuIO(path, "-r", "-f", "raw", "-c", "read 0 4k"); !ok {
		t.Errorf("a reader was refused: %s", out)
	}
	if out, ok := qemuIO(path, "-f", "raw", "-c", "write 0 4k"); ok {
		t.Errorf("a writer was admitted: %s", out)
	}
}

// holdWithQEMU keeps the image open in a qemu-io process until the test ends.
func holdWithQEMU(t *testing.T, path string, args ...string) int {
	t.Helper()
	cmd := exec.Command("qemu-io", append(args, "-f", "raw", path)...)
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); _, _ = io.Copy(io.Discard, out); _ = cmd.Wait() })
	if _, err := io.WriteString(in, "length\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil { // its answer: the image is open
		t.Fatalf("qemu-io: %q %v", line, err)
	}
	return cmd.Process.Pid
}

func TestWeRefuseAnImageQEMUHoldsAndNameTheHolder(t *testing.T) {
	requires(t, "qemu-io")
	for _, c := range []struct {
		name     string
		args     []string
		readOnly bool
		refused  bool
	}{
		{"writer beside a writer", nil, false, true},
		{"reader beside a writer", nil, true, true},
		{"writer beside a reader that tolerates writers", []string{"-r"}, false, false},
		{"reader beside a reader", []string{"-r"}, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := image(t, 1<<20)
			pid := holdWithQEMU(t, path, c.args...)
			f := open(t, path, block.FileOptions{ReadOnly: c.readOnly})
			err := f.LockQEMU()
			if !c.refused {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			var locked *block.LockedError
			if !errors.As(err, &locked) || locked.PID != pid || locked.Holder != "qemu-io" {
				t.Fatalf("LockQEMU() = %v, want process %d named", err, pid)
			}
			if !strings.Contains(err.Error(), "ps -fp "+strconv.Itoa(pid)) {
				t.Errorf("no next step in %q", err)
			}
		})
	}
}

// TestWriterLockYieldsToAReaderThatNeedsStableContent plays a program that
// reads and does not share write, with the bytes QEMU would lock.
func TestWriterLockYieldsToAReaderThatNeedsStableContent(t *testing.T) {
	path := image(t, 4096)
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	lock := func(typ int16, at int64) {
		t.Helper()
		lk := unix.Flock_t{Type: typ, Start: at, Len: 1}
		if err := unix.FcntlFlock(other.Fd(), unix.F_OFD_SETLK, &lk); err != nil {
			t.Fatal(err)
		}
	}
	const notSharingWrite = 201
	lock(unix.F_RDLCK, notSharingWrite)
	w := open(t, path, block.FileOptions{NoLock: true})
	if err := w.LockQEMU(); !errors.Is(err, block.ErrLocked) {
		t.Fatalf("writer: %v", err)
	}
	r := open(t, path, block.FileOptions{ReadOnly: true, NoLock: true})
	if err := r.LockQEMU(); err != nil {
		t.Fatalf("reader: %v (did the refused writer leave a lock behind?)", err)
	}
	if err := r.UnlockQEMU(); err != nil {
		t.Fatal(err)
	}
	lock(unix.F_UNLCK, notSharingWrite)
	if err := w.LockQEMU(); err != nil {
		t.Fatalf("writer afterwards: %v", err)
	}
}

// An image can be opened again as soon as it was closed, however many programs
// this process is starting: between fork and exec a child has every descriptor
// of ours, and so would have the locks.
func TestAClosedImageIsFreeWhileProgramsAreStarted(t *testing.T) {
	path := image(t, 4096)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if err := exec.Command("/bin/true").Run(); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	defer wg.Wait()
	defer close(stop)
	for range 3000 {
		f, err := block.OpenFile(path, block.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.LockQEMU(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
}
