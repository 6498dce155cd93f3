// Package health turns facts about one VM's replication into conditions with a
// stable code, a severity, a sentence and a remedy.
//
// It is pure: Evaluate takes facts and the current time and returns the same
// conditions every time. Every condition the product knows stands in this
// package; a viewer needs no logic of its own.
package health

import (
	"fmt"
	"sort"
	"time"
)

// Severity of a condition, and the rolled-up health of a VM.
type Severity string

// The severities, in order.
const (
	Normal   Severity = "normal"
	Warning  Severity = "warning"
	Critical Severity = "critical"
)

// rank orders severities.
func (s Severity) rank() int {
	switch s {
	case Critical:
		return 2
	case Warning:
		return 1
	}
	return 0
}

// Condition is one reason why a VM is not (quite) well.
type Condition struct {
	Code     string   `json:"code"` // stable
	Severity Severity `json:"severity"`
	Text     string   `json:"text"`   // one sentence
	Remedy   string   `json:"remedy"` // the next command or action
}

// Facts are what Evaluate judges. Zero values mean "no".
type Facts struct {
	Name         string
	Primary      bool // this host is the primary
	Running      bool
	Interval     time.Duration
	Since        time.Time // when protection began
	LastCommit   time.Time // last cut the replica holds; zero = none
	Seeding      bool
	Paused       bool
	Scheduled    time.Time // the initial copy begins then; zero = not scheduled
	Verifying    string    // reason of a digest pass
	SuspectBytes int64
	Diverged     string
	Stopped      string // the session stopped for this reason and waits for the operator
	StoppedHint  string // the command that leads out
	LinkError    string // last error while trying to reach the peer
	SourceError  string // the disks here cannot be read or tracked
	Refused      string // the peer answers, and says no
	Corrupt      string // what arrives is not what was sent
	PeerSuspect  string // primary: why the replica does not trust what it holds
	ApplyError   string // replica: what was received cannot be written into the image
	LinkSince    time.Time
	Bypass       string // which disks' export is, or was, missing from the guest's block graph; a sentence
	Overlay      string // a snapshot lies above our export; Ended: the guest is off
	Ended        bool
	Stranded     bool   // ... and its definition does not name the snapshot
	DataPlane    string // the data plane does not answer
	Outdated     string // it runs another program than is installed
	NoReverse    bool   // failed over, nothing replicates back
	Trial        bool   // the failover can be taken back
	FlattenError string // a committed failover cannot be completed
	Interrupted  string // an interrupted plan
	StoreSuspect string // the replica image was touched from outside, or its store is damaged
	Unproven     string // replica: why everything is to be compared before its content is trusted
	Incomplete   bool   // replica holds no complete copy
	NoCopy       bool   // primary: it is not known that the replica holds a complete copy
	Backlog      string // replica apply is late
	TrackingLost string
	NoSpace      string
	AppFailed    string // primary: the last application-consistent point is crash-consistent
	Frozen       string // the guest's file systems may be frozen by us
	Orphan       string // replica: the primary ended the relationship; the copy is kept
	PointsFull   string // replica: recovery points are given up, or will be soon, for want of room
	Held         string // the VM is held back from starting
	Released     string // its domain stands on its own images, unprotected
}

// BypassRemedy brings a guest's disks back on their exports.
const BypassRemedy = "shut the guest down and start it again; what it wrote is then found by comparison"

// Evaluate returns the conditions, worst first, and the worst severity.
func Evaluate(f Facts, now time.Time) ([]Condition, Severity) {
	var cs []Condition
	add := func(code string, s Severity, remedy, format string, a ...any) {
		cs = append(cs, Condition{Code: code, Severity: s, Text: fmt.Sprintf(format, a...), Remedy: remedy})
	}
	evaluateFaults(f, add)
	if f.Primary {
		evaluatePrimary(f, now, add)
	} else {
		evaluateReplica(f, now, add)
	}
	sort.SliceStable(cs, func(i, j int) bool { return cs[i].Severity.rank() > cs[j].Severity.rank() })
	worst := Normal
	if len(cs) > 0 {
		worst = cs[0].Severity
	}
	return cs, worst
}

