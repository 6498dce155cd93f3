package status

import (
	"time"

	"kvmreplica/replicad/health"
	"kvmreplica/replicad/wire"
)

// Policy is one [[policy]] of the configuration; what is missing is not the
// policy's to say.
type Policy struct {
	Name      string         `json:"name"`
	Match     []string       `json:"match,omitempty"`
	Tags      []string       `json:"tags,omitempty"`
	Exclude   []string       `json:"exclude,omitempty"`
	To        string         `json:"to"`
	Every     *time.Duration `json:"every_ns,omitempty"`
	AppEvery  *time.Duration `json:"app_every_ns,omitempty"`
	Points    string         `json:"points,omitempty"`
	Bandwidth *int64         `json:"bandwidth,omitempty"` // bytes per second
	Shutdown  *time.Duration `json:"shutdown_time_ns,omitempty"`
	OnSilent  string         `json:"on_silent_peer,omitempty"`
	Initial   string         `json:"initial,omitempty"` // "at 22:00"
	Alarm     bool           `json:"alarm"`
	// AlarmAfter is how long a domain may be without protection.
	AlarmAfter time.Duration `json:"alarm_after_ns"`
}

// Domain is a domain of this host, protected or not.
type Domain struct {
	Name  string    `json:"name"`
	ID    wire.VMID `json:"id"`
	State string    `json:"state"`      // libvirt's: running, off, …
	Bytes int64     `json:"size_bytes"` // of its disks; negative = not known
	Tags  []string  `json:"tags,omitempty"`
	// Policy is the first that fits it; empty = none.
	Policy string `json:"policy,omitempty"`
	// Role is this host's for it; none = not protected here. Peer is the other
	// host then.
	Role Role   `json:"role"`
	Peer string `json:"peer,omitempty"`
	// Drift is what policy apply would set, Fixed what differs from the policy, or
	// cannot be compared, and cannot be set: with the way to it.
	Drift []string `json:"drift,omitempty"`
	Fixed []string `json:"fixed,omitempty"`
}

// NotProtected is a domain of this host that a policy with an alarm fits and
// that has not been protected for longer than the policy lets it.
type NotProtected struct {
	Name   string    `json:"name"`
	ID     wire.VMID `json:"id"`
	Policy string    `json:"policy"`
	// Since is when the daemon first saw it so; it forgets that when it ends.
	Since     time.Time        `json:"since"`
	After     time.Duration    `json:"alarm_after_ns"`
	Condition health.Condition `json:"condition"`
}

// Policies are the policies of this host and the domains they are for.
type Policies struct {
	Policies []Policy `json:"policies"`
	Domains  []Domain `json:"domains"`
}
