package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"kvmreplica/integration/oracle"
)

// device is a block device without the page cache in between.
type device struct{ f *os.File }

// aligned runs fn with a buffer the kernel accepts for direct I/O.
func aligned(n int, fn func(b []byte) (int, error)) (int, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return 0, err
	}
	k, err := fn(b)
	return k, errors.Join(err, unix.Munmap(b))
}

func (d device) ReadAt(p []byte, off int64) (int, error) {
	return aligned(len(p), func(b []byte) (int, error) {
		n, err := d.f.ReadAt(b, off)
		copy(p, b)
		return n, err
	})
}

func (d device) WriteAt(p []byte, off int64) (int, error) {
	return aligned(len(p), func(b []byte) (int, error) {
		copy(b, p)
		return d.f.WriteAt(b, off)
	})
}

// ZeroAt asks the device for zeroes; a discard would leave the content open.
func (d device) ZeroAt(off, n int64, _ bool) error {
	r := [2]uint64{uint64(off), uint64(n)}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, d.f.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&r))); e != 0 {
		return fmt.Errorf("BLKZEROOUT: %w", e)
	}
	return nil
}

func (d device) Sync() error { return d.f.Sync() }

// load writes, zeroes, flushes and reads, checks what it reads, and in the end
// everything.
func load(path string, workers, n int, seed uint64) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	image := func() ([]byte, error) {
		b := make([]byte, size)
		for off := int64(0); off < size; off += 1 << 20 {
			if _, err := (device{f}).ReadAt(b[off:min(size, off+1<<20)], off); err != nil {
				return nil, err
			}
		}
		return b, nil
	}
	base, err := image()
	if err != nil {
		return err
	}
	h := oracle.NewHistory(1, oracle.Images{base})
	l := oracle.Load{History: h, Disks: []oracle.Disk{device{f}}}
	if err := l.Run(seed, workers, n); err != nil {
		return err
	}
	if base, err = image(); err != nil {
		return err
	}
	if err := oracle.CheckVisible(h, oracle.Images{base}); err != nil {
		return err
	}
	fmt.Printf("%d operations, content %x\n", workers*n, sha256.Sum256(base))
	return f.Sync()
}
