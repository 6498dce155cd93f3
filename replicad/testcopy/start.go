package testcopy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"kvmreplica/internal/count"
	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/wire"
)

// Start makes a test copy and lets its guest run. On any failure everything
// that was made is taken away again.
func (m *Manager) Start(ctx context.Context, s Subject, o Options, event func(failover.Event)) (Copy, error) {
	release, err := o.Take(s)
	if err != nil {
		return Copy{}, err
	}
	defer release()
	p, err := m.Prepare(ctx, s, o)
	if err != nil {
		return Copy{}, err
	}
	if f := p.Failed(); f != nil {
		return Copy{}, &wire.Error{Kind: wire.KindRefused, Text: f.Name + ": " + f.Detail, Hint: f.Remedy}
	}
	return m.startPlanned(ctx, s, p, event)
}

func (m *Manager) startPlanned(ctx context.Context, s Subject, p Plan, event func(failover.Event)) (Copy, error) {
	ctx, done := m.living(ctx)
	defer done()
	c, unlock, err := m.add(p.Copy)
	if err != nil {
		return Copy{}, err
	}
	defer unlock()
	m.deps.Log.Info("test copy begins", "vm", p.Copy.Of, "test", p.Copy.Name, "id", c.id, "point", p.Copy.At.String(), "request", p.Copy.Request)
	r := m.runner(c, startFile, event)
	err = r.Begin(failover.Test, p.Copy.Request, nil)
	if err == nil {
		err = r.Run(ctx, m.startSteps(c, s))
	}
	if err == nil {
		return c.record(), nil
	}
	// What the plan took back is taken back again: that is harmless, and
	// complete however the plan ended.
	if cerr := m.end(context.WithoutCancel(ctx), c, "it could not be started: "+err.Error(), nil); cerr != nil {
		err = errors.Join(err, fmt.Errorf("clean up after it (it is tried again): %w", cerr))
	}
	return Copy{}, err
}

// add registers a copy whose record is durable; its plan token is taken.
func (m *Manager) add(rec Copy) (*copied, func(), error) {
	c := newCopied(rec.ID, fsx.Sub(m.fsys, rec.ID), rec)
	unlock, _ := c.tryLock() // nobody else knows it yet
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.copies) >= m.deps.Max {
		unlock()
		return nil, nil, &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("%d test copies exist on this host, that is the limit", len(m.copies)), Hint: "replicactl failover test-stop " + rec.Of + " --all"}
	}
	for _, o := range m.copies {
		if o.record().Name == rec.Name {
			unlock()
			return nil, nil, &wire.Error{Kind: wire.KindConflict, Text: "a test copy is called " + rec.Name + " already", Hint: "repeat it, or choose a name: --name"}
		}
	}
	if err := m.fsys.MkdirAll(rec.ID); err != nil {
		unlock()
		return nil, nil, fmt.Errorf("make the test copy's directory: %w", err)
	}
	if err := saveCopy(c.fsys, rec); err != nil {
		unlock()
		return nil, nil, errors.Join(err, m.sweep(rec.ID))
	}
	m.copies[rec.ID] = c
	return c, unlock, nil
}

func (m *Manager) runner(c *copied, file string, event func(failover.Event)) *failover.Runner {
	return &failover.Runner{FS: c.fsys, Path: file, Now: m.deps.Now, Failpoint: m.deps.Failpoint, Event: func(e failover.Event) {
		if e.Result != "" {
			m.deps.Log.Info("plan step", "plan", strings.TrimSuffix(file, ".json"), "test", c.record().Name, "step", e.Name, "result", string(e.Result), "detail", e.Detail, "undo", e.Undo)
		}
		if event != nil {
			event(e)
		}
	}}
}

// startSteps of a copy. A start that was interrupted is never continued: its
// guest may have been let run, or not; everything is taken away instead.
func (m *Manager) startSteps(c *copied, s Subject) []failover.Step {
	undo := func(f func(context.Context, *copied) (string, error)) func(context.Context) error {
		return func(ctx context.Context) error { _, err := f(ctx, c); return err }
	}
	return []failover.Step{
		{Name: "disks", Title: "Open the recovery point and put scratch disks above it", Undo: undo(m.dropDisks), Do: func(context.Context) (string, error) {
			return m.makeDisks(c, s)
		}},
		{Name: "point", Title: "Keep the recovery point", Undo: undo(m.dropPin), Do: func(ctx context.Context) (string, error) {
			return m.pin(ctx, c, s)
		}},
		{Name: "network", Title: "Make the test network", Undo: undo(m.dropNetworks), Do: func(ctx context.Context) (string, error) {
			return m.makeNetworks(ctx, c)
		}},
		{Name: "define", Title: "Define the test copy", Undo: undo(m.dropDomain), Do: func(ctx context.Context) (string, error) {
			return m.define(ctx, c, s)
		}},
		{Name: "firmware", Title: "Copy the firmware state", Do: func(ctx context.Context) (string, error) {
			return m.writeFirmware(ctx, c, s)
		}},
		{Name: "start", Title: "Load the guest, paused", Undo: undo(m.destroy), Do: func(ctx context.Context) (string, error) {
			return m.loadPaused(ctx, c)
		}},
		{Name: "prove", Title: "Prove the isolation", Do: func(ctx context.Context) (string, error) {
			return m.prove(ctx, c)
		}},
		{Name: "resume", Title: "Let the guest run", Do: func(ctx context.Context) (string, error) {
			return m.letRun(ctx, c)
		}},
	}
}

