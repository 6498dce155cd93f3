package wire

import (
	"time"

	"kvmreplica/replicad/delta"
)

// PointsReply is what a replica's host keeps of a VM, and how long.
type PointsReply struct {
	Host      string        `json:"host"` // display name of the host that keeps them
	Points    []Point       `json:"points"`
	Retention string        `json:"retention"`        // as points.ParsePolicy reads it
	Quota     int64         `json:"quota_bytes"`      // what they may take, 0 = no limit but space
	Used      int64         `json:"used_bytes"`       // what they take
	Free      int64         `json:"free_bytes"`       // of the file system, negative = unknown
	Reserve   int64         `json:"reserve_bytes"`    // of it is to stay free
	PerDay    int64         `json:"bytes_per_day"`    // written at the present churn
	Full      time.Duration `json:"full_in_ns"`       // until points must be given up; negative = not foreseen
	GivenUp   int           `json:"given_up"`         // for want of room, since the daemon started
	Orphan    string        `json:"orphan,omitempty"` // the relationship ended: why
}

// Point is one recovery point, oldest first in lists.
type Point struct {
	Ordinal uint64    `json:"number"`
	Cut     time.Time `json:"time"`  // the primary's clock at the cut
	At      time.Time `json:"taken"` // when the replica committed it
	Pos     delta.Pos `json:"position"`
	App     bool      `json:"application_consistent"`
	Latest  bool      `json:"latest"` // the newest committed state
	Pinned  bool      `json:"pinned"`
	Mounted int       `json:"mounted"` // open mounts
	Bytes   int64     `json:"own_bytes"`
	Damage  string    `json:"damage,omitempty"`
}

// MaxPointsListed bounds a PointsReply.
const MaxPointsListed = 4096

// Validate refuses what no honest peer answers.
func (r PointsReply) Validate() error {
	if len(r.Points) > MaxPointsListed || r.Quota < 0 || r.Used < 0 || r.Reserve < 0 {
		return invalid("a list of %d recovery points", len(r.Points))
	}
	for _, p := range r.Points {
		if err := checkText("damage", p.Damage, MaxText); err != nil {
			return err
		}
	}
	return firstError(checkText("host name", r.Host, MaxName), checkText("retention", r.Retention, MaxName), checkText("reason", r.Orphan, MaxText))
}
