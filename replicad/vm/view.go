package vm

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// ID is the VM's UUID.
func (v *VM) ID() wire.VMID { return v.id }

// Peer is the other host of the relationship.
func (v *VM) Peer() wire.HostID { return v.record().Peer }

// Serves reports whether this host owns the VM's data now.
func (v *VM) Serves() bool { return v.record().Lineage.MayServe() }

// Receives reports whether this host holds, or is about to hold, the replica.
func (v *VM) Receives() bool {
	st := v.record().Lineage.State
	return st == lineage.Replica || st == lineage.Demoted
}

// Status is everything shown of the VM; peerName is the other host's name.
func (v *VM) Status(ctx context.Context, peerName string) status.VM {
	r := v.record()
	now := v.deps.Now()
	out := status.VM{
		Name: r.Name, ID: r.VM, Peer: r.Peer, Interval: r.Interval, Rate: r.Rate, AppEvery: r.AppEvery, OnSilent: r.OnSilent, Shutdown: r.shutdown(), Generation: r.Lineage.Generation.String()[:8],
		RPO: -1, Pending: -1, Running: v.guestRuns(),
	}
	f := health.Facts{Name: r.Name, Interval: r.Interval, Since: r.Created, Running: out.Running}
	for _, d := range r.Disks {
		k := status.Disk{Name: d.Name, Size: d.Size, Path: d.where(), Pending: -1, State: string(d.State)}
		if d.Out {
			k.State = string(left)
		}
		out.Disks = append(out.Disks, k)
	}
	if r.Lineage.State == lineage.Replica {
		out.Role, out.Primary, out.Replica = status.Replica, peerName, v.deps.HostName
		v.viewReplica(&out, &f)
	} else {
		out.Role, out.Primary, out.Replica = status.Primary, v.deps.HostName, peerName
		v.viewPrimary(ctx, &out, &f)
	}
	v.viewCommon(&out, &f)
	if !out.LastCommit.IsZero() {
		out.RPO = now.Sub(out.LastCommit)
	}
	f.LastCommit = out.LastCommit
	out.Conditions, out.Health = health.Evaluate(f, now)
	if len(out.Conditions) > 0 {
		out.Reason = out.Conditions[0].Text
	}
	return out
}

func (v *VM) viewCommon(out *status.VM, f *health.Facts) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if d := v.rec.Lineage.Diverged; d != nil {
		f.Diverged, out.State = d.Reason, status.Diverged
	}
	if j := v.running; j != nil {
		out.Plan = &status.Plan{Kind: string(j.Kind), Request: j.Request, Step: v.step, Committed: j.Committed, Started: j.Started}
	} else if j := v.stuck; j != nil {
		out.Plan = &status.Plan{Kind: string(j.Kind), Request: j.Request, Step: j.Begun, Committed: j.Committed, Started: j.Started, Interrupted: true, Failure: j.Failure}
		f.Interrupted = fmt.Sprintf("the plan %q stopped at step %q: %s", j.Kind, j.Begun, j.Failure)
	}
	f.Bypass, f.Overlay = v.bypass(), v.overlay()
	f.Ended, f.Stranded = !v.facts.running, v.facts.stranded
	if v.facts.hands.off {
		f.Released, out.State = v.facts.hands.why, status.Unprotected
	}
	if (f.Overlay != "" || f.Bypass != "") && (out.State == status.Replicating || out.State == status.Paused) && !v.rec.Paused {
		f.Paused = false // not by a person
		out.State = status.Behind
	}
	if !v.rec.StartAt.IsZero() && out.State == status.Paused && !v.rec.Paused {
		f.Paused, f.Scheduled, out.State = false, v.rec.StartAt, status.Seeding
	}
	if v.thawing && !v.frozen.IsZero() {
		f.Frozen = "since " + v.frozen.UTC().Format("2006-01-02T15:04:05Z") + " the agent has not thawed them"
	}
	if v.held != "" && !v.facts.running {
		f.Held = v.held
	}
	if v.trouble != "" {
		f.DataPlane = v.trouble
		if out.State == "" {
			out.State = status.Error
		}
	}
}