func (m *Manager) makeDisks(c *copied, s Subject) (string, error) {
	sv, err := m.serve(c.record(), s)
	if err != nil {
		return "", err
	}
	c.mu.Lock()
	c.served = sv
	c.mu.Unlock()
	return fmt.Sprintf("%s, %d bytes may be written", count.Of(len(sv.disks), "disk"), sv.quota), nil
}

// pin keeps the point over a restart. The newest state is no point yet, and
// cannot be pinned before it is: when that takes long the open view keeps it,
// and look tries again.
func (m *Manager) pin(ctx context.Context, c *copied, s Subject) (string, error) {
	rec := c.record()
	if rec.Pinned {
		return "", nil
	}
	// Durable before it happens: a pin without a record would stay for ever.
	if err := c.update(func(r *Copy) { r.Pinned = true }); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, pinWithin)
	defer cancel()
	if err := s.HoldPoint(ctx, rec.At, rec.owner()); err != nil {
		return "from now on; durably when it is a recovery point", c.update(func(r *Copy) { r.Pinned = false })
	}
	return "pinned", nil
}

func (m *Manager) makeNetworks(ctx context.Context, c *copied) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	made := map[string]bool{}
	var what []string
	rec := c.record()
	for _, n := range rec.NICs {
		if n.Isolated && !made[n.Network] {
			made[n.Network] = true
			if err := m.deps.Hyper.CreateIsolated(ctx, n.Network, n.Bridge); err != nil {
				return "", err
			}
			what = append(what, n.Network)
		}
		if n.IP != "" && n.Network != "" {
			if err := m.deps.Hyper.Reserve(ctx, n.Network, reservation(rec, n)); err != nil {
				return "", err
			}
			what = append(what, n.IP+" in "+n.Network)
		}
	}
	if len(what) == 0 {
		return "nothing to make", nil
	}
	return strings.Join(what, ", "), nil
}

func reservation(c Copy, n NIC) libvirt.Reservation {
	return libvirt.Reservation{MAC: n.MAC, Name: c.Name, IP: n.IP}
}

func (m *Manager) define(ctx context.Context, c *copied, s Subject) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	spec, policy, err := s.TestSource(c.record().At)
	if err != nil {
		return "", err
	}
	rec := c.record()
	f, err := os.OpenFile(m.console(rec), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", fmt.Errorf("make the console's file: %w", err)
	}
	if err := errors.Join(f.Close(), m.giveToQEMU(m.console(rec))); err != nil {
		return "", err
	}
	doc, err := libvirt.Render(spec, m.policy(rec, policy))
	if err != nil {
		return "", err
	}
	_, err = m.deps.Hyper.Define(ctx, doc)
	return rec.Name, err
}

func (m *Manager) writeFirmware(ctx context.Context, c *copied, s Subject) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	rec := c.record()
	fw, err := s.PointFirmware(rec.At)
	if err != nil {
		return "", err
	}
	if fw.NVRAM == nil && fw.TPM == nil {
		return "none", nil
	}
	d, err := m.deps.Hyper.Domain(ctx, rec.UUID)
	if err != nil {
		return "", err
	}
	paths, err := d.FirmwarePaths(m.deps.LibvirtState)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d bytes", len(fw.NVRAM)+len(fw.TPM)), libvirt.WriteFirmware(paths, fw)
}

func (m *Manager) loadPaused(ctx context.Context, c *copied) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return "", m.deps.Hyper.Start(ctx, c.record().UUID, libvirt.StartOptions{Paused: true})
}

func (m *Manager) letRun(ctx context.Context, c *copied) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	// Before it runs: whoever finds it running must find it recorded.
	if err := c.update(func(r *Copy) { r.Phase, r.Ran = Running, true }); err != nil {
		return "", err
	}
	rec := c.record()
	if err := m.deps.Hyper.Resume(ctx, rec.UUID); err != nil {
		return "", err
	}
	return rec.Name + " runs", nil
}
