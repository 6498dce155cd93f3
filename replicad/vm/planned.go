package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// Steps of wire.FailoverRequest.
const (
	stepRequest = "request-planned" // run a planned failover, asked by the replica
	stepPromote = "promote"
	stepQuery   = "query"
	stepRelease = "release" // give up the own writes after an unplanned failover
)

// States of wire.FailoverReply.
const (
	statePromoted    = "promoted"
	stateNotPromoted = "not-promoted"
	stateRefused     = "refused"
	stateAccepted    = "accepted"
)

// plannedVars is what a planned failover needs after a restart.
type plannedVars struct {
	Start, Reverse, ForceOff bool
	Timeout                  time.Duration
	WasRunning               bool
	At                       delta.Pos
	Generation               delta.Generation // the peer's new one
}

// PlannedOptions are a person's choices.
type PlannedOptions struct {
	NoStart, NoReverse, ForceOff bool
	Timeout                      time.Duration // guest shutdown; 0 = 5 minutes
	Request                      string
}

const defaultShutdown = 5 * time.Minute

// Planned moves the VM to the peer without losing anything. It must be called
// on the primary. On a failure before the role change everything is taken
// back; behind it the plan stays in the journal and continues by itself.
func (v *VM) Planned(ctx context.Context, o PlannedOptions, event func(failover.Event)) error {
	unlock, err := v.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if st := v.record().Lineage.State; st != lineage.Primary && st != lineage.Promoted {
		return &wire.Error{Kind: wire.KindRefused, Text: "this host is not the primary of " + v.record().Name, Hint: "run the command on the primary, or: replicactl failover unplanned " + v.record().Name}
	}
	state, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil {
		return fmt.Errorf("read the guest's state: %w", err)
	}
	if o.Timeout <= 0 {
		o.Timeout = defaultShutdown
	}
	vars := &plannedVars{
		Start: !o.NoStart && state != libvirt.StateOff, Reverse: !o.NoReverse, ForceOff: o.ForceOff,
		Timeout: o.Timeout, WasRunning: !off(state),
	}
	return v.execute(ctx, failover.Planned, o.Request, vars, event)
}

// execute begins and runs a plan. The caller holds the plan token.
func (v *VM) execute(ctx context.Context, kind failover.Kind, request string, vars any, event func(failover.Event)) error {
	r := v.runner()
	if err := r.Begin(kind, request, vars); err != nil {
		return planError(err, v.record().Name)
	}
	return v.drive(ctx, r, event)
}

func (v *VM) runner() *failover.Runner {
	return &failover.Runner{FS: v.fsys, Path: planFile, Now: v.deps.Now, Failpoint: v.deps.Failpoint}
}

// drive runs a begun plan.
func (v *VM) drive(ctx context.Context, r *failover.Runner, event func(failover.Event)) error {
	steps, err := v.stepsOf(r)
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.running, v.stuck = r, nil
	v.mu.Unlock()
	r.Event = func(e failover.Event) {
		v.mu.Lock()
		v.step = e.Name
		v.mu.Unlock()
		if e.Result != "" {
			v.log.Info("plan step", "plan", string(r.Journal().Kind), "step", e.Name, "result", string(e.Result), "detail", e.Detail, "undo", e.Undo, "request", r.Journal().Request)
		}
		if event != nil {
			event(e)
		}
	}
	err = r.Run(ctx, steps)
	j, lerr := failover.Load(v.fsys, planFile)
	v.mu.Lock()
	v.running, v.step, v.stuck = nil, "", j
	v.mu.Unlock()
	return errors.Join(err, lerr)
}

func planError(err error, name string) error {
	if errors.Is(err, failover.ErrInterrupted) {
		return &wire.Error{Kind: wire.KindConflict, Text: err.Error(), Hint: "replicactl failover resume " + name + " (or take-back)"}
	}
	return err
}

