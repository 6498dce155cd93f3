package vm

import (
	"context"
	"fmt"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/wire"
)

// CommitOptions are a person's choices.
type CommitOptions struct {
	// KeepPoints has the recovery points copied before they end; so does a
	// failover that was begun with it.
	KeepPoints bool
	Request    string
}

// Commit makes an unplanned failover final: the recovery points end, the images
// are brought to what the guest wrote while it goes on.
func (v *VM) Commit(ctx context.Context, o CommitOptions, event func(failover.Event)) error {
	unlock, err := v.lockAsked(ctx, "commit")
	if err != nil {
		return err
	}
	defer unlock()
	return v.commitLocked(ctx, o, event)
}

func (v *VM) commitLocked(ctx context.Context, o CommitOptions, event func(failover.Event)) error {
	r := v.record()
	switch {
	case r.Lineage.State != lineage.Promoted && r.Overlay == nil:
		return &wire.Error{Kind: wire.KindRefused, Text: "there is no failover to commit on this host", Hint: "replicactl vm status " + r.Name}
	case r.Overlay != nil && r.Overlay.Committed:
		return &wire.Error{Kind: wire.KindRefused, Text: "the failover is committed already", Hint: "replicactl vm status " + r.Name}
	case r.Lineage.Diverged != nil:
		return &wire.Error{Kind: wire.KindRefused, Text: "the two copies have diverged: " + r.Lineage.Diverged.Reason, Hint: fmt.Sprintf("replicactl failover cancel %s to give this host's side up, or replicactl failover reverse %s to keep it", r.Name, r.Name)}
	case o.KeepPoints && (r.Overlay == nil || v.finalOffline()):
		return pointsEnded(r.Name)
	}
	return v.execute(ctx, failover.Commit, o.Request, &commitVars{KeepPoints: v.keepsPoints(o.KeepPoints)}, event)
}

func pointsEnded(name string) error {
	return &wire.Error{Kind: wire.KindRefused, Text: "there are no recovery points to keep: they ended with the failover", Hint: "leave --keep-points out: replicactl failover commit " + name}
}

// commitVars is what a commit needs after a restart.
type commitVars struct {
	KeepPoints bool `json:",omitempty"`
}

func (v *VM) commitSteps(p *commitVars, request string) []failover.Step {
	var steps []failover.Step
	if p.KeepPoints {
		steps = append(steps, failover.Step{
			Name: "keep", Title: "Keep the recovery points", Do: func(ctx context.Context) (string, error) { return v.keepTrial(ctx, request) },
			Undo: func(ctx context.Context) error { return v.dropTrialHistory(ctx, request) },
		})
	}
	return append(steps,
		failover.Step{Name: "role", Title: "Make the failover final", Commit: true, Do: func(ctx context.Context) (string, error) {
			if err := v.opensTrial(ctx); err != nil {
				return "", fmt.Errorf("%w: %w", err, failover.ErrNotTaken)
			}
			keep := func(r *Record) {
				if r.Overlay != nil {
					o := *r.Overlay
					o.Committed, o.Deadline, o.Then = true, time.Time{}, ""
					r.Overlay = &o
				}
			}
			if v.record().Lineage.State == lineage.Promoted {
				return "", v.move(lineage.Change{Event: lineage.Commit}, keep)
			}
			return "", v.update(func(r *Record) error { keep(r); return nil })
		}},
		failover.Step{Name: "seal", Title: "End the recovery points", Do: v.sealUnderGuest},
	)
}

// opensTrial refuses to end a trial whose disks cannot be opened, as when a host
// was put back from a copy: it could neither be completed nor cancelled then.
func (v *VM) opensTrial(ctx context.Context) error {
	r := v.record()
	if r.Overlay == nil || r.Overlay.Committed {
		return nil
	}
	if err := v.startPlane(ctx); err != nil {
		return &wire.Error{Kind: wire.KindRefused, Text: "the disks cannot be opened: " + err.Error(), Hint: "mend that, or give this host's side up: replicactl failover cancel " + r.Name}
	}
	return nil
}

