package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"kvmreplica/integration/oracle"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// ship is one primary's session, stepped by hand: the product's machine and
// operations without their goroutines.
type ship struct {
	h     *host
	s     *session.Session
	m     *session.Machine
	todo  session.Action
	final *finalEnd
}

type finalEnd struct {
	pos delta.Pos
	err error
}

func (h *host) startShip() {
	if h.ship != nil || h.plane == nil {
		return
	}
	sh := &ship{h: h}
	rng := rand.New(rand.NewPCG(h.w.seed, 77))
	sh.s = session.New(session.Config{
		VM: vmID, Name: "web", Source: &spy{Client: h.client, h: h}, Replica: &courier{h},
		Complete: h.complete, Union: h.union, ScrubRate: 1 << 40, Rand: rng,
	})
	sh.m = session.NewMachine(session.MachineConfig{
		Interval: h.w.opt.Interval, ScrubRate: 1 << 40, Verified: h.w.opt.Verified, Rand: rng.Float64,
	}, h.w.now)
	h.ship = sh
	sh.feed(session.EvStart{})
}

// feed gives the machine an event and keeps the one operation it asks for.
func (sh *ship) feed(ev session.Event) {
	if f, ok := ev.(session.EvFailed); ok {
		sh.h.w.count("session failed " + string(f.Class))
		sh.h.w.note("  %s session: %s: %s", sh.h.name, f.Class, f.Text)
	}
	for _, a := range sh.m.Step(sh.h.w.now, ev) {
		switch a := a.(type) {
		case session.DoCancel, session.Committed, session.Joined: // nothing is outstanding between two steps
		case session.FinalDone:
			sh.final = &finalEnd{pos: a.Pos}
		case session.FinalFailed:
			sh.final = &finalEnd{err: errors.New(a.Stop.Reason)}
		default:
			sh.todo = a
		}
	}
}

// step performs one operation, or lets the time pass until one is due.
func (sh *ship) step() bool {
	w := sh.h.w
	if a := sh.todo; a != nil {
		sh.todo = nil
		w.count(fmt.Sprintf("session %T", a)[len("session "):])
		ev := sh.s.Perform(context.Background(), a)
		if sh.h.ship != sh || sh.h.lost() {
			return true // the host has changed under it
		}
		sh.feed(ev)
		return true
	}
	at, ok := sh.m.Wake()
	if !ok {
		return false
	}
	if w.now.Before(at) {
		w.now = at
	}
	sh.feed(session.EvWake{})
	return true
}

// complete adds to a handshake what only the record knows.
func (h *host) complete(r *wire.HandshakeRequest) {
	l := h.rec.Lineage
	r.Ancestors, r.Before, r.Diverged = l.Ancestors, l.Before, l.Diverged != nil
	r.Between = l.Before == l.Parent()
	r.Running = h.guest != nil
}

func (h *host) union(ctx context.Context, _ lineage.Decision) error {
	if h.rec.UnionMarked {
		return nil
	}
	return h.client.Mark(ctx, dataplane.MarkRequest{Reason: "the old primary's changes are not known"})
}

// cutMark is what the oracle saw at a freeze.
type cutMark struct {
	nonce  uint64
	dirty  map[wire.DiskName][]wire.Range
	images oracle.Images
}

// spy notes cuts and acknowledgements on their way to the data plane.
type spy struct {
	*dataplane.Client
	h *host
}

// Freeze implements session.Source.
func (s *spy) Freeze(ctx context.Context, r dataplane.FreezeRequest) (dataplane.Epoch, error) {
	dirty, err := s.h.dirty()
	if err != nil {
		return dataplane.Epoch{}, err
	}
	e, err := s.Client.Freeze(ctx, r)
	if err != nil || e.Empty {
		return e, err
	}
	w := s.h.w
	images := s.h.content()
	w.cuts[cutName{e.Generation, e.Epoch, e.Nonce}] = images
	if s.h.frozen == nil {
		s.h.frozen = map[delta.Generation]map[uint64]cutMark{}
	}
	s.h.frozen[e.Generation] = map[uint64]cutMark{e.Epoch: {nonce: e.Nonce, dirty: dirty, images: images}}
	w.highest[e.Generation] = max(w.highest[e.Generation], e.Epoch)
	return e, nil
}

// Ack implements session.Source.
func (s *spy) Ack(ctx context.Context, pos delta.Pos) error {
	err := s.Client.Ack(ctx, pos)
	if err == nil && !s.h.lost() {
		s.h.w.acked(s.h, pos)
	}
	return err
}

// dirty is the tracker's active set.
func (h *host) dirty() (map[wire.DiskName][]wire.Range, error) {
	out := map[wire.DiskName][]wire.Range{}
	for _, d := range disks() {
		for off := int64(0); ; {
			a, err := h.client.Ranges(context.Background(), dataplane.RangesRequest{Disk: wire.DiskName(d.name), Offset: off, Bytes: 1 << 40})
			if err != nil {
				return nil, err
			}
			out[wire.DiskName(d.name)] = append(out[wire.DiskName(d.name)], a.Ranges...)
			if a.Done {
				break
			}
			off = a.Next
		}
	}
	return out, nil
}

// courier is the peer as the session sees it.
type courier struct{ h *host }

// Handshake implements session.Replica.
func (c *courier) Handshake(ctx context.Context, q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	reply, err := linked{c.h}.Handshake(ctx, q)
	if err != nil {
		return reply, err
	}
	return reply, c.h.judge(q, reply)
}

// judge is the asking host's reading of both halves.
func (h *host) judge(q wire.HandshakeRequest, reply wire.HandshakeReply) error {
	d := lineage.Decide(q, reply)
	h.w.count("handshake " + d.Row)
	h.w.note("  %s handshake: %s (%s)", h.name, d.Row, d.Outcome)
	if err := h.conclude(d, reply.Generation); err != nil {
		return err
	}
	switch {
	case !d.MayRun(lineage.P):
		h.held = d.Reason
	case d.MayShip():
		h.held = ""
	}
	why := h.rec.Superseded
	switch {
	case d.Outcome == lineage.Stale:
		why = d.Reason
	case d.MayShip():
		why = ""
	}
	if why == h.rec.Superseded {
		return nil
	}
	return h.update(func(r *record) { r.Superseded = why })
}

// conclude persists a divergence before anything else happens.
func (h *host) conclude(d lineage.Decision, other delta.Generation) error {
	if !d.Diverged || h.rec.Lineage.Diverged != nil {
		return nil
	}
	return h.move(lineage.Change{Event: lineage.Diverge, Diverged: &lineage.Divergence{Row: d.Row, Reason: d.Reason, Other: other}}, nil)
}

// cutName is a frozen content; numbers may come back after a host was put back
// to an earlier state, nonces do not.
type cutName struct {
	generation delta.Generation
	epoch      uint64
	nonce      uint64
}

func name(p delta.Pos) oracle.Position {
	return oracle.Position{Generation: p.Generation.String(), Epoch: p.Epoch, Digest: p.Digest.String()}
}

// linked reaches the other host over the link.
type linked struct{ h *host }

// settleShip drives the session until nothing is due at this moment, at most n
// operations.
func (h *host) settleShip(n int) {
	for range n {
		if h.ship == nil || h.lost() || !h.ship.step() {
			return
		}
	}
}
