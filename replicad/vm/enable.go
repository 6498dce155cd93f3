package vm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// EnableOptions are a person's choices.
type EnableOptions struct {
	Name     string // domain name or UUID
	Peer     wire.HostID
	Interval time.Duration
	Disks    []string // empty = every disk that can be protected
	OnSilent string   // "start" (default) or "hold"
	// StartAt is when the initial copy begins, at most MaxStartDelay ahead; zero
	// = at once. Changes are tracked from the beginning.
	StartAt time.Time
	// Existing: images lie ready on the replica host and are compared.
	Existing bool
	// Retention says which recovery points the replica is asked to keep, as
	// points.ParsePolicy reads it; empty = the default.
	Retention string
	AppEvery  time.Duration // of application-consistent points; 0 = none
	// Shutdown is how long the guest may take to shut down in a planned failover
	// that does not say; 0 = the default.
	Shutdown time.Duration
	// Rate bounds what is sent of the VM, in bytes per second; 0 = only the host's
	// limits do.
	Rate    int64
	Request string
}

// MaxStartDelay is how far ahead the initial copy may be scheduled.
const MaxStartDelay = 7 * 24 * time.Hour

// enableVars is what enabling needs after a restart.
type enableVars struct {
	Generation delta.Generation
	Running    bool
}

// EnablePlan is what Enable would do, and whether it can.
type EnablePlan struct {
	Checks []wire.Check
	Steps  []string
	rec    Record
	run    bool
	adding bool // one disk to a VM that is protected
}

// OK reports that no check failed.
func (p EnablePlan) OK() bool {
	return !slices.ContainsFunc(p.Checks, func(c wire.Check) bool { return c.Result == wire.Failed })
}

// PlanEnable checks everything that can be checked without changing anything.
func (m *Manager) PlanEnable(ctx context.Context, o EnableOptions) (EnablePlan, error) {
	if err := o.check(); err != nil {
		return EnablePlan{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	d, err := m.domain(ctx, o.Name)
	if err != nil {
		return EnablePlan{}, err
	}
	if v, ok := m.get(wire.VMID(d.UUID)); ok {
		return EnablePlan{}, &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("VM %s is %s here already", d.Name, v.record().Lineage.Role()), Hint: "replicactl vm status " + d.Name}
	}
	p := &EnablePlan{run: d.State != libvirt.StateOff && d.State != libvirt.StateCrashed}
	p.rec = Record{
		VM: wire.VMID(d.UUID), Name: d.Name, Peer: o.Peer, Interval: o.Interval, Native: true,
		Autostart: d.Autostart, WantRunning: p.run, Created: m.deps.Now(), OnSilent: o.OnSilent, StartAt: o.StartAt, Existing: o.Existing,
		Retention: o.Retention, AppEvery: o.AppEvery, Shutdown: o.Shutdown, Rate: o.Rate,
	}
	if ahead := o.StartAt.Sub(m.deps.Now()); !o.StartAt.IsZero() && (ahead <= 0 || ahead > MaxStartDelay) {
		return EnablePlan{}, &wire.Error{
			Kind: wire.KindInvalid, Text: fmt.Sprintf("the initial copy cannot begin at %s", o.StartAt.Format(time.DateTime)),
			Hint: "a time within the next seven days, see the hosts' clocks",
		}
	}
	if p.rec.OnSilent == "" {
		p.rec.OnSilent = "start"
	}
	p.checkDomain(ctx, m, d)
	p.checkDisks(ctx, d, o.Disks)
	p.checkSpec(ctx, m, d)
	p.checkPeer(ctx, m, o.Peer)
	how := "point the definition at the exports; the next start goes through them"
	if p.run {
		how = "put the exports under the running guest's disks, one by one, without a stop"
	}
	copying := fmt.Sprintf("%scopy %s of disks while the guest runs", begins(o.StartAt), status.Bytes(p.rec.bytes()))
	if o.Existing {
		copying = fmt.Sprintf("%scompare %s of disks with the images that lie ready on the replica host and send what differs, while the guest runs", begins(o.StartAt), status.Bytes(p.rec.bytes()))
	}
	p.Steps = []string{
		fmt.Sprintf("announce the VM to %s, which defines it there, off", m.peerName(o.Peer)), "start the data plane and the change tracking", how,
		"take over autostart", fmt.Sprintf("%s, then send changes every %s", copying, o.Interval),
		"after an unclean boot with a silent peer: " + p.rec.OnSilent,
		pointsStep(o),
	}
	return *p, nil
}

func begins(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return "at " + at.Format(time.DateTime) + " "
}

func (m *Manager) peerName(h wire.HostID) string {
	if g, err := m.deps.Grant(h); err == nil {
		return g.Name
	}
	return string(h)
}

func (r *Record) bytes() int64 {
	var n int64
	for _, d := range r.Disks {
		n += d.Size
	}
	return n
}

func (m *Manager) domain(ctx context.Context, name string) (libvirt.Domain, error) {
	id, err := m.deps.Hyper.LookupName(ctx, name)
	if errors.Is(err, libvirt.ErrNotFound) {
		id = name
	} else if err != nil {
		return libvirt.Domain{}, err
	}
	d, err := m.deps.Hyper.Domain(ctx, id)
	if errors.Is(err, libvirt.ErrNotFound) || errors.Is(err, libvirt.ErrInvalid) {
		return d, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("libvirt has no domain %q", name), Hint: "virsh list --all"}
	}
	return d, err
}

