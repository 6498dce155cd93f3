package block_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
)

func handedImage(t *testing.T) (*block.File, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return f, path
}

// duplicated is what the other process would receive.
func duplicated(t *testing.T, f *block.File) int {
	t.Helper()
	var fd int
	var derr error
	if err := f.Control(func(x int) { fd, derr = unix.FcntlInt(uintptr(x), unix.F_DUPFD_CLOEXEC, 0) }); err != nil || derr != nil {
		t.Fatal(err, derr)
	}
	return fd
}

func TestAnAdoptedImageIsLockedWithoutAGap(t *testing.T) {
	old, path := handedImage(t)
	if err := old.LockQEMU(); err != nil {
		t.Fatal(err)
	}
	h, resume, err := old.HandOver(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	resume() // twice over: taken back, then handed on
	if h, _, err = old.HandOver(context.Background()); err != nil {
		t.Fatal(err)
	}
	h.QemuLock = true
	next, err := block.AdoptFile(duplicated(t, old), h)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(when string) {
		t.Helper()
		if f, err := block.OpenFile(path, block.FileOptions{}); !errors.Is(err, block.ErrLocked) {
			t.Fatalf("%s: a stranger opened the image: %v, %v", when, f, err)
		}
		f, err := block.OpenFile(path, block.FileOptions{NoLock: true})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.LockQEMU(); !errors.Is(err, block.ErrLocked) {
			t.Fatalf("%s: QEMU's lock was free: %v", when, err)
		}
	}
	refused("both have it")
	if _, err := next.WriteAt([]byte("next"), 0); err != nil {
		t.Fatal(err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	refused("the successor alone")
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		t.Fatalf("after the end: %v", err)
	}
	_ = f.Close()
}

func TestAnAdoptionThatFailsLeavesTheLocks(t *testing.T) {
	old, path := handedImage(t)
	defer old.Close()
	if err := old.LockQEMU(); err != nil {
		t.Fatal(err)
	}
	h, resume, err := old.HandOver(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	h.QemuLock = true
	for what, wrong := range map[string]block.Handed{
		"size":      {Path: path, Size: h.Size + 512, QemuLock: true},
		"read-only": {Path: path, Size: h.Size, ReadOnly: true},
	} {
		if _, err := block.AdoptFile(duplicated(t, old), wrong); err == nil {
			t.Fatalf("adopted with a wrong %s", what)
		}
	}
	resume()
	if _, err := old.WriteAt([]byte("goes on"), 0); err != nil {
		t.Fatal(err)
	}
	if err := old.Sync(); err != nil {
		t.Fatal(err)
	}
	if _, err := block.OpenFile(path, block.FileOptions{}); !errors.Is(err, block.ErrLocked) {
		t.Fatalf("our lock is gone: %v", err)
	}
	f, err := block.OpenFile(path, block.FileOptions{NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.LockQEMU(); !errors.Is(err, block.ErrLocked) {
		t.Fatalf("QEMU's lock is gone: %v", err)
	}
}
