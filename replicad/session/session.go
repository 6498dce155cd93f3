package session

import (
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Source is the primary's data plane; *dataplane.Client is one.
type Source interface {
	Status(ctx context.Context) (dataplane.Status, error)
	Freeze(ctx context.Context, r dataplane.FreezeRequest) (dataplane.Epoch, error)
	Attach(ctx context.Context, epoch uint64, blobs []dataplane.Blob) error
	Frames(ctx context.Context, epoch uint64, from uint32) (io.ReadCloser, error)
	Ack(ctx context.Context, pos delta.Pos) error
	Abandon(ctx context.Context, epoch uint64) error
	SeedFrames(ctx context.Context, disk wire.DiskName, offset int64, holes bool) (io.ReadCloser, error)
	Ranges(ctx context.Context, r dataplane.RangesRequest) (dataplane.RangesReply, error)
	Compare(ctx context.Context, r dataplane.CompareRequest) (dataplane.CompareReply, error)
	EndCompare(ctx context.Context, r dataplane.CompareEnd) (dataplane.CompareResult, error)
	Mark(ctx context.Context, r dataplane.MarkRequest) error
}

var _ Source = (*dataplane.Client)(nil)

// Replica is what a session asks of the peer; every wire.Service is one.
type Replica interface {
	Handshake(ctx context.Context, r wire.HandshakeRequest) (wire.HandshakeReply, error)
	PutSeed(ctx context.Context, r wire.SeedRequest, body io.Reader) (wire.SeedReply, error)
	EpochProgress(ctx context.Context, k wire.EpochKey) (uint32, error)
	PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error)
	Beat(ctx context.Context, r wire.Beat) error
	Digests(ctx context.Context, r wire.DigestRequest) (wire.DigestReply, error)
}

var _ Replica = wire.Service(nil)

// Config is what a Session needs. The zero value of everything optional is
// useful.
type Config struct {
	VM      wire.VMID
	Name    string
	Source  Source
	Replica Replica
	// Interval between cuts; 0 = back to back.
	Interval time.Duration
	// Ancestors are the parents of the generation, nearest first.
	Ancestors []delta.Pos
	// Running says whether the guest runs here; nil = yes.
	Running func() bool
	// Firmware returns the firmware state if it changed since the last one the
	// replica committed, nil when not; called after each freeze. Committed is
	// told when a position that carried it was committed.
	Firmware func(ctx context.Context) ([]dataplane.Blob, error)
	// FirmwareCommitted is told that the replica committed what Firmware
	// returned last.
	FirmwareCommitted func(blobs []dataplane.Blob)
	// Limit wraps bulk bodies (bandwidth); nil = unlimited.
	Limit func(ctx context.Context, r io.Reader) io.Reader
	// ScrubRate bounds the background digest pass in bytes per second; 0 = 64 MiB.
	ScrubRate int64
	// Verified says that the seed was verified before; Scrub is where an
	// interrupted pass goes on. Both come from an earlier Status.
	Verified bool
	Scrub    Cursor
	// Holes permits SEEK_DATA when seeding into a base known to be all zero.
	Holes bool
	// OnChange is told of every new Status, in order, never concurrently. It
	// must not call the session.
	OnChange func(Status)
	Log      *slog.Logger
	// Rand decides jitter, keys and nothing else; nil = a random seed.
	Rand *rand.Rand
}

// Cursor is a place in a pass over all disks.
type Cursor struct {
	Disk   wire.DiskName
	Offset int64
}

// Phase says what a session is doing.
type Phase string

// The phases.
const (
	Idle        Phase = "idle"        // not running yet, or ended
	Connecting  Phase = "connecting"  // handshake
	Seeding     Phase = "seeding"     // initial copy
	Verifying   Phase = "verifying"   // comparing marked ranges by digest
	Waiting     Phase = "waiting"     // for the next cut
	Freezing    Phase = "freezing"    // making a cut
	Shipping    Phase = "shipping"    // sending an epoch
	BackingOff  Phase = "backing-off" // waiting after a failure
	PausedPhase Phase = "paused"
	Stopped     Phase = "stopped" // waits for a person, see Stop
)