type adder func(code string, s Severity, remedy, format string, a ...any)

// evaluateFaults are the conditions that hold on either side.
func evaluateFaults(f Facts, add adder) {
	if f.Diverged != "" {
		add("diverged", Critical, "decide which side's changes are discarded: replicactl failover reverse "+f.Name,
			"both hosts changed this VM independently: %s", f.Diverged)
	}
	if f.Interrupted != "" {
		add("plan-interrupted", Critical, "replicactl failover resume "+f.Name+" (or take-back)", "%s", f.Interrupted)
	}
	if f.Released != "" {
		add("released", Critical, "shut the guest down: protection then resumes by digest; or end it: replicactl vm disable "+f.Name,
			"the guest writes to its own images and nothing is replicated: %s", f.Released)
	}
	if f.StoreSuspect != "" {
		add("replica-suspect", Critical, "find out why, then on this host: replicactl vm resync "+f.Name, "the replica takes nothing: %s", f.StoreSuspect)
	}
	if f.DataPlane != "" {
		add("data-plane-down", Critical, "replicactl doctor; the guest waits for its disk", "the data plane does not answer: %s", f.DataPlane)
	}
	if f.Frozen != "" {
		add("guest-frozen", Critical, "virsh domfsthaw "+f.Name+"; it is tried again and again", "the guest's file systems may be frozen: %s", f.Frozen)
	}
	if f.AppFailed != "" {
		add("app-points", Warning, "virsh domfsfreeze "+f.Name+" && virsh domfsthaw "+f.Name+": does the guest agent answer? none are wanted: replicactl point app "+f.Name+" 0",
			"the last application-consistent point is crash-consistent: %s", f.AppFailed)
	}
	if f.NoSpace != "" {
		add("no-space", Critical, "free space on the replica's storage root", "%s", f.NoSpace)
	}
	if f.Held != "" {
		add("start-held", Critical, "replicactl vm start "+f.Name+" --force when the other copy is certainly stopped", "the VM is not started: %s", f.Held)
	}
}

// lateness thresholds: as Hyper-V Replica, relative to the VM's own interval.
const (
	warnIntervals     = 3
	criticalIntervals = 12
	minPatience       = 15 * time.Second
)