func (v *VM) viewReplica(out *status.VM, f *health.Facts) {
	out.State = status.Error
	st, err := v.storeStatus()
	if err != nil {
		return
	}
	out.State = status.Replicating
	switch st.State {
	case points.Seeding:
		out.State = status.Seeding
	case points.Suspect, points.Damaged:
		out.State = status.Suspect
		f.StoreSuspect = whySuspect(st)
	case points.Promoted:
		out.State = status.FailedOver
	}
	v.mu.Lock()
	if v.applying != nil {
		f.ApplyError = v.applying.Error()
	}
	v.mu.Unlock()
	if o := v.orphanText(); o != "" {
		out.State, f.Orphan = status.Orphan, o
	}
	f.PointsFull, f.Unproven = pointsFull(st.Status), st.VerifyAll
	f.Incomplete = st.Committed.IsZero() || v.record().Incomplete
	out.Position, out.Epoch, out.LastCommit = st.Committed.String(), st.Committed.Epoch, st.CutTime
	if f.Incomplete {
		out.LastCommit = time.Time{}
	}
	if st.Backlog > backlogShown {
		f.Backlog = fmt.Sprintf("%s, %d bytes, the oldest %s old", count.Of(st.Backlog, "epoch"), st.Spool, st.BacklogAge.Round(time.Second))
	}
}

const backlogShown = 60

// fullSoon is how far ahead a forecast is worth a warning.
const fullSoon = 24 * time.Hour

// pointsFull says when room for recovery points is, or will be, short.
func pointsFull(st points.Status) string {
	switch {
	case st.Sacrificed > 0:
		return fmt.Sprintf("given up for want of room since the daemon started: %s", count.Of(st.Sacrificed, "recovery point"))
	case st.Forecast.Full >= 0 && st.Forecast.Full < fullSoon:
		return fmt.Sprintf("at the present churn room for recovery points is used up in %s; the oldest are given up then", st.Forecast.Full.Round(time.Minute))
	}
	return ""
}

func (v *VM) viewPrimary(ctx context.Context, out *status.VM, f *health.Facts) {
	f.Primary = true
	r := v.record()
	out.Position, out.Epoch = r.Acked.String(), r.Acked.Epoch
	switch r.Lineage.State {
	case lineage.Demoting, lineage.Demoted:
		out.State = status.Preparing
	default:
		out.State = status.Unprotected
	}
	f.NoReverse = r.NoReverse
	if r.NoReverse {
		out.State = status.FailedOver
	}
	if o := r.Overlay; o != nil {
		out.Failover = &status.Failover{
			Phase: status.Trial, Point: o.At.String(), Cut: o.Cut, Points: o.Points, Deadline: o.Deadline, Then: o.Then,
		}
		if o.Committed {
			out.Failover.Phase, out.Failover.Points = status.Completing, 0
		}
		f.Trial = !o.Committed
	}
	c, err := v.plane()
	if err == nil {
		v.viewPlane(ctx, c, out, f)
	}
	f.NoCopy = true
	if s := v.session(); s != nil {
		st := s.Status()
		f.NoCopy = !st.Protected
		viewSession(st, out, f)
		v.viewPass(st, out)
	}
}

