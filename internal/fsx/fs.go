// Package fsx is the small file-system seam through which every metadata file
// of the product is written: superblocks, intent maps, spools, undo segments,
// journals, configuration state.
//
// It guarantees nothing beyond what a POSIX file system does: data is durable
// after File.Sync, names after SyncDir of their directory, and a failed Sync
// is never retried on the same file. The doubles in fsxtest lose everything
// that was not made durable by these calls, in any combination.
//
// Callers must sync the file before they rename it into place and sync the
// directory afterwards; WriteAtomic does both.
package fsx

import "io"

// FS is one directory tree. Names are slash-separated and relative to its
// root; "..", absolute names and NUL are refused. Safe for concurrent use.
type FS interface {
	// Open opens name with os.O_* flags (O_RDONLY, O_RDWR, O_CREATE, O_EXCL,
	// O_TRUNC). Absence is fs.ErrNotExist.
	Open(name string, flag int) (File, error)
	// Rename moves old over name atomically; durable after SyncDir of both.
	Rename(old, name string) error
	// Remove deletes a file or an empty directory. Absence is fs.ErrNotExist.
	Remove(name string) error
	// List returns the names in dir, sorted. Absence is fs.ErrNotExist.
	List(dir string) ([]string, error)
	// MkdirAll creates dir and its parents and makes them durable.
	MkdirAll(dir string) error
	// SyncDir makes the names in dir durable.
	SyncDir(dir string) error
}

// File is an open file. ReadAt and WriteAt follow io.ReaderAt and io.WriterAt;
// WriteAt past the end grows the file.
type File interface {
	io.ReaderAt
	io.WriterAt
	// Allocate reserves [off, off+n), grows the file, and reads as zeros where
	// nothing was written.
	Allocate(off, n int64) error
	// Truncate sets the length.
	Truncate(n int64) error
	// Sync makes content and length durable. An error is final: content
	// written since the last good Sync is unknown, and the next Sync may
	// succeed without it.
	Sync() error
	// Size is the current length in bytes.
	Size() (int64, error)
	// Close releases the file; it does not imply Sync.
	Close() error
}
