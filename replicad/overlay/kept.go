package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
)

// OpenKept is a Scratch that outlives its process, not a boot: its data and the
// map of what is in it are the files PATH.data and PATH.map, and whoever opens
// them again over the same device below finds every write that was answered.
// The map is only right together with the page cache, so that files of an
// earlier boot must be removed (RemoveKept), not opened. room, when set, is
// asked before data grows; its error is the write's.
func OpenKept(path string, base block.Device, quota int64, room func() error) (*Scratch, error) {
	s, err := openKept(path, base, quota, room)
	if err != nil {
		return nil, fmt.Errorf("open kept overlay %s: %w", path, err)
	}
	return s, nil
}

// RemoveKept deletes the files of an overlay that is closed. What is not there
// is no error.
func RemoveKept(path string) error {
	var errs []error
	for _, f := range []string{path + ".data", path + ".map"} {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func openKept(path string, base block.Device, quota int64, room func() error) (*Scratch, error) {
	if err := sized(path+".data", base.Size()); err != nil {
		return nil, err
	}
	data, err := block.OpenFile(path+".data", block.FileOptions{})
	if err != nil {
		return nil, err
	}
	in, end, err := mapPresence(path+".map", base.Size())
	if err != nil {
		return nil, errors.Join(err, data.Close())
	}
	s := NewScratch(base, data, quota)
	s.in, s.end, s.room = in, end, room
	s.used.Store(in.count() * granule)
	return s, nil
}

// sized makes a sparse file of a size, or leaves the one that is there.
func sized(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() == size {
		return err
	}
	if st.Size() != 0 {
		return fmt.Errorf("%s has %d bytes, the disk has %d", path, st.Size(), size)
	}
	return f.Truncate(size)
}

// mapPresence maps the presence words of a file. Its space is taken at once: a
// page that could not be had later would end the process.
func mapPresence(path string, size int64) (presence, func() error, error) {
	words := (size/granule)/perWord + 1
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, words*8); err != nil {
		return nil, nil, fmt.Errorf("take space for %s: %w", path, err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(words*8), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map %s: %w", path, err)
	}
	in := unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&mem[0])), words)
	return in, func() error { return unix.Munmap(mem) }, nil
}

// count is the number of granules that are present.
func (p presence) count() int64 {
	var n int64
	for g := range int64(len(p)) * perWord {
		if g%perWord == 0 && p[g/perWord].Load() == 0 {
			continue
		}
		if p.get(g) == present {
			n++
		}
	}
	return n
}
