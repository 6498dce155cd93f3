package session

import (
	"slices"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// Cursor is a place in a pass over all disks; the zero value is the beginning.
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
	Stopped     Phase = "stopped"  // waits for a person, see Stop
	Finished    Phase = "finished" // SyncFinal succeeded; Resume goes on
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
	Pending   int64 // bytes changed since the last cut, as of the last cycle
	Suspect   int64 // bytes still to be compared
	Stats     Stats
	// Verified: everything was compared with the replica after the seed.
	// Scrub is the pass's cursor, Mismatched the bytes it found to differ.
	Verified   bool
	Pass       Pass
	Scrub      Cursor
	Mismatched int64
	// Joining are the disks that were added and are still called joining, also
	// when they are whole at the replica.
	Joining    map[wire.DiskName]Joining
	Conditions []Condition
	// Stop is the handshake's verdict that a person must act on; nil = none.
	// Its Diverged flag must be made durable by whoever sees it.
	Stop *lineage.Decision
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
	TotalLatency   time.Duration // sum over the cuts that were not empty
	LargestLatency time.Duration
	RPOMedian      time.Duration // age of the last cut just before the next commit
	RPOMax         time.Duration
	RawBytes       int64 // changed bytes committed, before compression
	SentBytes      int64 // bytes handed to the transport
	LastError      string
	AppPoints      int64     // application-consistent cuts the replica holds
	LastApp        time.Time // the last of them
	AppFailed      int64     // cuts that were to be, and are crash-consistent
	AppError       string    // why the last one that was to be is not; empty = it is
}

// Condition is one reason why a session is not (quite) well.
type Condition struct {
	Code   string // stable, see the constants
	Text   string
	Remedy string `json:",omitempty"`
}

// The codes of conditions. Those of a stop end shipping until a new handshake
// (made by itself every half minute, or at once by Retry) finds otherwise.
const (
	CondLink         = "link"          // the peer does not answer
	CondSource       = "source"        // the data plane does not answer
	CondNoSpace      = "no-space"      // the replica is full
	CondRefused      = "refused"       // the peer refuses
	CondCorrupt      = "corrupt"       // digests of what arrives are wrong
	CondSuspect      = "suspect"       // the replica does not trust what it holds; the text is its own
	CondOverload     = "overload"      // epochs are abandoned for want of capture memory
	CondStop         = "stop"          // the handshake table stops; see Status.Stop
	CondAlarm        = "alarm"         // it goes on, but a person should know
	CondMismatch     = "mismatch"      // a scrub found differing bytes (now marked)
	CondTrackingLost = "tracking-lost" // changes cannot be recorded
)

// rpoSamples bounds the window the median is taken over.
const rpoSamples = 512

// meter keeps what the statistics are made of.
type meter struct {
	stats   Stats
	shipped int64 // epochs with content
	latency time.Duration
	rpo     []time.Duration
	at      int // next place in rpo
}

// committed counts one cut that reached the replica. last is the cut it
// replaces (zero = none).
func (m *meter) committed(now, cut, last time.Time, bytes int64) {
	m.stats.Cycles++
	if !last.IsZero() {
		m.sample(now.Sub(last))
	}
	if bytes == 0 {
		m.stats.Empty++
		return
	}
	m.shipped++
	m.stats.RawBytes += bytes
	m.stats.AverageBytes = m.stats.RawBytes / m.shipped
	m.stats.LargestBytes = max(m.stats.LargestBytes, bytes)
	took := now.Sub(cut)
	m.latency += took
	m.stats.TotalLatency = m.latency
	m.stats.AverageLatency = m.latency / time.Duration(m.shipped)
	m.stats.LargestLatency = max(m.stats.LargestLatency, took)
}

func (m *meter) sample(age time.Duration) {
	if len(m.rpo) < rpoSamples {
		m.rpo = append(m.rpo, age)
	} else {
		m.rpo[m.at] = age
		m.at = (m.at + 1) % rpoSamples
	}
	m.stats.RPOMax = max(m.stats.RPOMax, age)
}

// snapshot fills in what is computed on demand.
func (m *meter) snapshot() Stats {
	s := m.stats
	if len(m.rpo) > 0 {
		sorted := slices.Clone(m.rpo)
		slices.Sort(sorted)
		s.RPOMedian = sorted[len(sorted)/2]
	}
	return s
}
