package vm

import (
	"context"
	"errors"
	"fmt"
	"io"

	"kvmreplica/internal/block"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// These methods are the per-VM half of wire.Service; the daemon adds Hello.

func notFound(id wire.VMID) error {
	return &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("this host knows no VM %q", id), Hint: "replicactl vm enable on the primary"}
}

// ofPeer finds a VM and checks that the caller is its other half. An orphan has
// none.
func (m *Manager) ofPeer(ctx context.Context, id wire.VMID) (*VM, error) {
	v, ok := m.get(id)
	if !ok {
		return nil, notFound(id)
	}
	p, ok := wire.PeerFrom(ctx)
	if r := v.record(); !ok || p.Host != r.Peer || r.Orphan != nil {
		return nil, notFound(id) // a stranger learns nothing
	}
	return v, nil
}

// Find returns a VM by id.
func (m *Manager) Find(id wire.VMID) (*VM, bool) { return m.get(id) }

// Count is how many VMs a peer replicates to this host, and their bytes,
// leaving one out.
func (m *Manager) Count(host wire.HostID, except wire.VMID) (vms int, bytes int64) {
	for _, v := range m.All() {
		if r := v.record(); r.Peer == host && v.Receives() && r.VM != except {
			vms++
			bytes += r.bytes()
		}
	}
	return vms, bytes
}

// Withdraw ends a relationship. What was committed here stays, with its
// recovery points, as an orphan: a primary in the wrong hands must not be able
// to delete it. A replica that never held anything is removed.
func (m *Manager) Withdraw(ctx context.Context, w wire.Withdraw) error {
	v, err := m.ofPeer(ctx, w.VM)
	if err != nil {
		return err
	}
	unlock, err := v.lockAsked(ctx, "end the relationship")
	if err != nil {
		return err
	}
	defer unlock()
	if st := v.record().Lineage.State; st != lineage.Replica {
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("this host is %s for the VM, not its replica", st), Hint: "replicactl vm disable here"}
	}
	v.log.Info("relationship ended by the primary", "request", w.Request, "delete", w.Delete)
	if !v.empty() {
		return v.orphan(w.Request)
	}
	return v.endReplica(ctx, m, w.Delete)
}

// empty: nothing was ever committed here, and the images are not a guest's.
func (v *VM) empty() bool {
	r := v.record()
	st, err := v.storeStatus()
	return err == nil && st.State == points.Seeding && r.Lineage.Generation.IsZero() && r.Next == nil && !r.Native
}

// orphan keeps the copy without its primary. Nothing is received any more and
// nothing is thinned.
func (v *VM) orphan(request string) error {
	if err := v.closeIntake(); err != nil {
		return err
	}
	err := v.update(func(r *Record) error {
		r.Orphan = &Orphan{Since: v.deps.Now(), Request: request}
		return nil
	})
	if err != nil {
		v.openIntake()
		return err
	}
	if s, err := v.store(); err == nil {
		s.SetPolicy(v.retention(), 0)
	}
	v.log.Warn("the copy is an orphan: it is kept until it is deleted here")
	return nil
}

// Handshake answers with this host's half of the facts.
func (m *Manager) Handshake(ctx context.Context, q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	v, err := m.ofPeer(ctx, q.VM)
	if err != nil {
		return wire.HandshakeReply{}, err
	}
	if err := v.compared(q); err != nil {
		return wire.HandshakeReply{}, err
	}
	reply, err := v.half()
	if err != nil {
		return reply, err
	}
	if err := v.catchUp(); err != nil {
		return wire.HandshakeReply{}, err
	}
	v.judged(q, reply)
	return reply, nil
}

