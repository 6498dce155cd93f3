package block

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"
)

// Handed is what a process that takes an image over must know besides its
// descriptor. flock and QEMU's lock bytes belong to the open file description
// the descriptor names, so whoever has a duplicate holds them as well: at no
// moment does nobody.
type Handed struct {
	Path     string `json:"path"`
	ReadOnly bool   `json:"read_only,omitempty"`
	// QemuLock: QEMU's lock bytes are held.
	QemuLock bool  `json:"qemu_lock,omitempty"`
	Size     int64 `json:"size"`
	// DirtyBytes are written and perhaps not written back.
	DirtyBytes int64 `json:"dirty_bytes,omitempty"`
	DirtyLimit int64 `json:"dirty_limit,omitempty"`
}

// HandOver brings the file to rest for a successor and tells what that must
// know; the caller fills in QemuLock. Nobody may write or sync until resume was
// called. A failed sync is not handed on: the kernel tells of it once only.
// When ctx ends before writeback does, nothing has changed.
func (f *File) HandOver(ctx context.Context) (h Handed, resume func(), err error) {
	if err := f.enter(); err != nil {
		return h, nil, err
	}
	defer f.leave()
	wake, err := f.dirty.rest(ctx)
	if err != nil {
		return h, nil, fmt.Errorf("wait for writeback of %s: %w", f.path, err)
	}
	if err := f.syncFailure(); err != nil {
		wake()
		return h, nil, err
	}
	f.handed.Store(true)
	return Handed{
		Path: f.path, ReadOnly: f.readOnly, Size: f.size.Load(),
		DirtyBytes: f.dirty.bytes.Load(), DirtyLimit: f.dirty.limit,
	}, func() { f.handed.Store(false); wake() }, nil
}

// Control calls fn with the file's descriptor, which stays open until fn
// returns. Never unlock it or close it.
func (f *File) Control(fn func(fd int)) error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.leave()
	fn(f.fd)
	return nil
}

// AdoptFile makes a File of a descriptor that another process handed over,
// locks included, and owns it from now on, also when it fails. A failure takes
// no lock away.
func AdoptFile(fd int, h Handed) (*File, error) {
	f := &File{fd: fd, path: h.Path, readOnly: h.ReadOnly}
	if err := f.adopt(h); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("adopt image: %w", err)
	}
	f.noWait.Store(true)
	limit := h.DirtyLimit
	if limit == 0 {
		limit = -1 // it had no bound
	}
	f.dirty.bytes.Store(h.DirtyBytes)
	f.startWriteback(limit)
	return f, nil
}

// adopt checks that the descriptor is what it is said to be. Taking locks that
// the description holds already changes nothing.
func (f *File) adopt(h Handed) error {
	unix.CloseOnExec(f.fd)
	flags, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", h.Path, err)
	}
	if ro := flags&unix.O_ACCMODE == unix.O_RDONLY; ro != h.ReadOnly {
		return fmt.Errorf("%s: the descriptor's mode is not what was said (read-only: %t)", h.Path, ro)
	}
	if err := f.setup(FileOptions{ReadOnly: h.ReadOnly}); err != nil {
		return err
	}
	if f.size.Load() != h.Size {
		return fmt.Errorf("%s has %d bytes, it had %d", h.Path, f.size.Load(), h.Size)
	}
	if !h.QemuLock {
		return nil
	}
	return f.lockQEMU(f.qemuPerms())
}

// rest waits until no writeback runs and keeps it from starting until resume.
func (d *dirtyState) rest(ctx context.Context) (resume func(), err error) {
	if d.busy == nil {
		return func() {}, nil
	}
	select {
	case d.busy <- struct{}{}:
		return func() { <-d.busy }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
