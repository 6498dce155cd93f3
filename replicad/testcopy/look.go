package testcopy

import (
	"context"
	"errors"
	"fmt"

	"kvmreplica/internal/count"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/isolate"
	"kvmreplica/replicad/wire"
)

// nicTap is one card of a running copy.
type nicTap struct{ bridge, tap string }

// look is one observation of a copy: what an interrupted plan left is settled,
// what nobody needs any more is ended, a guest that waits for its disk is let
// go on, and its isolation is proven again.
func (m *Manager) look(ctx context.Context, c *copied) {
	unlock, ok := c.tryLock()
	if !ok {
		return // somebody works on it
	}
	defer unlock()
	if !m.known(c.id) {
		return
	}
	rec := c.record()
	if why, ended := m.over(ctx, rec); ended {
		if rec.Purpose == "drill" && rec.Phase != Ending {
			m.abandoned(rec, why)
		}
		if err := m.end(ctx, c, why, nil); err != nil {
			m.deps.Log.Error("end a test copy; it is tried again", "test", rec.Name, "reason", why, "err", err)
		}
		return
	}
	subject, _ := m.deps.Find(rec.VM)
	err := m.tend(ctx, c, subject)
	c.mu.Lock()
	c.trouble = ""
	if err != nil {
		c.trouble = err.Error()
	}
	c.mu.Unlock()
}

// abandoned keeps a report of a drill whose daemon ended; one that runs here
// keeps its own.
func (m *Manager) abandoned(rec Copy, why string) {
	m.mu.Lock()
	ours := m.conducted[rec.ID]
	m.mu.Unlock()
	if ours {
		return
	}
	r := Report{
		Version: reportVersion, VM: rec.VM, Name: rec.Of, Copy: rec.Name, Request: rec.Request, Started: rec.Started, Finished: m.deps.Now().UTC(),
		Point: rec.At.String(), Ordinal: rec.Ordinal, Cut: rec.Cut, Isolated: rec.Isolated(), Proof: "none", Failure: why,
	}
	if err := m.keepReport(&r); err != nil {
		m.deps.Log.Error("keep the report of a drill that was cut off", "test", rec.Name, "err", err)
	}
}

// over says whether and why a copy must end.
func (m *Manager) over(ctx context.Context, rec Copy) (why string, ended bool) {
	switch rec.Phase {
	case Ending:
		return rec.Reason, true
	case Starting:
		return "the daemon ended while it was being started", true
	}
	m.mu.Lock()
	alone := rec.Purpose == "drill" && !m.conducted[rec.ID]
	m.mu.Unlock()
	if alone {
		return "the daemon ended during the drill", true
	}
	if rec.Boot != m.deps.BootID {
		return "the host was restarted", true
	}
	s, ok := m.deps.Find(rec.VM)
	switch {
	case !ok:
		return "the VM is not protected here any more", true
	case !s.HoldsReplica():
		return "this host is not the VM's replica any more: its recovery points have ended", true
	}
	lctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	if _, _, err := m.deps.Hyper.DomainState(lctx, rec.UUID); gone(err) {
		return "somebody removed its domain", true
	}
	return "", false
}

// tend keeps a running copy going.
func (m *Manager) tend(ctx context.Context, c *copied, s Subject) error {
	rec := c.record()
	lctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	d, derr := m.deps.Hyper.Domain(lctx, rec.UUID)
	if derr == nil {
		c.saw(d)
	}
	off := derr == nil && (d.State == libvirt.StateOff || d.State == libvirt.StateCrashed)
	if !off {
		if err := m.proveOr(ctx, c, d, derr); err != nil {
			return err
		}
	}
	c.mu.Lock()
	up := c.served != nil
	c.mu.Unlock()
	if !up {
		sv, err := m.serve(rec, s)
		if err != nil {
			return fmt.Errorf("serve its disks: %w", err)
		}
		c.mu.Lock()
		c.served = sv
		c.mu.Unlock()
		m.deps.Log.Info("test copy has its disks again", "test", rec.Name)
	}
	if !rec.Pinned {
		if _, err := m.pin(ctx, c, s); err != nil {
			return err
		}
	}
	if derr != nil {
		return fmt.Errorf("look at its domain: %w", derr)
	}
	if d.State == libvirt.StatePaused && d.Reason == libvirt.ReasonIOError {
		return m.goOn(c)
	}
	return nil
}

func (c *copied) saw(d libvirt.Domain) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = string(d.State)
	if d.State == libvirt.StatePaused && d.Reason != libvirt.ReasonNone {
		c.state += " (" + string(d.Reason) + ")"
	}
	c.taps = nil
	for _, n := range d.NICs {
		c.taps = append(c.taps, nicTap{n.Bridge, n.Device})
	}
}

