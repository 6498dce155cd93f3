package vm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/firmware"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// promoteVars is what a promotion needs after a restart.
type promoteVars struct {
	At         delta.Pos
	Generation delta.Generation
	Start      bool
	Reverse    bool
	Fence      bool
	// Unfenced goes on although the fencing command failed.
	Unfenced bool `json:",omitempty"`
	// KeepPoints copies the store before its points end.
	KeepPoints bool `json:",omitempty"`
	// Newest is what the replica had committed; zero means At.
	Newest delta.Pos `json:",omitzero"`
	// Overlay is how the guest runs until the failover is final; nil: in place.
	Overlay *Overlay `json:",omitempty"`
}

// newest is the committed position that the promotion was decided for.
func (p *promoteVars) newest() delta.Pos {
	if p.Newest.IsZero() {
		return p.At
	}
	return p.Newest
}

// promoteAsked answers the primary's request to take over. It is safe to
// repeat: the correlation id says whether this promotion already happened, or
// was declined for good.
func (v *VM) promoteAsked(ctx context.Context, q wire.FailoverRequest) (wire.FailoverReply, error) {
	if done, ok := v.promoted(q.Request); ok {
		return done, nil
	}
	unlock, err := v.lockAsked(ctx, "promotion")
	if err != nil {
		return wire.FailoverReply{}, err
	}
	defer unlock()
	if done, ok := v.promoted(q.Request); ok {
		return done, nil
	}
	if j, err := failover.Load(v.fsys, planFile); err != nil {
		return wire.FailoverReply{}, err
	} else if j != nil && j.Request == q.Request {
		return v.finishPromotion(ctx, j)
	}
	if why := v.mayPromote(q.At); why != "" {
		return v.decline(q.Request, why)
	}
	g, err := lineage.NewGeneration(rand.Reader)
	if err != nil {
		return wire.FailoverReply{}, err
	}
	vars := &promoteVars{At: q.At, Generation: g, Start: q.Start, Reverse: q.Reverse, KeepPoints: q.KeepPoints}
	// A cut link must not stop a promotion half-way: the primary asks again.
	return v.promotionEnded(q.Request, v.execute(context.WithoutCancel(ctx), failover.Promote, q.Request, vars, nil))
}

// finishPromotion continues a promotion that was interrupted.
func (v *VM) finishPromotion(ctx context.Context, j *failover.Journal) (wire.FailoverReply, error) {
	r := v.runner()
	r.Resume(j)
	return v.promotionEnded(j.Request, v.drive(context.WithoutCancel(ctx), r, nil))
}

// promotionEnded answers after a try. What may still happen is not declined:
// the primary would start its guest again.
func (v *VM) promotionEnded(request string, err error) (wire.FailoverReply, error) {
	if done, ok := v.promoted(request); ok {
		if err != nil {
			done.Detail = "took over, but: " + err.Error()
		}
		return done, nil
	}
	j, lerr := failover.Load(v.fsys, planFile)
	if lerr != nil || j != nil {
		return wire.FailoverReply{}, &wire.Error{Kind: wire.KindUnavailable, Text: fmt.Sprintf("the promotion has not ended: %v", errors.Join(err, lerr)), Hint: "ask again; or on the replica host: replicactl failover resume " + v.record().Name}
	}
	if err == nil {
		err = errors.New("the plan ended without a promotion")
	}
	return v.decline(request, err.Error())
}

// promoted answers for a correlation id that is already settled. A host that
// owns the VM by now, through whatever request, says so: a refusal would let
// the caller start its guest again.
func (v *VM) promoted(request string) (wire.FailoverReply, bool) {
	r := v.record()
	switch st := r.Lineage.State; {
	case request != "" && r.Promotion == request, st == lineage.Promoted, st == lineage.Primary, st == lineage.Demoting:
		return wire.FailoverReply{State: statePromoted, Generation: r.Lineage.Generation, Parent: r.Lineage.Parent(), Detail: wire.CleanText(r.History, wire.MaxText)}, true
	case slices.Contains(r.Refused, request):
		return wire.FailoverReply{State: stateRefused, Detail: "this promotion was declined before"}, true
	}
	return wire.FailoverReply{}, false
}