func evaluatePrimary(f Facts, now time.Time, add adder) {
	if f.FlattenError != "" {
		add("failover-incomplete", Warning, "free space on the images' file system; replicactl vm status "+f.Name,
			"the images cannot be brought to what the guest wrote, it is tried again: %s", f.FlattenError)
	}
	switch {
	case f.Trial:
		add("failover-trial", Critical, "replicactl failover commit "+f.Name+" (or cancel)",
			"failed over on trial: the guest's writes lie beside the replica, nothing replicates the VM")
		return
	case f.NoReverse:
		add("no-reverse", Critical, "replicactl failover reverse "+f.Name, "failed over; nothing replicates the VM any more")
		return
	case f.Stopped != "":
		hint := f.StoppedHint
		if hint == "" {
			hint = "replicactl vm resync " + f.Name
		}
		add("session-stopped", Critical, hint, "replication has stopped: %s", f.Stopped)
	case !f.Scheduled.IsZero():
		add("scheduled", Warning, "wait, or begin now: replicactl vm resume "+f.Name,
			"the VM is not protected yet: the initial copy begins at %s", f.Scheduled.Format(time.DateTime))
	case f.Paused:
		add("paused", Warning, "replicactl vm resume "+f.Name, "replication is paused")
	case f.Seeding:
		add("seeding", Warning, "wait; replicactl vm watch "+f.Name, "the initial copy is not complete: the VM is not protected yet")
	}
	if f.NoCopy && !f.Seeding && f.Stopped == "" && f.Scheduled.IsZero() {
		add("unprotected", Warning, "wait; replicactl vm watch "+f.Name, "it is not confirmed yet that the replica holds a complete copy")
	}
	if f.Bypass != "" {
		add("bypass", Critical, BypassRemedy, "%s", f.Bypass)
	}
	if f.TrackingLost != "" {
		add("tracking-lost", Critical, "check the state directory's disk", "changes cannot be recorded: %s", f.TrackingLost)
	}
	if f.Outdated != "" {
		add("outdated", Warning, "replicactl vm upgrade "+f.Name+" (the guest does not notice)", "the VM's disks are served by another program than is installed: %s", f.Outdated)
	}
	switch {
	case f.Overlay == "":
	case f.Stranded:
		add("overlay", Critical, "docs/operations/day2.md (a guest that ended below a snapshot); to give those writes up: replicactl vm start "+f.Name+" --without-snapshot",
			"the guest is off and its newest writes lie in a snapshot that its definition does not name: %s; the replica does not have them", f.Overlay)
	case f.Ended:
		add("overlay", Warning, "replicactl vm start "+f.Name+"; then finish the backup (blockcommit)",
			"the guest is off and its newest writes lie in a snapshot: %s; the replica does not have them", f.Overlay)
	default:
		add("overlay", Warning, "finish the backup (blockcommit)", "a snapshot lies above the export: %s; replication stands still until it is committed", f.Overlay)
	}
	if f.Verifying != "" {
		add("verifying", Warning, "wait; replicactl vm watch "+f.Name, "comparing %d MiB by digest: %s", f.SuspectBytes>>20, f.Verifying)
	}
	if f.SourceError != "" {
		add("source-error", Critical, "check the disk's image and its storage; then: replicactl vm resync "+f.Name,
			"the changes cannot be read from this host's disks: %s", f.SourceError)
	}
	if f.Refused != "" {
		add("peer-refuses", Critical, "replicactl peer test PEER; replicactl peer allow … on the replica host", "the replica host refuses the VM: %s", f.Refused)
	}
	if f.PeerSuspect != "" {
		add("replica-suspect", Critical, "find out why, then on the replica host: replicactl vm resync "+f.Name, "the replica takes nothing: %s", f.PeerSuspect)
	}
	if f.Corrupt != "" {
		add("corrupt", Critical, "check both hosts' memory and network", "what arrives is not what was sent: %s", f.Corrupt)
	}
	if f.LinkError != "" {
		add("peer-unreachable", Warning, "replicactl peer test PEER", "the replica host does not answer since %s: %s", f.LinkSince.Format(time.DateTime), f.LinkError)
	}
	lateness(f, now, add)
}

// lateness judges the age of the last committed cut.
func lateness(f Facts, now time.Time, add adder) {
	if f.Seeding || f.Paused || !f.Scheduled.IsZero() || f.LastCommit.IsZero() {
		return
	}
	age := now.Sub(f.LastCommit)
	unit := max(f.Interval, time.Second)
	switch {
	case age > max(criticalIntervals*unit, 4*minPatience):
		add("late", Critical, "replicactl vm status "+f.Name, "the last copy is %s old, the interval is %s", age.Round(time.Second), f.Interval)
	case age > max(warnIntervals*unit, minPatience):
		add("late", Warning, "replicactl vm status "+f.Name, "the last copy is %s old, the interval is %s", age.Round(time.Second), f.Interval)
	}
}

func evaluateReplica(f Facts, now time.Time, add adder) {
	if f.PointsFull != "" {
		add("points-room", Warning, "free space, or keep fewer: replicactl point list "+f.Name+"; replicactl point keep "+f.Name, "%s", f.PointsFull)
	}
	if f.Orphan != "" {
		add("orphan", Warning, "replicactl point list "+f.Name+"; to delete it: replicactl vm disable "+f.Name+" --delete-replica", "%s", f.Orphan)
		return
	}
	if f.Incomplete {
		add("incomplete", Warning, "wait for the initial copy", "the replica holds no complete copy yet")
	}
	if f.Unproven != "" {
		add("unverified", Warning, "wait until the primary has compared everything: replicactl vm watch "+f.Name+" there", "what the replica holds is not verified: %s", f.Unproven)
	}
	if f.ApplyError != "" {
		add("apply-failed", Critical, "check the replica's storage: df -h; it is tried again by itself", "what was received cannot be written: %s", f.ApplyError)
	}
	if f.Backlog != "" {
		add("backlog", Warning, "check the replica's storage", "applying is late: %s", f.Backlog)
	}
	lateness(f, now, add)
}
