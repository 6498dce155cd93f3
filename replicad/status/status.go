// Package status is plain data: the only thing the command line, the API and
// the metrics see of a protected VM. Values are immutable snapshots; fields
// are added, never renamed or given another meaning.
package status

import (
	"time"

	"kvmreplica/replicad/health"
	"kvmreplica/replicad/wire"
)

// Role of a host for one VM.
type Role string

// The roles.
const (
	Primary Role = "primary"
	Replica Role = "replica"
	None    Role = "none"
)

// State of a VM's replication; the names are stable.
type State string

// The states.
const (
	Seeding     State = "seeding"
	Replicating State = "replicating"
	Behind      State = "behind"
	Paused      State = "paused"
	Verifying   State = "verifying"
	Resyncing   State = "resyncing"
	Preparing   State = "preparing-failover"
	FailedOver  State = "failed-over"
	Suspect     State = "suspect"
	Unprotected State = "unprotected"
	Orphan      State = "orphan" // a replica whose primary ended the relationship
	Diverged    State = "diverged"
	Error       State = "error"
)

// Phases of a Failover.
const (
	Trial      = "trial"
	Completing = "completing"
)

// VM is everything shown of one VM on one host.
type VM struct {
	Name       string             `json:"name"`
	ID         wire.VMID          `json:"id"`
	Role       Role               `json:"role"`
	State      State              `json:"state"`
	Health     health.Severity    `json:"health"`
	Reason     string             `json:"reason,omitempty"` // one sentence: why it is not protected, or not normal
	Conditions []health.Condition `json:"conditions,omitempty"`
	Primary    string             `json:"primary"` // host names
	Replica    string             `json:"replica"`
	Peer       wire.HostID        `json:"peer"`
	Running    bool               `json:"running"` // the guest runs on this host
	Generation string             `json:"generation"`
	Position   string             `json:"position"` // last committed position as this host knows it
	Epoch      uint64             `json:"epoch"`
	Interval   time.Duration      `json:"interval_ns"`
	AppEvery   time.Duration      `json:"app_every_ns"`         // of application-consistent points, 0 = none
	Rate       int64              `json:"rate_limit,omitempty"` // bytes per second of this VM, 0 = only the host's limits
	OnSilent   string             `json:"on_silent_peer"`       // after an unclean boot with a silent peer: start or hold
	// Shutdown is how long the guest may take to shut down in a planned failover.
	Shutdown time.Duration `json:"shutdown_time_ns"`
	// LastCommit is the time of the last cut the replica holds; zero when none.
	LastCommit time.Time `json:"last_commit"`
	// RPO is the age of that cut now; negative when there is none.
	RPO time.Duration `json:"rpo_ns"`
	// Pending is what was changed and not yet committed on the replica, the rest
	// of an initial copy included; negative where it is not known: on the
	// replica's host, and while the data plane does not answer.
	Pending int64 `json:"pending_bytes"`
	Job     *Job  `json:"job,omitempty"`
	// Compare is the comparison of everything that was asked for last.
	Compare *Compare `json:"compare,omitempty"`
	Disks   []Disk   `json:"disks"`
	Stats   Stats    `json:"stats"`
	Plan    *Plan    `json:"plan,omitempty"`
	Program *Program `json:"program,omitempty"`
	// Failover is set while a failover can be taken back, or is being completed.
	Failover *Failover `json:"failover,omitempty"`
	// Tests are the test copies that exist on this host, TestsThere how many the
	// other one was last heard to have. LastTest is the last that was taken away,
	// LastDrill the last drill and Proven the last that succeeded, on either host.
	Tests      []Test   `json:"tests,omitempty"`
	TestsThere int      `json:"tests_there,omitempty"`
	LastTest   *TestEnd `json:"last_test,omitempty"`
	LastDrill  *Drill   `json:"last_drill,omitempty"`
	Proven     *Drill   `json:"proven,omitempty"`
}

// Program is what serves the VM's disks on this host.
type Program struct {
	Version string `json:"version"`
	// Outdated: another program is installed than the one that runs, as data
	// plane or as its keeper.
	Outdated bool `json:"outdated"`
	PID      int  `json:"pid"`
}

// Upgrade is what became of one VM's data plane.
type Upgrade struct {
	VM       string `json:"vm"`
	From     string `json:"from"` // version that ran
	To       string `json:"to"`   // version that runs, or would
	Program  string `json:"program,omitempty"`
	Outdated bool   `json:"outdated"` // another program was installed than ran
	DryRun   bool   `json:"dry_run,omitempty"`
	// Done: the data plane was succeeded; Keeper: its keeper was replaced.
	Done   bool `json:"done"`
	Keeper bool `json:"keeper,omitempty"`
	// Pause is how long the guest's requests were not read.
	Pause       time.Duration `json:"pause_ns,omitempty"`
	Connections int           `json:"connections,omitempty"`
	Tries       int           `json:"tries,omitempty"`
}

// Failover is an unplanned failover on trial, or one whose images are still
// being brought to what the guest wrote.
type Failover struct {
	Phase string    `json:"phase"`
	Point string    `json:"point"` // position that the guest began with
	Cut   time.Time `json:"cut"`
	// Bytes the guest wrote lie beside the images; Moved have been written into
	// them since the data plane started.
	Bytes int64 `json:"bytes"`
	Moved int64 `json:"moved_bytes"`
	// Points end with the commit.
	Points   int       `json:"points"`
	Deadline time.Time `json:"deadline,omitzero"`
	Then     string    `json:"then,omitempty"` // commit or cancel, at the deadline
	Failure  string    `json:"failure,omitempty"`
}

