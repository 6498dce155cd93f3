package sim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"kvmreplica/integration/oracle"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
)

// start begins the processes on what the storage holds.
func (h *host) start() error {
	if h.up {
		return nil
	}
	known, err := h.loadRecord()
	if err != nil || !known {
		return err
	}
	h.up = true
	return h.tend()
}

// tend brings the role's machinery up, ends what was interrupted, and decides
// about the guest; it may be called at any time.
func (h *host) tend() error {
	if !h.up {
		return nil
	}
	if h.unmade {
		if err := h.remake(); err != nil {
			return err
		}
	}
	if h.store != nil {
		if _, err := h.store.Step(context.Background()); errors.Is(err, points.ErrFailed) {
			_ = h.closeStore() // it failed, maybe under a plan: only opening it again helps
		}
	}
	if j, err := failover.Load(h.m.FS, planFile); err != nil {
		return err
	} else if j != nil {
		if err := h.settle(j); err != nil {
			h.w.note("  %s plan %s/%s: %v", h.name, j.Kind, j.Begun, err)
		}
	} else {
		h.closed = false // what closed it never began
	}
	if err := h.raise(); err != nil {
		return err
	}
	return h.decideBoot()
}

// raise opens what the role needs.
func (h *host) raise() error {
	l := h.rec.Lineage
	switch {
	case l.State == lineage.Replica:
		if err := h.completeStore(); err != nil {
			return err
		}
		if err := h.openStore(); err != nil {
			return err
		}
		h.checkAcks()
		return h.catchUp()
	case l.MayServe():
		if err := h.openPlane(); err != nil {
			return err
		}
		if !h.rec.NoReverse {
			h.startShip()
		}
	case l.State == lineage.Primary || l.State == lineage.Promoted:
		h.ship = nil
		return h.openPlane()
	}
	return nil
}

// decideBoot starts the guest that ran before the host went down.
func (h *host) decideBoot() error {
	if h.booted {
		return nil
	}
	if !h.rec.Lineage.MayServe() || h.guest != nil {
		h.booted = true
		return nil
	}
	why, answered := h.askPeer()
	switch {
	case why != "":
		h.held = why
		return h.refuse(why)
	case !answered && h.asked < 3:
		h.asked++
		h.held = "the other host is being asked"
		return nil
	case !answered && h.rec.Superseded != "":
		h.held = h.rec.Superseded
		return nil
	}
	if !answered {
		h.w.count("silent peer: start")
		h.w.consented()
	}
	h.held, h.booted = "", true
	if !h.rec.WantRunning {
		return nil
	}
	return h.startGuest()
}

// askPeer asks whether the VM may run here.
func (h *host) askPeer() (why string, answered bool) {
	s, err := linked{h}.status()
	switch {
	case err != nil:
		return "", false
	case s.Running:
		return "the VM runs on the other host", true
	case s.Role == lineage.RolePrimary && !h.knows(s.Generation):
		return "the other host was promoted and owns the VM now", true
	case s.Role == lineage.RoleReplica && !s.Committed.IsZero() && !h.knows(s.Committed.Generation):
		return "this host's state was put back to an earlier time", true
	}
	return "", true
}

// knows reports a generation that is ours or before ours.
func (h *host) knows(g delta.Generation) bool {
	if g == h.rec.Lineage.Generation {
		return true
	}
	for _, a := range h.rec.Lineage.Ancestors {
		if a.Generation == g {
			return true
		}
	}
	return false
}

func (h *host) refuse(why string) error {
	if h.client == nil {
		return nil
	}
	return h.client.Refuse(context.Background(), why)
}

// completeStore makes anew what a crash left half-made.
func (h *host) completeStore() error {
	r := h.rec
	fresh := r.Lineage.Generation.IsZero() && r.Next == nil
	released := r.Incomplete && !r.Lineage.Discard.IsZero() && r.Next == nil
	if h.store != nil || !fresh && !released {
		return nil
	}
	s, err := points.Open(h.storeConfig())
	if err == nil {
		st := s.Status()
		for _, d := range disks() {
			if released && st.State == points.Seeding {
				err = errors.Join(err, s.SeedAssume(d.name))
			}
		}
		if err = errors.Join(err, s.Close()); err != nil || st.State != points.Promoted || fresh {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open the store: %w", err)
	}
	if released {
		return h.adoptBase(delta.Pos{}, true)
	}
	return h.createStore()
}

func (h *host) createStore() error {
	if err := h.m.FS.MkdirAll("store"); err != nil {
		return err
	}
	s, err := points.Create(h.storeConfig(), deltaDisks())
	if err != nil {
		return err
	}
	h.acks = oracle.NewAcks()
	return s.Close()
}

// adoptBase makes a store around images that are exactly at pos, or, with
// assume, nearly good.
func (h *host) adoptBase(pos delta.Pos, assume bool) error {
	if err := h.closeStore(); err != nil {
		return err
	}
	if err := h.m.FS.MkdirAll("store"); err != nil {
		return err
	}
	cfg := h.storeConfig()
	if old, err := points.Open(cfg); err == nil {
		st := old.Status()
		if err := old.Close(); err != nil {
			return err
		}
		if st.State == points.Replica && st.Committed == pos && !assume {
			h.acks = oracle.NewAcks() // a crash may have kept it from being noted
			return h.acks.Committed(name(pos), oracle.Position{})
		}
	}
	h.acks = oracle.NewAcks()
	if !assume {
		s, err := points.CreateAt(cfg, pos, deltaDisks())
		if err != nil {
			return fmt.Errorf("make the store: %w", err)
		}
		if err := h.acks.Committed(name(pos), oracle.Position{}); err != nil {
			return err
		}
		return s.Close()
	}
	if err := points.Remove(h.fs("store")); err != nil {
		return err
	}
	s, err := points.Create(cfg, deltaDisks())
	if err != nil {
		return fmt.Errorf("make the store: %w", err)
	}
	for _, d := range disks() {
		if err := s.SeedAssume(d.name); err != nil {
			return errors.Join(err, s.Close())
		}
	}
	return s.Close()
}

// enable makes the VM known on both hosts: a primary with a running guest, a
// replica without content.
func (w *World) enable(p, r *host) error {
	g := w.generation()
	if err := r.update(func(x *record) { *x = record{Lineage: lineage.New(vmID, delta.Generation{})} }); err != nil {
		return err
	}
	if err := r.createStore(); err != nil {
		return err
	}
	if err := p.update(func(x *record) { *x = record{Lineage: lineage.New(vmID, g), WantRunning: true} }); err != nil {
		return err
	}
	p.booted, r.booted = true, true
	p.up, r.up = true, true
	w.roles.Created(p.name, g.String(), "", 0, false)
	if err := p.openPlane(); err != nil {
		return err
	}
	if err := p.client.CreateTracker(context.Background(), dataplane.CreateRequest{Generation: g}); err != nil {
		return err
	}
	if err := p.startGuest(); err != nil {
		return err
	}
	p.startShip()
	return r.raise()
}
