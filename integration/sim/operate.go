package sim

import (
	"context"
	"fmt"
	"math/rand/v2"

	"kvmreplica/integration/oracle"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
)

// What operators do, and what happens to whole machines.

func background() context.Context { return context.Background() }

func eventTrigger() session.Event { return session.EvTrigger{} }

func opPause(w *World, r *rand.Rand) error {
	h := w.pick(r)
	if h.ship == nil || !h.up || h.lost() {
		return nil
	}
	h.ship.feed(session.EvPause{})
	h.settleShip(1)
	if h.ship != nil && !h.lost() {
		h.ship.feed(session.EvResume{})
	}
	return nil
}

// owner is a host that serves; the first one when both do.
func (w *World) owner() *host {
	for _, h := range w.hosts {
		if h.up && !h.lost() && h.rec.Lineage.MayServe() {
			return h
		}
	}
	return nil
}

func (w *World) request(kind string, r *rand.Rand) string {
	return fmt.Sprintf("%s-%d", kind, r.Uint64())
}

func opPlanned(w *World, r *rand.Rand) error {
	h := w.owner()
	if h == nil {
		return nil
	}
	return w.told(h.planned(w.request("planned", r)))
}

// opPlannedCrash is a planned failover during which one host stops at a step.
func opPlannedCrash(w *World, r *rand.Rand) error {
	h := w.owner()
	if h == nil {
		return nil
	}
	on := []string{"shutdown", "demote", "final", "seal", "demoted", "promote", "follow"}
	at := h.name + " planned/" + on[r.IntN(len(on))]
	if r.IntN(2) == 0 {
		on = []string{"apply", "generation", "store", "tracker", "start", "reverse"}
		at = h.other().name + " promote/" + on[r.IntN(len(on))]
	}
	w.crashStep = at + []string{"/begun", "/acted"}[r.IntN(2)]
	err := h.planned(w.request("planned", r))
	w.crashStep = ""
	return w.told(err)
}

// opUnplanned is an operator who takes the replica's side, whatever the
// primary does.
func opUnplanned(w *World, r *rand.Rand) error {
	h := w.pick(r)
	if !h.up || h.lost() || h.rec.Lineage.State != lineage.Replica {
		return nil
	}
	return w.told(h.unplanned(w.request("unplanned", r)))
}

func opReverse(w *World, r *rand.Rand) error {
	for _, h := range w.hosts {
		if !h.up || h.lost() || !h.rec.Lineage.MayServe() || !h.rec.NoReverse {
			continue
		}
		o := h.other()
		o.stopGuest() // a person does that first
		return w.told(h.reverse(w.request("reverse", r)))
	}
	return nil
}

func opPin(w *World, r *rand.Rand) error {
	for _, h := range w.hosts {
		if !h.up || h.lost() || h.store == nil {
			continue
		}
		ps := h.store.Points()
		if len(ps) == 0 {
			continue
		}
		p := ps[r.IntN(len(ps))]
		if r.IntN(2) == 0 {
			return w.told(h.store.Pin(p.Pos))
		}
		return w.told(h.store.Unpin(p.Pos))
	}
	return nil
}

// opSnapshot copies a whole machine, as a backup of it would.
func opSnapshot(w *World, r *rand.Rand) error {
	h := w.pick(r)
	if h.lost() || h.arm != nil || h.unmade {
		return nil
	}
	w.count("snapshot")
	h.copy = h.m.Cut(fsxtest.Newest)
	return nil
}

// opRestore puts a machine back to its copy: state and images, F27.
func opRestore(w *World, r *rand.Rand) error {
	h := w.pick(r)
	if h.copy == nil {
		return nil
	}
	if err := h.crash(false, r.Uint64()); err != nil {
		return err
	}
	h.m, h.hist = h.copy.Cut(fsxtest.Newest), nil
	h.unmade, h.tried = false, nil
	h.settings()
	w.count("restored")
	if h.guest != nil {
		return fmt.Errorf("%w: a guest survived a power cut", oracle.ErrViolation)
	}
	w.forget(h)
	return nil
}

// forget drops what the oracle knew of a machine that was put back: what it
// lost by that is the operator's doing.
func (w *World) forget(h *host) {
	w.forced = true // a promoted host may be a primary again
	h.acks = oracle.NewAcks()
	s, err := points.Open(h.storeConfig())
	if err != nil {
		return
	}
	if c := s.Committed(); !c.IsZero() {
		_ = h.acks.Committed(name(c), oracle.Position{})
	}
	_ = s.Close()
}

// consented: a host that was put back starts the guest in a generation that had
// been handed over, because a person or the policy said so.
func (w *World) consented() {
	if w.forced {
		w.roles.PutBack()
	}
}

// opReseed makes the replica anew: disabled and enabled again.
func opReseed(w *World, _ *rand.Rand) error {
	p := w.owner()
	if p == nil || p.other().rec.Lineage.State != lineage.Replica {
		return nil
	}
	return w.told(p.reseed())
}

// reseed throws the other host's copy away and begins a new one.
func (h *host) reseed() error {
	o := h.other()
	if !o.up || o.lost() {
		return errDown
	}
	h.w.count("reseeded")
	_ = o.closeStore()
	_ = o.closePlane()
	o.stopGuest()
	o.hist, o.ship, o.closed, o.held, o.allowed = nil, nil, false, "", delta.Generation{}
	if err := o.remake(); err != nil {
		return err
	}
	if h.ship != nil {
		h.ship.feed(session.EvRetry{})
	}
	return o.raise()
}

// remake begins a copy anew. What a crash leaves of it is made again before the
// host starts: in the product a record that has ended says so.
func (h *host) remake() error {
	h.unmade = true
	if err := points.Remove(h.fs("store")); err != nil {
		return err
	}
	if err := h.m.FS.Remove(planFile); err != nil && !notThere(err) {
		return err
	}
	if err := h.update(func(r *record) { *r = record{Lineage: lineage.New(vmID, delta.Generation{})} }); err != nil {
		return err
	}
	if err := h.createStore(); err != nil {
		return err
	}
	h.unmade = false
	return nil
}
