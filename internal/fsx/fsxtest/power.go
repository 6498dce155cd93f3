// Package fsxtest holds the test doubles of storage: an in-memory fsx.FS with
// the strictest behaviour a POSIX file system may show, and the Power object
// that counts operations, injects errors and cuts the power.
//
// The storage model. Content is kept in sectors of 512 bytes. What was written
// but not synced is pending: after a power cut every pending sector, every
// file length and every directory entry holds, independently of all others,
// any value it had since it was last made durable. A file's content and length
// become durable by File.Sync, a name by SyncDir of its directory, nothing
// else. A failed Sync reports once, marks content clean and leaves it old or
// new; a later Sync succeeds without it, also one of the next process. (Names
// and lengths stay pending: no file system in use drops those from its
// journal and goes on.) The one mercy: a rename never
// loses a file whose old name was durable (it is there under one of the two
// names, or both), because no file system in use loses it either.
//
// How to use it. A test makes a Mem (alone) or a blocktest.Host (a Mem and
// disks under one Power), runs code against it, and then takes
//
//   - CrashClone(choose): the storage as a power cut might have left it, the
//     Chooser deciding every pending item, or
//   - KillClone(choose): the storage after the death of the process; the page
//     cache survives, so pending items are still pending in the clone.
//
// Power.CrashAt(n) makes the n-th persistence operation the last one: it is
// under way when the power goes, all later ones fail with ErrPowerLost.
// Power.SetHook sees every operation before it happens and may return an error
// for it, a short count (Short), or block to hold it in flight.
//
// What these doubles teach again and again: what a process finds at its start
// may be in the page cache only, because its predecessor was killed before the
// sync, or after a sync that failed. Make it durable - sync the file, better
// write the doubtful part again and sync, and sync the directory - before
// telling anybody, or writing anything that depends on it.
//
// Sweeps over all crash points and all single faults are in blocktest.
package fsxtest

import (
	"errors"
	"fmt"
	"sync"
)

// ErrPowerLost is returned by every operation after the power was cut.
var ErrPowerLost = errors.New("power lost")

// Kind says what an operation does.
type Kind uint8

// The kinds of operations, of files, of directories and of disks.
const (
	Open     Kind = iota + 1 // open an existing file
	Create                   // open that makes the name
	Read                     // ReadAt of a file or disk
	Size                     // length of a file
	List                     // list a directory
	Write                    // WriteAt of a file or disk
	Zero                     // ZeroAt of a disk, punch or not
	Allocate                 // reserve a range of a file
	Truncate                 // set a file's length, also by O_TRUNC
	Sync                     // make content durable
	Rename                   // Path is the new name
	Remove                   // delete a file or directory
	Mkdir                    // make one directory
	SyncDir                  // make names durable
	Close                    // close; never a crash point
)

// String names the kind.
func (k Kind) String() string {
	names := [...]string{
		"?", "open", "create", "read", "size", "list", "write", "zero", "allocate",
		"truncate", "sync", "rename", "remove", "mkdir", "syncdir", "close",
	}
	if int(k) < len(names) {
		return names[k]
	}
	return "?"
}

// Persists reports whether the operation changes what a crash may leave: all
// mutations and all syncs. These are the crash points.
func (k Kind) Persists() bool {
	switch k {
	case Create, Write, Zero, Allocate, Truncate, Sync, Rename, Remove, Mkdir, SyncDir:
		return true
	}
	return false
}

// Op is one operation. Path is the name below the file system's root, or
// "disk:NAME". Index counts all operations of the Power from 0, Point the
// persistence operations from 1 (0 for the others).
type Op struct {
	Kind  Kind
	Path  string
	Off   int64
	Len   int64
	Index int
	Point int
}

// String is the operation for failure messages.
func (o Op) String() string {
	return fmt.Sprintf("#%d %s %s [%d+%d]", o.Index, o.Kind, o.Path, o.Off, o.Len)
}

// shortError makes a read or write stop early.
type shortError struct {
	n   int
	err error
}

