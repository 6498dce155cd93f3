package replicad

import (
	"context"
	"fmt"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

const defaultPort = config.DefaultPort

func emitChecks(cs []wire.Check, emit func(api.Event)) (failed *wire.Check) {
	for i := range cs {
		c := cs[i]
		emit(api.Event{Check: &c})
		if c.Result == wire.Failed && failed == nil {
			failed = &c
		}
	}
	return failed
}

func note(emit func(api.Event), format string, a ...any) {
	emit(api.Event{Note: fmt.Sprintf(format, a...)})
}

func (d *Daemon) enable(ctx context.Context, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	if a.Peer == "" {
		var err error
		if a, err = d.byPolicy(ctx, a, emit); err != nil {
			return err
		}
	}
	rec, err := d.peers.Find(a.Peer)
	if err != nil {
		return err
	}
	silent := a.OnSilent
	if silent == "" {
		silent = string(d.conf().OnSilentPeer)
	}
	if err := (vm.Settings{Interval: &a.Interval, OnSilent: &silent, Shutdown: &a.Shutdown}).Check(); err != nil {
		return err
	}
	o := vm.EnableOptions{
		Name: a.VM, Peer: rec.Host, Interval: a.Interval, Disks: a.Disks, OnSilent: silent, StartAt: a.StartAt, Existing: a.Existing, Request: request,
		Retention: a.Retention, AppEvery: a.AppEvery, Shutdown: a.Shutdown, Rate: a.Rate,
	}
	if a.DryRun {
		p, err := d.vms.PlanEnable(ctx, o)
		if err != nil {
			return err
		}
		note(emit, "Checks:")
		failed := emitChecks(p.Checks, emit)
		note(emit, "Plan:")
		for i, s := range p.Steps {
			note(emit, "  %d. %s", i+1, s)
		}
		return refusedBy(failed)
	}
	v, err := d.vms.Enable(ctx, o, step)
	if err != nil {
		return err
	}
	return d.result(ctx, v, emit)
}

func refusedBy(failed *wire.Check) error {
	if failed == nil {
		return nil
	}
	return &wire.Error{Kind: wire.KindRefused, Text: failed.Name + ": " + failed.Detail, Hint: failed.Remedy}
}

// result ends an action with the relationship as it is now.
func (d *Daemon) result(ctx context.Context, v *vm.VM, emit func(api.Event)) error {
	s := d.view(ctx, v)
	emit(api.Event{VM: &s})
	return nil
}

func (d *Daemon) actOn(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	switch a.Verb {
	case api.VMDisable:
		return d.disable(ctx, v, a, request, step, emit)
	case api.VMPause:
		return v.Pause()
	case api.VMResume:
		return v.Resume()
	case api.VMSync:
		return v.SyncNow(ctx)
	case api.VMLimit:
		return v.SetRate(a.Rate)
	case api.VMSet:
		return setVM(ctx, v, a, emit)
	case api.VMResize:
		return d.resize(ctx, v, a, request, emit)
	case api.VMAddDisk, api.VMTakeDisk:
		return d.setDisk(ctx, v, a, request, step, emit)
	case api.VMResync:
		return d.resync(ctx, v, a, request, emit)
	case api.PointPin, api.PointUnpin, api.PointKeep, api.PointApp, api.PointMount, api.PointUnmount, api.PointExport:
		return d.pointAction(ctx, v, a, emit)
	case api.VMStatsReset:
		return v.ResetStatistics()
	case api.VMUpgrade:
		u, err := v.Upgrade(ctx, a.DryRun, a.Force)
		if err != nil {
			return err
		}
		emit(api.Event{Upgrade: &u})
		return nil
	case api.VMStart:
		return v.StartGuest(ctx, vm.StartOptions{Force: a.Force, WithoutSnapshot: a.WithoutSnapshot})
	case api.Planned:
		return d.planned(ctx, v, a, request, step, emit)
	case api.Unplanned:
		return d.unplanned(ctx, v, a, request, step, emit)
	case api.Reverse:
		return d.reverse(ctx, v, a, request, step, emit)
	case api.AuditLog:
		return showAudit(v, emit)
	case api.PatchList, api.PatchExport, api.PatchDelete, api.PatchMount:
		return d.patch(ctx, v, a, emit)
	case api.Commit, api.Cancel:
		return d.settleTrial(ctx, v, a, request, step, emit)
	case api.FailoverTest:
		return d.testFailover(ctx, v, a, request, step, emit)
	case api.TestStop:
		return d.testStop(ctx, v, a, step, emit)
	case api.Drill:
		return d.drill(ctx, v, a, request, step, emit)
	case api.PlanResume, api.PlanUndo:
		if err := v.Settle(ctx, a.Verb == api.PlanUndo, a.Force); err != nil {
			return err
		}
		return d.result(ctx, v, emit)
	}
	return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("unknown action %q", a.Verb), Hint: "use a replicactl of the daemon's version"}
}

