package block

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Resize gives the image size bytes, a multiple of SectorSize, durably; what is
// new reads as zeros. A block device cannot be told: it must have at least so
// many bytes by now, and all it has are used. Nothing may be in flight behind
// the smaller of the two sizes. After an error a size that was to grow is as
// before, one that was to shrink has shrunk; the file may be longer than that.
func (f *File) Resize(size int64) error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.leave()
	if f.readOnly {
		return ErrReadOnly
	}
	if size <= 0 || size%SectorSize != 0 {
		return fmt.Errorf("resize %s to %d bytes: not whole sectors: %w", f.path, size, ErrRange)
	}
	if f.blockDev {
		n, err := blockDeviceSize(f.fd)
		if err == nil && n < size {
			err = fmt.Errorf("the device has %d bytes: %w", n, ErrRange)
		}
		if err != nil {
			return fmt.Errorf("resize %s to %d bytes: %w", f.path, size, err)
		}
		f.real.Store(n)
		f.size.Store(n)
		return nil
	}
	shorter := size < f.size.Load()
	if shorter { // refuse what would make it longer again
		f.size.Store(size)
		f.real.Store(min(size, f.real.Load()))
	}
	if _, err := retryEINTR(func() (struct{}, error) { return struct{}{}, unix.Ftruncate(f.fd, size) }); err != nil {
		return &os.PathError{Op: "resize", Path: f.path, Err: err}
	}
	if _, err := retryEINTR(func() (struct{}, error) { return struct{}{}, unix.Fsync(f.fd) }); err != nil {
		f.failSync(err) // an error of earlier writes may have been told here, once
		return f.syncFailure()
	}
	f.grown(size)
	f.size.Store(size)
	return nil
}