func (p *EnablePlan) check(name string, r wire.Result, remedy, format string, a ...any) {
	p.Checks = append(p.Checks, wire.Check{Name: name, Result: r, Detail: fmt.Sprintf(format, a...), Remedy: remedy})
}

func (p *EnablePlan) checkDomain(ctx context.Context, m *Manager, d libvirt.Domain) {
	if !d.Persistent {
		p.check("Domain", wire.Failed, "virsh dumpxml "+d.Name+" >FILE; virsh define FILE", "%s is transient: it has no definition", d.Name)
	} else {
		p.check("Domain", wire.OK, "", "%s is %s", d.Name, d.State)
	}
	if saved, err := m.deps.Hyper.HasSaved(ctx, d.UUID); err != nil {
		p.check("Saved state", wire.Unknown, "", "%v", err)
	} else if saved {
		p.check("Saved state", wire.Failed, "virsh start "+d.Name+", or: virsh managedsave-remove "+d.Name, "a managed save image would restore the old disk sources")
	}
	for _, n := range d.Notes {
		p.check("Features", wire.Warning, "", "%s stays on this host and is not replicated", n)
	}
}

func (p *EnablePlan) checkDisks(ctx context.Context, d libvirt.Domain, want []string) {
	for _, w := range want {
		if _, ok := d.Disk(w); !ok {
			p.check("Disk "+w, wire.Failed, "virsh domblklist "+d.Name, "the domain has no such disk")
		}
	}
	for _, k := range d.Disks {
		if len(want) > 0 && !slices.Contains(want, k.Target) {
			p.check("Disk "+k.Target, wire.Warning, "", "left out: it will not exist on the replica")
			continue
		}
		if len(want) == 0 && (k.Device != "disk" || k.ReadOnly || k.Kind == libvirt.SourceNone) {
			p.check("Disk "+k.Target, wire.Warning, "", "left out: %s", k.Device)
			continue
		}
		p.checkDisk(ctx, d, k)
	}
	if len(p.rec.Disks) == 0 {
		p.check("Disks", wire.Failed, "", "there is nothing to protect")
	}
}

func (p *EnablePlan) checkSpec(ctx context.Context, m *Manager, d libvirt.Domain) {
	doc, err := m.deps.Hyper.XML(ctx, d.UUID, libvirt.XMLPersistent)
	if err != nil {
		p.check("Description", wire.Failed, "", "%v", err)
		return
	}
	_, dropped, err := libvirt.SpecFromXML(doc)
	if err != nil {
		p.check("Description", wire.Failed, "", "%v", err)
		return
	}
	tmp := &VM{rec: p.rec}
	if p.rec.Spec, err = tmp.specOf(doc); err != nil {
		p.check("Description", wire.Failed, "", "%v", err)
		return
	}
	p.check("Description", wire.OK, "", "complete for the replica")
	for _, x := range dropped {
		p.check("Description", wire.Warning, "", "not carried over: %s", x)
	}
}

func (p *EnablePlan) checkPeer(ctx context.Context, m *Manager, host wire.HostID) {
	s, err := m.deps.Dial(host)
	if err == nil {
		var reply wire.CheckReply
		if reply, err = s.Check(ctx, wire.CheckRequest{VM: p.rec.VM, For: "enable", Spec: p.rec.Spec, Need: p.rec.bytes()}); err == nil {
			p.Checks = append(p.Checks, reply.Checks...)
		}
	}
	if err != nil {
		p.check("Replica host", wire.Failed, "replicactl peer test "+m.peerName(host), "%s", said(err))
	}
}

// Enable protects a VM. On any failure everything is as before.
func (m *Manager) Enable(ctx context.Context, o EnableOptions, event func(failover.Event)) (*VM, error) {
	p, err := m.PlanEnable(ctx, o)
	if err != nil {
		return nil, err
	}
	for _, c := range p.Checks {
		if c.Result == wire.Failed {
			return nil, &wire.Error{Kind: wire.KindRefused, Text: c.Name + ": " + c.Detail, Hint: c.Remedy}
		}
	}
	g, err := lineage.NewGeneration(rand.Reader)
	if err != nil {
		return nil, err
	}
	p.rec.Lineage = lineage.New(p.rec.VM, g)
	v, err := m.add(p.rec)
	if err != nil {
		return nil, err
	}
	unlock, err := v.lock("enable")
	if err != nil {
		return nil, err
	}
	defer unlock()
	err = v.execute(ctx, failover.Enable, o.Request, &enableVars{Generation: g, Running: p.run}, event)
	if err == nil {
		return v, nil
	}
	if j, lerr := failover.Load(v.fsys, planFile); lerr == nil && j == nil {
		err = errors.Join(err, m.remove(v))
	}
	return nil, err
}