func (d *Daemon) disable(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	if a.DryRun {
		d.disablePlan(v, a, emit)
		return nil
	}
	return d.vms.Disable(ctx, v, vm.DisableOptions{Delete: a.Delete, Force: a.Force, Request: request}, step)
}

// disablePlan says what would become of the copy.
func (d *Daemon) disablePlan(v *vm.VM, a api.Action, emit func(api.Event)) {
	if v.Receives() {
		note(emit, "This host's part of the relationship ends.")
		if a.Delete {
			note(emit, "The copy here and its recovery points are DELETED.")
		} else {
			note(emit, "The images stay as files; the recovery points end.")
		}
		return
	}
	note(emit, "Protection ends; the guest goes on, on its own images, without a stop.")
	note(emit, "The copy on %s stays there with its recovery points. To delete it, there: replicactl vm disable %s --delete-replica", d.peerName(v.Peer()), a.VM)
}

func (d *Daemon) planned(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	if !v.Serves() {
		return d.plannedElsewhere(ctx, v, a, request, emit)
	}
	checks, err := v.PlanPlanned(ctx, a.NoReverse, a.KeepPoints)
	if err != nil {
		return err
	}
	note(emit, "Prerequisites:")
	if failed := emitChecks(checks, emit); failed != nil || a.DryRun {
		return refusedBy(failed)
	}
	note(emit, "Planned failover of %s to %s:", a.VM, d.peerName(v.Peer()))
	err = v.Planned(ctx, vm.PlannedOptions{NoStart: a.NoStart, NoReverse: a.NoReverse, ForceOff: a.Force, KeepPoints: a.KeepPoints, Timeout: a.Timeout, Request: request}, step)
	if err != nil {
		return err
	}
	return d.result(ctx, v, emit)
}

// plannedElsewhere asks the primary to do it.
func (d *Daemon) plannedElsewhere(ctx context.Context, v *vm.VM, a api.Action, request string, emit func(api.Event)) error {
	name := d.peerName(v.Peer())
	if a.DryRun {
		note(emit, "%s is the primary: it is asked to run the planned failover.", name)
		return nil
	}
	c, err := d.client(v.Peer())
	if err != nil {
		return err
	}
	note(emit, "Asking the primary %s:", name)
	reply, err := (&asking{
		c: c, served: v.Serves, name: name, vm: a.VM, pause: askAgain, patience: askPatience, note: func(text string) { note(emit, "%s", text) },
	}).planned(ctx, d.hello(), wire.FailoverRequest{
		VM: v.ID(), Step: "request-planned", Request: request, Start: !a.NoStart, Reverse: !a.NoReverse, Force: a.Force, KeepPoints: a.KeepPoints, Timeout: a.Timeout, Reason: a.Reason,
	})
	for i := range reply.Steps { // also those of a refusal
		emit(api.Event{Step: &reply.Steps[i]})
	}
	if err != nil {
		return err
	}
	return d.result(ctx, v, emit)
}