// Status is an immutable snapshot.
type Status struct {
	Phase Phase
	// Protected is true once the replica holds a consistent copy.
	Protected bool
	// Seeding and Verifying hold across back-off and pause.
	Seeding   bool
	Verifying string // reason of the digest pass; empty = none
	Paused    bool
	Progress  *Progress
	// Committed is the replica's position as last heard; LastCut the time of
	// the last cut it holds.
	Committed delta.Pos
	LastCut   time.Time
	Pending   int64 // bytes changed since the last cut
	Suspect   int64 // bytes still to be compared
	Stats     Stats
	// Verified: everything was compared with the replica after the seed.
	// Scrub is the pass's cursor, Mismatched the bytes it found to differ.
	Verified   bool
	Scrub      Cursor
	Mismatched int64
	Conditions []Condition
	// Failures in a row, the last of them, and the next try.
	Failures  int
	LastError string
	Since     time.Time // of the first failure in the row
	Retry     time.Time
}

// RPO is the age of the last committed cut; negative when there is none.
func (s Status) RPO(now time.Time) time.Duration {
	if s.LastCut.IsZero() {
		return -1
	}
	return now.Sub(s.LastCut)
}

// Progress of a long transfer.
type Progress struct {
	Phase string // "seed", "delta", "verify", "scrub"
	Disk  wire.DiskName
	Done  int64
	Total int64
	Rate  int64         // bytes per second
	ETA   time.Duration // negative when unknown
}

// Stats since the session began.
type Stats struct {
	Since          time.Time
	Cycles         int64 // cuts the replica holds, empty ones included
	Empty          int64 // of which nothing had changed
	CyclesMissed   int64 // cuts that fell due while an earlier one was shipped
	Errors         int64
	Resumed        int64 // epochs continued after an interruption
	Abandoned      int64
	AverageBytes   int64
	LargestBytes   int64
	AverageLatency time.Duration // cut to commit
	LargestLatency time.Duration
	RPOMedian      time.Duration // age of the last cut just before the next commit
	RPOMax         time.Duration
	RawBytes       int64 // changed bytes committed, before compression
	SentBytes      int64 // bytes handed to the transport
	LastError      string
}

// Condition is one reason why a session is not (quite) well.
type Condition struct {
	Code   string // stable, see the constants
	Text   string
	Remedy string
}

// The codes of conditions. Stop conditions end shipping until the daemon or a
// person changes something and calls Retry.
const (
	CondLink         = "link"          // the peer does not answer
	CondSource       = "source"        // the data plane does not answer
	CondDiverged     = "diverged"      // stop: forked histories
	CondStale        = "stale"         // stop: the peer was promoted, this side is the old one
	CondRefused      = "refused"       // stop: the handshake table refuses
	CondWentBack     = "went-back"     // stop: this side's state is older than the replica's
	CondReplicaBack  = "replica-back"  // the replica went back; everything is compared
	CondMismatch     = "mismatch"      // a scrub found differing bytes (now marked)
	CondNoSpace      = "no-space"      // the replica is full
	CondOverload     = "overload"      // epochs are abandoned for want of capture memory
	CondTrackingLost = "tracking-lost" // changes cannot be recorded
)

// Session ships one VM. Make it with New, then Run it once.
type Session struct {
	cfg Config
}

// New returns a session; nothing runs yet.
func New(cfg Config) *Session { return &Session{cfg: cfg} }

// Run ships until ctx ends; every failure is retried inside.
func (s *Session) Run(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

// Status is the latest snapshot.
func (s *Session) Status() Status { return Status{Phase: Idle} }

// Pause stops shipping after telling what is under way to end; tracking goes
// on. It is remembered only in memory.
func (s *Session) Pause() {}

// Resume takes Pause back.
func (s *Session) Resume() {}

// Retry ends a back-off or a stop and starts with a new handshake.
func (s *Session) Retry() {}

// TriggerNow asks for a cut as soon as possible.
func (s *Session) TriggerNow() {}

// SetInterval changes the interval from the next cut on.
func (s *Session) SetInterval(d time.Duration) {}

// SyncFinal ships until nothing is dirty and everything is acknowledged, and
// returns that position. The guest must be stopped. Failures are retried until
// ctx ends; a stop condition is returned as an error at once.
func (s *Session) SyncFinal(ctx context.Context) (delta.Pos, error) { return delta.Pos{}, ctx.Err() }