// PutSeed writes seed chunks into the images.
func (m *Manager) PutSeed(ctx context.Context, q wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	v, s, err := m.receiving(ctx, q.VM, q.Generation)
	if err != nil {
		return wire.SeedReply{}, err
	}
	have, err := s.SeedCursor(string(q.Disk))
	if err != nil {
		return wire.SeedReply{}, storeError(err)
	}
	if q.Offset > have || q.Offset < 0 {
		return wire.SeedReply{Cursor: have}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("seed of %s at %d, the cursor is at %d", q.Disk, q.Offset, have)}
	}
	d := delta.NewDecoder(body)
	h, err := d.Header()
	if err == nil && (!h.Seed || h.VM.String() != string(q.VM) || h.Generation != q.Generation) {
		err = &wire.Error{Kind: wire.KindInvalid, Text: "the seed stream belongs to something else"}
	}
	if err == nil {
		err = v.seedFrom(q.Generation)
	}
	for err == nil {
		var frame []byte
		if frame, _, err = d.Next(); err == nil {
			err = s.SeedChunk(&h, frame)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	cursors, ferr := s.SeedFlush()
	v.heard()
	return wire.SeedReply{Cursor: cursors[string(q.Disk)]}, storeError(errors.Join(err, ferr))
}

// EpochProgress is the number of verified chunks kept.
func (m *Manager) EpochProgress(ctx context.Context, k wire.EpochKey) (uint32, error) {
	_, s, err := m.receiving(ctx, k.VM, k.Generation)
	if err != nil {
		return 0, err
	}
	return s.Progress(k.Generation, k.Epoch, k.Nonce), nil
}

// PutEpoch receives and commits an epoch.
func (m *Manager) PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error) {
	if _, _, err := m.receiving(ctx, k.VM, k.Generation); err != nil {
		return delta.Pos{}, err
	}
	d := delta.NewDecoder(body)
	h, err := d.Header()
	if err != nil {
		return delta.Pos{}, storeError(err)
	}
	if h.Seed || h.VM.String() != string(k.VM) || h.Generation != k.Generation || h.Epoch != k.Epoch || h.Nonce != k.Nonce {
		return delta.Pos{}, &wire.Error{Kind: wire.KindInvalid, Text: "the stream is not the epoch that was announced"}
	}
	if h.Epoch >= patchEpoch {
		return delta.Pos{}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("epoch %d is no epoch: patches have such numbers", h.Epoch)}
	}
	v, rcv, err := m.beginEpoch(ctx, k, h)
	if err != nil {
		return delta.Pos{}, storeError(err)
	}
	if n := rcv.Next(); n != from {
		return delta.Pos{}, &wire.Error{Kind: wire.KindUnavailable, Text: fmt.Sprintf("the stream begins at chunk %d, chunk %d is wanted", from, n)}
	}
	rcv.First(func(all []points.Replaced) error { return v.keepReplaced(ctx, all) })
	pos, err := rcv.Stream(ctx, d)
	if err != nil {
		return delta.Pos{}, storeError(err)
	}
	if err := v.committed(pos); err != nil {
		return delta.Pos{}, err
	}
	return pos, nil
}

// beginEpoch opens an epoch, or finds the intake closed; nothing comes between.
func (m *Manager) beginEpoch(ctx context.Context, k wire.EpochKey, h delta.Header) (*VM, *points.Receive, error) {
	v, err := m.ofPeer(ctx, k.VM)
	if err != nil {
		return nil, nil, err
	}
	v.intake.RLock()
	defer v.intake.RUnlock()
	_, s, err := m.receiving(ctx, k.VM, k.Generation)
	if err != nil {
		return nil, nil, err
	}
	if err := m.roomFor(v, h.Disks); err != nil {
		return nil, nil, err
	}
	if err := v.expect(k.Generation); err != nil {
		return nil, nil, err
	}
	rcv, err := s.Begin(h)
	return v, rcv, err
}

// roomFor holds disks that grew against what their host was granted, before
// anything of the epoch is received.
func (m *Manager) roomFor(v *VM, disks []delta.Disk) error {
	r := v.record()
	var need int64
	for _, d := range disks { // at most MaxDisks of at most delta.MaxDiskSize
		need += d.Size
	}
	if need <= r.bytes() {
		return nil
	}
	g, err := m.deps.Grant(r.Peer)
	if err != nil {
		return err
	}
	if _, used := m.Count(r.Peer, r.VM); g.MaxBytes > 0 && used+need > g.MaxBytes {
		return &wire.Error{
			Kind: wire.KindNoSpace, Text: fmt.Sprintf("%s may send %d bytes of disks, with what %s has grown to it would be %d", g.Name, g.MaxBytes, r.Name, used+need),
			Hint: "on the replica host: replicactl peer allow " + g.Name + " --may-send …",
		}
	}
	return nil
}

// Beat says that nothing changed since the committed cut.
func (m *Manager) Beat(ctx context.Context, b wire.Beat) error {
	// Before the first epoch of a generation the position is its parent's.
	v, err := m.ofPeer(ctx, b.VM)
	if err != nil {
		return err
	}
	v.mu.Lock()
	allowed := v.facts.allowed
	v.mu.Unlock()
	_, s, err := m.receiving(ctx, b.VM, allowed)
	if err != nil {
		return err
	}
	if c := s.Committed(); c != b.Pos {
		return &wire.Error{Kind: wire.KindPosMismatch, Text: "the primary beats for another position", Have: &c}
	}
	v.mu.Lock()
	v.facts.beat, v.facts.beatAt, v.facts.heard = v.deps.Now(), b.Pos, v.deps.Now()
	v.mu.Unlock()
	return nil
}

// Digests hashes committed content.
func (m *Manager) Digests(ctx context.Context, q wire.DigestRequest) (wire.DigestReply, error) {
	v, err := m.ofPeer(ctx, q.VM)
	if err != nil {
		return wire.DigestReply{}, err
	}
	s, err := v.store()
	if err != nil {
		return wire.DigestReply{}, err
	}
	if len(q.Ranges) > wire.MaxDigestRanges {
		return wire.DigestReply{}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("%d ranges, at most %d", len(q.Ranges), wire.MaxDigestRanges)}
	}
	rs := make([]block.Range, len(q.Ranges))
	for i, r := range q.Ranges {
		if r.Off < 0 || r.Len < 0 || r.Len > 1<<20 {
			return wire.DigestReply{}, &wire.Error{Kind: wire.KindInvalid, Text: "a range is outside what one digest may cover"}
		}
		rs[i] = block.Range{Off: r.Off, Len: r.Len}
	}
	ds, err := s.Digests(ctx, q.Pos, string(q.Disk), q.Key, rs)
	return wire.DigestReply{Digests: ds}, storeError(err)
}

