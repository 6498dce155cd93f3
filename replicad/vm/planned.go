package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
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
	// what a release would give up
	stepReleasePlan = "release-plan"
	stepRelease     = "release" // give up the own writes after an unplanned failover
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
	KeepPoints               bool `json:",omitempty"`
	Timeout                  time.Duration
	WasRunning               bool
	At                       delta.Pos
	Generation               delta.Generation // the peer's new one
	// Forced is the generation of a take-back without the peer's word.
	Forced delta.Generation `json:",omitzero"`
}

// PlannedOptions are a person's choices.
type PlannedOptions struct {
	NoStart, NoReverse, ForceOff bool
	// KeepPoints has the replica's recovery points copied before they end.
	KeepPoints bool
	Timeout    time.Duration // guest shutdown; 0 = as the VM's settings say
	Request    string
}

const defaultShutdown = 5 * time.Minute

// Planned moves the VM to the peer without losing anything. It must be called
// on the primary. On a failure before the role change everything is taken
// back; behind it the plan stays in the journal and continues by itself.
func (v *VM) Planned(ctx context.Context, o PlannedOptions, event func(failover.Event)) error {
	unlock, err := v.lockAsked(ctx, "planned failover")
	if err != nil {
		return err
	}
	defer unlock()
	if st := v.record().Lineage.State; st != lineage.Primary && st != lineage.Promoted {
		return &wire.Error{Kind: wire.KindRefused, Text: "this host is not the primary of " + v.record().Name, Hint: "run the command on the primary, or: replicactl failover unplanned " + v.record().Name}
	}
	if d := v.record().Lineage.Diverged; d != nil {
		return &wire.Error{Kind: wire.KindRefused, Text: "the two copies have diverged: " + d.Reason, Hint: "replicactl failover reverse " + v.record().Name + " on the host whose data is to be kept"}
	}
	if err := errors.Join(v.imagesOnly(ctx), v.notJoining()); err != nil {
		return err
	}
	state, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil {
		return fmt.Errorf("read the guest's state: %w", err)
	}
	if o.Timeout <= 0 {
		r := v.record()
		o.Timeout = r.shutdown()
	}
	vars := &plannedVars{
		Start: !o.NoStart && state != libvirt.StateOff, Reverse: !o.NoReverse, ForceOff: o.ForceOff,
		KeepPoints: o.KeepPoints, Timeout: o.Timeout, WasRunning: !off(state),
	}
	return v.execute(ctx, failover.Planned, o.Request, vars, event)
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
	case failover.AddDisk:
		return steps(j.Vars, &diskVars{}, v.addDiskSteps)
	case failover.TakeDisk:
		return steps(j.Vars, &diskVars{}, v.takeDiskSteps)
	case failover.Reverse:
		return steps(j.Vars, &commitVars{}, func(p *commitVars) []failover.Step { return v.reverseSteps(r, p) })
	case failover.Commit:
		return steps(j.Vars, &commitVars{}, func(p *commitVars) []failover.Step { return v.commitSteps(p, j.Request) })
	case failover.Cancel:
		return steps(j.Vars, &cancelVars{}, v.cancelSteps)
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
		{Name: "demote", Title: "Close the disks to writers", Do: v.demote, Undo: func(ctx context.Context) error { return v.undoDemote(ctx, p) }},
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
	if !off(st) {
		v.lookAtGraph(ctx) // a backup may have begun since the prerequisites
	}
	if err := v.writesArrive(); err != nil {
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
		return "", &wire.Error{Kind: wire.KindUnavailable, Text: fmt.Sprintf("the guest has not shut down within %s", p.Timeout), Hint: "shut it down from inside, or repeat with a longer --shutdown-timeout (lastingly: replicactl vm set --shutdown-time) or with --force-off"}
	}
	return "", err
}

