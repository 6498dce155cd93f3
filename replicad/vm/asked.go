package vm

import (
	"context"
	"time"

	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/wire"
)

// AskedWithin is how long a request for a planned failover counts, by the clock
// of the host that is asked.
const AskedWithin = 30 * time.Second

// errExpired is what a late request is refused with.
func errExpired(name string) error {
	return &wire.Error{
		Kind: wire.KindConflict, Text: "the request for a planned failover of " + name + " has expired and is not begun; whether it ran before this daemon's start is not known here",
		Hint: "replicactl vm status " + name + "; replicactl failover log " + name + "; then ask again",
	}
}

// plannedAsked runs a planned failover because the replica's operator asked. A
// repeated request waits for the end of the first and has its answer; one that
// arrives late is not begun: who asked has given up by then.
func (v *VM) plannedAsked(ctx context.Context, q wire.FailoverRequest) (wire.FailoverReply, error) {
	v.mu.Lock()
	a := v.asked
	again := a != nil && a.request == q.Request
	if now := v.deps.Now(); !again && (!now.Before(q.Before) || q.Before.Sub(now) > 2*AskedWithin) {
		name := v.rec.Name
		v.mu.Unlock()
		v.audit(q.Request, "host "+v.mgr.peerName(v.record().Peer), "planned failover asked for", "expired, not begun")
		return wire.FailoverReply{}, errExpired(name)
	}
	if !again {
		a = &answered{request: q.Request, done: make(chan struct{})}
		v.asked = a
	}
	v.mu.Unlock()
	if !again {
		a.reply = v.runAsked(q)
		close(a.done)
	}
	select {
	case <-a.done:
		return a.reply, nil
	case <-ctx.Done():
		return wire.FailoverReply{}, &wire.Error{Kind: wire.KindUnavailable, Text: "the planned failover is under way", Hint: "replicactl vm status " + v.record().Name}
	}
}

// answered is a planned failover that the peer asked for, and how it ended.
type answered struct {
	request string
	done    chan struct{}
	reply   wire.FailoverReply // valid when done is closed
}

// runAsked checks what the local command would check, then moves the VM. It
// does not end with the request: a cut link must not tear a plan apart.
func (v *VM) runAsked(q wire.FailoverRequest) wire.FailoverReply {
	ctx := context.Background()
	refused := func(steps []wire.Step, why string) wire.FailoverReply {
		return wire.FailoverReply{State: stateRefused, Detail: why, Steps: steps}
	}
	v.audit(q.Request, "host "+v.mgr.peerName(v.record().Peer), "planned failover asked for", q.Reason)
	checks, err := v.PlanPlanned(ctx, !q.Reverse, q.KeepPoints)
	if err != nil {
		return refused(nil, err.Error())
	}
	for _, c := range checks {
		if c.Result == wire.Failed {
			return refused(nil, c.Name+": "+c.Detail+" ("+c.Remedy+")")
		}
	}
	var steps []wire.Step
	err = v.Planned(ctx, PlannedOptions{NoStart: !q.Start, NoReverse: !q.Reverse, ForceOff: q.Force, KeepPoints: q.KeepPoints, Timeout: q.Timeout, Request: q.Request}, func(e failover.Event) {
		if e.Result != "" {
			steps = append(steps, e.Step)
		}
	})
	if err != nil {
		return refused(steps, err.Error())
	}
	return wire.FailoverReply{State: stateAccepted, Steps: steps}
}

// How long the primary may take to answer before an unplanned failover: with
// --force, when it was silent a moment ago (a command asks more than once), and
// otherwise.
const (
	forcedAsk   = time.Second
	repeatedAsk = 250 * time.Millisecond
	justNow     = 30 * time.Second
)

func (v *VM) askFor(force bool) time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch silent := v.facts.unanswered; {
	case !force:
		return peerTimeout
	case !silent.IsZero() && v.deps.Now().Sub(silent) < justNow:
		return repeatedAsk
	}
	return forcedAsk
}
