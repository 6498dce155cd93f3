package points

import (
	"time"

	"kvmreplica/replicad/delta"
)

// State is what a store is. The strings are stable.
type State string

// The states.
const (
	// Seeding: the initial copy goes straight into the images; nothing is
	// committed, failover and mounts are refused.
	Seeding State = "seeding"
	// Replica: there is a committed position.
	Replica State = "replica"
	// Promoted: the images are a primary's; points have ended.
	Promoted State = "promoted"
	// Suspect: an image was changed from outside; nothing is applied.
	Suspect State = "suspect"
	// Damaged: committed epochs cannot be read; see Status.Damage.
	Damaged State = "damaged"
	// Rolling: a promotion at an older point is under way and must be ended by
	// calling PromoteAt again.
	Rolling State = "rolling-back"
)

// Point is a recovery point.
type Point struct {
	Pos     delta.Pos
	Ordinal uint64    // number of the commit in this store, from 1
	At      time.Time // when it was committed here
	Cut     time.Time // the primary's clock at the cut, for display only
	Disks   []delta.Disk
	Config  delta.Digest
	App     bool  // application-consistent: cut while the guest was frozen
	Latest  bool  // the newest committed state; see Store.States
	Bytes   int64 // undo between this point and the next
	Pinned  bool
	Owners  []string // of the pin: "" is a person, others are as Hold names them
	Damage  error    // not nil: cannot be read
}

// Seal is the durable record of a promotion.
type Seal struct {
	At         delta.Pos        // the position the new generation starts from
	Ended      delta.Pos        // what was committed; differs from At after PromoteAt
	Generation delta.Generation // the new one
	Forced     bool
	Time       time.Time
	Points     int // recovery points that ended
}

// Status is a snapshot of a store.
type Status struct {
	State      State
	VM         delta.VM
	Disks      []delta.Disk // as of the committed position
	Absent     []string     // not there then; points may have them, see Store.Absent
	Committed  delta.Pos
	Applied    delta.Pos
	Cut        time.Time // of the committed position; display only
	Seeded     map[string]int64
	Backlog    int           // committed, unapplied epochs
	Spool      int64         // their bytes
	BacklogAge time.Duration // of the oldest
	Undo       int64         // bytes
	Points     int
	Views      int   // open
	Free       int64 // of the file system, -1 = unknown
	Quota      int64 // what undo may take, 0 = no limit but space
	Reserve    int64 // what is to stay free
	Sacrificed int   // points given up for want of room since the store was opened
	Forecast   Forecast
	Partial    *Partial
	Seal       *Seal
	Rolling    *Seal // the promotion at an older point that must be ended
	Damage     []error
	// VerifyAll is not empty when the whole content must be compared with the
	// primary's: see Store.Verified.
	VerifyAll string
}

// Partial is an epoch that has not been committed. Chunks and Bytes are 0
// while one is just being written.
type Partial struct {
	Generation delta.Generation
	Epoch      uint64
	Nonce      uint64
	Chunks     uint32
	Bytes      int64
}