func (d *Daemon) unplanned(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	if v.Serves() {
		return &wire.Error{Kind: wire.KindRefused, Text: "this host is the primary of " + a.VM + ": there is no replica here to fail over to", Hint: "replicactl failover planned " + a.VM + ", or type it on the replica host"}
	}
	l, err := v.Loss(ctx, a.Point, a.Force)
	if err != nil {
		return err
	}
	emit(api.Event{Check: &l.Primary})
	if l.At != l.Newest {
		note(emit, "The chosen state is %s old (%s, position %v).", time.Since(l.Cut).Round(time.Second), l.Cut.Format(time.DateTime), l.At)
	}
	note(emit, "The last committed cut is %s old (%s, position %v).", time.Since(l.NewestCut).Round(time.Second), l.NewestCut.Format(time.DateTime), l.Newest)
	switch {
	case l.Bytes >= 0:
		note(emit, "The primary reports %d changed bytes since: they will be lost.", l.Bytes)
	default:
		note(emit, "What the primary wrote since will be lost; how much is unknown.")
	}
	for _, name := range l.Without {
		note(emit, "WITHOUT disk %s: that state does not have it, or not all of it.", name)
	}
	if l.Unproven != "" {
		note(emit, "NOT VERIFIED: %s, and the primary has not done so: the disks may hold wrong content.", l.Unproven)
	}
	if a.InPlace {
		note(emit, "In place: it cannot be cancelled, and ENDS %s.", count.Of(l.Points, "recovery point"))
	} else {
		note(emit, "The guest runs beside the replica until: replicactl failover commit %s (ends %s), or cancel.", a.VM, count.Of(l.Points, "recovery point"))
	}
	if a.DryRun {
		failed := emitChecks(v.PlanUnplanned(a.InPlace, a.KeepPoints), emit)
		if l.Primary.Result != wire.OK && !a.Force {
			failed = &l.Primary
		}
		if l.Unproven != "" && failed == nil && !a.Force {
			failed = &wire.Check{Name: "Verified", Result: wire.Failed, Detail: l.Unproven, Remedy: "wait until the primary has compared everything; or repeat with --force"}
		}
		return refusedBy(failed)
	}
	err = v.Unplanned(ctx, vm.UnplannedOptions{
		NoStart: a.NoStart, Force: a.Force, Request: request, Reason: a.Reason,
		Point: a.Point, InPlace: a.InPlace, Unfenced: a.Unfenced, Within: a.Within, Then: a.Then, KeepPoints: a.KeepPoints,
	}, step)
	if err != nil {
		return err
	}
	return d.result(ctx, v, emit)
}

// settleTrial makes an unplanned failover final, or gives it up.
func (d *Daemon) settleTrial(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	if a.DryRun {
		if a.Verb == api.Commit {
			if failed := emitChecks(v.PlanCommit(ctx, a.KeepPoints), emit); failed != nil {
				return refusedBy(failed)
			}
		}
		if f := v.Status(ctx, d.peerName(v.Peer())).Failover; f != nil && a.Verb == api.Commit {
			note(emit, "The failover of %s becomes final and ENDS %s; %d bytes are brought into the images while the guest runs.", a.VM, count.Of(f.Points, "recovery point"), f.Bytes)
		} else if f != nil {
			note(emit, "The guest %s is STOPPED, the %d bytes it wrote here since the failover are DROPPED; %s is the replica again, with all recovery points.", a.VM, f.Bytes, d.name)
		}
		return nil
	}
	var err error
	if a.Verb == api.Cancel {
		err = v.Cancel(ctx, request, step)
	} else {
		err = v.Commit(ctx, vm.CommitOptions{KeepPoints: a.KeepPoints, Request: request}, step)
	}
	if err != nil {
		return err
	}
	return d.result(ctx, v, emit)
}

