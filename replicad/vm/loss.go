package vm

import (
	"context"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Loss is what an unplanned failover would give up, as far as it is known.
type Loss struct {
	// Cut is the time of the cut that will run again; zero = there is none.
	Cut time.Time
	At  delta.Pos
	// Newest is the last cut the replica holds, and its time; later than At when
	// an older point is chosen.
	Newest    delta.Pos
	NewestCut time.Time
	// Points are the recovery points that end when the failover is made final.
	Points int
	// Bytes the primary reports as changed since; negative = unknown.
	Bytes int64
	// Primary is what the peer said, or why it could not be asked.
	Primary wire.Check
	// Running: the primary answered that its guest runs.
	Running bool
	// Without are disks of the VM that the chosen state does not have, or not
	// all of: the guest starts without them.
	Without []wire.DiskName
	// Unproven says why the replica wants everything compared before it trusts
	// its content; empty = it trusts it.
	Unproven string
}

// Loss asks the peer and reports what an unplanned failover would lose.
// point chooses the state as UnplannedOptions.Point does. With force a person is
// sure that the primary is dead: it is not waited for long.
func (v *VM) Loss(ctx context.Context, point string, force bool) (Loss, error) {
	st, err := v.storeStatus()
	if err != nil {
		return Loss{}, err
	}
	if st.Committed.IsZero() || v.record().Incomplete {
		return Loss{}, &wire.Error{Kind: wire.KindRefused, Text: "the replica holds no complete copy", Hint: "replicactl vm status " + v.record().Name}
	}
	l := Loss{
		Newest: st.Committed, NewestCut: st.CutTime, Points: st.Points, Unproven: st.VerifyAll,
		Bytes: -1, Primary: wire.Check{Name: "Ask the primary", Result: wire.Unknown},
	}
	if l.At, l.Cut, err = v.choose(point, st); err != nil {
		return Loss{}, err
	}
	l.Without = v.without(l.At)
	ctx, cancel := context.WithTimeout(ctx, v.askFor(force))
	defer cancel()
	p, err := v.peer()
	if err == nil {
		var s wire.PeerVM
		if s, err = p.Status(ctx, v.id); err == nil {
			l.Running = s.Running
			if l.Bytes = s.Pending; s.Running {
				l.Primary.Result, l.Primary.Detail = wire.Failed, "it answers and its guest runs"
				l.Primary.Remedy = "replicactl failover planned " + v.record().Name
			} else {
				l.Primary.Result, l.Primary.Detail = wire.OK, "it answers, the guest is off there"
			}
		}
	}
	if err != nil {
		l.Primary.Detail = "it does not answer: " + err.Error()
		l.Primary.Remedy = "make sure that it is off, then repeat with --force"
	}
	v.mu.Lock()
	if v.facts.unanswered = (time.Time{}); err != nil {
		v.facts.unanswered = v.deps.Now()
	}
	v.mu.Unlock()
	return l, nil
}