// declineAsked declines a promotion for good because the primary wants its role
// back, unless it has happened or may be happening.
func (v *VM) declineAsked(ctx context.Context, q wire.FailoverRequest) (wire.FailoverReply, error) {
	unlock, err := v.lockAsked(ctx, "decline a promotion")
	if err != nil {
		return wire.FailoverReply{}, err
	}
	defer unlock()
	if done, ok := v.promoted(q.Request); ok {
		return done, nil
	}
	j, err := failover.Load(v.fsys, planFile)
	if err != nil {
		return wire.FailoverReply{}, err
	}
	if j != nil && j.Request == q.Request {
		return wire.FailoverReply{}, &wire.Error{Kind: wire.KindUnavailable, Text: "the promotion is under way", Hint: "ask again"}
	}
	return v.decline(q.Request, "the primary takes the role back")
}

// decline makes the refusal durable before it is said.
func (v *VM) decline(request, why string) (wire.FailoverReply, error) {
	err := v.update(func(r *Record) error {
		r.Refused = append(r.Refused, request)
		return nil
	})
	if err != nil {
		return wire.FailoverReply{}, err
	}
	v.audit(request, "host "+v.mgr.peerName(v.record().Peer), "promotion asked for", "declined for good: "+why)
	return wire.FailoverReply{State: stateRefused, Detail: why}, nil
}

// mayPromote says why this host cannot take over at pos; empty = it can.
func (v *VM) mayPromote(at delta.Pos) string {
	if d := v.record().Lineage.Diverged; d != nil {
		return "the copies have diverged: " + d.Reason
	}
	if err := v.notJoining(); err != nil {
		return err.Error()
	}
	return v.canPromote(at)
}

// canPromote is mayPromote when a person takes this host's side of a divergence.
func (v *VM) canPromote(at delta.Pos) string {
	r := v.record()
	if r.Lineage.State != lineage.Replica {
		return fmt.Sprintf("this host is %s, not a replica", r.Lineage.State)
	}
	if err := v.catchUp(); err != nil {
		return err.Error()
	}
	r = v.record()
	st, err := v.storeStatus()
	switch {
	case err != nil:
		return err.Error()
	case st.State == points.Suspect:
		return fmt.Sprintf("%v; when what was changed counts for nothing, on this host: replicactl vm resync %s", points.ErrSuspect, r.Name)
	case st.Committed.IsZero() || r.Incomplete:
		return "the replica holds no complete copy"
	case !at.IsZero() && st.Committed != at:
		return fmt.Sprintf("the replica stands at %v, not at %v", st.Committed, at)
	}
	return ""
}

func (v *VM) promoteSteps(r *failover.Runner, p *promoteVars, kind failover.Kind) []failover.Step {
	event := lineage.Promote
	if kind == failover.Unplanned {
		event = lineage.ForcePromote
	}
	var steps []failover.Step
	if kind == failover.Unplanned && p.Fence {
		steps = append(steps, failover.Step{Name: "fence", Title: "Fence the old primary", Do: func(ctx context.Context) (string, error) { return v.fence(ctx, p.Unfenced) }})
	}
	steps = append(steps, failover.Step{
		Name: "apply", Title: "Complete the copy", Do: func(ctx context.Context) (string, error) { return v.completeAt(ctx, p) },
		Undo: func(context.Context) error { return v.undoComplete(p) },
	})
	if request := r.Journal().Request; p.KeepPoints {
		steps = append(steps, failover.Step{
			Name: "keep", Title: "Keep the recovery points", Do: func(ctx context.Context) (string, error) { return v.keepHistory(ctx, request) },
			Undo: func(context.Context) error { return v.dropHistory(request) },
		})
	}
	return append(steps,
		failover.Step{Name: "generation", Title: "Take the primary role", Commit: true, Do: func(context.Context) (string, error) {
			return v.takeRole(event, p, r.Journal().Request)
		}},
		failover.Step{Name: "store", Title: "Close the replica's history", Do: func(context.Context) (string, error) { return v.sealStore(p) }},
		failover.Step{Name: "tracker", Title: "Serve and track the disks", Do: func(ctx context.Context) (string, error) { return v.serveAs(ctx, p) }},
		failover.Step{Name: "define", Title: "Define the virtual machine", Do: func(ctx context.Context) (string, error) {
			detail, err := v.placeDomain(ctx)
			if ips := v.reserveAddresses(ctx); err == nil && ips != "" {
				detail += "; " + ips
			}
			return detail, err
		}},
		failover.Step{Name: "firmware", Title: "Restore firmware state", Do: func(ctx context.Context) (string, error) { return v.restoreFirmware(ctx) }},
		failover.Step{Name: "start", Title: "Start the virtual machine", Do: func(ctx context.Context) (string, error) {
			switch {
			case !p.Start:
				return "left off, as asked", nil
			case v.record().Lineage.Diverged != nil:
				return "left off: the other host's guest runs, the two copies have diverged", nil
			}
			return "", v.startGuest(ctx)
		}},
		failover.Step{Name: "reverse", Title: "Reverse replication", Do: func(context.Context) (string, error) { return v.reverseNow(p) }},
	)
}