// stepsOf rebuilds the steps of a journalled plan.
func (v *VM) stepsOf(r *failover.Runner) ([]failover.Step, error) {
	j := r.Journal()
	switch j.Kind {
	case failover.Planned:
		return steps(j.Vars, &plannedVars{}, func(p *plannedVars) []failover.Step { return v.plannedSteps(r, p) })
	case failover.Promote, failover.Unplanned:
		return steps(j.Vars, &promoteVars{}, func(p *promoteVars) []failover.Step { return v.promoteSteps(r, p, j.Kind) })
	case failover.Enable:
		return steps(j.Vars, &enableVars{}, v.enableSteps)
	case failover.Disable:
		return steps(j.Vars, &disableVars{}, v.disableSteps)
	case failover.Reverse:
		return v.reverseSteps(r), nil
	}
	return nil, fmt.Errorf("the journal holds an unknown plan %q", j.Kind)
}

// steps reads a plan's values, which decide what its steps are.
func steps[V any](raw json.RawMessage, vars *V, build func(*V) []failover.Step) ([]failover.Step, error) {
	if err := json.Unmarshal(raw, vars); err != nil {
		return nil, fmt.Errorf("read the plan's values: %w", err)
	}
	return build(vars), nil
}

func (v *VM) plannedSteps(r *failover.Runner, p *plannedVars) []failover.Step {
	return []failover.Step{
		{Name: "shutdown", Title: "Shut the guest down", Do: func(ctx context.Context) (string, error) { return v.shutDown(ctx, p) }, Undo: func(ctx context.Context) error { return v.bootAgain(ctx, p) }},
		{Name: "demote", Title: "Close the disks to writers", Do: v.demote, Undo: v.undoDemote},
		{Name: "final", Title: "Send the last changes", Do: func(ctx context.Context) (string, error) { return v.sendFinal(ctx, r, p) }},
		{Name: "seal", Title: "Seal the disks at the last position", Do: func(ctx context.Context) (string, error) { return v.seal(ctx, p) }, Undo: v.unseal},
		{Name: "demoted", Title: "Give up the primary role", Do: func(context.Context) (string, error) {
			if st := v.record().Lineage.State; st == lineage.Demoted {
				return "", nil
			}
			return p.At.String(), v.move(lineage.Change{Event: lineage.Seal, At: p.At}, nil)
		}},
		{Name: "promote", Title: "Fail over to the replica host", Commit: true, Do: func(ctx context.Context) (string, error) { return v.askPromote(ctx, r, p) }},
		{Name: "follow", Title: "Become the replica", Do: func(ctx context.Context) (string, error) { return v.follow(ctx, p) }},
	}
}

func (v *VM) shutDown(ctx context.Context, p *plannedVars) (string, error) {
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil {
		return "", err
	}
	if off(st) {
		return "it is off", nil
	}
	err = v.deps.Hyper.Shutdown(ctx, string(v.id), libvirt.ShutdownOptions{Within: p.Timeout})
	if errors.Is(err, libvirt.ErrTimeout) && p.ForceOff {
		return "switched off: it did not shut down in " + p.Timeout.String(), v.deps.Hyper.Destroy(ctx, string(v.id), true)
	}
	if errors.Is(err, libvirt.ErrTimeout) {
		return "", &wire.Error{Kind: wire.KindUnavailable, Text: fmt.Sprintf("the guest has not shut down within %s", p.Timeout), Hint: "shut it down from inside, or repeat with a longer --shutdown-timeout or with --force-off"}
	}
	return "", err
}

// bootAgain starts the guest that the plan had shut down.
func (v *VM) bootAgain(ctx context.Context, p *plannedVars) error {
	if !p.WasRunning {
		return nil
	}
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil || (!off(st)) {
		return err
	}
	v.publishGate()
	return v.startGuest(ctx)
}

func (v *VM) demote(ctx context.Context) (string, error) {
	if v.record().Lineage.State == lineage.Primary || v.record().Lineage.State == lineage.Promoted {
		if err := v.commitPromotion(); err != nil {
			return "", err
		}
		if err := v.move(lineage.Change{Event: lineage.Demote}, nil); err != nil {
			return "", err
		}
	}
	c, err := v.plane()
	if err != nil {
		return "", err
	}
	return "", c.Refuse(ctx, "a planned failover is under way")
}

// commitPromotion makes a promotion that nobody cancelled an ordinary primary.
func (v *VM) commitPromotion() error {
	if v.record().Lineage.State != lineage.Promoted {
		return nil
	}
	return v.move(lineage.Change{Event: lineage.Commit}, nil)
}

