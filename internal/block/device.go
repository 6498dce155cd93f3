// Package block is the one word everybody shares: a random-access disk.
//
// It guarantees nothing about tracking or replication; it says what a disk can
// do, so that servers (nbd), trackers (cbt) and stores (replicad/points) can be
// stacked. A decorator implements every method of Device explicitly and never
// embeds one: a mutation that slips through an unaware layer is a lost block.
//
// Callers must treat an error of Sync as final for everything written since
// the last good Sync (fsync failures are not retryable).
package block

import (
	"errors"
	"io"
)

// Device is a random-access disk. Every mutation is one of its methods;
// optional interfaces of this package may only read. All methods are safe for
// concurrent use; overlapping concurrent mutations leave some serial order per
// 512-byte sector.
type Device interface {
	// ReadAt fills p from byte offset off. A range past Size is an error
	// (ErrRange), never a short read with nil error.
	io.ReaderAt
	// WriteAt stores p at byte offset off. When it returns nil the data is
	// visible to ReadAt, not necessarily durable. A range past Size is refused
	// with ErrRange before anything is written.
	io.WriterAt
	// ZeroAt makes n bytes at off read as zeros. punch permits, but does not
	// demand, that storage is freed.
	ZeroAt(off, n int64, punch bool) error
	// Sync returns once every write that returned before the call is on stable
	// storage. Twice is harmless. After an error see the package comment.
	Sync() error
	// Size is the length in bytes; constant unless the device says otherwise.
	Size() int64
	// Close releases the device; it does not imply Sync. A second call returns
	// an error or nil and changes nothing.
	Close() error
}

// Range is Len bytes at byte offset Off.
type Range struct {
	Off, Len int64
}

// End is the first byte offset behind r.
func (r Range) End() int64 { return r.Off + r.Len }

// Overlaps reports whether r and o share a byte.
func (r Range) Overlaps(o Range) bool { return r.Off < o.End() && o.Off < r.End() }

// Errors of devices. Test with errors.Is.
var (
	// ErrRange: the request does not lie wholly inside the device.
	ErrRange = errors.New("request outside the device")
	// ErrReadOnly: a mutation on a device opened for reading.
	ErrReadOnly = errors.New("device is read-only")
	// ErrWouldBlock: a Try method would have had to wait. Nothing happened.
	ErrWouldBlock = errors.New("operation would block")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("device is closed")
)

// TryWriter is implemented by devices whose WriteAt may wait for something
// other than the page cache (an intent record, a range lock, a freeze). TryWriteAt
// either does the whole write without such a wait, or changes nothing and
// returns ErrWouldBlock; the caller then runs WriteAt off its hot loop.
type TryWriter interface {
	TryWriteAt(p []byte, off int64) (int, error)
}

// TryReader is the reading counterpart: TryReadAt returns ErrWouldBlock when
// the data is not at hand (a page-cache miss); the caller then uses ReadAt.
type TryReader interface {
	TryReadAt(p []byte, off int64) (int, error)
}

// Extent describes how a range is stored. Hole means not allocated; Zero
// means it is known to read as zeros. Both false says nothing.
type Extent struct {
	Range
	Hole, Zero bool
}

// Mapper reports allocation, for NBD block status. It must never be used to
// decide whether a changed block is zero.
type Mapper interface {
	// Map calls fn for consecutive extents covering [off, off+n) until fn
	// returns false or the range ends.
	Map(off, n int64, fn func(Extent) bool) error
}

// FastZeroer reports whether ZeroAt is quicker than writing zeros.
type FastZeroer interface {
	FastZero() bool
}

// FileBacked gives the raw descriptor of a plain file or block device, so that
// a server may sendfile from it. ok is false when bytes read from the
// descriptor would not be what ReadAt returns.
type FileBacked interface {
	ReadFD() (fd int, ok bool)
}

// Check returns ErrRange unless [off, off+n) lies inside a device of the given
// size. It does not overflow for any input.
func Check(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return ErrRange
	}
	return nil
}
