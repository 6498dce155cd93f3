package block

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// SectorSize is the unit to which the size of a file is rounded up.
const SectorSize = 512

// FileOptions say how OpenFile opens an image. The zero value opens it for
// writing under our own lock.
type FileOptions struct {
	// ReadOnly opens without write permission; mutations return ErrReadOnly.
	ReadOnly bool
	// NoLock leaves out our own lock (flock). Only for images another lock
	// already protects.
	NoLock bool
	// DirtyLimit bounds the bytes written and not yet written back by the
	// kernel. Zero means DefaultDirtyLimit, a negative value no bound.
	DirtyLimit int64
}

// DefaultDirtyLimit is the dirty page cache one disk may hold.
const DefaultDirtyLimit = 64 << 20

// ErrSyncFailed: an fsync of this file failed earlier. What was written since
// the last good Sync may be lost although the kernel would report success now,
// so every later Sync of the same File fails as well. Reopen and verify.
var ErrSyncFailed = errors.New("an earlier sync failed, data written before it may be lost; reopen and verify the image")

// File is a raw image: a regular file or a block device. It never looks at the
// content to guess a format.
type File struct {
	fd       int
	path     string       // resolved once, at open
	size     atomic.Int64 // rounded up to SectorSize
	readOnly bool
	blockDev bool

	real   atomic.Int64 // bytes that exist; grows up to size when the tail is written
	noWait atomic.Bool  // preadv2(RWF_NOWAIT) works here
	zero   zeroState
	dirty  dirtyState

	syncMu  sync.Mutex
	syncErr error // guarded by syncMu; sticky

	closeMu sync.RWMutex // held for reading by every operation
	closed  bool         // guarded by closeMu

	handed atomic.Bool // a successor may have the descriptor and the locks
}

var (
	_ Device     = (*File)(nil)
	_ TryWriter  = (*File)(nil)
	_ TryReader  = (*File)(nil)
	_ Mapper     = (*File)(nil)
	_ FastZeroer = (*File)(nil)
	_ FileBacked = (*File)(nil)
)

// OpenFile opens the raw image at path. Symbolic links are resolved once;
// Path reports the result. Anything but a regular file or a block device is
// refused. Unless opts.NoLock is set the file is locked (flock), exclusively
// when writable, and OpenFile fails with a *LockedError when somebody else
// holds it.
func OpenFile(path string, opts FileOptions) (*File, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	if resolved, err = filepath.Abs(resolved); err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	flags := unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_RDWR
	if opts.ReadOnly {
		flags = flags&^unix.O_RDWR | unix.O_RDONLY
	}
	fd, err := retryEINTR(func() (int, error) { return unix.Open(resolved, flags, 0) })
	if err != nil {
		return nil, &os.PathError{Op: "open image", Path: resolved, Err: err}
	}
	f := &File{fd: fd, path: resolved, readOnly: opts.ReadOnly}
	if err := f.setup(opts); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	f.noWait.Store(true)
	f.startWriteback(opts.DirtyLimit)
	return f, nil
}

// setup learns kind and size and takes our lock.
func (f *File) setup(opts FileOptions) error {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return &os.PathError{Op: "stat image", Path: f.path, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		f.real.Store(st.Size)
	case unix.S_IFBLK:
		f.blockDev = true
		n, err := blockDeviceSize(f.fd)
		if err != nil {
			return &os.PathError{Op: "read size of block device", Path: f.path, Err: err}
		}
		f.real.Store(n)
	default:
		return fmt.Errorf("open image %s: neither a regular file nor a block device", f.path)
	}
	f.size.Store(roundUp(f.real.Load()))
	if err := unix.SetNonblock(f.fd, false); err != nil {
		return &os.PathError{Op: "open image", Path: f.path, Err: err}
	}
	if opts.NoLock {
		return nil
	}
	return f.lockOwn()
}

// Path is the resolved path of the image.
func (f *File) Path() string { return f.path }

// ReadOnly reports whether mutations are refused.
func (f *File) ReadOnly() bool { return f.readOnly }

// Size is the length rounded up to whole sectors; the bytes behind the real
// end read as zeros, and come into being when a guest writes to them.
func (f *File) Size() int64 { return f.size.Load() }

func roundUp(n int64) int64 { return (n + SectorSize - 1) / SectorSize * SectorSize }

// enter keeps the descriptor open until leave; it fails after Close.
func (f *File) enter() error {
	f.closeMu.RLock()
	if f.closed {
		f.closeMu.RUnlock()
		return ErrClosed
	}
	return nil
}

func (f *File) leave() { f.closeMu.RUnlock() }

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if err := f.enter(); err != nil {
		return 0, err
	}
	defer f.leave()
	if err := Check(off, int64(len(p)), f.size.Load()); err != nil {
		return 0, err
	}
	return f.readFull(p, off)
}

