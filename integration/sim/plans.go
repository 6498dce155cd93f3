package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// The plans run under the product's runner and journal; their steps are those
// of package vm, without libvirt.

const (
	stepPromote = "promote"
	stepRelease = "release"

	statePromoted = "promoted"
	stateRefused  = "refused"
	stateAccepted = "accepted"
)

type planVars struct {
	At         delta.Pos
	Generation delta.Generation
	WasRunning bool
	Start      bool
	Reverse    bool
}

func (h *host) runner() *failover.Runner {
	return &failover.Runner{FS: h.m.FS, Path: planFile, Now: func() time.Time { return h.w.now }, Failpoint: func(p string) {
		h.w.count("step " + p)
		if h.w.crashStep == h.name+" "+p {
			h.w.crashStep = ""
			h.w.count("crash at a step")
			h.m.Power.Cut()
		}
	}}
}

func (h *host) execute(kind failover.Kind, request string, v planVars) error {
	r := h.runner()
	if err := r.Begin(kind, request, v); err != nil {
		return err
	}
	steps, err := h.stepsOf(r)
	if err != nil {
		return err
	}
	err = r.Run(context.Background(), steps)
	h.w.count(fmt.Sprintf("plan %s ended %s", kind, r.Journal().Phase))
	return err
}

// settle continues a plan behind its point of no return, takes back any other.
func (h *host) settle(j *failover.Journal) error {
	r := h.runner()
	r.Resume(j)
	steps, err := h.stepsOf(r)
	if err != nil {
		return err
	}
	if j.Committed {
		h.w.count("plan continued")
		return r.Run(context.Background(), steps)
	}
	h.w.count("plan taken back")
	err = r.TakeBack(context.Background(), steps, nil)
	if err == nil {
		h.closed = false
	}
	return err
}

func (h *host) stepsOf(r *failover.Runner) ([]failover.Step, error) {
	j := r.Journal()
	v := &planVars{}
	if err := json.Unmarshal(j.Vars, v); err != nil {
		return nil, err
	}
	switch j.Kind {
	case failover.Planned:
		return h.plannedSteps(r, v), nil
	case failover.Promote, failover.Unplanned:
		return h.promoteSteps(r, v, j.Kind), nil
	case failover.Reverse:
		return h.reverseSteps(r), nil
	}
	return nil, fmt.Errorf("unknown plan %q", j.Kind)
}

func (h *host) planned(request string) error {
	if st := h.rec.Lineage.State; st != lineage.Primary && st != lineage.Promoted {
		return errors.New("not the primary")
	}
	return h.execute(failover.Planned, request, planVars{WasRunning: h.guest != nil, Start: h.guest != nil, Reverse: true})
}

// act is a step that says nothing.
func act(f func() error) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return "", f() }
}

func (h *host) plannedSteps(r *failover.Runner, v *planVars) []failover.Step {
	return []failover.Step{
		{Name: "shutdown", Do: act(func() error { h.stopGuest(); return nil }), Undo: func(context.Context) error { return h.bootAgain(v) }},
		{Name: "demote", Do: act(h.demote), Undo: func(context.Context) error { return h.undoDemote() }},
		{Name: "final", Do: act(func() error { return h.sendFinal(r, v) })},
		{Name: "seal", Do: act(func() error {
			h.ship = nil
			return errors.Join(h.openPlane(), h.withPlane(func(c *dataplane.Client) error { return c.Seal(context.Background(), v.At) }))
		}), Undo: func(context.Context) error { return h.unseal() }},
		{Name: "demoted", Do: act(func() error {
			if h.rec.Lineage.State == lineage.Demoted {
				return nil
			}
			return h.move(lineage.Change{Event: lineage.Seal, At: v.At}, nil)
		})},
		{Name: "promote", Commit: true, Do: act(func() error { return h.askPromote(r, v) })},
		{Name: "follow", Do: act(func() error { return h.become(v) })},
	}
}

func (h *host) withPlane(f func(c *dataplane.Client) error) error {
	if h.client == nil {
		return errors.New("the data plane is down")
	}
	return f(h.client)
}

func (h *host) bootAgain(v *planVars) error {
	if !v.WasRunning || h.guest != nil || !h.rec.Lineage.MayServe() {
		return nil
	}
	if why, _ := h.askPeer(); why != "" {
		h.held = why
		return h.refuse(why)
	}
	return h.startGuest()
}

