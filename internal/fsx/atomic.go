package fsx

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
)

// ErrTooLarge: a file is longer than its reader accepts.
var ErrTooLarge = errors.New("file is too large")

// TempSuffix marks the file WriteAtomic writes before it renames it. One found
// at start is the remains of a crash and may be removed.
const TempSuffix = ".tmp"

// WriteAtomic replaces name by data: after a crash the file holds its old
// content or all of the new, and the new for certain once WriteAtomic returned
// nil. After an error either may be there, and after a kill before the end the
// new content may be visible without its name being durable: who relies on what
// it reads at start calls SyncDir first. Its directory must exist; calls for one
// name must not overlap.
func WriteAtomic(f FS, name string, data []byte) error {
	tmp := name + TempSuffix
	if err := writeSynced(f, tmp, data); err != nil {
		_ = f.Remove(tmp)
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := f.Rename(tmp, name); err != nil {
		_ = f.Remove(tmp)
		return fmt.Errorf("put %s in place: %w", name, err)
	}
	if err := f.SyncDir(path.Dir(name)); err != nil {
		return fmt.Errorf("put %s in place: %w", name, err)
	}
	return nil
}

func writeSynced(f FS, name string, data []byte) error {
	w, err := f.Open(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	if _, err := w.WriteAt(data, 0); err != nil {
		return errors.Join(err, w.Close())
	}
	if err := w.Sync(); err != nil {
		return errors.Join(err, w.Close())
	}
	return w.Close()
}

// ReadFile returns the content of name. A file longer than limit bytes is
// refused with ErrTooLarge before anything is allocated.
func ReadFile(f FS, name string, limit int64) ([]byte, error) {
	r, err := f.Open(name, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	data, err := readAll(r, name, limit)
	if cerr := r.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, err
	}
	return data, nil
}

func readAll(r File, name string, limit int64) ([]byte, error) {
	size, err := r.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%w: %s has %d bytes, at most %d are accepted", ErrTooLarge, name, size, limit)
	}
	data := make([]byte, size)
	n, err := r.ReadAt(data, 0)
	switch {
	case int64(n) == size:
		return data, nil
	case err == nil || errors.Is(err, io.EOF):
		return nil, fmt.Errorf("read %s: %w", name, io.ErrUnexpectedEOF)
	default:
		return nil, err
	}
}

// Exists reports whether name is there. An error other than absence is
// returned: "could not look" is not "no".
func Exists(f FS, name string) (bool, error) {
	r, err := f.Open(name, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, r.Close()
}