func (e *shortError) Error() string { return fmt.Sprintf("after %d bytes: %v", e.n, e.err) }
func (e *shortError) Unwrap() error { return e.err }

// Short returns an error for a hook: the read or write transfers n bytes and
// then fails with err. Other operations just fail with err.
func Short(n int, err error) error { return &shortError{n, err} }

// Power is the clock of operations of one machine: every Mem and every
// Crashable disk of it calls Do for each operation. It is safe for concurrent
// use; all storage under one Power shares its lock.
type Power struct {
	mu      sync.Mutex
	ops     int
	points  int
	crashAt int // point at which the power goes; 0 = never
	off     bool
	exempt  int // depth of Setup
	last    Op  // the operation under way when the power went

	hook      func(Op) error
	dropDirty bool
	trace     func(Op)
}

// NewPower returns a machine that is switched on.
func NewPower() *Power { return &Power{} }

// SetHook installs h, called before each operation without any lock held; an
// error from it is the operation's result. nil removes it.
func (p *Power) SetHook(h func(Op) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hook = h
}

// SetTrace installs f, called for each operation that passed the hook, in
// order, with the storage locked: f must not touch the storage.
func (p *Power) SetTrace(f func(Op)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trace = f
}

// DropOnSyncError chooses what is visible after a failed Sync: false keeps the
// new content (ext4), true shows the last durable content (the pages were
// evicted). Either way a power cut may leave old or new.
func (p *Power) DropOnSyncError(drop bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dropDirty = drop
}

// CrashAt cuts the power at persistence operation n (counted from 1): that
// operation is under way, its effect is pending at best, and it and all later
// operations return ErrPowerLost. 0 never cuts.
func (p *Power) CrashAt(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.crashAt = n
}

// Cut takes the power away now, between operations.
func (p *Power) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.off = true
}

// Lost reports whether the power is gone.
func (p *Power) Lost() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.off
}

// Counts returns the number of operations and of persistence operations seen.
func (p *Power) Counts() (ops, points int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ops, p.points
}

// Last is the operation that was under way when CrashAt cut the power.
func (p *Power) Last() Op {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// Setup runs fn without counting its operations, calling the hook or cutting
// the power, so that a sweep does not spend its cases on preparations. It must
// not run at the same time as counted operations.
func (p *Power) Setup(fn func() error) error {
	p.mu.Lock()
	p.exempt++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.exempt--
		p.mu.Unlock()
	}()
	return fn()
}

// Do performs one operation of a storage double. fn runs with the Power's lock
// held: fault is the hook's verdict (nil: do it), dying says that the power
// goes during this operation, whose result is then ErrPowerLost whatever fn
// returns. fn must not call back into the Power.
func (p *Power) Do(op Op, fn func(fault error, dying bool) error) error {
	p.mu.Lock()
	if p.off {
		p.mu.Unlock()
		return ErrPowerLost
	}
	counted := p.exempt == 0 && op.Kind != Close
	var hook func(Op) error
	if counted {
		op.Index = p.ops
		p.ops++
		hook = p.hook
	}
	p.mu.Unlock()
	var fault error
	if hook != nil {
		fault = hook(op)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.off {
		return ErrPowerLost
	}
	dying := false
	if counted && op.Kind.Persists() {
		p.points++
		op.Point = p.points
		dying = p.points == p.crashAt
	}
	if p.trace != nil && counted {
		p.trace(op)
	}
	err := fn(fault, dying)
	if dying {
		p.off, p.last = true, op
		return ErrPowerLost
	}
	return err
}

// Locked runs fn with the Power's lock held, for cloning and damage.
func (p *Power) Locked(fn func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fn()
}

// Drops reports the choice of DropOnSyncError; only valid within Do.
func (p *Power) Drops() bool { return p.dropDirty }

// ShortCount splits a hook's verdict for a transfer of n bytes into the bytes
// to transfer and the error to return after them.
func ShortCount(fault error, n int) (int, error) {
	if fault == nil {
		return n, nil
	}
	var s *shortError
	if errors.As(fault, &s) {
		return max(0, min(s.n, n)), s.err
	}
	return 0, fault
}