// readFull reads without looking at limits; the virtual tail is zeros.
func (f *File) readFull(p []byte, off int64) (int, error) {
	stored := p[:f.storedLen(off, len(p))]
	for done := 0; done < len(stored); {
		n, err := unix.Pread(f.fd, stored[done:], off+int64(done))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return done, &os.PathError{Op: "read", Path: f.path, Err: err}
		case n == 0:
			return done, f.errShrunk("read", off+int64(done))
		default:
			done += n
		}
	}
	clear(p[len(stored):])
	return len(p), nil
}

// errShrunk: somebody cut the file behind our back. A guest must see an error,
// never zeros.
func (f *File) errShrunk(op string, off int64) error {
	return &os.PathError{
		Op: op, Path: f.path,
		Err: fmt.Errorf("somebody cut the image off before byte %d, it had %d bytes when opened: %w", off, f.real.Load(), io.ErrUnexpectedEOF),
	}
}

// storedLen says how many of n bytes at off exist in the file.
func (f *File) storedLen(off int64, n int) int {
	return int(max(0, min(int64(n), f.real.Load()-off)))
}

// TryReadAt reads from the page cache only. Where the file system cannot tell
// (tmpfs), it reads plainly.
func (f *File) TryReadAt(p []byte, off int64) (int, error) {
	if err := f.enter(); err != nil {
		return 0, err
	}
	defer f.leave()
	if err := Check(off, int64(len(p)), f.size.Load()); err != nil {
		return 0, err
	}
	stored := f.storedLen(off, len(p))
	if stored < len(p) || !f.noWait.Load() {
		return f.readFull(p, off)
	}
	n, err := preadNoWait(f.fd, p, off)
	switch {
	case err == nil && n == len(p):
		return n, nil
	case err == nil || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		return 0, ErrWouldBlock
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		f.noWait.Store(false)
		return f.readFull(p, off)
	}
	return 0, &os.PathError{Op: "read", Path: f.path, Err: err}
}

// WriteAt implements io.WriterAt; it waits while the dirty limit is reached.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if err := f.enter(); err != nil {
		return 0, err
	}
	defer f.leave()
	if err := f.checkWrite(off, int64(len(p))); err != nil {
		return 0, err
	}
	f.dirty.wait()
	return f.write(p, off)
}

// TryWriteAt writes into the page cache, or returns ErrWouldBlock when the
// dirty limit is reached and the write would have to wait for storage.
func (f *File) TryWriteAt(p []byte, off int64) (int, error) {
	if err := f.enter(); err != nil {
		return 0, err
	}
	defer f.leave()
	if err := f.checkWrite(off, int64(len(p))); err != nil {
		return 0, err
	}
	if f.dirty.full() {
		return 0, ErrWouldBlock
	}
	return f.write(p, off)
}

func (f *File) checkWrite(off, n int64) error {
	if f.readOnly {
		return ErrReadOnly
	}
	return Check(off, n, f.size.Load())
}

func (f *File) write(p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		n, err := unix.Pwrite(f.fd, p[done:], off+int64(done))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return done, &os.PathError{Op: "write", Path: f.path, Err: err}
		default:
			done += n
		}
	}
	f.grown(off + int64(len(p)))
	f.dirty.add(int64(len(p)))
	return len(p), nil
}

// grown notes that the image exists up to end.
func (f *File) grown(end int64) {
	for {
		have := f.real.Load()
		if end <= have || f.real.CompareAndSwap(have, end) {
			return
		}
	}
}

// Sync makes everything written so far durable. An error is sticky: see
// ErrSyncFailed.
func (f *File) Sync() error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.leave()
	if f.readOnly {
		return nil
	}
	if err := f.syncFailure(); err != nil {
		return err
	}
	for {
		err := unix.Fdatasync(f.fd)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			f.failSync(err)
		}
		return f.syncFailure()
	}
}

func (f *File) failSync(err error) {
	f.syncMu.Lock()
	defer f.syncMu.Unlock()
	if f.syncErr == nil {
		f.syncErr = fmt.Errorf("sync %s: %w: %w", f.path, err, ErrSyncFailed)
	}
}

func (f *File) syncFailure() error {
	f.syncMu.Lock()
	defer f.syncMu.Unlock()
	return f.syncErr
}

// ReadFD implements FileBacked. It declines when the file has a virtual tail.
func (f *File) ReadFD() (int, bool) { return f.fd, f.real.Load() == f.size.Load() }

// Close waits for running operations, releases the locks and the descriptor;
// locks that were handed over stay the successor's.
func (f *File) Close() error {
	f.dirty.stop() // before closeMu: a writer may be waiting for it
	f.closeMu.Lock()
	defer f.closeMu.Unlock()
	if f.closed {
		return ErrClosed
	}
	f.closed = true
	if !f.handed.Load() {
		f.unlock()
	}
	if err := unix.Close(f.fd); err != nil {
		return &os.PathError{Op: "close", Path: f.path, Err: err}
	}
	return nil
}

func retryEINTR[T any](call func() (T, error)) (T, error) {
	for {
		v, err := call()
		if !errors.Is(err, unix.EINTR) {
			return v, err
		}
	}
}
