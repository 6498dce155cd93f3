package lineage

import (
	"fmt"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Outcome is what a handshake ends in. There is deliberately no outcome that
// means "equal, nothing to do".
type Outcome int

// The outcomes. P is the host that asked (it holds the writable copy), R the
// one that answered.
const (
	// Refused: the case is not listed. The zero value, so that a forgotten
	// Decision never ships.
	Refused Outcome = iota
	// Incremental: the next epoch starts at Parent; the primary's own set of
	// changes is a superset of what differs.
	Incremental
	// SeedContinue: the initial copy goes on at Cursors; whatever the tracker
	// marked is sent again afterwards.
	SeedContinue
	// VerifyAll: the direction is clear but the set of changes is not proven:
	// compare every granule by digest, then go on at Parent.
	VerifyAll
	// VerifyUnion: an operator agreed to discard R's own writes: compare the
	// union of the three sets named in Union, then go on at Parent.
	VerifyUnion
	// ReverseIncremental: R was cleanly sealed exactly where P's generation
	// begins; the new direction starts at Parent without comparing anything.
	ReverseIncremental
	// OperatorDecides: nothing may ship until a person has decided.
	OperatorDecides
	// Stale: R was promoted past P: P must not ship and must not start the VM.
	Stale
	// SplitBrain: both sides wrote. Both persist it, neither ships.
	SplitBrain
	// Unrelated: there is no common history (or no such VM or disks there).
	Unrelated
	// Stop: one name stands for two contents. Corruption or a copied identity.
	Stop
)

// String is the stable, lower-case name.
func (o Outcome) String() string {
	names := [...]string{
		"refused", "incremental", "seed-continue", "verify-all", "verify-union",
		"reverse-incremental", "operator-decides", "stale", "split-brain", "unrelated", "stop",
	}
	if o < 0 || int(o) >= len(names) {
		return fmt.Sprintf("outcome-%d", int(o))
	}
	return names[o]
}

// Ships reports whether bytes may travel from P to R after this outcome.
func (o Outcome) Ships() bool {
	switch o {
	case Incremental, SeedContinue, VerifyAll, VerifyUnion, ReverseIncremental:
		return true
	}
	return false
}

// Side names one of the two hosts of a handshake.
type Side int

// The sides.
const (
	P Side = iota // asked, holds the writable copy
	R             // answered
)

// Union names the three sets whose union holds every granule that may differ
// when an old primary is turned back into a replica after a promotion at
// Promoted, a position at or before Before.
type Union struct {
	// ROwn: R's own dirty set, relative to RBase, which is at or before Before.
	RBase delta.Pos
	// Middle: blocks in P's undo segments and spools after Promoted up to Before.
	Promoted, Before delta.Pos
	// POwn: P's dirty set, relative to Promoted.
}

// Decision is the answer of Decide.
type Decision struct {
	Outcome Outcome
	// Row is the stable name of the table row that matched, for journals.
	Row string
	// Reason is for people: what was found and what it means.
	Reason string
	// Hint is the next command, where a person can mend it.
	Hint string
	// Parent is the position the next epoch starts from (shipping outcomes
	// except SeedContinue). Zero for VerifyAll of a replica without one.
	Parent delta.Pos
	// Cursors are the seed offsets to continue at; missing disks start at 0.
	Cursors map[wire.DiskName]int64
	// Restart says that the seed starts again at zero and the base is not
	// known to be all zero.
	Restart bool
	// LostAck says that the replica committed an epoch the primary had no
	// answer for; its bits are still set and are sent again.
	LostAck bool
	// Union is set for VerifyUnion.
	Union *Union
	// SaveLosing says that R must save the blocks it is about to lose first.
	SaveLosing bool
	// Alarm says that a person must learn of it even when it mends itself.
	Alarm bool
	// Diverged says that both sides must durably record it before they answer
	// anybody else. It stays until an operator names the side to discard.
	Diverged bool
}

// MayShip reports whether the session may send data from P to R.
func (d Decision) MayShip() bool { return d.Outcome.Ships() }

// MayRun reports whether the VM may be started, or go on running, on side s as
// far as this handshake can tell. A running guest is never stopped by it:
// SplitBrain is reported on both sides and left to a person.
func (d Decision) MayRun(s Side) bool {
	if s == R {
		return d.Outcome == Stale
	}
	switch d.Outcome {
	case Stale, SplitBrain, Stop, Refused:
		return false
	}
	return true
}

// Idle reports that a session has nothing to send: only when the replica
// stands exactly where the primary's last acknowledgement was and the tracker
// holds no dirty granule, frozen or active. A non-empty dirty set is never idle.
func (d Decision) Idle(acked delta.Pos, dirtyGranules int64) bool {
	return d.Outcome == Incremental && !d.LostAck && dirtyGranules == 0 &&
		!acked.IsZero() && d.Parent == acked
}
