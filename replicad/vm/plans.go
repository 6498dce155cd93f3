package vm

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"

	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// execute begins and runs a plan. The caller holds the plan token.
func (v *VM) execute(ctx context.Context, kind failover.Kind, request string, vars any, event func(failover.Event)) error {
	r := v.runner()
	if err := r.Begin(kind, request, vars); err != nil {
		return errors.Join(planError(err, v.record().Name), v.noteStuck(&failover.Journal{Kind: kind, Request: request, Failure: err.Error()}))
	}
	return v.drive(ctx, r, event)
}

func (v *VM) runner() *failover.Runner {
	return &failover.Runner{FS: v.fsys, Path: planFile, Now: v.deps.Now, Failpoint: v.deps.Failpoint}
}

func planError(err error, name string) error {
	if errors.Is(err, failover.ErrInterrupted) {
		return &wire.Error{Kind: wire.KindConflict, Text: err.Error(), Hint: "replicactl failover resume " + name + " (or take-back)"}
	}
	return err
}

// drive runs a begun plan.
func (v *VM) drive(ctx context.Context, r *failover.Runner, event func(failover.Event)) error {
	steps, err := v.stepsOf(r)
	if err != nil {
		j := r.Journal()
		return errors.Join(err, v.noteStuck(&j))
	}
	return v.conduct(ctx, r, event, func(ctx context.Context) error { return r.Run(ctx, steps) })
}

// conduct runs or takes back a plan, in the sight of those who ask for the
// status, and so that a take-back, or the daemon's end, can interrupt it.
func (v *VM) conduct(ctx context.Context, r *failover.Runner, event func(failover.Event), run func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(v.mgr.lifetime(), cancel)()
	show := func(title string) {
		j := r.Journal()
		v.mu.Lock()
		v.running, v.stuck, v.cancel, v.step = &j, nil, cancel, title
		v.mu.Unlock()
	}
	show("")
	j := r.Journal()
	who := v.who(j, j.Begun != "")
	v.audit(j.Request, who, "plan "+string(j.Kind), "begun")
	r.Event = func(e failover.Event) {
		show(e.Name)
		if e.Result != "" {
			j := r.Journal()
			v.log.Info("plan step", "plan", string(j.Kind), "step", e.Name, "result", string(e.Result), "detail", e.Detail, "undo", e.Undo, "request", j.Request)
		}
		if event != nil {
			event(e)
		}
	}
	err := run(ctx)
	j = r.Journal()
	result := string(j.Phase)
	if err != nil {
		result += ": " + err.Error()
	}
	v.audit(j.Request, who, "plan "+string(j.Kind), result)
	return errors.Join(err, v.noteStuck(&j))
}