// noteReverse says what a return will send, or that everything is compared.
func noteReverse(ctx context.Context, v *vm.VM, name string, emit func(api.Event)) {
	p, err := v.PlanReverse(ctx)
	switch {
	case err != nil:
		note(emit, "%s cannot be asked what it changed (%v); here %d bytes were changed since.", name, err, p.Own)
	case p.Compare:
		note(emit, "Everything is COMPARED by digest first, %d bytes, about %s: %s.", p.Size, vm.CompareTime(p.Size, 0), p.Why)
		note(emit, "What %s gives up is not known block by block and is NOT kept: if you may need it, copy its images first.", name)
	default:
		between := fmt.Sprintf("the failover to an older point took back %d bytes", p.Between)
		if p.Between < 0 {
			between = "what the failover to an older point takes back is listed by its commit"
		}
		note(emit, "Changed: %d bytes here, %d bytes on %s; %s. Only these blocks are sent.", p.Own, p.Theirs, name, between)
		note(emit, "What %s has in these blocks is kept there: replicactl failover patch list.", name)
	}
}

// auditShown is how many entries a person is shown; the file has more.
const auditShown = 200

func showAudit(v *vm.VM, emit func(api.Event)) error {
	all, err := v.Audit(auditShown)
	for _, e := range all {
		note(emit, "%s  %-18s %-12s %-24s %s", e.At.Format(time.DateTime), e.Request, e.Who, e.What, e.Result)
	}
	return err
}

// patch lists, exports, mounts or deletes what was given up in a return.
func (d *Daemon) patch(ctx context.Context, v *vm.VM, a api.Action, emit func(api.Event)) error {
	switch a.Verb {
	case api.PatchExport:
		n, err := v.ExportPatch(ctx, a.Patch, a.To)
		if err == nil {
			note(emit, "%d bytes written to %s: each block at its place in DISK.raw, the ranges in DISK.map.", n, a.To)
		}
		return err
	case api.PatchMount:
		m, err := v.MountPatch(a.Patch, mountOptions(a))
		if err == nil {
			emit(api.Event{Mount: &m})
		}
		return err
	case api.PatchDelete:
		if a.DryRun {
			note(emit, "The patch %s is DELETED. It may be the only copy of what it holds.", a.Patch)
			return nil
		}
		return v.DeletePatch(a.Patch)
	}
	all, err := v.Patches()
	for _, p := range all {
		state := fmt.Sprintf("%s  %d bytes of generation %.8s", p.Made.Format(time.DateTime), p.Bytes, p.Generation)
		if p.Damage != "" {
			state = "DAMAGED: " + p.Damage
		}
		note(emit, "%s  %s  %s (%d bytes)", p.ID, state, p.File, p.Size)
	}
	if err == nil && len(all) == 0 {
		note(emit, "Nothing that was given up is kept on this host; patches lie on the host that was the old primary.")
	}
	return err
}

func (d *Daemon) reverse(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	name := d.peerName(v.Peer())
	s := v.Status(ctx, name)
	if s.Role == status.Primary && s.State == status.Replicating {
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("there is nothing to reverse: %s replicates to %s", a.VM, name), Hint: "replicactl vm status " + a.VM}
	}
	if a.DryRun {
		trial := s.Failover != nil && s.Failover.Phase == status.Trial
		if trial {
			note(emit, "The failover becomes final and ENDS %s.", count.Of(s.Failover.Points, "recovery point"))
		}
		if trial || a.KeepPoints {
			if failed := emitChecks(v.PlanCommit(ctx, a.KeepPoints), emit); failed != nil {
				return refusedBy(failed)
			}
		}
		note(emit, "%s becomes the replica. What it wrote after %s was promoted is DISCARDED.", name, d.name)
		noteReverse(ctx, v, name, emit)
		return nil
	}
	if err := v.Reverse(ctx, vm.CommitOptions{KeepPoints: a.KeepPoints, Request: request}, step); err != nil {
		return err
	}
	return d.result(ctx, v, emit)
}
