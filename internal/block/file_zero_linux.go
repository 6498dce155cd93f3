package block

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// zeroState remembers which ways of zeroing the file system refused, so that
// they are tried once.
type zeroState struct {
	noPunch, noZeroRange, noBlockZero atomic.Bool
}

// zeroChunk is what the fallback writes at once.
const zeroChunk = 256 << 10

// ZeroAt implements Device: fallocate on files, BLKZEROOUT on block devices
// (the kernel frees the range there only when it then reads as zeros), written
// zeros where neither works.
func (f *File) ZeroAt(off, n int64, punch bool) error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.leave()
	if err := f.checkWrite(off, n); err != nil {
		return err
	}
	n = max(0, min(n, f.real.Load()-off))
	if n == 0 {
		return nil
	}
	ok, err := f.zeroQuickly(off, n, punch)
	if ok || err != nil {
		return err
	}
	return f.zeroByWriting(off, n)
}

// zeroQuickly reports false when the storage has no quick way.
func (f *File) zeroQuickly(off, n int64, punch bool) (bool, error) {
	if f.blockDev {
		if f.zero.noBlockZero.Load() || off%SectorSize != 0 || n%SectorSize != 0 {
			return false, nil
		}
		return f.quickResult("zero block device", &f.zero.noBlockZero, ioctlRange(f.fd, unix.BLKZEROOUT, off, n))
	}
	if punch && !f.zero.noPunch.Load() {
		mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
		ok, err := f.quickResult("punch hole", &f.zero.noPunch, f.fallocate(mode, off, n))
		if ok || err != nil {
			return ok, err
		}
	}
	if f.zero.noZeroRange.Load() {
		return false, nil
	}
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE)
	return f.quickResult("zero range", &f.zero.noZeroRange, f.fallocate(mode, off, n))
}

func (f *File) fallocate(mode uint32, off, n int64) error {
	for {
		if err := unix.Fallocate(f.fd, mode, off, n); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// quickResult turns "not supported" into a remembered false.
func (f *File) quickResult(op string, refused *atomic.Bool, err error) (bool, error) {
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS),
		errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL):
		refused.Store(true)
		return false, nil
	}
	return false, &os.PathError{Op: op, Path: f.path, Err: err}
}

func (f *File) zeroByWriting(off, n int64) error {
	zeros := make([]byte, min(n, zeroChunk))
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		f.dirty.wait()
		if _, err := f.write(p, off); err != nil {
			return fmt.Errorf("write zeros: %w", err)
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// FastZero implements FastZeroer: true until the storage refused every quick
// way.
func (f *File) FastZero() bool {
	if f.blockDev {
		return false // BLKZEROOUT may write
	}
	return !f.zero.noPunch.Load() || !f.zero.noZeroRange.Load()
}

// ioctlRange calls an ioctl that takes {start, length} in bytes.
func ioctlRange(fd int, req uint, off, n int64) error {
	arg := [2]uint64{uint64(off), uint64(n)}
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(&arg)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}

func blockDeviceSize(fd int) (int64, error) {
	var size uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(unix.BLKGETSIZE64), uintptr(unsafe.Pointer(&size)))
	if errno != 0 {
		return 0, errno
	}
	return int64(size), nil
}

// preadNoWait is preadv2(RWF_NOWAIT) of one buffer, without allocating.
func preadNoWait(fd int, p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	iov := unix.Iovec{Base: &p[0]}
	iov.SetLen(len(p))
	n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&iov)), 1,
		uintptr(off), uintptr(uint64(off)>>32), unix.RWF_NOWAIT)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// Map implements Mapper with SEEK_DATA and SEEK_HOLE. Holes read as zeros. On
// block devices, and where the file system cannot tell, all is data.
func (f *File) Map(off, n int64, fn func(Extent) bool) error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.leave()
	if err := Check(off, n, f.size.Load()); err != nil {
		return err
	}
	for end := off + n; off < end; {
		e, err := f.extentAt(off, end)
		if err != nil {
			return err
		}
		if !fn(e) {
			return nil
		}
		off = e.End()
	}
	return nil
}

// extentAt describes the storage at off, up to end at most.
func (f *File) extentAt(off, end int64) (Extent, error) {
	if off >= f.real.Load() {
		return Extent{Range: Range{Off: off, Len: end - off}, Hole: true, Zero: true}, nil
	}
	if f.blockDev {
		return Extent{Range: Range{Off: off, Len: end - off}}, nil
	}
	data, err := unix.Seek(f.fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // nothing but hole up to the end
		return Extent{Range: Range{Off: off, Len: end - off}, Hole: true, Zero: true}, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return Extent{Range: Range{Off: off, Len: end - off}}, nil
	case err != nil:
		return Extent{}, &os.PathError{Op: "seek data", Path: f.path, Err: err}
	case data > off:
		return Extent{Range: Range{Off: off, Len: min(data, end) - off}, Hole: true, Zero: true}, nil
	}
	hole, err := unix.Seek(f.fd, off, unix.SEEK_HOLE)
	if err != nil {
		return Extent{}, &os.PathError{Op: "seek hole", Path: f.path, Err: err}
	}
	if hole <= off { // changed between the two calls
		hole = off + 1
	}
	return Extent{Range: Range{Off: off, Len: min(hole, end) - off}}, nil
}
