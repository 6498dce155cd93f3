package fsx

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// osFS is a directory of the host. os.Root resolves every name below it with
// openat, so that neither ".." nor a symbolic link leads out.
type osFS struct {
	root *os.Root
}

var (
	_ FS   = (*osFS)(nil)
	_ File = (*osFile)(nil)
)

// openFlags are the flags Open takes.
const openFlags = os.O_RDONLY | os.O_RDWR | os.O_CREATE | os.O_EXCL | os.O_TRUNC

// OS returns the host's directory root as an FS. The directory must exist. New
// files have mode 0600, new directories 0700. Only regular files are opened.
// After a failed Sync the same File refuses every further Sync with that error.
func OS(root string) (FS, error) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	return &osFS{root: r}, nil
}

// Open implements FS.
func (o *osFS) Open(name string, flag int) (File, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	if flag&^openFlags != 0 {
		return nil, &fs.PathError{Op: "open", Path: name, Err: unix.EINVAL}
	}
	// O_NONBLOCK: a FIFO in the way must not hold us; it is refused below.
	f, err := o.root.OpenFile(name, flag|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &osFile{f: f}, nil
}

// Rename implements FS.
func (o *osFS) Rename(old, name string) error {
	if err := CheckName(old); err != nil {
		return err
	}
	if err := CheckName(name); err != nil {
		return err
	}
	return o.root.Rename(old, name)
}

// Remove implements FS.
func (o *osFS) Remove(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	return o.root.Remove(name)
}

// List implements FS.
func (o *osFS) List(dir string) ([]string, error) {
	if err := CheckDir(dir); err != nil {
		return nil, err
	}
	d, err := o.root.Open(dir)
	if err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	if err := errors.Join(err, d.Close()); err != nil {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// MkdirAll implements FS. Parents are synced even where they existed: an
// earlier process may have died between the making and the sync.
func (o *osFS) MkdirAll(dir string) error {
	if err := CheckDir(dir); err != nil {
		return err
	}
	if dir == "." {
		return nil
	}
	parts := strings.Split(dir, "/")
	for i := range parts {
		name := strings.Join(parts[:i+1], "/")
		if err := o.root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		st, err := o.root.Stat(name)
		if err != nil {
			return err
		}
		if !st.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: name, Err: unix.ENOTDIR}
		}
		if err := o.SyncDir(path.Dir(name)); err != nil {
			return err
		}
	}
	return nil
}

// SyncDir implements FS.
func (o *osFS) SyncDir(dir string) error {
	if err := CheckDir(dir); err != nil {
		return err
	}
	d, err := o.root.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(withFD(d, "syncdir", unix.Fsync), d.Close())
}

// osFile is a regular file of the host.
type osFile struct {
	f *os.File

	mu     sync.Mutex
	failed error // the first error of Sync; guarded by mu
}

// ReadAt implements io.ReaderAt.
func (o *osFile) ReadAt(p []byte, off int64) (int, error) { return o.f.ReadAt(p, off) }

// WriteAt implements io.WriterAt.
func (o *osFile) WriteAt(p []byte, off int64) (int, error) { return o.f.WriteAt(p, off) }

// Allocate implements File. On a file system without fallocate it only grows
// the file: the space is then not reserved and a write may meet ENOSPC.
func (o *osFile) Allocate(off, n int64) error {
	if off < 0 || n < 0 || off > 1<<62 || n > 1<<62 {
		return &fs.PathError{Op: "allocate", Path: o.f.Name(), Err: unix.EINVAL}
	}
	if n == 0 {
		return nil
	}
	err := withFD(o.f, "allocate", func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	size, err := o.Size()
	if err != nil || size >= off+n {
		return err
	}
	return o.f.Truncate(off + n)
}

// Truncate implements File.
func (o *osFile) Truncate(n int64) error { return o.f.Truncate(n) }

// Sync implements File.
func (o *osFile) Sync() error {
	o.mu.Lock()
	failed := o.failed
	o.mu.Unlock()
	if failed != nil {
		return fmt.Errorf("earlier sync failed, content is unknown: %w", failed)
	}
	err := withFD(o.f, "sync", unix.Fdatasync)
	if err != nil && !errors.Is(err, fs.ErrClosed) {
		o.mu.Lock()
		o.failed = err
		o.mu.Unlock()
	}
	return err
}

// Size implements File.
func (o *osFile) Size() (int64, error) {
	st, err := o.f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

// Close implements File.
func (o *osFile) Close() error { return o.f.Close() }

// withFD runs call on f's descriptor, again after EINTR, and names the file.
func withFD(f *os.File, op string, call func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var cerr error
	err = c.Control(func(fd uintptr) {
		for {
			if cerr = call(int(fd)); !errors.Is(cerr, unix.EINTR) {
				return
			}
		}
	})
	if err != nil { // Control fails on closed files only, with an error of its own
		cerr = fs.ErrClosed
	}
	if cerr != nil {
		return &fs.PathError{Op: op, Path: f.Name(), Err: cerr}
	}
	return nil
}
