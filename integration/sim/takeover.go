package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"kvmreplica/integration/oracle"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// serveFailover answers a step of a role change.
func (h *host) serveFailover(q wire.FailoverRequest) (wire.FailoverReply, error) {
	if q.Step == stepRelease {
		return h.release()
	}
	if done, ok := h.promotedFor(q.Request); ok {
		return done, nil
	}
	j, err := failover.Load(h.m.FS, planFile)
	if err != nil {
		return wire.FailoverReply{}, err
	}
	if j != nil && j.Request != q.Request {
		return wire.FailoverReply{}, unavailable("another plan is under way")
	}
	if j != nil {
		r := h.runner()
		r.Resume(j)
		steps, err := h.stepsOf(r)
		if err != nil {
			return wire.FailoverReply{}, err
		}
		return h.promotionEnded(q.Request, r.Run(background(), steps))
	}
	if why := h.mayPromote(q.At); why != "" {
		return h.decline(q.Request, why)
	}
	err = h.execute(failover.Promote, q.Request, planVars{At: q.At, Generation: h.w.generation(), Start: q.Start, Reverse: q.Reverse})
	return h.promotionEnded(q.Request, err)
}

func (h *host) promotedFor(request string) (wire.FailoverReply, bool) {
	r := h.rec
	switch st := r.Lineage.State; {
	case request != "" && r.Promotion == request, st == lineage.Promoted, st == lineage.Primary, st == lineage.Demoting:
		return wire.FailoverReply{State: statePromoted, Generation: r.Lineage.Generation, Parent: r.Lineage.Parent()}, true
	case slices.Contains(r.Refused, request):
		return wire.FailoverReply{State: stateRefused, Detail: "this promotion was declined before"}, true
	}
	return wire.FailoverReply{}, false
}

func (h *host) promotionEnded(request string, err error) (wire.FailoverReply, error) {
	if done, ok := h.promotedFor(request); ok {
		return done, nil
	}
	if j, lerr := failover.Load(h.m.FS, planFile); lerr != nil || j != nil {
		return wire.FailoverReply{}, unavailable("the promotion has not ended: %v", errors.Join(err, lerr))
	}
	return h.decline(request, fmt.Sprint(err))
}

// decline makes the refusal durable before it is said.
func (h *host) decline(request, why string) (wire.FailoverReply, error) {
	err := h.update(func(r *record) { r.Refused = append(r.Refused, request) })
	return wire.FailoverReply{State: stateRefused, Detail: why}, err
}

func (h *host) mayPromote(at delta.Pos) string {
	if h.rec.Lineage.Diverged != nil {
		return "the copies have diverged"
	}
	return h.canPromote(at)
}

// canPromote is mayPromote when a person takes this host's side of a divergence.
func (h *host) canPromote(at delta.Pos) string {
	if h.rec.Lineage.State != lineage.Replica {
		return "not a replica"
	}
	if err := h.catchUp(); err != nil {
		return err.Error()
	}
	if h.store == nil {
		return "the store is not open"
	}
	st := h.store.Status()
	switch {
	case st.Committed.IsZero() || h.rec.Incomplete || st.State != points.Replica:
		return "no complete copy"
	case !at.IsZero() && st.Committed != at:
		return fmt.Sprintf("the replica stands at %v, not at %v", st.Committed, at)
	}
	return ""
}

// unplanned takes over alone; at an older point when p is not zero.
func (h *host) unplanned(request string) error {
	if err := h.closeIntake(); err != nil {
		return err
	}
	defer func() {
		if j, err := failover.Load(h.m.FS, planFile); err == nil && j == nil {
			h.closed = false
		}
	}()
	if why := h.canPromote(delta.Pos{}); why != "" {
		return errors.New(why)
	}
	return h.execute(failover.Unplanned, request, planVars{At: h.store.Committed(), Generation: h.w.generation(), Start: true})
}

