package sim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

func (h *host) reverse(request string) error {
	if st := h.rec.Lineage.State; st != lineage.Promoted && st != lineage.Primary {
		return errors.New("not the primary")
	}
	return h.execute(failover.Reverse, request, planVars{})
}

func (h *host) reverseSteps(r *failover.Runner) []failover.Step {
	return []failover.Step{
		{Name: "keep", Do: act(func() error {
			if err := h.update(func(r *record) { r.UnionMarked = false }); err != nil {
				return err
			}
			if h.rec.Lineage.Diverged == nil {
				return nil
			}
			return h.move(lineage.Change{Event: lineage.Keep}, nil)
		})},
		{Name: "release", Commit: true, Do: act(func() error { return h.askRelease(r.Journal().Request) })},
		{Name: "ship", Do: act(func() error {
			if err := h.update(func(r *record) { r.NoReverse = false }); err != nil {
				return err
			}
			if err := h.raise(); err != nil {
				return err
			}
			if h.ship != nil {
				h.ship.feed(session.EvRetry{})
			}
			return nil
		})},
	}
}

func (h *host) askRelease(request string) error {
	if err := h.openPlane(); err != nil {
		return err
	}
	reply, err := linked{h}.failover(wire.FailoverRequest{VM: vmID, Step: stepRelease, Request: request, At: h.rec.Lineage.Parent()})
	if err != nil {
		return err
	}
	if reply.State != stateAccepted {
		return fmt.Errorf("%s: %w", reply.Detail, failover.ErrNotTaken)
	}
	if reply.All {
		return h.client.Mark(context.Background(), dataplane.MarkRequest{Reason: "the old primary's changes are not known"})
	}
	for disk, rs := range reply.Dirty {
		if err := h.client.Mark(context.Background(), dataplane.MarkRequest{Disk: disk, Ranges: rs, Reason: "changed on the old primary"}); err != nil {
			return err
		}
	}
	return h.update(func(r *record) { r.UnionMarked = true })
}

// release gives up this host's own writes: a person decided for the other's.
func (h *host) release() (wire.FailoverReply, error) {
	if h.guest != nil {
		return wire.FailoverReply{State: stateRefused, Detail: "the VM runs on this host"}, nil
	}
	j, err := failover.Load(h.m.FS, planFile)
	if err != nil {
		return wire.FailoverReply{}, err
	}
	over := j != nil && j.Kind == failover.Planned && j.Begun == stepPromote && !slices.Contains(j.Finished, stepPromote)
	if j != nil && !over {
		return wire.FailoverReply{}, unavailable("a plan of that host has not ended: %s", j.Kind)
	}
	if err := h.yield(); err != nil {
		return wire.FailoverReply{}, err
	}
	if l := h.rec.Lineage; l.State == lineage.Replica {
		h.closed = false // a promotion of an earlier time had closed it
		if l.Discard.IsZero() {
			return wire.FailoverReply{State: stateAccepted}, h.raise()
		}
		return wire.FailoverReply{State: stateAccepted, All: true}, h.raise()
	}
	reply, err := h.giveUp()
	if err != nil {
		return wire.FailoverReply{}, errors.Join(err, h.raise())
	}
	if j != nil {
		if err := h.m.FS.Remove(planFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return wire.FailoverReply{}, err
		}
	}
	h.closed, h.held = false, ""
	return reply, h.raise()
}

// yield ends a divergence that a replica is marked with.
func (h *host) yield() error {
	l := h.rec.Lineage
	if l.State != lineage.Replica || l.Diverged == nil {
		return nil
	}
	behind := slices.ContainsFunc(h.succession, func(p delta.Pos) bool { return p.Generation == l.Generation })
	c := lineage.Change{Event: lineage.Discard}
	if l.Generation.IsZero() || h.asker.IsZero() || l.Generation == h.asker || behind {
		c.Event = lineage.Keep
	}
	return h.move(c, nil)
}

// giveUp ends the role and makes it durable that what this host wrote is void.
func (h *host) giveUp() (wire.FailoverReply, error) {
	reply := wire.FailoverReply{State: stateAccepted, All: true}
	var base delta.Pos
	tracked := false
	if err := h.openPlane(); err == nil {
		st, err := h.client.Status(context.Background())
		if err == nil && st.Frozen != nil { // its changes are not in the ranges
			err = h.client.Abandon(context.Background(), st.Frozen.Epoch)
		}
		if err == nil {
			base = st.Base
			if dirty, err := h.dirty(); err == nil && st.TrackingLost == "" {
				tracked, reply.All, reply.Dirty = true, false, dirty
			}
		}
	}
	h.ship = nil
	if err := h.closePlane(); err != nil {
		return reply, err
	}
	if err := h.move(lineage.Change{Event: lineage.Discard}, func(r *record) {
		r.Incomplete, r.NoReverse, r.WantRunning = true, false, false
		r.ReleasedBase, r.ReleasedTracked = base, tracked
		r.Superseded, r.Next = "", nil
	}); err != nil {
		return reply, err
	}
	h.hist = nil
	h.w.count("released")
	return reply, h.adoptBase(delta.Pos{}, true)
}
