package sim

import (
	"errors"
	"fmt"
	"io/fs"

	"kvmreplica/integration/oracle"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
)

func notThere(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// failIO lets operations of the machine fail: after skip of them, times in a
// row. Opening for reading and closing never fail here.
func (h *host) failIO(errno error, skip, times int) {
	h.m.Power.SetHook(func(op fsxtest.Op) error {
		switch {
		case skip > 0:
			skip--
		case times > 0:
			times--
			h.w.count("I/O error")
			h.w.note("  %s: %v fails: %v", h.name, op, errno)
			return errno
		}
		return nil
	})
}

// finish ends machines that stopped in the middle of an op.
func (w *World) finish() error {
	for _, h := range w.hosts {
		if !h.lost() {
			continue
		}
		kill, seed := h.wanted, uint64(1)
		if h.arm != nil {
			kill, seed = h.arm.kill, h.arm.seed
		} else if w.seed%2 == 0 {
			kill = true
		}
		h.wanted = false
		w.note("  %s stops during %v", h.name, h.m.Power.Last())
		if err := h.crash(kill, seed); err != nil {
			return fmt.Errorf("%s after a crash: %w", h.name, err)
		}
	}
	return nil
}

// calm ends all faults.
func (w *World) calm() {
	w.link = link{cut: -1, kept: w.link.kept, bytes: w.link.bytes, calls: w.link.calls}
	w.restless, w.crashStep = 0, ""
	for _, h := range w.hosts {
		h.m.FS.SetCapacity(0)
		h.m.Power.SetHook(nil)
		h.m.Power.SetTrace(nil)
		h.m.Power.CrashAt(0)
		h.arm = nil
	}
}

// maxCycles is how long the pair may take to settle when nothing fails.
const maxCycles = 40

// settle ends the faults and wants both hosts well again: one serves, the
// other follows, and both hold the same.
func (w *World) settle() error {
	w.calm()
	n := 0
	err := oracle.Settles(maxCycles, func() (healthy, equal bool, err error) {
		n++
		w.note("settle %d: A %s, B %s", n, w.hosts[0].describe(), w.hosts[1].describe())
		healthy, equal, err = w.cycle(n)
		if w.failure() != nil {
			return true, true, nil // seen enough
		}
		return healthy, equal, err
	})
	if ferr := w.failure(); ferr != nil {
		return ferr
	}
	return err
}

// cycle is one interval without faults.
func (w *World) cycle(n int) (healthy, equal bool, err error) {
	if err := w.finish(); err != nil {
		return false, false, w.fail(err)
	}
	for _, h := range w.hosts {
		if h.doubt { // what health says of a failed sync: restart the machine
			if cerr := h.crash(false, 1); cerr != nil {
				return false, false, w.fail(cerr)
			}
		}
		if !h.up {
			err = errors.Join(err, h.start())
		} else {
			err = errors.Join(err, h.tend())
		}
	}
	if n > 3 {
		err = errors.Join(err, w.mend(n))
	}
	for _, h := range w.hosts {
		if h.ship != nil && h.up {
			h.ship.feed(session.EvRetry{})
			h.ship.feed(session.EvTrigger{})
			h.settleShip(25)
		}
	}
	for _, h := range w.hosts {
		for range 20 {
			if h.store == nil || !h.up {
				break
			}
			did, aerr := h.store.Step(background())
			if aerr != nil || !did {
				err = errors.Join(err, aerr)
				break
			}
		}
	}
	if verr := w.check(); verr != nil {
		return false, false, w.fail(verr)
	}
	return w.settled(err)
}

// settled looks whether the pair is at rest.
func (w *World) settled(err error) (healthy, equal bool, _ error) {
	if ferr := w.failure(); ferr != nil {
		return false, false, ferr
	}
	p := w.owner()
	if p == nil || p.ship == nil || p.guest == nil {
		return false, false, errors.Join(err, errors.New("nobody serves and ships"))
	}
	st := p.ship.m.Status()
	r := p.other()
	if r.rec.Lineage.State != lineage.Replica || r.store == nil || r.rec.Incomplete {
		return false, false, errors.Join(err, fmt.Errorf("%s is no complete replica", r.name))
	}
	healthy = st.Protected && st.Stop == nil && st.Failures == 0 && r.rec.Lineage.Generation == p.rec.Lineage.Generation
	at := r.store.Status()
	if at.State != points.Replica || at.Committed != st.Committed {
		return healthy, false, errors.Join(err, fmt.Errorf("the replica is %s at %v, the primary at %v (%s)", at.State, at.Committed, st.Committed, st.LastError))
	}
	images, verr := r.view(at.Committed)
	if verr != nil {
		return healthy, false, errors.Join(err, verr)
	}
	equal = oracle.CheckEqual(images, p.content()) == nil
	if healthy && equal {
		for _, j := range w.hosts {
			if plan, perr := failover.Load(j.m.FS, planFile); perr != nil || plan != nil {
				return false, true, errors.Join(err, perr, errors.New("a plan is open"))
			}
		}
	}
	return healthy, equal, err
}

// mend is a person who does what health tells him to.
func (w *World) mend(n int) error {
	a, b := w.hosts[0], w.hosts[1]
	if !a.up || !b.up {
		return nil
	}
	switch sa, sb := a.rec.Lineage.MayServe() || a.rec.Lineage.Diverged != nil, b.rec.Lineage.MayServe() || b.rec.Lineage.Diverged != nil; {
	case a.rec.Lineage.State == lineage.Replica && b.rec.Lineage.State == lineage.Replica:
		for _, h := range w.hosts {
			if h.canPromote(delta.Pos{}) == "" {
				w.count("mended: promoted by force")
				return h.unplanned(fmt.Sprintf("mend-%d", n))
			}
		}
		return errors.New("nobody holds a complete copy")
	case sa && sb:
		return w.choose(n)
	}
	p := w.owner()
	if p == nil {
		for _, h := range w.hosts {
			if h.rec.Lineage.Diverged != nil && h.other().rec.Lineage.State == lineage.Replica {
				w.count("mended: kept after a false alarm")
				return h.reverse(fmt.Sprintf("mend-%d", n))
			}
		}
		return nil
	}
	if p.held != "" && n > 8 {
		p.held = "" // a person looked at both hosts
		w.consented()
	}
	if p.guest == nil && p.other().guest == nil {
		if err := p.startGuest(); err != nil {
			return err
		}
	}
	switch {
	case p.rec.NoReverse:
		w.count("mended: reversed")
		return p.reverse(fmt.Sprintf("mend-%d", n))
	case p.ship != nil && p.ship.m.Status().Stop != nil && n > 6:
		return w.resolve(p, n)
	}
	return nil
}

// choose settles two hosts that both own the VM: the newer generation wins.
func (w *World) choose(n int) error {
	keep := w.hosts[0]
	if w.hosts[1].knows(keep.rec.Lineage.Generation) {
		keep = w.hosts[1]
	}
	w.count("mended: one side given up")
	keep.other().stopGuest()
	return keep.reverse(fmt.Sprintf("mend-%d", n))
}

// resolve is a stop that a person has to decide: a host was put back.
func (w *World) resolve(p *host, n int) error {
	r := p.other()
	if r.canPromote(delta.Pos{}) == "" && n%2 == 0 {
		w.count("mended: the replica's side taken")
		p.stopGuest()
		w.forced = true
		return r.unplanned(fmt.Sprintf("mend-%d", n))
	}
	w.count("mended: reseeded")
	return p.reseed()
}

// describe is a host for the trace.
func (h *host) describe() string {
	l := h.rec.Lineage
	s := fmt.Sprintf("up=%t %s gen=%.4x noreverse=%t guest=%t held=%q", h.up, l.State, l.Generation[4:], h.rec.NoReverse, h.guest != nil, h.held)
	if l.Diverged != nil {
		s += " diverged: " + l.Diverged.Row
	}
	if h.ship != nil {
		st := h.ship.m.Status()
		s += fmt.Sprintf(" ship=%s at %v pending %d %s", st.Phase, st.Committed, st.Pending, st.LastError)
		if st.Stop != nil {
			s += " stop: " + st.Stop.Row
		}
	}
	if h.store != nil {
		st := h.store.Status()
		s += fmt.Sprintf(" store=%s at %v", st.State, st.Committed)
	}
	return s
}
