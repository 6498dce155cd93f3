package vm

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// half is this host's half of a handshake.
func (v *VM) half() (wire.HandshakeReply, error) {
	r := v.record()
	l := r.Lineage
	h := wire.HandshakeReply{
		VM: r.VM, Role: l.Role(), Generation: l.Generation, Ancestors: l.Ancestors,
		Diverged: l.Diverged != nil, Running: v.guestRuns(), Discard: l.Discard,
	}
	for _, d := range r.served() {
		if d.State != leaving {
			h.Disks = append(h.Disks, d.Name)
		}
	}
	if l.State == lineage.Demoting || l.State == lineage.Demoted {
		return h, &wire.Error{Kind: wire.KindUnavailable, Text: "a role change is under way on this host", Hint: "replicactl vm status " + r.Name}
	}
	if l.State != lineage.Replica {
		h.Committed = delta.Pos{}
		return h, nil
	}
	if g, ancestors, ok := v.promotedOffline(); ok {
		h.Role, h.Generation, h.Ancestors = lineage.RolePrimary, g, ancestors
		return h, nil
	}
	st, err := v.storeStatus()
	if err != nil {
		return h, err
	}
	if r.Incomplete && st.State != points.Seeding && r.Next == nil {
		return h, &wire.Error{Kind: wire.KindUnavailable, Text: "this host is still giving up its own writes", Hint: "replicactl vm status " + r.Name}
	}
	if h.VerifyAll = st.VerifyAll; h.VerifyAll != "" {
		if h.Asked, err = v.askCompare(); err != nil {
			return h, err
		}
	}
	switch st.State {
	case points.Seeding:
		if r.Existing {
			h.VerifyAll = "it was given existing images"
		}
		h.Seeding = map[wire.DiskName]int64{}
		for d, c := range st.Seeded {
			h.Seeding[wire.DiskName(d)] = c
		}
		if l.Discard.IsZero() {
			// the chain begins with the first epoch
			return h, nil
		}
		h.Base, h.Tracked = v.released()
		return h, nil
	case points.Suspect, points.Damaged:
		return h, &wire.Error{Kind: wire.KindSuspect, Text: whySuspect(st), Hint: "on the replica host: replicactl vm resync " + r.Name}
	case points.Rolling:
		return h, &wire.Error{Kind: wire.KindUnavailable, Text: "a failover to an older recovery point is under way on this host", Hint: "replicactl vm status " + r.Name}
	}
	h.Sizes = map[wire.DiskName]int64{}
	for _, d := range st.Disks {
		h.Sizes[wire.DiskName(d.Name)] = d.Size
	}
	h.Committed = st.Committed
	h.Generation = st.Committed.Generation
	h.Ancestors = ancestorsOf(l, st.Committed)
	h.Sealed = !l.Sealed.IsZero() && l.Sealed == st.Committed
	if p := st.Partial; p != nil {
		h.Partial = &wire.EpochKey{VM: r.VM, Generation: p.Generation, Epoch: p.Epoch, Nonce: p.Nonce}
	}
	return h, nil
}

// askCompare names the store's wish to have everything compared.
func (v *VM) askCompare() (uint64, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.facts.asked == 0 {
		var b [8]byte
		if _, err := rand.Read(b[:]); err != nil {
			return 0, fmt.Errorf("name a comparison: %w", err)
		}
		v.facts.asked = binary.LittleEndian.Uint64(b[:])
	}
	return v.facts.asked, nil
}

// compared ends the store's distrust of its own content when the primary says
// that it compared everything since it was asked to, and that the replica has
// what differed. Without it each handshake would compare everything once more.
func (v *VM) compared(q wire.HandshakeRequest) error {
	v.mu.Lock()
	ours := q.Compared != 0 && q.Compared == v.facts.asked && v.facts.allowed == q.Generation && !v.closed
	v.mu.Unlock()
	if !ours || v.record().Lineage.State != lineage.Replica {
		return nil
	}
	s, err := v.store()
	if err != nil {
		return err
	}
	if st := s.Status(); st.State != points.Replica || st.Committed != q.CommittedAt || st.VerifyAll == "" {
		return nil
	}
	if err := s.Verified(); err != nil {
		return storeError(err)
	}
	v.forgetAsked()
	v.log.Info("everything was compared with the primary", "at", q.CommittedAt.String())
	return nil
}