// Job is a long transfer in progress.
type Job struct {
	Phase string        `json:"phase"` // "seed", "delta", "verify", "apply"
	Done  int64         `json:"done_bytes"`
	Total int64         `json:"total_bytes"`
	Rate  int64         `json:"rate_bytes_per_second"`
	ETA   time.Duration `json:"eta_ns"` // negative when unknown
}

// Compare is a comparison of everything by digest, in the background.
type Compare struct {
	Asked   time.Time `json:"asked"`
	Ended   time.Time `json:"ended,omitzero"` // zero: under way
	Rate    int64     `json:"rate_bytes_per_second,omitempty"`
	Window  string    `json:"window,omitempty"`
	Done    int64     `json:"done_bytes"`
	Total   int64     `json:"total_bytes"`
	Differs int64     `json:"differs_bytes"`
}

// Disk is one protected disk.
type Disk struct {
	Name    wire.DiskName `json:"name"`
	Size    int64         `json:"size_bytes"`
	Path    string        `json:"path"`
	Pending int64         `json:"pending_bytes"`           // changed; negative when unknown, as the VM's
	Suspect int64         `json:"suspect_bytes,omitempty"` // still to be compared by digest
	// State is empty, or "joining": being added, Copied bytes of it are with the
	// replica; on the replica also "leaving" (the primary has taken it out) and
	// "left" (only recovery points have it).
	State  string `json:"state,omitempty"`
	Copied int64  `json:"copied_bytes,omitempty"`
}

// Stats follow the names of Hyper-V Replica's measurements.
type Stats struct {
	Since          time.Time     `json:"since"`
	Cycles         int64         `json:"cycles"`
	CyclesMissed   int64         `json:"cycles_missed"`
	Errors         int64         `json:"errors"`
	AverageBytes   int64         `json:"average_bytes"`
	LargestBytes   int64         `json:"largest_bytes"`
	AverageLatency time.Duration `json:"average_latency_ns"`
	RPOMedian      time.Duration `json:"rpo_median_ns"`
	RPOMax         time.Duration `json:"rpo_max_ns"`
	RawBytes       int64         `json:"raw_bytes"`  // changed bytes shipped, before compression
	SentBytes      int64         `json:"sent_bytes"` // bytes on the wire
	LastError      string        `json:"last_error,omitempty"`
	Abandoned      int64         `json:"abandoned_epochs"`
	AppPoints      int64         `json:"app_points"` // application-consistent ones since the session began
	LastApp        time.Time     `json:"last_app"`   // the last of them; zero = none
	AppFailed      int64         `json:"app_failed"` // that became crash-consistent ones
	AppError       string        `json:"app_error,omitempty"`
}

// Plan is a running or interrupted plan.
type Plan struct {
	Kind        string    `json:"kind"`
	Request     string    `json:"request"`
	Step        string    `json:"step"`
	Committed   bool      `json:"committed"`
	Interrupted bool      `json:"interrupted"`
	Failure     string    `json:"failure,omitempty"`
	Started     time.Time `json:"started"`
}

// Mount is a recovery point that is shown over NBD on this host.
type Mount struct {
	ID          string      `json:"id"`
	VM          string      `json:"vm"`
	Number      uint64      `json:"number"` // of the point
	Time        time.Time   `json:"time"`   // of its cut
	Position    string      `json:"position"`
	App         bool        `json:"application_consistent"`
	Patch       string      `json:"patch,omitempty"` // laid over the point
	Writable    bool        `json:"writable"`
	Quota       int64       `json:"quota_bytes,omitempty"` // per disk
	Used        int64       `json:"used_bytes"`            // by what was written, over all disks
	Connections int         `json:"connections"`
	Since       time.Time   `json:"since"`
	Disks       []MountDisk `json:"disks"`
}

// MountDisk is one disk of a mount.
type MountDisk struct {
	Name wire.DiskName `json:"name"`
	Size int64         `json:"size_bytes"`
	URI  string        `json:"uri"` // for NBD clients on this host
}

// Peer is one paired host.
type Peer struct {
	Host      wire.HostID `json:"host"`
	Name      string      `json:"name"`
	Address   string      `json:"address"`
	Reachable bool        `json:"reachable"`
	LastSeen  time.Time   `json:"last_seen"`
	MaySend   bool        `json:"may_send"` // it may replicate VMs to this host
	MayAsk    bool        `json:"may_ask"`  // it may ask this host to hand a VM over
	Root      string      `json:"storage_root,omitempty"`
	Bandwidth int64       `json:"bandwidth,omitempty"` // bytes per second it may send; 0 = no limit
}

// Host is the daemon's own state.
type Host struct {
	Name      string      `json:"name"`
	ID        wire.HostID `json:"id"`
	Version   string      `json:"version"`
	Listen    string      `json:"listen"`
	Receiving bool        `json:"receiving"`
	Libvirt   string      `json:"libvirt"`
	// NotProtected are the domains that should be protected and are not.
	NotProtected []NotProtected `json:"not_protected,omitempty"`
}