func (h *host) closeIntake() error {
	h.closed, h.allowed = true, delta.Generation{}
	if h.store == nil {
		return nil
	}
	return h.store.Forget()
}

func (h *host) promoteSteps(r *failover.Runner, v *planVars, kind failover.Kind) []failover.Step {
	return []failover.Step{
		{Name: "apply", Do: act(func() error { return h.completeAt(v) }), Undo: func(context.Context) error { h.closed = false; return nil }},
		{Name: "generation", Commit: true, Do: act(func() error { return h.takeRole(r.Journal().Request, v, kind) })},
		{Name: "store", Do: act(func() error { return h.sealStore(v) })},
		{Name: "tracker", Do: act(func() error { return h.serveAs(v) })},
		{Name: "start", Do: act(func() error {
			if !v.Start || h.rec.Lineage.Diverged != nil || h.guest != nil {
				return nil
			}
			h.booted = true
			return h.startGuest()
		})},
		{Name: "reverse", Do: act(func() error {
			if !v.Reverse {
				return nil
			}
			if err := h.update(func(r *record) { r.NoReverse = false }); err != nil {
				return err
			}
			h.startShip()
			return nil
		})},
	}
}

func (h *host) completeAt(v *planVars) error {
	if err := h.openStore(); err != nil {
		return err
	}
	if err := h.closeIntake(); err != nil {
		return err
	}
	st := h.store.Status()
	if st.State == points.Promoted {
		return nil
	}
	if st.Committed != v.At {
		return fmt.Errorf("the replica has moved on to %v", st.Committed)
	}
	return h.store.ApplyAll(context.Background())
}

func (h *host) takeRole(request string, v *planVars, kind failover.Kind) error {
	if h.rec.Lineage.Generation == v.Generation {
		h.w.promoted(h, v, kind == failover.Unplanned) // a crash may have kept it from being noted
		return nil
	}
	if slices.Contains(h.rec.Refused, request) {
		return failover.ErrNotTaken
	}
	event := lineage.Promote
	if kind == failover.Unplanned {
		event = lineage.ForcePromote
	}
	err := h.move(lineage.Change{Event: event, Generation: v.Generation, At: v.At}, func(r *record) {
		r.Promotion, r.NoReverse, r.WantRunning = request, true, v.Start
		r.UnionMarked, r.Superseded, r.Next = false, "", nil
	})
	var never *lineage.TransitionError
	if errors.As(err, &never) {
		return fmt.Errorf("%w: %w", err, failover.ErrNotTaken)
	}
	if err == nil {
		h.w.promoted(h, v, kind == failover.Unplanned)
	}
	return err
}

func (h *host) sealStore(v *planVars) error {
	if err := h.openStore(); err != nil {
		if errors.Is(err, points.ErrPromoted) {
			return nil
		}
		return err
	}
	if h.store.Status().State == points.Promoted {
		return nil
	}
	seal, err := h.store.Promote(v.Generation, h.rec.Lineage.Forced)
	if err != nil {
		return err
	}
	if seal.At != v.At {
		return h.w.fail(fmt.Errorf("%w: the store was sealed at %v instead of %v", oracle.ErrViolation, seal.At, v.At))
	}
	return nil
}

// serveAs starts the data plane on the promoted images.
func (h *host) serveAs(v *planVars) error {
	if err := h.closeStore(); err != nil {
		return err
	}
	if err := h.openPlane(); err != nil {
		return err
	}
	st, err := h.client.Status(context.Background())
	if err != nil {
		return err
	}
	if !st.Tracker || st.Generation != v.Generation {
		if err := h.w.contentIs(h, v.At, "the images of a promoted host"); err != nil {
			return h.w.fail(err)
		}
		err := h.client.CreateTracker(context.Background(), dataplane.CreateRequest{Generation: v.Generation, Base: v.At, Parents: h.rec.Lineage.Ancestors, Replace: true})
		if err != nil {
			return err
		}
	}
	return h.client.Refuse(context.Background(), "")
}