func (h *host) demote() error {
	if h.rec.Lineage.State == lineage.Promoted {
		if err := h.move(lineage.Change{Event: lineage.Commit}, nil); err != nil {
			return err
		}
	}
	if h.rec.Lineage.State == lineage.Primary {
		if err := h.move(lineage.Change{Event: lineage.Demote}, nil); err != nil {
			return err
		}
	}
	return h.withPlane(func(c *dataplane.Client) error {
		return c.Refuse(context.Background(), "a planned failover is under way")
	})
}

func (h *host) undoDemote() error {
	if st := h.rec.Lineage.State; st == lineage.Demoting || st == lineage.Demoted {
		if err := h.move(lineage.Change{Event: lineage.TakeBack, PeerConfirmed: true}, nil); err != nil {
			return err
		}
	}
	if !h.rec.Lineage.MayServe() {
		return nil
	}
	if err := h.openPlane(); err != nil {
		return err
	}
	if err := h.client.Refuse(context.Background(), ""); err != nil {
		return err
	}
	h.ship = nil
	if !h.rec.NoReverse {
		h.startShip()
	}
	return nil
}

// sendFinal ships until nothing is left, or gives up after many tries.
func (h *host) sendFinal(r *failover.Runner, v *planVars) error {
	if !v.At.IsZero() {
		return nil
	}
	if err := h.openPlane(); err != nil {
		return err
	}
	h.startShip()
	sh := h.ship
	sh.feed(session.EvResume{})
	sh.feed(session.EvFinal{})
	for range h.w.opt.FinalSteps {
		if sh.final != nil || h.ship != sh || h.lost() {
			break
		}
		sh.step()
	}
	switch {
	case h.lost() || h.ship != sh:
		return errDown
	case sh.final == nil:
		return errors.New("the last changes do not get through")
	case sh.final.err != nil:
		return sh.final.err
	}
	v.At = sh.final.pos
	return r.SetVars(v)
}

func (h *host) unseal() error {
	if h.rec.Lineage.State == lineage.Replica {
		return nil
	}
	if err := h.openPlane(); err != nil {
		return err
	}
	st, err := h.client.Status(context.Background())
	if err != nil || !st.Sealed {
		return err
	}
	return h.client.Unseal(context.Background())
}

func (h *host) askPromote(r *failover.Runner, v *planVars) error {
	if h.rec.Lineage.State == lineage.Replica {
		return nil
	}
	last := errors.New("no answer")
	for range 3 {
		reply, err := linked{h}.failover(wire.FailoverRequest{VM: vmID, Step: stepPromote, Request: r.Journal().Request, At: v.At, Start: v.Start, Reverse: v.Reverse})
		switch {
		case err != nil:
			last = err
		case reply.State == statePromoted && reply.Parent != v.At:
			return fmt.Errorf("the other host was promoted at %v, this one was sealed at %v", reply.Parent, v.At)
		case reply.State == statePromoted:
			v.Generation = reply.Generation
			return r.SetVars(v)
		case reply.State == stateRefused:
			return fmt.Errorf("%s: %w", reply.Detail, failover.ErrNotTaken)
		}
		h.w.now = h.w.now.Add(time.Second)
	}
	return last
}

// become turns the sealed images into the replica's base.
func (h *host) become(v *planVars) error {
	if h.rec.Lineage.State != lineage.Replica {
		h.ship, h.hist = nil, nil
		if err := h.closePlane(); err != nil {
			return err
		}
		if err := h.adoptBase(v.At, false); err != nil {
			return err
		}
		if err := h.w.contentIs(h, v.At, "a demoted host's images"); err != nil {
			return h.w.fail(err)
		}
		ancestors := append([]delta.Pos{v.At}, h.rec.Lineage.Ancestors...)
		if err := h.move(lineage.Change{Event: lineage.Follow, Generation: v.Generation, At: v.At, Ancestors: ancestors}, func(r *record) {
			r.NoReverse, r.WantRunning, r.Superseded, r.Next = false, false, "", nil
		}); err != nil {
			return err
		}
	}
	h.closed = false
	return h.openStore()
}
