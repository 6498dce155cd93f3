package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNoClone: the file system cannot share blocks between these two files.
var ErrNoClone = errors.New("the file system cannot share blocks")

// Clone makes dst, an empty file, an independent copy of f that shares its
// blocks until either is written: in no time, on XFS and btrfs.
func (f *File) Clone(dst *os.File) error {
	err := ErrNoClone
	cerr := f.Control(func(fd int) { err = CloneFD(int(dst.Fd()), fd) })
	return errors.Join(cerr, err)
}

// CloneFD is Clone for open files.
func CloneFD(dst, src int) error {
	err := unix.IoctlFileClone(dst, src)
	for _, no := range []error{unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.ENOSYS} {
		if errors.Is(err, no) {
			return fmt.Errorf("%w: %w", ErrNoClone, err)
		}
	}
	return err
}

const copyPiece = 1 << 20

// Copy writes what src holds into dst, an empty file, and leaves zeros out.
// note, if not nil, is told how far it has come.
func Copy(ctx context.Context, dst *os.File, src Device, note func(done int64)) error {
	if err := dst.Truncate(src.Size()); err != nil {
		return err
	}
	buf := make([]byte, copyPiece)
	for off := int64(0); off < src.Size(); {
		window := min(64*copyPiece, src.Size()-off)
		var data []Range
		m, ok := src.(Mapper)
		if !ok {
			data = []Range{{Off: off, Len: window}}
		} else if err := m.Map(off, window, func(e Extent) bool {
			if !e.Zero {
				data = append(data, e.Range)
			}
			return true
		}); err != nil {
			return err
		}
		for _, r := range data {
			if err := copyRange(ctx, dst, src, r, buf); err != nil {
				return err
			}
		}
		off += window
		if note != nil {
			note(off)
		}
	}
	return nil
}

func copyRange(ctx context.Context, dst *os.File, src Device, r Range, buf []byte) error {
	for off := r.Off; off < r.End(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), r.End()-off)]
		if _, err := src.ReadAt(p, off); err != nil {
			return err
		}
		for at := 0; at < len(p); at += 4096 {
			g := p[at:min(at+4096, len(p))]
			if bytes.Count(g, []byte{0}) == len(g) {
				continue
			}
			if _, err := dst.WriteAt(g, off+int64(at)); err != nil {
				return err
			}
		}
		off += int64(len(p))
	}
	return nil
}