// undoDemote takes the role back. The peer was either never asked to promote,
// or has durably refused: the runner only comes here in these two cases.
func (v *VM) undoDemote(ctx context.Context) error {
	switch v.record().Lineage.State {
	case lineage.Demoting, lineage.Demoted:
		if err := v.move(lineage.Change{Event: lineage.TakeBack, PeerConfirmed: true}, nil); err != nil {
			return err
		}
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
	if err := v.openExports(ctx); err != nil {
		return err
	}
	v.startShipping()
	return nil
}

func (v *VM) sendFinal(ctx context.Context, r *failover.Runner, p *plannedVars) (string, error) {
	if !p.At.IsZero() {
		return p.At.String(), nil
	}
	if err := v.startPlane(ctx); err != nil {
		return "", err
	}
	v.startShipping()
	s := v.session()
	if s == nil {
		return "", errors.New("no session runs")
	}
	ctx, cancel := context.WithTimeout(ctx, finalTimeout)
	defer cancel()
	s.Resume()
	pos, err := s.SyncFinal(ctx)
	if err != nil {
		return "", fmt.Errorf("send the last changes: %w", err)
	}
	p.At = pos
	if err := r.SetVars(p); err != nil {
		return "", err
	}
	return pos.String(), nil
}

func (v *VM) seal(ctx context.Context, p *plannedVars) (string, error) {
	v.stopShipping()
	if err := v.startPlane(ctx); err != nil {
		return "", err
	}
	c, err := v.plane()
	if err != nil {
		return "", err
	}
	return "", c.Seal(ctx, p.At)
}

func (v *VM) unseal(ctx context.Context) error {
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	c, err := v.plane()
	if err != nil {
		return err
	}
	if st, err := c.Status(ctx); err != nil || !st.Sealed {
		return err // it never came to the seal
	}
	return c.Unseal(ctx)
}

// askPromote hands the role over. A lost answer is asked for again until ctx
// ends; only a durable refusal lets the plan be taken back.
func (v *VM) askPromote(ctx context.Context, r *failover.Runner, p *plannedVars) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, promoteTimeout)
	defer cancel()
	var last error
	for pause := newPause(); ; {
		reply, err := v.promoteOnce(ctx, r, p)
		switch {
		case err != nil:
			last = err
		case reply.State == statePromoted:
			p.Generation = reply.Generation
			return reply.Detail, r.SetVars(p)
		case reply.State == stateRefused:
			return "", fmt.Errorf("the replica host refuses: %s: %w", reply.Detail, failover.ErrNotTaken)
		default:
			last = fmt.Errorf("the replica host answers %q: %s", reply.State, reply.Detail)
		}
		if !pause.wait(ctx) {
			return "", &wire.Error{
				Kind: wire.KindUnavailable, Text: fmt.Sprintf("it is not known whether the replica host took over: %v", last),
				Hint: "the plan continues by itself; or: replicactl failover resume " + v.record().Name,
			}
		}
	}
}

func (v *VM) promoteOnce(ctx context.Context, r *failover.Runner, p *plannedVars) (wire.FailoverReply, error) {
	peer, err := v.peer()
	if err != nil {
		return wire.FailoverReply{}, err
	}
	return peer.Failover(ctx, wire.FailoverRequest{
		VM: v.id, Step: stepPromote, Request: r.Journal().Request, At: p.At, Start: p.Start, Reverse: p.Reverse,
	})
}

// follow turns the sealed images into the replica's base.
func (v *VM) follow(ctx context.Context, p *plannedVars) (string, error) {
	if v.record().Lineage.State != lineage.Replica {
		if err := v.stopPlane(ctx); err != nil {
			return "", err
		}
		if err := v.adoptBase(p.At, false); err != nil {
			return "", err
		}
		ancestors := append([]delta.Pos{p.At}, v.record().Lineage.Ancestors...)
		if err := v.move(lineage.Change{Event: lineage.Follow, Generation: p.Generation, At: p.At, Ancestors: ancestors}, func(r *Record) {
			r.NoReverse, r.WantRunning, r.Verified, r.Acked = false, false, false, p.At
		}); err != nil {
			return "", err
		}
	}
	v.publishGate()
	v.mu.Lock()
	v.facts.beat, v.facts.beatAt = v.deps.Now(), p.At // the guest is off: the copy is as new as can be
	v.mu.Unlock()
	return "", v.startKeeping(ctx)
}
