package testcopy

import (
	"context"
	"errors"
	"fmt"
	"os"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/wire"
)

// Stop ends copies of a VM: the named one, or all of them. It is idempotent:
// nothing to end is no error, and what is half gone already is taken away.
func (m *Manager) Stop(ctx context.Context, id wire.VMID, name string, event func(failover.Event)) (ended []string, err error) {
	all := m.of(id)
	if name != "" {
		for _, c := range all {
			if r := c.record(); r.Name == name || r.ID == name {
				all = []*copied{c}
				break
			}
		}
		if len(all) != 1 || all[0].record().Name != name && all[0].id != name {
			return nil, nil // ended already, or never there
		}
	}
	var errs []error
	for _, c := range all {
		was, err := m.stopOne(ctx, c, event)
		if was {
			ended = append(ended, c.record().Name)
		}
		errs = append(errs, err)
	}
	return ended, errors.Join(errs...)
}

// stopOne ends one copy; was says that there was something to end.
func (m *Manager) stopOne(ctx context.Context, c *copied, event func(failover.Event)) (was bool, err error) {
	unlock, err := c.lock(ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	if !m.known(c.id) {
		return false, nil
	}
	return true, m.end(ctx, c, "", event)
}

func (m *Manager) known(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.copies[id] != nil
}

// end takes everything away that was made for a copy. The caller holds its plan
// token. What fails stays in the journal and is tried again.
func (m *Manager) end(ctx context.Context, c *copied, reason string, event func(failover.Event)) error {
	r := m.runner(c, stopFile, event)
	j, err := c.pending(stopFile)
	if err != nil {
		return err
	}
	if j != nil {
		r.Resume(j)
	} else if rec := c.record(); rec.Phase != Ending {
		// The start's journal is not looked at any more.
		if err := c.update(func(r *Copy) { r.Phase, r.Reason = Ending, reason }); err != nil {
			return err
		}
		if err := r.Begin(failover.TestStop, rec.Request, nil); err != nil {
			return err
		}
	} else if err := r.Begin(failover.TestStop, rec.Request, nil); err != nil {
		return err
	}
	if err := r.Run(ctx, m.stopSteps(c)); err != nil {
		c.mu.Lock()
		c.trouble = err.Error()
		c.mu.Unlock()
		return err
	}
	rec := c.record()
	m.deps.Log.Info("test copy ended", "vm", rec.Of, "test", rec.Name, "id", c.id, "reason", rec.Reason)
	err = m.remember(Ended{
		ID: rec.ID, VM: rec.VM, Of: rec.Of, Name: rec.Name, Purpose: rec.Purpose, Point: rec.At.String(), Cut: rec.Cut,
		Started: rec.Started, Ended: m.deps.Now().UTC(), Ran: rec.Ran, Reason: rec.Reason,
	})
	if err != nil {
		return err
	}
	if err := m.sweep(c.id); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.copies, c.id)
	return nil
}

func (m *Manager) stopSteps(c *copied) []failover.Step {
	do := func(f func(context.Context, *copied) (string, error)) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) { return f(ctx, c) }
	}
	return []failover.Step{
		{Name: "destroy", Title: "Switch the test copy off", Commit: true, Do: do(m.destroy)},
		{Name: "undefine", Title: "Remove its definition", Do: do(m.dropDomain)},
		{Name: "network", Title: "Remove the test network", Do: do(m.dropNetworks)},
		{Name: "disks", Title: "Delete its scratch disks", Do: do(m.dropDisks)},
		{Name: "point", Title: "Let go of the recovery point", Do: do(m.dropPin)},
	}
}

// destroy ends the guest; one that is off or gone is fine.
func (m *Manager) destroy(ctx context.Context, c *copied) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	id := c.record().UUID
	st, _, err := m.deps.Hyper.DomainState(ctx, id)
	switch {
	case gone(err):
		return "it is gone", nil
	case err != nil:
		return "", err
	case st == libvirt.StateOff:
		return "it is off", nil
	}
	err = m.deps.Hyper.Destroy(ctx, id, false)
	if gone(err) || errors.Is(err, libvirt.ErrState) {
		err = nil
	}
	return "", err
}

func (m *Manager) dropDomain(ctx context.Context, c *copied) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	return "", m.deps.Hyper.Undefine(ctx, c.record().UUID, libvirt.UndefineOptions{DropNVRAM: true, DropTPM: true, DropSaved: true, DropSnapshots: true})
}

func (m *Manager) dropNetworks(ctx context.Context, c *copied) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	var errs []error
	rec := c.record()
	for _, n := range rec.NICs {
		if n.Isolated {
			errs = append(errs, m.deps.Hyper.DestroyNetwork(ctx, n.Network))
		} else if n.IP != "" && n.Network != "" {
			errs = append(errs, m.deps.Hyper.Unreserve(ctx, n.Network, reservation(rec, n)))
		}
	}
	return "", errors.Join(errs...)
}

func (m *Manager) dropDisks(_ context.Context, c *copied) (string, error) {
	c.mu.Lock()
	s := c.served
	c.served = nil
	c.mu.Unlock()
	detail := ""
	if s != nil {
		detail = fmt.Sprintf("%d bytes had been written", s.used())
		if err := s.close(); err != nil {
			m.deps.Log.Warn("close a test copy's disks", "test", c.record().Name, "err", err)
		}
	}
	rec := c.record()
	var errs []error
	for _, d := range rec.Disks {
		errs = append(errs, overlay.RemoveKept(m.scratchPath(rec, d)))
	}
	return detail, errors.Join(append(errs, os.RemoveAll(m.runDir(rec)))...)
}

// dropPin lets go of the point; whoever else pinned it still does.
func (m *Manager) dropPin(_ context.Context, c *copied) (string, error) {
	rec := c.record()
	if !rec.Pinned {
		return "", nil
	}
	s, ok := m.deps.Find(rec.VM)
	if !ok || !s.HoldsReplica() {
		return "the recovery points have ended", c.update(func(r *Copy) { r.Pinned = false })
	}
	if err := s.ReleasePoint(rec.At, rec.owner()); err != nil {
		return "", err
	}
	return "", c.update(func(r *Copy) { r.Pinned = false })
}
