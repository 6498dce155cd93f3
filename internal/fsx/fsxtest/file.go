package fsxtest

import (
	"io"
	"io/fs"
	"math"
	"sync/atomic"
	"syscall"
)

// file is an open file of a Mem.
type file struct {
	m        *Mem
	n        *node
	path     string
	writable bool
	closed   atomic.Bool
}

func (f *file) check(op string, off, n int64, write bool) error {
	switch {
	case f.closed.Load():
		return pathErr(op, f.path, fs.ErrClosed)
	case off < 0 || n < 0 || off > math.MaxInt64-n:
		return pathErr(op, f.path, syscall.EINVAL)
	case write && !f.writable:
		return pathErr(op, f.path, syscall.EBADF)
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (f *file) ReadAt(p []byte, off int64) (n int, err error) {
	if err := f.check("read", off, int64(len(p)), false); err != nil {
		return 0, err
	}
	err = f.m.power.Do(Op{Kind: Read, Path: f.path, Off: off, Len: int64(len(p))}, func(fault error, _ bool) error {
		have := max(0, min(int64(len(p)), f.n.size-off))
		want, ferr := ShortCount(fault, int(have))
		f.n.data.ReadAt(p[:want], off)
		n = want
		if ferr == nil && n < len(p) {
			ferr = io.EOF
		}
		return ferr
	})
	if err == io.EOF {
		return n, err
	}
	return n, pathErr("read", f.path, err)
}

// WriteAt implements io.WriterAt.
func (f *file) WriteAt(p []byte, off int64) (n int, err error) {
	if err := f.check("write", off, int64(len(p)), true); err != nil {
		return 0, err
	}
	err = f.m.power.Do(Op{Kind: Write, Path: f.path, Off: off, Len: int64(len(p))}, func(fault error, dying bool) error {
		want, ferr := ShortCount(fault, len(p))
		if want == 0 {
			return ferr
		}
		if err := f.m.reserve(f.n, off, int64(want)); err != nil {
			return err
		}
		f.n.data.WriteAt(p[:want], off, dying)
		f.n.setSize(max(f.n.size, off+int64(want)))
		n = want
		return ferr
	})
	if err == ErrPowerLost {
		n = 0
	}
	return n, pathErr("write", f.path, err)
}

// Allocate implements fsx.File.
func (f *file) Allocate(off, n int64) error {
	if err := f.check("allocate", off, n, true); err != nil {
		return err
	}
	err := f.m.power.Do(Op{Kind: Allocate, Path: f.path, Off: off, Len: n}, func(fault error, _ bool) error {
		if fault != nil {
			return fault
		}
		if err := f.m.reserve(f.n, off, n); err != nil {
			return err
		}
		f.n.setSize(max(f.n.size, off+n))
		return nil
	})
	return pathErr("allocate", f.path, err)
}

// Truncate implements fsx.File.
func (f *file) Truncate(n int64) error {
	if err := f.check("truncate", 0, n, true); err != nil {
		return err
	}
	return f.truncate(n)
}

func (f *file) truncate(n int64) error {
	err := f.m.power.Do(Op{Kind: Truncate, Path: f.path, Len: n}, func(fault error, _ bool) error {
		if fault != nil {
			return fault
		}
		if n < f.n.size {
			f.n.data.Zero(n, f.n.size-n, false)
			for b := range f.n.blocks {
				if b*blockSize >= n {
					delete(f.n.blocks, b)
				}
			}
		}
		f.n.setSize(n)
		return nil
	})
	return pathErr("truncate", f.path, err)
}

// Sync implements fsx.File.
func (f *file) Sync() error {
	if err := f.check("sync", 0, 0, false); err != nil {
		return err
	}
	err := f.m.power.Do(Op{Kind: Sync, Path: f.path}, func(fault error, dying bool) error {
		switch {
		case dying:
		case fault != nil:
			f.n.data.SyncFailed(f.m.power.Drops())
		default:
			f.n.data.Sync()
			f.n.sizes = []int64{f.n.size}
		}
		return fault
	})
	return pathErr("sync", f.path, err)
}

// Size implements fsx.File.
func (f *file) Size() (n int64, err error) {
	if err := f.check("size", 0, 0, false); err != nil {
		return 0, err
	}
	err = f.m.power.Do(Op{Kind: Size, Path: f.path}, func(fault error, _ bool) error {
		n = f.n.size
		return fault
	})
	return n, pathErr("size", f.path, err)
}

// Close implements fsx.File.
func (f *file) Close() error {
	if f.closed.Swap(true) {
		return pathErr("close", f.path, fs.ErrClosed)
	}
	return nil
}

// reserve allocates the 4 KiB blocks of [off, off+n), or none and ENOSPC.
func (m *Mem) reserve(n *node, off, length int64) error {
	if length == 0 {
		return nil
	}
	first, last := off/blockSize, (off+length-1)/blockSize
	if m.capacity > 0 {
		need := last - first + 1
		for b := range n.blocks {
			if b >= first && b <= last {
				need--
			}
		}
		if m.used()+need*blockSize > m.capacity {
			return syscall.ENOSPC
		}
	}
	if last-first > 1<<20 {
		return syscall.EFBIG
	}
	for b := first; b <= last; b++ {
		n.blocks[b] = struct{}{}
	}
	return nil
}