// goOn resumes a guest whose disk was away. One whose quota is used up stays
// stopped.
func (m *Manager) goOn(c *copied) error {
	c.mu.Lock()
	sv, busy := c.served, c.resuming
	if why := sv.full.Load(); why != nil {
		c.mu.Unlock()
		return errors.New("its guest stands still: " + *why)
	}
	c.resuming = true
	c.mu.Unlock()
	if busy {
		return nil
	}
	id, name := c.record().UUID, c.record().Name
	m.background.Add(1)
	go func() {
		defer m.background.Done()
		ctx, cancel := context.WithTimeout(context.Background(), libvirtTimeout)
		defer cancel()
		defer func() {
			c.mu.Lock()
			c.resuming = false
			c.mu.Unlock()
		}()
		n, err := m.deps.Hyper.ResumeIOError(ctx, id)
		if err != nil {
			m.deps.Log.Warn("resume a test copy after its disk came back", "test", name, "err", err)
			return
		}
		m.deps.Log.Info("test copy resumed after its disk came back", "test", name, "resumes", n)
	}()
	return nil
}

// prove is the step of the start: the domain is loaded and paused.
func (m *Manager) prove(ctx context.Context, c *copied) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	rec := c.record()
	d, err := m.deps.Hyper.Domain(ctx, rec.UUID)
	if err != nil {
		return "", err
	}
	c.saw(d)
	if err := m.proven(c, d); err != nil {
		return "", err
	}
	switch n := len(rec.NICs); {
	case n == 0:
		return "the copy has no network card", nil
	case !rec.Isolated():
		return "NOT isolated, as asked: it is in a network of this host", nil
	default:
		return fmt.Sprintf("%s; nothing else is on its bridge, the host has no address and no way there", count.Of(n, "card")), nil
	}
}

// proveOr proves the isolation again. When that fails the guest is switched
// off at once, and the copy ended.
func (m *Manager) proveOr(ctx context.Context, c *copied, d libvirt.Domain, derr error) error {
	err := m.proven(c, d)
	if derr != nil {
		err = m.provenLast(c)
	}
	if err == nil {
		return nil
	}
	m.deps.Log.Error("a test copy is not isolated any more; it is destroyed", "test", c.record().Name, "err", err)
	if _, derr := m.destroy(ctx, c); derr != nil {
		m.deps.Log.Error("destroy a test copy that is not isolated", "test", c.record().Name, "err", derr)
	}
	why := "it was destroyed: " + err.Error()
	if eerr := m.end(ctx, c, why, nil); eerr != nil {
		return errors.Join(err, eerr)
	}
	return err
}

// proven proves that every card of a live domain is in a network of this copy,
// and that these lead nowhere. Copies that are meant to be in a network of this
// host need none.
func (m *Manager) proven(c *copied, d libvirt.Domain) error {
	rec := c.record()
	if len(rec.NICs) > 0 && !rec.Isolated() {
		return nil
	}
	for _, note := range d.Notes {
		return &wire.Error{Kind: wire.KindRefused, Text: "a device of the host was given to the copy: " + note}
	}
	if len(d.NICs) > len(rec.NICs) {
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("it has %d network cards, %d were made for it", len(d.NICs), len(rec.NICs))}
	}
	byNet := map[string]*isolate.Bridge{}
	for _, n := range rec.NICs {
		byNet[n.Network] = &isolate.Bridge{Name: n.Bridge}
	}
	for _, n := range d.NICs {
		b := byNet[n.Network]
		if n.Kind != "network" || b == nil || n.Bridge != "" && n.Bridge != b.Name {
			return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("its network card %s is in %s %q, not in a network of its own", n.MAC, n.Kind, n.Network)}
		}
		if n.Device != "" {
			b.Taps = append(b.Taps, n.Device)
		}
	}
	return m.proveBridges(c, rec, func(n NIC) []string { return byNet[n.Network].Taps })
}

// provenLast proves it with the taps that were last seen: libvirt does not
// answer, the kernel does.
func (m *Manager) provenLast(c *copied) error {
	rec := c.record()
	if len(rec.NICs) > 0 && !rec.Isolated() {
		return nil
	}
	c.mu.Lock()
	taps := c.taps
	c.mu.Unlock()
	if len(taps) == 0 {
		return nil // nothing was seen yet: it is looked at before its disks are served
	}
	return m.proveBridges(c, rec, func(n NIC) []string {
		var out []string
		for _, t := range taps {
			if t.bridge == n.Bridge && t.tap != "" {
				out = append(out, t.tap)
			}
		}
		return out
	})
}

func (m *Manager) proveBridges(c *copied, rec Copy, taps func(NIC) []string) error {
	var bs []isolate.Bridge
	seen := map[string]bool{}
	for _, n := range rec.NICs {
		if !seen[n.Bridge] {
			seen[n.Bridge] = true
			bs = append(bs, isolate.Bridge{Name: n.Bridge, Taps: taps(n)})
		}
	}
	if err := m.deps.prove(bs); err != nil {
		return err
	}
	c.mu.Lock()
	c.proven = m.deps.Now()
	c.mu.Unlock()
	return nil
}
