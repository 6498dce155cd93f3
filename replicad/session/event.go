package session

import (
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// Event is something that happened. At most one operation is outstanding at a
// time; its end is one of the first group.
type Event interface{ event() }

// Ends of operations.
type (
	// EvHandshake ends DoHandshake: both halves and the data plane's state.
	EvHandshake struct {
		Request wire.HandshakeRequest
		Reply   wire.HandshakeReply
		Source  dataplane.Status
	}
	// EvMarked ends DoMark.
	EvMarked struct{}
	// EvSeeded ends DoSeed: the replica's durable cursor.
	EvSeeded struct {
		Disk   wire.DiskName
		Cursor int64
		Sent   int64
	}
	// EvVerified ends DoVerify.
	EvVerified struct{ Equal, Differ int64 }
	// EvFrozen ends DoFreeze.
	EvFrozen struct {
		Epoch dataplane.Epoch
		// AppError says why the cut is not application-consistent although it was
		// to be.
		AppError string
	}
	// EvShipped ends DoShip: the position the replica committed, the bytes
	// handed to the transport, and the chunk the transfer began at.
	EvShipped struct {
		Pos  delta.Pos
		Sent int64
		From uint32
	}
	// EvAcked ends DoAck; the data plane's state afterwards.
	EvAcked struct{ Source dataplane.Status }
	// EvAbandoned ends DoAbandon.
	EvAbandoned struct{}
	// EvBeaten ends DoBeat.
	EvBeaten struct{}
	// EvScrubbed ends DoScrub: where the pass stands, what it marked.
	EvScrubbed struct {
		Next       Cursor
		Done       bool
		Bytes      int64
		Mismatched int64
	}
	// EvFailed ends any operation. Sent counts bytes of an interrupted
	// transfer; Advanced says that the replica durably got further.
	EvFailed struct {
		Class    Class
		Text     string
		Sent     int64
		From     uint32
		Advanced bool
	}
)

// Commands and the clock.
type (
	// EvWake: the time Wake named has come.
	EvWake struct{}
	// EvStart: Run began.
	EvStart struct{}
	// EvPause: a person wants a pause.
	EvPause struct{}
	// EvResume: and its end.
	EvResume struct{}
	// EvRetry ends a back-off or a stop.
	EvRetry struct{}
	// EvTrigger asks for a cut now.
	EvTrigger struct{}
	// EvFinal asks for everything to be shipped until nothing is left.
	EvFinal struct{}
	// EvFinalCancel takes EvFinal back.
	EvFinalCancel struct{}
	// EvInterval changes the interval.
	EvInterval struct{ Interval time.Duration }
	// EvAppEvery changes the interval of application-consistent cuts, 0 = none.
	EvAppEvery struct{ Every time.Duration }
	// EvScan begins the background pass over everything, changes the bounds of
	// one that is under way, or ends it; Verified is then what was known before.
	EvScan struct {
		Pass     Pass
		Stop     bool
		Verified bool
	}
)

func (EvHandshake) event()   {}
func (EvMarked) event()      {}
func (EvSeeded) event()      {}
func (EvVerified) event()    {}
func (EvFrozen) event()      {}
func (EvShipped) event()     {}
func (EvAcked) event()       {}
func (EvAbandoned) event()   {}
func (EvBeaten) event()      {}
func (EvScrubbed) event()    {}
func (EvFailed) event()      {}
func (EvWake) event()        {}
func (EvStart) event()       {}
func (EvPause) event()       {}
func (EvResume) event()      {}
func (EvRetry) event()       {}
func (EvTrigger) event()     {}
func (EvFinal) event()       {}
func (EvFinalCancel) event() {}
func (EvInterval) event()    {}
func (EvAppEvery) event()    {}
func (EvScan) event()        {}

// Class of a failure: who to ask and what to do next.
type Class string

// The classes.
const (
	ClassLink      Class = "link"       // the peer: try again, resume
	ClassSource    Class = "source"     // the data plane: try again
	ClassEpochLost Class = "epoch-lost" // the frozen epoch is gone or overrun
	ClassMismatch  Class = "mismatch"   // the replica stands elsewhere: shake hands
	ClassCorrupt   Class = "corrupt"    // a digest was wrong: resend, then re-freeze
	ClassSuspect   Class = "suspect"    // the replica takes nothing until a person there has decided
	ClassNoSpace   Class = "no-space"   // the replica is full
	ClassRefused   Class = "refused"    // the peer does not want this
	ClassCancelled Class = "cancelled"  // DoCancel took effect
)

// Action is what the shell has to do. Do... actions are operations: exactly
// one Ev... end or EvFailed answers each.
type Action interface{ action() }

// Operations.
type (
	// DoHandshake asks both sides where they stand. Compared is not 0 when what
	// the replica asked for by that number was compared, and is equal at At.
	DoHandshake struct {
		Compared uint64
		At       delta.Pos
	}
	// DoMark marks what must be compared: everything, or what the decision's
	// union names.
	DoMark struct{ Decision lineage.Decision }
	// DoSeed streams a piece of one disk from Offset on. Done and Total are
	// the bytes of all disks, for display.
	DoSeed struct {
		Generation  delta.Generation
		Disk        wire.DiskName
		Offset      int64
		Holes       bool
		Done, Total int64
	}
	// DoVerify compares ranges with the replica's content at Pos: those marked
	// without proof, or with All every marked one. Of the disks in Below only
	// what lies below that.
	DoVerify struct {
		Pos    delta.Pos
		Reason string
		All    bool
		Below  map[wire.DiskName]int64
	}
	// DoFreeze makes a cut on top of Parent; with App the guest's file systems
	// are to be frozen at it. Of disks with a limit it has what lies below.
	DoFreeze struct {
		Parent delta.Pos
		App    bool
		Limits map[wire.DiskName]int64
	}
	// DoShip sends a frozen epoch, asking for the replica's progress first
	// when Resume is set.
	DoShip struct {
		Epoch  dataplane.Epoch
		Resume bool
	}
	// DoAck tells the data plane that the replica holds Pos.
	DoAck struct{ Pos delta.Pos }
	// DoAbandon ends a frozen epoch unshipped.
	DoAbandon struct{ Epoch uint64 }
	// DoBeat tells the replica that nothing changed.
	DoBeat struct {
		Pos      delta.Pos
		Interval time.Duration // in force now
	}
	// DoScrub compares one window of everything, but of the disks in Below what
	// lies below that.
	DoScrub struct {
		Pos   delta.Pos
		From  Cursor
		Below map[wire.DiskName]int64
	}
)

// Notices; no event answers them.
type (
	// DoCancel interrupts the outstanding operation, which then ends with any
	// of its ends.
	DoCancel struct{}
	// FinalDone answers EvFinal: everything up to Pos is there.
	FinalDone struct{ Pos delta.Pos }
	// FinalFailed answers EvFinal when a person has to decide first.
	FinalFailed struct{ Stop lineage.Decision }
	// Committed tells that firmware state attached to the last epoch arrived.
	Committed struct{}
	// Joined tells that the replica has all of the disks that were joining. It is
	// repeated after each handshake until they are not called joining any more.
	Joined struct{ Disks []wire.DiskName }
)

func (DoHandshake) action() {}
func (DoMark) action()      {}
func (DoSeed) action()      {}
func (DoVerify) action()    {}
func (DoFreeze) action()    {}
func (DoShip) action()      {}
func (DoAck) action()       {}
func (DoAbandon) action()   {}
func (DoBeat) action()      {}
func (DoScrub) action()     {}
func (DoCancel) action()    {}
func (FinalDone) action()   {}
func (FinalFailed) action() {}
func (Committed) action()   {}
func (Joined) action()      {}
