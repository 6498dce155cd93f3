// Package api is the daemon's local control interface: HTTP with JSON on a
// unix socket that only root may open. Client and server stand side by side,
// and everything that crosses is a value of package status or of this file.
//
// Long actions answer with a stream of Event lines, one JSON object each; the
// last one has Done set and carries the outcome. Closing the connection does
// not stop an action that has begun: plans are journalled and run to an end.
//
// Errors are wire.Error values on both sides, so that a caller can branch on
// the kind and show the hint.
package api

import (
	"context"
	"time"

	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// Verb names an action.
type Verb string

// The actions.
const (
	VMEnable  Verb = "vm-enable"
	VMDisable Verb = "vm-disable"
	VMPause   Verb = "vm-pause"
	VMResume  Verb = "vm-resume"
	VMSync    Verb = "vm-sync"   // one cycle now
	VMResync  Verb = "vm-resync" // compare everything by digest, send what differs
	VMLimit   Verb = "vm-limit"  // bound what is sent of a VM
	VMSet     Verb = "vm-set"    // change what Set says
	// PolicyApply protects a domain as its policy says, or sets what differs from it.
	PolicyApply Verb = "policy-apply"
	VMResize    Verb = "vm-resize"      // give a disk another size
	VMAddDisk   Verb = "vm-add-disk"    // protect one disk more: Disks[0]
	VMTakeDisk  Verb = "vm-remove-disk" // and one less
	VMStart     Verb = "vm-start"
	VMUpgrade   Verb = "vm-upgrade" // the installed program takes the data plane over
	Planned     Verb = "failover-planned"
	Unplanned   Verb = "failover-unplanned"
	Reverse     Verb = "failover-reverse"
	Commit      Verb = "failover-commit"
	Cancel      Verb = "failover-cancel"
	PlanResume  Verb = "failover-resume"
	AuditLog    Verb = "failover-log"
	// What an old primary gave up in a return.
	PatchList   Verb = "failover-patch-list"
	PatchExport Verb = "failover-patch-export"
	PatchDelete Verb = "failover-patch-delete"
	PatchMount  Verb = "failover-patch-mount"

	// Reload has the daemon read its configuration again.
	Reload Verb = "reload"

	PlanUndo Verb = "failover-take-back"
	PeerTest Verb = "peer-test"
	// PeerAddress records where a peer is to be found: To.
	PeerAddress Verb = "peer-address"
	PointPin    Verb = "point-pin"
	PointUnpin  Verb = "point-unpin"
	PointKeep   Verb = "point-keep" // change the retention on the replica's host
	PointApp    Verb = "point-app"  // change the interval of application-consistent points
	PointMount  Verb = "point-mount"
	// VMStatsReset begins the open window of the measurements anew.
	VMStatsReset Verb = "vm-stats-reset"
	// PointUnmount ends the mount ID, or all of the VM.
	PointUnmount Verb = "point-unmount"
	// PointExport ends when its caller goes away: it is no plan.
	PointExport Verb = "point-export"
	// VMExport writes a VM's disks onto an external medium, VMImport makes images
	// of one. Both end when their caller goes away; repeated, they go on.
	VMExport Verb = "vm-export"
	VMImport Verb = "vm-import"

	FailoverTest Verb = "failover-test"
	TestStop     Verb = "failover-test-stop"
	Drill        Verb = "drill"
)

// Action asks the daemon to do something to a VM (or a peer). Fields that a
// verb does not use must be zero.
type Action struct {
	Verb     Verb          `json:"verb"`
	VM       string        `json:"vm,omitempty"`   // name or UUID
	Peer     string        `json:"peer,omitempty"` // name or host id
	Interval time.Duration `json:"interval_ns,omitempty"`
	Disks    []string      `json:"disks,omitempty"` // empty = all that can be protected
	DryRun   bool          `json:"dry_run,omitempty"`
	Force    bool          `json:"force,omitempty"`
	NoStart  bool          `json:"no_start,omitempty"`
	// WithoutSnapshot of a start: what lies in a snapshot above the disks is given up.
	WithoutSnapshot bool `json:"without_snapshot,omitempty"`
	NoReverse       bool `json:"no_reverse,omitempty"`
	// KeepPoints of planned, unplanned, commit and reverse: recovery points are
	// copied before they end.
	KeepPoints bool          `json:"keep_points,omitempty"`
	Delete     bool          `json:"delete,omitempty"`     // disable: also delete the replica's data
	Timeout    time.Duration `json:"timeout_ns,omitempty"` // guest shutdown deadline; 0 = the VM's
	// Shutdown of enable: the VM's deadline from then on, 0 = the default.
	Shutdown time.Duration `json:"shutdown_time_ns,omitempty"`
	// Of vm-set: which settings it changes. Of vm-enable without a peer, by the
	// policy: those that count instead of its; Initial: StartAt and Existing do, too.
	Initial  bool      `json:"initial,omitempty"`
	Set      *Settings `json:"set,omitempty"`
	OnSilent string    `json:"on_silent_peer,omitempty"`
	Existing bool      `json:"existing,omitempty"` // enable: compare with images that lie ready on the replica host
	StartAt  time.Time `json:"start_at,omitzero"`  // enable: when the initial copy begins; zero = at once
	Reason   string    `json:"reason,omitempty"`
	// Of vm-export and vm-import: the medium's directory is To or From; at most
	// one of the secrets.
	From       string `json:"from,omitempty"`
	Recipient  string `json:"recipient,omitempty"`  // age recipient to encrypt for
	Passphrase string `json:"passphrase,omitempty"` // to encrypt and decrypt with
	Identity   string `json:"identity,omitempty"`   // an age identity file's content
	// Of vm-resync: between the cycles, at most so many bytes per second, in a
	// time of day ("22:00-06:00"); or the end of that. Rate also of vm-limit.
	Background bool   `json:"background,omitempty"`
	Rate       int64  `json:"rate,omitempty"`
	Window     string `json:"window,omitempty"`
	Stop       bool   `json:"stop,omitempty"`
	// Of vm-resize: the disk is Disks[0]; Size 0 = what the image has by now.
	Size   int64 `json:"size,omitempty"`
	Shrink bool  `json:"shrink,omitempty"`
	// Point names a recovery point, as points.Choose reads it.
	Point string `json:"point,omitempty"`
	// Retention and Quota say what a replica keeps, as points.ParsePolicy reads
	// it; of point-keep nil (Quota) and empty (Retention) leave as it is.
	Retention string        `json:"retention,omitempty"`
	Quota     *int64        `json:"quota,omitempty"`
	AppEvery  time.Duration `json:"app_every_ns,omitempty"` // of application-consistent points
	Writable  bool          `json:"writable,omitempty"`     // point-mount: with a scratch overlay of Quota bytes per disk
	TCP       *int          `json:"tcp,omitempty"`          // point-mount: a port of the loopback interface
	Mount     string        `json:"mount,omitempty"`        // point-unmount: the beginning of an id; empty = all
	To        string        `json:"to,omitempty"`           // point-export: an absolute path
	Format    string        `json:"format,omitempty"`       // point-export: raw or qcow2
	// Of failover unplanned.
	InPlace  bool          `json:"in_place,omitempty"`  // unplanned: final at once
	Unfenced bool          `json:"unfenced,omitempty"`  // unplanned: although fencing failed
	Within   time.Duration `json:"within_ns,omitempty"` // unplanned: time of trial
	Then     string        `json:"then,omitempty"`      // unplanned: commit or cancel after it
	Patch    string        `json:"patch,omitempty"`     // patch-export, patch-mount, patch-delete: its name
	// Of tests and drills.
	Network  string `json:"network,omitempty"` // of this host
	Isolated bool   `json:"isolated,omitempty"`
	Name     string `json:"name,omitempty"` // of the copy
	All      bool   `json:"all,omitempty"`
	Proof    string `json:"proof,omitempty"` // that the guest works
}

// Settings of a protected VM; nil leaves as it is.
type Settings struct {
	Interval *time.Duration `json:"interval_ns,omitempty"`
	AppEvery *time.Duration `json:"app_every_ns,omitempty"`
	OnSilent *string        `json:"on_silent_peer,omitempty"`
	Shutdown *time.Duration `json:"shutdown_time_ns,omitempty"`
}

// Text is a document for people.
type Text struct {
	Text string `json:"text"`
}

// Statistics are a VM's measurements on the host that ships it.
type Statistics = status.Measurements

// Event is one line of an action's answer.
type Event struct {
	Step    *wire.Step      `json:"step,omitempty"`    // a step began (Result empty) or ended
	Undo    bool            `json:"undo,omitempty"`    // the step is being taken back
	Check   *wire.Check     `json:"check,omitempty"`   // one prerequisite
	Note    string          `json:"note,omitempty"`    // a line for people
	VM      *status.VM      `json:"vm,omitempty"`      // the relationship afterwards
	Mount   *status.Mount   `json:"mount,omitempty"`   // what was mounted
	Job     *status.Job     `json:"job,omitempty"`     // how far it is
	Error   *wire.Error     `json:"error,omitempty"`   // with Done: the action failed
	Upgrade *status.Upgrade `json:"upgrade,omitempty"` // what became of a data plane
	Done    bool            `json:"done,omitempty"`    // last line
	Asking  *Question       `json:"asking,omitempty"`  // the action needs a decision; it ended, repeat it with the flag
	Drill   *status.Drill   `json:"drill,omitempty"`   // a drill that ended
}

// Question is a decision only a person can take.
type Question struct {
	Text string `json:"text"`
	Flag string `json:"flag"` // repeat the command with this flag to say yes
}

// Rights are what the other host may do on this one.
type Rights struct {
	MaySend bool   `json:"may_send"` // it may replicate VMs to this host
	Root    string `json:"storage_root,omitempty"`
	MaxVMs  int    `json:"max_vms,omitempty"`
	Limit   int64  `json:"max_bytes,omitempty"`
	// Bandwidth bounds what it sends, in bytes per second; 0 = no limit.
	Bandwidth int64 `json:"bandwidth,omitempty"`
	// MayAsk lets it ask this host to fail a VM over to it, and, once it was
	// promoted, to give up what this host wrote since. Nil: as MaySend.
	MayAsk *bool `json:"may_ask,omitempty"`
}

// InviteRequest opens the door for one pairing.
type InviteRequest struct {
	TTL time.Duration `json:"ttl_ns"`
	Rights
}

// InviteReply is what the other host needs.
type InviteReply struct {
	Code    string    `json:"code"`
	Address string    `json:"address"`
	Expires time.Time `json:"expires"`
}

// JoinRequest uses an invitation.
type JoinRequest struct {
	Address string `json:"address"`
	Code    string `json:"code"`
	Rights
}

// AllowRequest changes what a paired host may do here.
type AllowRequest struct {
	Peer string `json:"peer"`
	Rights
}

// Backend is what the server needs of the daemon. Every method may be called
// concurrently; errors are *wire.Error where a kind matters.
type Backend interface {
	Host(ctx context.Context) (status.Host, error)
	VMs(ctx context.Context) ([]status.VM, error)
	VM(ctx context.Context, name string) (status.VM, error)
	// Policies are the policies of this host and all its domains.
	Policies(ctx context.Context) (status.Policies, error)
	// Points lists a VM's recovery points, wherever they are kept.
	Points(ctx context.Context, name string) (wire.PointsReply, error)
	// Statistics are a VM's measurements on this host.
	Statistics(ctx context.Context, name string) (Statistics, error)
	// Mounts lists the recovery points that are mounted on this host.
	Mounts(ctx context.Context) ([]status.Mount, error)
	Peers(ctx context.Context) ([]status.Peer, error)
	Drills(ctx context.Context, name string) ([]status.Drill, error)
	DrillReport(ctx context.Context, name, when string) (Text, error)
	Invite(ctx context.Context, r InviteRequest) (InviteReply, error)
	Join(ctx context.Context, r JoinRequest) (status.Peer, error)
	Allow(ctx context.Context, r AllowRequest) error
	RemovePeer(ctx context.Context, name string) error
	// Act runs an action to its end, calling emit for every event but the last.
	Act(ctx context.Context, a Action, emit func(Event)) error
	// Doctor checks the host against the list of good practice.
	Doctor(ctx context.Context) ([]wire.Check, error)
}