// noteStuck looks at what is in the journal while no plan runs. One that cannot
// be read now counts as interrupted, as last is known of it: mend looks again.
func (v *VM) noteStuck(last *failover.Journal) error {
	j, err := failover.Load(v.fsys, planFile)
	if err != nil {
		j = last
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.running, v.cancel, v.step, v.stuck = nil, nil, "", j
	return err
}

// settle continues a plan that has passed its point of no return and takes
// back one that has not. While somebody else has the VM it is busy, not done:
// until it is done the role must not be brought up.
func (v *VM) settle(ctx context.Context) error {
	unlock, err := v.lockOwn("settle an interrupted plan")
	if err != nil {
		return err
	}
	defer unlock()
	j, err := failover.Load(v.fsys, planFile)
	switch {
	case err != nil:
		return err
	case j == nil: // it could not be read for a while, and had not begun or is over
		v.openIntake()
		return v.noteStuck(nil)
	}
	return v.settleLocked(ctx, j, !j.Committed)
}

func (v *VM) settleLocked(ctx context.Context, j *failover.Journal, back bool) error {
	r := v.runner()
	r.Resume(j)
	v.log.Warn("plan was interrupted", "plan", string(j.Kind), "step", j.Begun, "committed", j.Committed, "request", j.Request)
	if !back {
		return v.drive(ctx, r, nil)
	}
	steps, err := v.stepsOf(r)
	if err != nil {
		return errors.Join(err, v.noteStuck(j))
	}
	err = v.conduct(ctx, r, nil, func(ctx context.Context) error { return r.TakeBack(ctx, steps, nil) })
	if err == nil {
		v.openIntake() // a promotion refused because of this plan may have closed it
	}
	return err
}

// mend continues interrupted plans of a running daemon, until ctx ends or the
// relationship does.
func (v *VM) mend(ctx context.Context) {
	for pause := (&pause{next: watchEvery}); pause.wait(ctx) && !v.forgotten(); {
		v.mu.Lock()
		idle := v.stuck == nil
		v.mu.Unlock()
		if idle {
			pause.next = watchEvery
			continue
		}
		err := v.settle(ctx)
		if err == nil {
			err = v.resume(ctx)
		}
		if err != nil && !busy(err) {
			v.log.Warn("an interrupted plan does not go on", "err", err)
		}
	}
}

// resume brings the role up that a settled plan left.
func (v *VM) resume(ctx context.Context) error {
	unlock, err := v.lockOwn("bring the VM into its role")
	if err != nil {
		return err
	}
	defer unlock()
	return v.resumeLocked(ctx)
}

func (v *VM) resumeLocked(ctx context.Context) error {
	if v.over() {
		return v.mgr.remove(v)
	}
	if v.outOfHands() {
		return nil
	}
	return v.up(ctx)
}

// Settle continues an interrupted plan because a person asked, or takes one
// back that has not passed its point of no return; a running one is stopped for
// that. With force the role is taken back from a replica host that cannot be
// asked: the person knows that it has not taken over and never will.
func (v *VM) Settle(ctx context.Context, back, force bool) error {
	stopped, unlock, err := v.lockFor(ctx, back)
	if err != nil {
		return err
	}
	defer unlock()
	j, err := failover.Load(v.fsys, planFile)
	switch {
	case err != nil:
		return err
	case j == nil && stopped:
		return nil // what ran has taken itself back
	case j == nil:
		return &wire.Error{Kind: wire.KindRefused, Text: "no plan of this VM is interrupted", Hint: "replicactl vm status " + v.record().Name}
	case back && j.Committed:
		if err := v.mayReturn(ctx, j, force); err != nil {
			return err
		}
	}
	if err := v.settleLocked(ctx, j, back); err != nil {
		return err
	}
	return v.resumeLocked(ctx)
}

// lockFor takes the plan token; to take a plan back it ends what the plan does
// and waits until it has stopped.
func (v *VM) lockFor(ctx context.Context, back bool) (stopped bool, unlock func(), err error) {
	if unlock, err = v.lockAsked(ctx, "settle an interrupted plan"); err == nil || !back {
		return false, unlock, err
	}
	v.mu.Lock()
	cancel, j := v.cancel, v.running
	v.mu.Unlock()
	if cancel == nil || j.Committed && !handingOver(j) {
		return false, nil, err
	}
	cancel()
	ctx, end := context.WithTimeout(ctx, swapTimeout)
	defer end()
	select {
	case v.plan <- struct{}{}:
		return true, v.free, nil
	case <-ctx.Done():
		return false, nil, err
	}
}

// handingOver: the peer was asked to take over and has not been heard to.
func handingOver(j *failover.Journal) bool {
	if j.Kind != failover.Planned || j.Begun != stepPromote {
		return false
	}
	for _, f := range j.Finished {
		if f == stepPromote {
			return false
		}
	}
	return true
}

// mayReturn lets a hand-over be taken back that the peer was asked for: when
// the peer declines it for good, or a person forces it, which is recorded as a
// new generation.
func (v *VM) mayReturn(ctx context.Context, j *failover.Journal, force bool) error {
	name := v.record().Name
	if !handingOver(j) {
		return &wire.Error{Kind: wire.KindRefused, Text: failover.ErrCommitted.Error(), Hint: "replicactl failover resume " + name}
	}
	state, err := v.askDecline(ctx, j.Request)
	switch {
	case err == nil && state == stateRefused:
	case err == nil && state == statePromoted:
		return &wire.Error{Kind: wire.KindRefused, Text: "the other host has taken over", Hint: "replicactl failover resume " + name}
	case !force:
		return &wire.Error{
			Kind: wire.KindUnavailable, Text: fmt.Sprintf("it is not known whether the other host took over: %v", err),
			Hint: "repeat when it answers, or, when it certainly has not and never will: replicactl failover take-back --force " + name,
		}
	default:
		v.log.Warn("the role is taken back by force", "request", j.Request, "err", err)
		if err := forceReturn(j); err != nil {
			return err
		}
	}
	j.Committed = false
	return nil
}

// forceReturn gives the plan the generation that records the force.
func forceReturn(j *failover.Journal) error {
	var p plannedVars
	if _, err := steps(j.Vars, &p, func(*plannedVars) []failover.Step { return nil }); err != nil {
		return err
	}
	g, err := lineage.NewGeneration(rand.Reader)
	if err != nil {
		return err
	}
	p.Forced = g
	j.Vars, err = json.Marshal(&p)
	return err
}

// askDecline asks the peer to decline a hand-over for good, unless it has
// happened.
func (v *VM) askDecline(ctx context.Context, request string) (state string, err error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	p, err := v.peer()
	if err != nil {
		return "", err
	}
	reply, err := p.Failover(ctx, wire.FailoverRequest{VM: v.id, Step: stepQuery, Request: request})
	if err != nil {
		return "", err
	}
	return reply.State, nil
}

// lifetime ends with Run; before Run it does not end.
func (m *Manager) lifetime() context.Context {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx == nil {
		return context.Background()
	}
	return m.ctx
}
