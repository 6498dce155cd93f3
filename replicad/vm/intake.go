package vm

import (
	"fmt"
	"slices"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// What is received ends before a promotion looks at where the replica stands:
// an epoch that were committed behind its back would be lost although the
// primary was told that it is safe.

// closeIntake refuses every epoch from now on, also those on their way.
func (v *VM) closeIntake() error {
	v.intake.Lock()
	defer v.intake.Unlock()
	v.mu.Lock()
	v.closed, v.facts.allowed = true, delta.Generation{}
	k := v.keep
	v.mu.Unlock()
	if k == nil {
		return nil
	}
	s, err := v.store()
	if err != nil {
		return err
	}
	if err := s.Forget(); err != nil {
		return fmt.Errorf("end what is being received: %w", err)
	}
	return nil
}

// openIntake lets the next handshake decide again.
func (v *VM) openIntake() {
	v.mu.Lock()
	v.closed = false
	v.mu.Unlock()
}

// standsAt checks, with the intake closed, that the replica is where the
// promotion was decided for.
func (v *VM) standsAt(at delta.Pos) error {
	st, err := v.storeStatus()
	if err != nil {
		return err
	}
	if st.State != points.Promoted && st.Committed != at {
		return &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("the replica has moved on to %v meanwhile", st.Committed), Hint: "repeat the command"}
	}
	return nil
}

// expect makes durable who may follow, before the first epoch of a generation
// is committed: a crash may fall between that commit and the record.
func (v *VM) expect(g delta.Generation) error {
	r := v.record()
	if r.Lineage.Generation == g && !r.Incomplete || r.Next != nil && r.Next.Generation == g {
		return nil
	}
	v.mu.Lock()
	ancestors := slices.Clone(v.facts.peerAncestors)
	v.mu.Unlock()
	return v.update(func(r *Record) error {
		r.Next = &Succession{Generation: g, Ancestors: ancestors}
		return nil
	})
}

// catchUp follows what the store committed and the record does not know yet.
func (v *VM) catchUp() error {
	r := v.record()
	if r.Lineage.State != lineage.Replica || r.Next == nil {
		return nil
	}
	st, err := v.storeStatus()
	if err != nil || st.State != points.Replica || st.Committed.Generation != r.Next.Generation {
		return nil // nothing is committed that could be followed
	}
	return v.committed(st.Committed)
}