func (v *VM) viewPlane(ctx context.Context, c planeStatus, out *status.VM, f *health.Facts) {
	ctx, cancel := context.WithTimeout(ctx, viewTimeout)
	defer cancel()
	p, err := c.Status(ctx)
	if err != nil {
		f.DataPlane = err.Error()
		return
	}
	out.Pending, f.SuspectBytes, f.TrackingLost = p.Pending, p.Suspect, p.TrackingLost
	if o := p.Overlay; o != nil && out.Failover != nil {
		out.Failover.Bytes, out.Failover.Moved, out.Failover.Failure = o.Bytes, o.Moved, o.Failure
		f.FlattenError = o.Failure
	}
	out.Program = &status.Program{Version: p.Version, Outdated: p.Outdated || p.KeeperOutdated, PID: p.PID}
	if out.Program.Outdated {
		f.Outdated = "process " + strconv.Itoa(p.PID) + " runs " + p.Version
	}
	for i := range out.Disks {
		for _, d := range p.Disks {
			if d.Name == out.Disks[i].Name {
				out.Disks[i].Pending, out.Disks[i].Suspect = d.Pending, d.Suspect
			}
		}
	}
}

const viewTimeout = 2 * time.Second

func viewSession(s session.Status, out *status.VM, f *health.Facts) {
	switch {
	case s.Stop != nil:
		out.State = status.Error
		f.Stopped, f.StoppedHint = s.Stop.Reason, strings.ReplaceAll(s.Stop.Hint, "NAME", f.Name)
	case s.Paused:
		out.State, f.Paused = status.Paused, true
	case s.Seeding:
		out.State, f.Seeding = status.Seeding, true
	case s.Verifying != "":
		out.State, f.Verifying = status.Verifying, s.Verifying
		f.SuspectBytes = max(f.SuspectBytes, s.Suspect)
	case s.Protected && s.Failures > 0:
		out.State = status.Behind
	case s.Protected:
		out.State = status.Replicating
	}
	if !s.Committed.IsZero() {
		out.Position, out.Epoch = s.Committed.String(), s.Committed.Epoch
	}
	if s.Seeding && out.Pending >= 0 {
		out.Pending += unseeded(s.Progress, out.Disks)
	}
	for i, d := range out.Disks {
		out.Disks[i].Copied = s.Joining[d.Name].Done
	}
	out.LastCommit = s.LastCut
	f.AppFailed = s.Stats.AppError
	viewConditions(s, f)
	if p := s.Progress; p != nil {
		out.Job = &status.Job{Phase: p.Phase, Done: p.Done, Total: p.Total, Rate: p.Rate, ETA: p.ETA}
	}
	out.Stats = status.Stats{
		Since: s.Stats.Since, Cycles: s.Stats.Cycles, CyclesMissed: s.Stats.CyclesMissed, Errors: s.Stats.Errors,
		AverageBytes: s.Stats.AverageBytes, LargestBytes: s.Stats.LargestBytes, AverageLatency: s.Stats.AverageLatency,
		RPOMedian: s.Stats.RPOMedian, RPOMax: s.Stats.RPOMax, RawBytes: s.Stats.RawBytes, SentBytes: s.Stats.SentBytes,
		LastError: s.Stats.LastError, Abandoned: s.Stats.Abandoned,
		AppPoints: s.Stats.AppPoints, LastApp: s.Stats.LastApp, AppFailed: s.Stats.AppFailed, AppError: s.Stats.AppError,
	}
}

// unseeded is what the initial copy has still to send, at most.
func unseeded(p *session.Progress, disks []status.Disk) int64 {
	if p != nil && p.Total > 0 {
		return max(0, p.Total-p.Done)
	}
	all := int64(0)
	for _, d := range disks {
		all += d.Size
	}
	return all
}

// viewConditions tells a silent peer from one that says no and from trouble
// with this host's own disks.
func viewConditions(s session.Status, f *health.Facts) {
	told := false
	for _, c := range s.Conditions {
		switch c.Code {
		case session.CondNoSpace:
			f.NoSpace, told = c.Text, true
		case session.CondSource:
			f.SourceError, told = s.LastError, true
		case session.CondRefused:
			f.Refused, told = s.LastError, true
		case session.CondCorrupt:
			f.Corrupt, told = s.LastError, true
		case session.CondSuspect:
			f.PeerSuspect, told = c.Text, true
		}
	}
	if s.Failures > 0 && !told {
		f.LinkError, f.LinkSince = s.LastError, s.Since
	}
}