// completeCopy applies what was received, unless the copy was completed and
// sealed offline.
func (v *VM) completeCopy(ctx context.Context) (string, error) {
	if st, err := v.storeStatus(); err == nil && st.State == points.Promoted {
		return "done offline", nil
	}
	return v.applyAll(ctx)
}

// completeAt ends what is being received and applies the rest; with an overlay
// nothing has to be applied.
func (v *VM) completeAt(ctx context.Context, p *promoteVars) (string, error) {
	if err := v.closeIntake(); err != nil {
		return "", err
	}
	if err := v.standsAt(p.newest()); err != nil {
		return "", err
	}
	if p.Overlay != nil {
		return v.makeOverlay(p)
	}
	// What keeps the store from being sealed must not be met behind the point of
	// no return.
	switch st, err := v.storeStatus(); {
	case err != nil:
		return "", err
	case st.State == points.Suspect:
		return "", points.ErrSuspect
	case st.State == points.Damaged:
		return "", fmt.Errorf("%w: %w", points.ErrDamaged, errors.Join(st.Damage...))
	}
	return v.completeCopy(ctx)
}

func (v *VM) undoComplete(p *promoteVars) error {
	v.openIntake()
	if p.Overlay == nil {
		return nil
	}
	return v.dropOverlay()
}

func (v *VM) takeRole(event lineage.Event, p *promoteVars, request string) (string, error) {
	r := v.record()
	if r.Lineage.Generation == p.Generation {
		return "", nil
	}
	if slices.Contains(r.Refused, request) {
		return "", fmt.Errorf("this promotion was declined: %w", failover.ErrNotTaken)
	}
	before, disks, stands := r.Lineage, r.Disks, v.stands()
	if p.Overlay != nil { // its disks are those of that state, and as long
		info, err := overlay.Read(fsx.Sub(v.fsys, overlayDir))
		if err == nil {
			err = v.followSizes(info.Head.Disks)
		}
		if err != nil {
			return "", fmt.Errorf("the disks' sizes: %w", err)
		}
		stands = nil
		for _, d := range info.Head.Disks {
			stands = append(stands, wire.DiskName(d.Name))
		}
	}
	err := v.move(lineage.Change{Event: event, Generation: p.Generation, At: p.At, Before: p.Newest}, func(r *Record) {
		r.Overlay = nil
		if p.Overlay != nil {
			o := *p.Overlay
			o.Prior, o.Disks = before, disks
			r.Overlay = &o
		}
		r.standOn(stands)
		r.Promotion, r.NoReverse, r.WantRunning, r.Verified, r.Placed = request, true, p.Start, true, true
		r.Paused, r.UnionMarked, r.Superseded, r.Next, r.Given = false, false, "", nil, ""
		r.Bypass, r.Snapshots = "", nil
		r.Acked, r.LastCut = delta.Pos{}, time.Time{}
		if !p.KeepPoints {
			r.History = "" // an earlier promotion's
		}
		if event == lineage.Promote { // the old primary is sealed exactly there
			r.Acked, r.LastCut = p.At, v.deps.Now()
		}
	})
	var never *lineage.TransitionError
	if errors.As(err, &never) {
		return "", fmt.Errorf("%w: %w", err, failover.ErrNotTaken) // nothing was written
	}
	return p.Generation.String()[:8], err
}

// serveAs starts the data plane on the promoted images with a tracker that is
// relative to the position promoted.
func (v *VM) serveAs(ctx context.Context, p *promoteVars) (string, error) {
	if err := v.stopKeeping(); err != nil {
		return "", err
	}
	if p.Overlay == nil {
		if err := v.trimImages(); err != nil {
			return "", err
		}
	}
	if err := v.startPlane(ctx); err != nil {
		return "", err
	}
	c, err := v.plane()
	if err != nil {
		return "", err
	}
	if err := v.trackFrom(ctx, c, p.Generation, p.At); err != nil {
		return "", err
	}
	if err := c.Refuse(ctx, ""); err != nil {
		return "", err
	}
	return "", v.openExports(ctx)
}

