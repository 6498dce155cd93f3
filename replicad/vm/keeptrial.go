package vm

import (
	"context"
	"fmt"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// While an unplanned failover is on trial the data plane holds the store, and
// the recovery points are all there. Whoever wants to keep them has it copy the
// store before the commit ends them; the guest runs on.

// trialHistory is what a commit would end.
func (v *VM) trialHistory(ctx context.Context) (heldPoints, error) {
	c, err := v.plane()
	if err != nil {
		return heldPoints{}, err
	}
	h, err := c.History(ctx)
	if err != nil {
		return heldPoints{}, err
	}
	return heldPoints{points: h.Points, pinned: h.Pinned, since: h.Since, undo: h.Undo, spool: h.Spool, end: "the commit", while: "while the guest runs"}, nil
}

// hasPoints: the open store has recovery points that a promotion would end.
func (v *VM) hasPoints() bool {
	s, err := v.store()
	return err == nil && len(s.Points()) > 0
}

// keepsPoints: a commit that comes now keeps the points, because asked now or
// with the failover, unless they have ended already.
func (v *VM) keepsPoints(asked bool) bool {
	o := v.record().Overlay
	return o != nil && !o.Committed && (asked || o.KeepPoints) && !v.finalOffline()
}

// keepTrial copies the recovery points before the commit.
func (v *VM) keepTrial(ctx context.Context, request string) (string, error) {
	if v.finalOffline() { // meanwhile
		return "", pointsEnded(v.record().Name)
	}
	if err := v.startPlane(ctx); err != nil {
		return "", err
	}
	h, err := v.trialHistory(ctx)
	if err != nil {
		return "", fmt.Errorf("look at the recovery points: %w", err)
	}
	if h.points == 0 {
		return "there are none", nil
	}
	c, err := v.plane()
	if err != nil {
		return "", err
	}
	if err := v.copyEnded(ctx, c); err != nil { // an interrupted one of this very request
		return "", err
	}
	return v.keepAs(ctx, request, h, func(ctx context.Context, dir string) (points.Copied, error) {
		k, err := c.KeepPoints(ctx, dataplane.KeepRequest{Dir: dir})
		return points.Copied(k), err
	})
}

// copyEnded waits until the data plane copies nothing: whoever wanted it is
// gone, so that it ends soon.
func (v *VM) copyEnded(ctx context.Context, c *dataplane.Client) error {
	if _, err := c.KeepPoints(ctx, dataplane.KeepRequest{}); err != nil {
		return fmt.Errorf("wait for an interrupted copy of the recovery points: %w", err)
	}
	return nil
}

// dropTrialHistory takes back what keepTrial did; a data plane that does not
// answer copies nothing for anybody.
func (v *VM) dropTrialHistory(ctx context.Context, request string) error {
	if o := v.record().Overlay; o == nil || o.Committed {
		return nil // the points have ended: the copy is all there is
	}
	if c, err := v.plane(); err == nil {
		if err := v.copyEnded(ctx, c); err != nil {
			v.log.Warn("the data plane may still copy recovery points", "err", err)
		}
	}
	if err := v.dropHistory(request); err != nil {
		return err
	}
	return v.update(func(r *Record) error { r.History = ""; return nil })
}

// PlanCommit says what becomes of the recovery points with a commit; keep is as
// CommitOptions.KeepPoints. It changes nothing.
func (v *VM) PlanCommit(ctx context.Context, keep bool) []wire.Check {
	o := v.record().Overlay
	if o == nil || o.Committed {
		if keep {
			return []wire.Check{{Name: "Recovery points", Result: wire.Failed, Detail: "there are none to keep: they have ended", Remedy: "leave --keep-points out"}}
		}
		return nil
	}
	var c checklist
	h, err := v.trialHistory(ctx)
	switch {
	case err == nil:
		v.checkHistory(&c, keep || o.KeepPoints, h)
	case keep:
		c.add("Recovery points", wire.Failed, "replicactl vm status "+v.record().Name, "%s", said(err))
	default:
		c.add("Recovery points", wire.Unknown, "replicactl vm status "+v.record().Name, "%s", said(err))
	}
	return c
}

// PlanUnplanned says what an unplanned failover does with the recovery points,
// now if inPlace, else when it is committed. It changes nothing.
func (v *VM) PlanUnplanned(inPlace, keep bool) []wire.Check {
	if !keep && !inPlace {
		return nil // nothing ends before the commit, which says so itself
	}
	var c checklist
	h, err := v.storeHistory()
	if err != nil {
		c.add("Recovery points", wire.Failed, "replicactl vm status "+v.record().Name, "%s", said(err))
		return c
	}
	if h.while = "before the guest starts"; !inPlace {
		h.end, h.while = "the commit", "by the commit, while the guest runs"
	}
	v.checkHistory(&c, keep, h)
	return c
}