// Status is this host's view of one VM.
func (m *Manager) Status(ctx context.Context, id wire.VMID) (wire.PeerVM, error) {
	v, err := m.ofPeer(ctx, id)
	if err != nil {
		return wire.PeerVM{}, err
	}
	return v.peerView(ctx)
}

// Failover carries one step of a role change.
func (m *Manager) Failover(ctx context.Context, q wire.FailoverRequest) (wire.FailoverReply, error) {
	v, err := m.ofPeer(ctx, q.VM)
	if err != nil {
		return wire.FailoverReply{}, err
	}
	if q.Request == "" || len(q.Request) > 128 {
		return wire.FailoverReply{}, &wire.Error{Kind: wire.KindInvalid, Text: "a role change needs a correlation id"}
	}
	switch q.Step {
	case stepPromote:
		return v.promoteAsked(ctx, q)
	case stepQuery:
		return v.declineAsked(ctx, q)
	case stepReleasePlan:
		return v.planRelease(ctx)
	case stepRelease:
		return v.release(ctx, q)
	case stepRequest:
		return v.plannedAsked(ctx, q)
	}
	return wire.FailoverReply{}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("unknown step %.32q", q.Step)}
}

// Check answers the receiver's side of prerequisites.
func (m *Manager) Check(ctx context.Context, q wire.CheckRequest) (wire.CheckReply, error) {
	p, ok := wire.PeerFrom(ctx)
	if !ok {
		return wire.CheckReply{}, &wire.Error{Kind: wire.KindRefused, Text: "a check needs an authenticated host"}
	}
	return wire.CheckReply{Checks: m.checks(ctx, p, q)}, nil
}

// storeError gives errors of the store their kinds.
func storeError(err error) error {
	var mismatch *delta.PosMismatchError
	var w *wire.Error
	switch {
	case err == nil, errors.As(err, &w):
		return err
	case errors.As(err, &mismatch):
		have := mismatch.Have
		return &wire.Error{Kind: wire.KindPosMismatch, Text: err.Error(), Have: &have}
	case errors.Is(err, points.ErrNoSpace):
		return &wire.Error{Kind: wire.KindNoSpace, Text: err.Error(), Hint: "free space on the replica's storage"}
	case errors.Is(err, points.ErrBusy):
		return &wire.Error{Kind: wire.KindUnavailable, Text: err.Error()}
	case errors.Is(err, points.ErrFork):
		return &wire.Error{Kind: wire.KindDiverged, Text: err.Error()}
	case errors.Is(err, points.ErrSuspect), errors.Is(err, points.ErrDamaged):
		return &wire.Error{Kind: wire.KindSuspect, Text: err.Error(), Hint: "on the replica host: replicactl vm resync NAME"}
	case errors.Is(err, points.ErrSeeding), errors.Is(err, points.ErrNotSeeding), errors.Is(err, points.ErrState), errors.Is(err, points.ErrPromoted), errors.Is(err, points.ErrDisks):
		return &wire.Error{Kind: wire.KindRefused, Text: err.Error()}
	case errors.Is(err, points.ErrFailed):
		return &wire.Error{Kind: wire.KindUnavailable, Text: err.Error()}
	case errors.Is(err, delta.ErrFormat), errors.Is(err, delta.ErrChecksum), errors.Is(err, delta.ErrVersion), errors.Is(err, delta.ErrOrder):
		return &wire.Error{Kind: wire.KindCorrupt, Text: err.Error()}
	}
	return err
}

// peerView is what the other host may know.
func (v *VM) peerView(ctx context.Context) (wire.PeerVM, error) {
	r := v.record()
	out := wire.PeerVM{VM: r.VM, Name: r.Name, Role: r.Lineage.Role(), State: string(r.Lineage.State), Generation: r.Lineage.Generation, Diverged: r.Lineage.Diverged != nil, Pending: -1, Committed: r.Acked}
	if g, _, ok := v.promotedOffline(); ok {
		out.Role, out.Generation = lineage.RolePrimary, g
	}
	lctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	st, _, err := v.deps.Hyper.DomainState(lctx, string(v.id))
	if err != nil && !errors.Is(err, libvirt.ErrNotFound) {
		// "it does not run" would let the other host start it
		return out, &wire.Error{Kind: wire.KindUnavailable, Text: "that host cannot tell whether the guest runs: " + err.Error(), Hint: "systemctl status libvirtd virtqemud there"}
	}
	out.Defined = err == nil
	out.Running = err == nil && !off(st)
	if st, err := v.storeStatus(); err == nil {
		out.Committed, out.Applied = st.Committed, st.Applied
	}
	if c, err := v.plane(); err == nil {
		if s, err := c.Status(ctx); err == nil {
			out.Pending = s.Pending
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.bypass() != "" || v.overlay() != "" {
		out.Pending = -1 // what is not tracked is not counted
	}
	if v.stuck != nil {
		out.Interrupted = string(v.stuck.Kind)
	}
	return out, nil
}