func (v *VM) reverseNow(p *promoteVars) (string, error) {
	if !p.Reverse {
		return "not asked for", nil
	}
	if err := v.update(func(r *Record) error { r.NoReverse = false; return nil }); err != nil {
		return "", err
	}
	v.startShipping()
	return "", nil
}

// UnplannedOptions are a person's choices.
type UnplannedOptions struct {
	NoStart, Force bool
	// Point is the state to start from, as points.Choose reads it; empty is the
	// newest.
	Point string
	// InPlace changes the images at once: the failover cannot be cancelled and
	// all recovery points end.
	InPlace bool
	// KeepPoints has the recovery points copied before they end: now if InPlace,
	// else by the commit, however that comes.
	KeepPoints bool
	// Unfenced goes on although the fencing command failed.
	Unfenced bool
	// Within, if not zero, ends the time of trial: then Then is done.
	Within time.Duration
	// Then is "commit" or "cancel".
	Then            string
	Request, Reason string
}

// Unplanned starts the replica from its last committed cut.
func (v *VM) Unplanned(ctx context.Context, o UnplannedOptions, event func(failover.Event)) error {
	unlock, err := v.lockAsked(ctx, "unplanned failover")
	if err != nil {
		return err
	}
	defer unlock()
	// Nothing may be acknowledged any more that the promotion would leave out.
	if err := v.closeIntake(); err != nil {
		return err
	}
	defer func() {
		v.mu.Lock()
		over := v.stuck == nil
		v.mu.Unlock()
		if over {
			v.openIntake() // the role refuses now, or everything is as before
		}
	}()
	if d := v.record().Lineage.Diverged; d != nil && !o.Force {
		return &wire.Error{Kind: wire.KindRefused, Text: "the copies have diverged: " + d.Reason, Hint: "repeat with --force to keep this host's copy; to keep the other's: replicactl failover reverse " + v.record().Name + " there"}
	}
	if why := v.canPromote(delta.Pos{}); why != "" {
		return &wire.Error{Kind: wire.KindRefused, Text: why, Hint: "replicactl vm status " + v.record().Name}
	}
	loss, err := v.Loss(ctx, o.Point, o.Force)
	if err != nil {
		return err
	}
	if loss.Primary.Result != wire.OK && !o.Force {
		return &wire.Error{Kind: wire.KindRefused, Text: "the primary: " + loss.Primary.Detail, Hint: loss.Primary.Remedy}
	}
	if loss.Unproven != "" && !o.Force {
		return &wire.Error{Kind: wire.KindRefused, Text: "the replica is not verified: " + loss.Unproven, Hint: "replicactl vm watch " + v.record().Name + " on the primary until everything was compared; or repeat with --force"}
	}
	g, err := lineage.NewGeneration(rand.Reader)
	if err != nil {
		return err
	}
	v.log.Warn("unplanned failover", "request", o.Request, "reason", o.Reason, "at", loss.At.String(), "force", o.Force)
	vars := &promoteVars{At: loss.At, Newest: loss.Newest, Generation: g, Start: !o.NoStart, Fence: v.deps.Fence != "", Unfenced: o.Unfenced}
	if vars.Overlay, err = v.trial(o, loss); err != nil {
		return err
	}
	vars.KeepPoints = o.KeepPoints && vars.Overlay == nil && v.hasPoints()
	return v.execute(ctx, failover.Unplanned, o.Request, vars, event)
}

// restoreFirmware writes the NVRAM and TPM state of the promoted position.
func (v *VM) restoreFirmware(ctx context.Context) (string, error) {
	fw, err := firmware.Kept(v.fsys)
	if err != nil {
		return "", err
	}
	if fw.None() {
		return "none", nil
	}
	d, err := v.deps.Hyper.Domain(ctx, string(v.id))
	if err != nil {
		return "", err
	}
	if d.State == libvirt.StateRunning || d.State == libvirt.StatePaused {
		return "the guest runs already", nil
	}
	paths, err := d.FirmwarePaths(v.deps.LibvirtState)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d bytes", len(fw.NVRAM)+len(fw.TPM)), libvirt.WriteFirmware(paths, libvirt.FirmwareState(fw))
}
