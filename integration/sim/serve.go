package sim

import (
	"context"
	"errors"
	"fmt"
	"io"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// What a host answers; package vm's service is the model.

func unavailable(format string, a ...any) error {
	return &wire.Error{Kind: wire.KindUnavailable, Text: fmt.Sprintf(format, a...)}
}

// half is this host's half of a handshake.
func (h *host) half() (wire.HandshakeReply, error) {
	l := h.rec.Lineage
	r := wire.HandshakeReply{
		VM: vmID, Role: l.Role(), Generation: l.Generation, Ancestors: l.Ancestors,
		Diverged: l.Diverged != nil, Running: h.guest != nil, Discard: l.Discard,
	}
	for _, d := range disks() {
		r.Disks = append(r.Disks, wire.DiskName(d.name))
	}
	if l.State == lineage.Demoting || l.State == lineage.Demoted {
		return r, unavailable("a role change is under way on this host")
	}
	if l.State != lineage.Replica {
		return r, nil
	}
	if h.store == nil {
		return r, unavailable("the store is not open")
	}
	st := h.store.Status()
	if h.rec.Incomplete && st.State != points.Seeding && h.rec.Next == nil {
		return r, unavailable("this host is still giving up its own writes")
	}
	r.VerifyAll = st.VerifyAll
	switch st.State {
	case points.Seeding:
		r.Seeding = map[wire.DiskName]int64{}
		for d, c := range st.Seeded {
			r.Seeding[wire.DiskName(d)] = c
		}
		if !l.Discard.IsZero() {
			r.Base, r.Tracked = h.rec.ReleasedBase, h.rec.ReleasedTracked
		}
		return r, nil
	case points.Rolling:
		return r, unavailable("a failover to an older recovery point is under way on this host")
	case points.Suspect, points.Damaged:
		return r, &wire.Error{Kind: wire.KindSuspect, Text: fmt.Sprintf("the replica is %s: %v", st.State, st.Damage)}
	}
	r.Committed, r.Generation = st.Committed, st.Committed.Generation
	r.Ancestors = ancestorsOf(l, st.Committed)
	r.Sealed = !l.Sealed.IsZero() && l.Sealed == st.Committed
	return r, nil
}

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

func (h *host) serveHandshake(q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	reply, err := h.half()
	if err != nil {
		return reply, err
	}
	if err := h.catchUp(); err != nil {
		return reply, err
	}
	d := lineage.Decide(q, reply)
	h.allowed, h.asker, h.succession = delta.Generation{}, q.Generation, q.Ancestors
	if d.MayShip() && !h.closed {
		h.allowed = q.Generation
	}
	return reply, h.conclude(d, q.Generation)
}

// receiving is the store, when this generation may write into it.
func (h *host) receiving(g delta.Generation) (*points.Store, error) {
	switch {
	case h.rec.Lineage.State != lineage.Replica:
		return nil, &wire.Error{Kind: wire.KindRefused, Text: "this host is " + string(h.rec.Lineage.State)}
	case h.closed:
		return nil, unavailable("a promotion of this host is under way")
	case g.IsZero() || h.allowed != g:
		return nil, unavailable("this generation has not shaken hands since the replica started")
	case h.store == nil:
		return nil, unavailable("the store is not open")
	}
	return h.store, nil
}

func (h *host) serveSeed(q wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	s, err := h.receiving(q.Generation)
	if err != nil {
		return wire.SeedReply{}, err
	}
	have, err := s.SeedCursor(string(q.Disk))
	if err != nil {
		return wire.SeedReply{}, mapped(err)
	}
	if q.Offset > have {
		return wire.SeedReply{Cursor: have}, &wire.Error{Kind: wire.KindInvalid, Text: "beyond the cursor"}
	}
	d := delta.NewDecoder(body)
	hd, err := d.Header()
	if err == nil && (!hd.Seed || hd.Generation != q.Generation) {
		err = &wire.Error{Kind: wire.KindInvalid, Text: "the seed stream belongs to something else"}
	}
	if err == nil && h.rec.Lineage.Generation != q.Generation {
		err = h.move(lineage.Change{Event: lineage.Follow, Generation: q.Generation, Ancestors: h.succession}, nil)
	}
	for err == nil {
		var frame []byte
		if frame, _, err = d.Next(); err == nil {
			err = s.SeedChunk(&hd, frame)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	cursors, ferr := s.SeedFlush()
	return wire.SeedReply{Cursor: cursors[string(q.Disk)]}, mapped(errors.Join(err, ferr))
}

func (h *host) serveEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error) {
	s, err := h.receiving(k.Generation)
	if err != nil {
		return delta.Pos{}, err
	}
	d := delta.NewDecoder(body)
	hd, err := d.Header()
	if err != nil {
		return delta.Pos{}, mapped(err)
	}
	if hd.Seed || hd.Generation != k.Generation || hd.Epoch != k.Epoch || hd.Nonce != k.Nonce {
		return delta.Pos{}, &wire.Error{Kind: wire.KindInvalid, Text: "the stream is not the epoch that was announced"}
	}
	if err := h.expect(k.Generation); err != nil {
		return delta.Pos{}, err
	}
	rcv, err := s.Begin(hd)
	if err != nil {
		return delta.Pos{}, mapped(err)
	}
	if n := rcv.Next(); n != from {
		return delta.Pos{}, unavailable("the stream begins at chunk %d, chunk %d is wanted", from, n)
	}
	if err := h.keepUp(s); err != nil {
		return delta.Pos{}, mapped(err)
	}
	before := s.Committed()
	h.tried = &commitTry{k, before}
	pos, err := rcv.Stream(ctx, d)
	if now := s.Committed(); now != before { // also when the answer is an error
		h.w.committed(h, now, before, k)
	}
	if err != nil {
		return delta.Pos{}, mapped(err)
	}
	return pos, h.follow(pos)
}

// keepUp applies what is too old: a commit would wait for the goroutine that
// does that in the product.
func (h *host) keepUp(s *points.Store) error {
	for s.BacklogAge() > backlogAge {
		h.w.count("commit waited for apply")
		if did, err := s.Step(background()); err != nil || !did {
			return errors.Join(err, points.ErrBusy)
		}
	}
	return nil
}

// expect makes durable who may follow before its first epoch is committed.
func (h *host) expect(g delta.Generation) error {
	r := h.rec
	if r.Lineage.Generation == g && !r.Incomplete || r.Next != nil && r.Next.Generation == g {
		return nil
	}
	return h.update(func(r *record) { r.Next = &succession{g, h.succession} })
}

// follow moves the record into the generation a committed position lies in.
func (h *host) follow(pos delta.Pos) error {
	r := h.rec
	if r.Lineage.Generation == pos.Generation && !r.Incomplete && r.Lineage.Sealed.IsZero() && r.Next == nil {
		return nil
	}
	ancestors := h.succession
	switch {
	case r.Next != nil && r.Next.Generation == pos.Generation:
		ancestors = r.Next.Ancestors
	case r.Lineage.Generation == pos.Generation:
		ancestors = r.Lineage.Ancestors
	}
	return h.move(lineage.Change{Event: lineage.Follow, Generation: pos.Generation, At: pos, Ancestors: ancestors}, func(r *record) {
		r.Incomplete, r.Next = false, nil
		r.Lineage.Sealed, r.Lineage.Discard = delta.Pos{}, delta.Generation{}
	})
}

// catchUp follows what the store committed and the record does not know yet.
func (h *host) catchUp() error {
	if h.rec.Lineage.State != lineage.Replica || h.rec.Next == nil || h.store == nil {
		return nil
	}
	st := h.store.Status()
	if st.State != points.Replica || st.Committed.Generation != h.rec.Next.Generation {
		return nil
	}
	return h.follow(st.Committed)
}

func (h *host) serveBeat(b wire.Beat) error {
	s, err := h.receiving(h.allowed)
	if err != nil {
		return err
	}
	if c := s.Committed(); c != b.Pos {
		return &wire.Error{Kind: wire.KindPosMismatch, Text: "the primary beats for another position", Have: &c}
	}
	return nil
}

func (h *host) serveDigests(ctx context.Context, q wire.DigestRequest) (wire.DigestReply, error) {
	if h.store == nil {
		return wire.DigestReply{}, unavailable("the store is not open")
	}
	rs := make([]block.Range, len(q.Ranges))
	for i, r := range q.Ranges {
		rs[i] = block.Range{Off: r.Off, Len: r.Len}
	}
	ds, err := h.store.Digests(ctx, q.Pos, string(q.Disk), q.Key, rs)
	return wire.DigestReply{Digests: ds}, mapped(err)
}

func (h *host) serveStatus() (wire.PeerVM, error) {
	out := wire.PeerVM{VM: vmID, Role: h.rec.Lineage.Role(), Generation: h.rec.Lineage.Generation, Running: h.guest != nil, Pending: -1}
	if h.store != nil {
		out.Committed = h.store.Committed()
	}
	return out, nil
}

// mapped gives the store's errors their kinds.
func mapped(err error) error {
	var pm *delta.PosMismatchError
	var we *wire.Error
	switch {
	case err == nil || errors.As(err, &we):
		return err
	case errors.As(err, &pm):
		return &wire.Error{Kind: wire.KindPosMismatch, Text: err.Error(), Have: &pm.Have}
	case errors.Is(err, points.ErrNoSpace):
		return &wire.Error{Kind: wire.KindNoSpace, Text: err.Error()}
	case errors.Is(err, points.ErrFork):
		return &wire.Error{Kind: wire.KindDiverged, Text: err.Error()}
	case errors.Is(err, points.ErrSuspect), errors.Is(err, points.ErrDamaged):
		return &wire.Error{Kind: wire.KindSuspect, Text: err.Error()}
	case errors.Is(err, points.ErrSeeding), errors.Is(err, points.ErrNotSeeding), errors.Is(err, points.ErrState), errors.Is(err, points.ErrPromoted), errors.Is(err, points.ErrDisks):
		return &wire.Error{Kind: wire.KindRefused, Text: err.Error()}
	case errors.Is(err, points.ErrFailed), errors.Is(err, points.ErrBusy):
		return unavailable("%v", err)
	case errors.Is(err, delta.ErrFormat), errors.Is(err, delta.ErrChecksum), errors.Is(err, delta.ErrOrder):
		return &wire.Error{Kind: wire.KindCorrupt, Text: err.Error()}
	}
	return err
}