// bootAgain starts the guest that the plan had shut down.
func (v *VM) bootAgain(ctx context.Context, p *plannedVars) error {
	if !p.WasRunning || !v.record().Lineage.MayServe() {
		return nil // the copies have diverged: a person decides which one runs
	}
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil || (!off(st)) {
		return err
	}
	// The peer may have been promoted by force meanwhile.
	if why, _ := v.askPeer(ctx); why != "" {
		v.hold(why)
		v.refuseExports(ctx, why)
		return nil
	}
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
	if err := c.Refuse(ctx, "a planned failover is under way"); err != nil {
		return "", err
	}
	// Somebody may have started it after it had shut down.
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil {
		return "", err
	}
	if !off(st) {
		return "", fmt.Errorf("the guest is %s again", st)
	}
	return "", nil
}

// commitPromotion makes a promotion that nobody cancelled an ordinary primary.
func (v *VM) commitPromotion() error {
	if v.record().Lineage.State != lineage.Promoted {
		return nil
	}
	return v.move(lineage.Change{Event: lineage.Commit}, nil)
}

// undoDemote takes the role back. The peer was never asked to promote, has
// durably refused, or a person forced it: the runner only comes here then.
func (v *VM) undoDemote(ctx context.Context, p *plannedVars) error {
	st := v.record().Lineage.State
	if st == lineage.Demoting || st == lineage.Demoted {
		if err := v.move(p.takeBack(), nil); err != nil {
			return err
		}
	}
	if !v.record().Lineage.MayServe() {
		return nil // the role went another way meanwhile, or the copies diverged
	}
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	c, err := v.plane()
	if err != nil {
		return err
	}
	if !p.Forced.IsZero() {
		if err := v.trackFrom(ctx, c, p.Forced, p.At); err != nil {
			return err
		}
	}
	if err := c.Refuse(ctx, ""); err != nil {
		return err
	}
	if err := v.openExports(ctx); err != nil {
		return err
	}
	v.stopShipping() // a session that has sent its last changes ships no more
	if !v.record().NoReverse {
		v.startShipping()
	}
	return nil
}

func (p *plannedVars) takeBack() lineage.Change {
	if p.Forced.IsZero() {
		return lineage.Change{Event: lineage.TakeBack, PeerConfirmed: true}
	}
	return lineage.Change{Event: lineage.ForceTakeBack, Generation: p.Forced, At: p.At}
}

// trackFrom starts tracking generation g relative to at, unless that happened.
func (v *VM) trackFrom(ctx context.Context, c *dataplane.Client, g delta.Generation, at delta.Pos) error {
	s, err := c.Status(ctx)
	if err != nil {
		return fmt.Errorf("start tracking: %w", err)
	}
	if s.Tracker && s.Generation == g {
		return nil // a guest may have written since
	}
	err = c.CreateTracker(ctx, dataplane.CreateRequest{Generation: g, Base: at, Parents: v.record().Lineage.Ancestors, Replace: true})
	if err != nil {
		return fmt.Errorf("start tracking: %w", err)
	}
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
	if v.record().Lineage.State == lineage.Replica {
		return nil
	}
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
	if v.record().Lineage.State == lineage.Replica {
		return "released meanwhile", nil
	}
	ctx, cancel := context.WithTimeout(ctx, promoteTimeout)
	defer cancel()
	var last error
	for pause := newPause(); ; {
		reply, err := v.promoteOnce(ctx, r, p)
		switch {
		case err != nil:
			last = err
		case reply.State == statePromoted && reply.Parent != p.At:
			return "", &wire.Error{
				Kind: wire.KindDiverged, Text: fmt.Sprintf("the other host was promoted at %v, this one was sealed at %v", reply.Parent, p.At),
				Hint: "replicactl failover reverse " + v.record().Name + " on the other host, whose data is kept",
			}
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
		VM: v.id, Step: stepPromote, Request: r.Journal().Request, At: p.At, Start: p.Start, Reverse: p.Reverse, KeepPoints: p.KeepPoints,
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
			r.Paused, r.Superseded, r.Next = false, "", nil
		}); err != nil {
			return "", err
		}
	}
	v.openIntake()
	v.publishGate()
	v.mu.Lock()
	v.facts.beat, v.facts.beatAt = v.deps.Now(), p.At // the guest is off: the copy is as new as can be
	v.mu.Unlock()
	return "", v.startKeeping(ctx)
}