// forgetAsked makes the next wish another one.
func (v *VM) forgetAsked() {
	v.mu.Lock()
	v.facts.asked = 0
	v.mu.Unlock()
}

// whySuspect says why a store that is suspect or damaged takes nothing.
func whySuspect(st storeState) string {
	if st.State == points.Damaged {
		return wire.CleanText(errors.Join(st.Damage...).Error(), wire.MaxText)
	}
	return points.ErrSuspect.Error()
}

// ancestorsOf are the parents of the generation a replica stands in; its
// lineage may name a newer generation whose first epoch has not arrived.
func ancestorsOf(l lineage.Lineage, at delta.Pos) []delta.Pos {
	if l.Generation == at.Generation {
		return l.Ancestors
	}
	for i, a := range l.Ancestors {
		if a.Generation == at.Generation {
			return l.Ancestors[i+1:]
		}
	}
	return nil
}

// judged is the answering host's reading of a handshake: it decides whether
// this generation may write here, and persists a divergence before it answers.
func (v *VM) judged(q wire.HandshakeRequest, h wire.HandshakeReply) {
	d := lineage.Decide(q, h)
	v.mu.Lock()
	v.facts.peerGeneration, v.facts.peerAncestors = q.Generation, q.Ancestors
	v.facts.allowed = delta.Generation{}
	if d.MayShip() && !v.closed {
		v.facts.allowed = q.Generation
	}
	v.facts.heard, v.facts.peerRunning = v.deps.Now(), q.Running
	v.mu.Unlock()
	v.conclude(d, q.Generation)
}

// judge is the asking host's reading of the same two halves.
func (v *VM) judge(q wire.HandshakeRequest, h wire.HandshakeReply) lineage.Decision {
	d := lineage.Decide(q, h)
	v.conclude(d, h.Generation)
	v.mu.Lock()
	v.facts.heard = v.deps.Now()
	v.facts.decision = d
	lift := d.MayShip() && v.held != "" && v.held == v.facts.told
	if v.facts.told = ""; !d.MayRun(lineage.P) {
		v.facts.told = d.Reason
	}
	v.mu.Unlock()
	if !d.MayRun(lineage.P) {
		v.hold(d.Reason)
	}
	if lift {
		v.hold("")
	}
	v.supersede(d)
	return d
}

// supersede keeps, also over a boot at which the other host is silent, that it
// was promoted; it ends when the other host follows this one.
func (v *VM) supersede(d lineage.Decision) {
	why := v.record().Superseded
	switch {
	case d.Outcome == lineage.Stale:
		why = d.Reason
	case d.MayShip():
		why = ""
	}
	if why == v.record().Superseded {
		return
	}
	if err := v.update(func(r *Record) error { r.Superseded = why; return nil }); err != nil {
		v.log.Error("keep what the other host said of its role", "err", err)
		return
	}
	v.publishGate()
}

// conclude persists what must not be forgotten.
func (v *VM) conclude(d lineage.Decision, other delta.Generation) {
	if d.Alarm {
		v.log.Error("handshake", "outcome", d.Outcome.String(), "row", d.Row, "reason", d.Reason)
	}
	if !d.Diverged || v.record().Lineage.Diverged != nil {
		return
	}
	err := v.move(lineage.Change{Event: lineage.Diverge, Diverged: &lineage.Divergence{Row: d.Row, Reason: d.Reason, Other: other}}, nil)
	if err != nil {
		v.log.Error("keep the finding that the copies diverged", "err", err)
	}
}