func (v *VM) enableSteps(p *enableVars) []failover.Step {
	steps := []failover.Step{
		{
			Name: "offer", Title: "Announce the VM to the replica host",
			Do: func(ctx context.Context) (string, error) {
				peer, err := v.peer()
				if err != nil {
					return "", err
				}
				return "", v.offer(ctx, peer, "enable")
			},
			Undo: func(ctx context.Context) error {
				_, err := v.withdraw(ctx, true, true)
				return err
			},
		},
		{
			Name: "plane", Title: "Start the data plane and the change tracking",
			Do: func(ctx context.Context) (string, error) {
				if err := v.startPlane(ctx); err != nil {
					return "", err
				}
				c, err := v.plane()
				if err != nil {
					return "", err
				}
				if err := c.CreateTracker(ctx, dataplane.CreateRequest{Generation: p.Generation}); err != nil {
					return "", fmt.Errorf("start tracking: %w", err)
				}
				return "", v.openExports(ctx)
			},
			Undo: func(ctx context.Context) error {
				return errors.Join(v.stopPlane(ctx), removeTree(v.fsys, "track"))
			},
		},
	}
	if p.Running {
		steps = append(steps, failover.Step{Name: "insert", Title: "Put the exports under the running guest", Do: v.insert, Undo: v.takeOut})
	}
	return append(steps,
		failover.Step{Name: "define", Title: "Point the definition at the exports", Do: v.pointIn, Undo: v.restoreDomain},
		failover.Step{Name: "place", Title: "Lock the images and start replicating", Do: func(ctx context.Context) (string, error) {
			if err := v.update(func(r *Record) error { r.Placed = true; return nil }); err != nil {
				return "", err
			}
			c, err := v.plane()
			if err != nil {
				return "", err
			}
			if err := c.LockQEMU(ctx, ""); err != nil {
				return "", err
			}
			v.publishGate()
			v.startShipping()
			return "", nil
		}, Undo: func(context.Context) error {
			v.clearGate()
			return v.update(func(r *Record) error { r.Placed = false; return nil })
		}},
	)
}

// swaps are the requests that put the exports under a running guest, or take
// them away.
func (v *VM) swaps() []libvirt.InsertRequest {
	r := v.record()
	return v.swapsOf(r.served())
}

func (v *VM) swapsOf(disks []Disk) (out []libvirt.InsertRequest) {
	for _, d := range disks {
		out = append(out, libvirt.InsertRequest{
			Disk: d.Live, Source: libvirt.NBDSource{Socket: v.socket(), Export: string(d.Name)},
			AfterRelease: func(ctx context.Context) error {
				c, err := v.plane()
				if err != nil {
					return err
				}
				return c.LockQEMU(ctx, d.Name)
			},
			BeforeReopen: func(ctx context.Context) error {
				v.stopShipping()
				c, err := v.plane()
				if err != nil {
					return err
				}
				if err := c.Sync(ctx); err != nil {
					return err
				}
				return c.UnlockQEMU(ctx, d.Name)
			},
			AfterReopen: func(ctx context.Context) error {
				c, err := v.plane()
				if err != nil {
					return err
				}
				return c.Sync(ctx)
			},
		})
	}
	return out
}

func (v *VM) insert(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	begun := v.deps.Now()
	if err := v.deps.Hyper.InsertDisks(ctx, string(v.id), v.swaps()); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s in %s", count.Of(len(v.record().Disks), "disk"), v.deps.Now().Sub(begun).Round(time.Millisecond)), nil
}

// takeOut brings a running guest back onto its own images.
func (v *VM) takeOut(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if errors.Is(err, libvirt.ErrNotFound) || off(st) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	r := v.record()
	disks, err := v.onImages(ctx, r.served())
	if err != nil {
		return err
	}
	return v.deps.Hyper.RemoveDisks(ctx, string(v.id), v.swapsOf(disks))
}

// pointIn edits the persistent definition.
func (v *VM) pointIn(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if err != nil {
		return "", err
	}
	if doc, err = v.offExports(doc); err != nil { // a repeated step
		return "", err
	}
	doc, originals, err := v.onExports(doc)
	if err != nil {
		return "", err
	}
	if err := v.keepOriginals(originals); err != nil {
		return "", err
	}
	if _, err := v.deps.Hyper.Define(ctx, doc); err != nil {
		return "", err
	}
	return "", v.deps.Hyper.SetAutostart(ctx, string(v.id), false)
}

// restoreDomain gives the definition its own disk sources and autostart back.
func (v *VM) restoreDomain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	r := v.record()
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if errors.Is(err, libvirt.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	d, err := libvirt.ParseDomain(doc)
	if err != nil {
		return err
	}
	on := false
	for name, src := range v.exports() {
		k, ok := d.Disk(name)
		on = on || ok && k.Kind == libvirt.SourceNBD && k.Socket == src.Socket
	}
	if on {
		if doc, err = v.offExports(doc); err != nil {
			return err
		}
		if _, err := v.deps.Hyper.Define(ctx, doc); err != nil {
			return err
		}
	}
	if r.Autostart {
		return v.deps.Hyper.SetAutostart(ctx, string(v.id), true)
	}
	return nil
}