// finish does the steps of a commit within another plan, which takes back what
// was kept when it fails.
func (v *VM) finish(ctx context.Context, p *commitVars, request string) error {
	if o := v.record().Overlay; o.Committed {
		p = &commitVars{} // copied before, and ended
	}
	for _, s := range v.commitSteps(p, request) {
		if _, err := s.Do(ctx); err != nil {
			return err
		}
	}
	return nil
}

// sealUnderGuest tells the data plane, which does the rest by itself.
func (v *VM) sealUnderGuest(ctx context.Context) (string, error) {
	o := v.record().Overlay
	if o == nil {
		return "they ended with the failover", nil
	}
	if err := v.startPlane(ctx); err != nil {
		return "", err
	}
	c, err := v.plane()
	if err != nil {
		return "", err
	}
	if err := c.CommitOverlay(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s ended; the images are brought up to date in the background", count.Of(o.Points, "recovery point")), nil
}

// cancelVars is what a cancel needs after a restart.
type cancelVars struct {
	WasRunning bool
	// Newest is where the replica stands again.
	Newest delta.Pos
	Prior  lineage.Lineage
}

// Cancel gives an unplanned failover up: the guest is stopped, what it wrote is
// dropped, this host is the replica again with all its recovery points.
func (v *VM) Cancel(ctx context.Context, request string, event func(failover.Event)) error {
	unlock, err := v.lockAsked(ctx, "cancel")
	if err != nil {
		return err
	}
	defer unlock()
	r := v.record()
	switch {
	case r.Overlay == nil && r.Lineage.State == lineage.Promoted:
		return &wire.Error{Kind: wire.KindRefused, Text: "the failover was made in place and cannot be cancelled", Hint: "replicactl failover reverse " + r.Name}
	case r.Overlay == nil:
		return &wire.Error{Kind: wire.KindRefused, Text: "there is no failover to cancel on this host", Hint: "replicactl vm status " + r.Name}
	case r.Overlay.Committed:
		return &wire.Error{Kind: wire.KindRefused, Text: "the failover is committed, its recovery points have ended", Hint: "replicactl failover reverse " + r.Name}
	}
	if v.finalOffline() {
		return &wire.Error{Kind: wire.KindRefused, Text: "the failover was made final by replicafsck", Hint: "replicactl failover commit " + r.Name}
	}
	isOff, err := v.guestIsOff(ctx)
	if err != nil {
		return err
	}
	vars := &cancelVars{WasRunning: !isOff, Newest: r.Overlay.Newest, Prior: r.Overlay.Prior}
	return v.execute(ctx, failover.Cancel, request, vars, event)
}

func (v *VM) cancelSteps(p *cancelVars) []failover.Step {
	return []failover.Step{
		{Name: "stop", Title: "Stop the virtual machine", Do: v.stopGuest, Undo: func(ctx context.Context) error {
			v.hold("")
			if !p.WasRunning || !v.record().Lineage.MayServe() {
				return nil
			}
			return v.startGuest(ctx)
		}},
		{Name: "close", Title: "Close its disks", Do: v.closeDisks, Undo: v.reopenDisks},
		{Name: "role", Title: "Become the replica again", Commit: true, Do: func(context.Context) (string, error) { return v.backToReplica(p) }},
		{Name: "drop", Title: "Drop what the guest wrote", Do: func(context.Context) (string, error) { return "", v.dropOverlay() }},
		{Name: "follow", Title: "Receive again", Do: v.receiveAgain},
	}
}

func (v *VM) stopGuest(ctx context.Context) (string, error) {
	v.hold("the failover is being cancelled")
	isOff, err := v.guestIsOff(ctx)
	if err != nil || isOff {
		return "it is off", err
	}
	return "", v.deps.Hyper.Destroy(ctx, string(v.id), true)
}

// closeDisks ends the data plane, durably refused first: somebody may have
// started the guest again.
func (v *VM) closeDisks(ctx context.Context) (string, error) {
	if err := v.startPlane(ctx); err != nil {
		// What cannot be opened can still be given up.
		v.log.Warn("the disks of the failover cannot be opened", "err", err)
		return "", v.stopPlane(ctx)
	}
	c, err := v.plane()
	if err != nil {
		return "", err
	}
	if err := c.Refuse(ctx, "the failover is being cancelled"); err != nil {
		return "", err
	}
	if isOff, err := v.guestIsOff(ctx); err != nil || !isOff {
		if err == nil {
			err = &wire.Error{Kind: wire.KindUnavailable, Text: "the guest was started meanwhile", Hint: "repeat the command"}
		}
		return "", err
	}
	return "", v.stopPlane(ctx)
}

func (v *VM) reopenDisks(ctx context.Context) error {
	if !v.record().Lineage.MayServe() {
		return nil
	}
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	c, err := v.plane()
	if err != nil {
		return err
	}
	if err := c.Refuse(ctx, ""); err != nil {
		return err
	}
	return v.openExports(ctx)
}

// backToReplica takes the role back; the generation is remembered as void.
func (v *VM) backToReplica(p *cancelVars) (string, error) {
	if v.record().Lineage.State == lineage.Replica {
		return "", nil
	}
	err := v.move(lineage.Change{Event: lineage.Cancel, At: p.Newest, Prior: &p.Prior}, func(r *Record) {
		if r.Overlay != nil && r.Overlay.Disks != nil {
			r.Disks = r.Overlay.Disks
		}
		r.Overlay, r.Promotion, r.NoReverse, r.WantRunning = nil, "", false, false
		r.Paused, r.UnionMarked, r.Superseded = false, false, ""
		r.Acked, r.LastCut = delta.Pos{}, time.Time{}
	})
	return "at " + p.Newest.String(), err
}

func (v *VM) receiveAgain(ctx context.Context) (string, error) {
	v.hold("")
	if err := v.startKeeping(ctx); err != nil {
		return "", err
	}
	st, err := v.storeStatus()
	if err != nil {
		return "", err
	}
	v.redefine() // it may have had other disks
	v.openIntake()
	v.publishGate()
	return "as before: " + count.Of(st.Points, "recovery point"), nil
}

// finalOffline: replicafsck has made the failover final.
func (v *VM) finalOffline() bool {
	info, err := overlay.Read(fsx.Sub(v.fsys, overlayDir))
	return err == nil && info.Phase != overlay.Running
}

// phaseOfPlane is what the data plane knows of the overlay; zero = nothing.
func (v *VM) phaseOfPlane(ctx context.Context) overlay.Phase {
	c, err := v.plane()
	if err != nil {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, viewTimeout)
	defer cancel()
	st, err := c.Status(ctx)
	if err != nil || st.Overlay == nil {
		return 0
	}
	for _, p := range []overlay.Phase{overlay.Committed, overlay.Done} {
		if st.Overlay.Phase == p.String() {
			return p
		}
	}
	return overlay.Running
}

// tendTrial ends a failover whose time of trial is over, and one whose images
// have caught up.
func (v *VM) tendTrial(ctx context.Context) {
	o := v.record().Overlay
	if o == nil || v.busy() || v.outOfHands() {
		return
	}
	var err error
	switch now := v.deps.Now(); {
	case o.Committed:
		ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
		defer cancel()
		unlock, lerr := v.lockOwn("complete a committed failover")
		if lerr != nil {
			return
		}
		defer unlock()
		_, err = v.finishOverlay(ctx)
	case v.phaseOfPlane(ctx) > overlay.Running:
		err = v.Commit(ctx, CommitOptions{Request: "replicafsck-" + now.UTC().Format(time.RFC3339)}, nil)
	case o.Deadline.IsZero() || now.Before(o.Deadline):
	case o.Then == thenCancel:
		err = v.Cancel(ctx, "timer-"+o.Deadline.UTC().Format(time.RFC3339), nil)
	default:
		err = v.Commit(ctx, CommitOptions{Request: "timer-" + o.Deadline.UTC().Format(time.RFC3339)}, nil)
	}
	if err != nil && !busy(err) && ctx.Err() == nil {
		v.log.Warn("end the failover's trial", "err", err)
	}
}
