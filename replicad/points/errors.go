package points

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"kvmreplica/replicad/delta"
)

// Errors of a store. Test with errors.Is. A delta on another position is
// *delta.PosMismatchError.
var (
	// ErrSeeding: the initial copy is not complete, nothing is committed.
	ErrSeeding = errors.New("the initial copy is not complete")
	// ErrNotSeeding: a seed chunk came after the seed was complete and used.
	ErrNotSeeding = errors.New("the replica is not seeding")
	// ErrPromoted: the store was promoted; its images are a primary's now and
	// its points have ended.
	ErrPromoted = errors.New("the replica was promoted, its recovery points have ended")
	// ErrSuspect: somebody else changed an image while the store was closed.
	ErrSuspect = errors.New("a replica image was changed from outside")
	// ErrNoSpace: refused before commit for want of room; nothing is lost.
	ErrNoSpace = errors.New("not enough space on the replica")
	// ErrBusy: the backlog of committed, unapplied epochs is at its limit;
	// what was received is kept, commit again later.
	ErrBusy = errors.New("the replica is behind with applying")
	// ErrNoPoint: there is no such recovery point.
	ErrNoPoint = errors.New("no such recovery point")
	// ErrFailed: an earlier sync or an inconsistency ended this Store; close it
	// and open it again.
	ErrFailed = errors.New("the replica store failed and must be opened again")
	// ErrDamaged: files of the store are damaged; see DamageError.
	ErrDamaged = errors.New("the replica store is damaged")
	// ErrFork: the same generation and epoch with other content.
	ErrFork = errors.New("the same epoch with other content")
	// ErrDisks: the delta's disks are not the store's.
	ErrDisks = errors.New("the disks do not match the replica's")
	// ErrGone: the view's state ended (promotion, or its undo was lost).
	ErrGone = errors.New("the viewed state is gone")
	// ErrState: the call does not fit the store's or receive's state.
	ErrState = errors.New("not possible in this state")
	// ErrExists: there is a store in the directory already.
	ErrExists = errors.New("a replica store exists here")
)

// DamageError says which file is damaged and what it costs.
type DamageError struct {
	File string
	Text string
}

// Error names the file and the damage.
func (e *DamageError) Error() string { return fmt.Sprintf("%s: %s", e.File, e.Text) }

// Is makes errors.Is(err, ErrDamaged) work.
func (e *DamageError) Is(target error) bool { return target == ErrDamaged }

// ForkError: the epoch of Have arrived again with other content.
type ForkError struct{ Have, Other delta.Pos }

// Error names both positions.
func (e *ForkError) Error() string {
	return fmt.Sprintf("epoch %d of this generation is committed as %v and arrived again as %v", e.Have.Epoch, e.Have, e.Other)
}

// Is makes errors.Is(err, ErrFork) work.
func (e *ForkError) Is(target error) bool { return target == ErrFork }

// BusyError says how far behind the apply is.
type BusyError struct {
	Bytes int64
	Age   time.Duration
}

// Error names the backlog.
func (e *BusyError) Error() string {
	return fmt.Sprintf("the replica is behind with applying: %d bytes, %v", e.Bytes, e.Age.Round(time.Second))
}

// Is makes errors.Is(err, ErrBusy) work.
func (e *BusyError) Is(target error) bool { return target == ErrBusy }

// noSpace wraps err and marks it as ErrNoSpace when the system says so.
func noSpace(what string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s: %w: %w", what, ErrNoSpace, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