// receiving returns the store when this generation may write into it.
func (m *Manager) receiving(ctx context.Context, id wire.VMID, g delta.Generation) (*VM, *points.Store, error) {
	v, err := m.ofPeer(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	v.mu.Lock()
	allowed, closed := v.facts.allowed, v.closed
	state := v.rec.Lineage.State
	v.mu.Unlock()
	if state != lineage.Replica {
		return nil, nil, &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("this host is %s for the VM, not its replica", state), Hint: "replicactl vm status"}
	}
	if closed {
		return nil, nil, &wire.Error{Kind: wire.KindUnavailable, Text: "a promotion of this host is under way", Hint: "replicactl vm status"}
	}
	if g.IsZero() || allowed != g {
		return nil, nil, &wire.Error{Kind: wire.KindUnavailable, Text: "this generation has not shaken hands since the replica started", Hint: "begin with a handshake"}
	}
	s, err := v.store()
	return v, s, err
}

// committed follows the position into the generation it lies in.
func (v *VM) committed(pos delta.Pos) error {
	v.heard()
	before := v.record()
	if err := v.followStore(); err != nil {
		return fmt.Errorf("follow the newest state's disks: %w", err)
	}
	r := v.record()
	if was := before.wholeNames(); !slices.Equal(was, r.wholeNames()) {
		go v.redefineLater() // libvirt may take its time, the epoch is committed
	}
	if r.Lineage.Generation == pos.Generation && !r.Incomplete && r.Lineage.Sealed.IsZero() && r.Next == nil {
		return nil
	}
	v.mu.Lock()
	ancestors := v.facts.peerAncestors
	v.mu.Unlock()
	switch {
	case r.Next != nil && r.Next.Generation == pos.Generation:
		ancestors = r.Next.Ancestors
	case r.Lineage.Generation == pos.Generation:
		ancestors = r.Lineage.Ancestors
	}
	err := v.move(lineage.Change{Event: lineage.Follow, Generation: pos.Generation, At: pos, Ancestors: ancestors}, func(r *Record) {
		r.Incomplete, r.Existing, r.Next = false, false, nil
		r.Lineage.Sealed = delta.Pos{}
		r.Lineage.Discard = delta.Generation{}
	})
	if err != nil {
		return fmt.Errorf("follow the new generation: %w", err)
	}
	return nil
}

// seedFrom makes durable whose seed the images hold before its first byte.
func (v *VM) seedFrom(g delta.Generation) error {
	if v.record().Lineage.Generation == g {
		return nil
	}
	v.mu.Lock()
	ancestors := v.facts.peerAncestors
	v.mu.Unlock()
	return v.move(lineage.Change{Event: lineage.Follow, Generation: g, Ancestors: ancestors}, nil)
}

// released is what this host's own tracker knew when it gave its writes up.
func (v *VM) released() (base delta.Pos, tracked bool) {
	r := v.record()
	return r.ReleasedBase, r.ReleasedTracked
}

func (v *VM) heard() {
	v.mu.Lock()
	v.facts.heard = v.deps.Now()
	v.mu.Unlock()
}

// guestIsOff is certain or an error: in doubt a guest may run.
func (v *VM) guestIsOff(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if errors.Is(err, libvirt.ErrNotFound) {
		return true, nil
	}
	if err != nil {
		return false, &wire.Error{Kind: wire.KindUnavailable, Text: "it is not known whether the guest runs: " + err.Error(), Hint: "systemctl status libvirtd virtqemud"}
	}
	return off(st), nil
}

// guestRuns asks libvirt; doubt counts as "as last seen".
func (v *VM) guestRuns() bool {
	ctx, cancel := context.WithTimeout(context.Background(), peerTimeout)
	defer cancel()
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case err == nil:
		v.facts.running = !off(st)
	case errors.Is(err, libvirt.ErrNotFound):
		v.facts.running = false
	}
	return v.facts.running
}
