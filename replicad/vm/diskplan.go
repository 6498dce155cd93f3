package vm

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// DiskOptions are a person's choices.
type DiskOptions struct {
	Disk    wire.DiskName // the target in the domain: vdb
	Remove  bool
	Request string
}

// diskVars is what a change of the set needs after a restart.
type diskVars struct {
	Disk    Disk
	Running bool
}

// PlanDisk checks what changing the set would need, without changing anything.
func (v *VM) PlanDisk(ctx context.Context, o DiskOptions) ([]wire.Check, error) {
	checks, _, err := v.planDisk(ctx, o)
	return checks, err
}

func (v *VM) planDisk(ctx context.Context, o DiskOptions) ([]wire.Check, *diskVars, error) {
	if err := v.maySetDisks(ctx); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	d, err := v.deps.Hyper.Domain(ctx, string(v.id))
	if err != nil {
		return nil, nil, fmt.Errorf("read the domain: %w", err)
	}
	vars := &diskVars{Running: !off(d.State)}
	if o.Remove {
		err := v.planTake(o.Disk, vars)
		return nil, vars, err
	}
	checks, err := v.planAdd(ctx, d, o.Disk, vars)
	return checks, vars, err
}

// maySetDisks refuses where the set of disks is not this host's to change now.
func (v *VM) maySetDisks(ctx context.Context) error {
	r := v.record()
	refuse := func(hint, format string, a ...any) error {
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf(format, a...), Hint: hint}
	}
	switch s := v.session(); {
	case r.Lineage.Diverged != nil || r.Superseded != "":
		return refuse("replicactl failover reverse "+r.Name+" on the host whose data is to be kept; see: replicactl vm status "+r.Name, "the other host may own this VM")
	case !r.Lineage.MayServe():
		return refuse("run the command on the host where the VM runs", "this host is %s for the VM", r.Lineage.State)
	case v.outOfHands():
		return refuse("replicactl vm status "+r.Name, "the VM was released from this host's hands")
	case r.Overlay != nil:
	case r.NoReverse:
		return refuse("replicactl failover reverse "+r.Name, "nothing is replicated since the failover")
	case r.Acked.IsZero() && (s == nil || !s.Status().Protected):
		return refuse("replicactl vm watch "+r.Name, "the replica holds no complete copy yet")
	}
	return v.imagesOnly(ctx)
}

func (v *VM) planAdd(ctx context.Context, d libvirt.Domain, name wire.DiskName, vars *diskVars) ([]wire.Check, error) {
	r := v.record()
	for _, k := range r.served() {
		switch {
		case k.Name == name && k.State == member:
			return nil, &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("disk %s is protected already", name), Hint: "replicactl vm status " + r.Name}
		case k.State == joining:
			return nil, &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("disk %s is still being added", k.Name), Hint: fmt.Sprintf("wait: replicactl vm watch %s; or take it out again: replicactl vm remove-disk %s %s", r.Name, r.Name, k.Name)}
		}
	}
	k, ok := d.Disk(string(name))
	if !ok {
		return nil, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("the domain has no disk %q", name), Hint: "virsh domblklist " + d.Name + "; attach it first: virsh attach-disk … --persistent"}
	}
	if !r.Native {
		return nil, &wire.Error{Kind: wire.KindRefused, Text: "the VM came here by a failover; its old host's definition has no place for the disk", Hint: "fail over back first, or disable and enable the protection"}
	}
	p := &EnablePlan{run: vars.Running, adding: true}
	p.checkDisk(ctx, d, k)
	if !p.OK() || len(p.rec.Disks) != 1 {
		return p.Checks, nil
	}
	vars.Disk = p.rec.Disks[0]
	vars.Disk.State = joining
	next := r
	next.Disks = append(slices.Clone(r.Disks), vars.Disk)
	o := v.offering("add-disk")
	o.Disks, o.Try = next.wireDisks(), true
	peer, err := v.peer()
	if err == nil {
		_, err = peer.Offer(ctx, o)
	}
	if err != nil {
		remedy := "replicactl peer test " + v.mgr.peerName(r.Peer)
		if w := (*wire.Error)(nil); errors.As(err, &w) && w.Hint != "" {
			remedy = w.Hint
		}
		p.check("Replica host", wire.Failed, remedy, "%s", err)
	} else {
		p.check("Replica host", wire.OK, "", "takes the disk")
	}
	return p.Checks, nil
}

func (v *VM) planTake(name wire.DiskName, vars *diskVars) error {
	r := v.record()
	k, ok := r.disk(name)
	switch {
	case !ok || !slices.ContainsFunc(r.served(), func(d Disk) bool { return d.Name == name }):
		return &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("VM %s has no protected disk %q", r.Name, name), Hint: "replicactl vm status " + r.Name}
	case len(r.served()) == 1:
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("%s is the only protected disk", name), Hint: "to end the protection: replicactl vm disable " + r.Name}
	case vars.Running && k.Live.Target == "":
		return &wire.Error{Kind: wire.KindRefused, Text: "the VM came here by a failover: its running guest has no other source for the disk", Hint: "shut the guest down and repeat the command"}
	}
	vars.Disk = k
	return nil
}

// SetDisk adds a disk to a protected VM or takes one out. The guest may run; the
// other disks' replication goes on, and recovery points keep what they have.
func (v *VM) SetDisk(ctx context.Context, o DiskOptions, event func(failover.Event)) error {
	unlock, err := v.lockAsked(ctx, "change the set of disks")
	if err != nil {
		return err
	}
	defer unlock()
	checks, vars, err := v.planDisk(ctx, o)
	if err != nil {
		return err
	}
	for _, c := range checks {
		if c.Result == wire.Failed {
			return &wire.Error{Kind: wire.KindRefused, Text: c.Name + ": " + c.Detail, Hint: c.Remedy}
		}
	}
	kind := failover.AddDisk
	if o.Remove {
		kind = failover.TakeDisk
	}
	return v.execute(ctx, kind, o.Request, vars, event)
}

func (v *VM) addDiskSteps(p *diskVars) []failover.Step {
	name := p.Disk.Name
	steps := []failover.Step{
		{Name: "offer", Title: "Announce the disk to the replica host", Do: func(ctx context.Context) (string, error) {
			v.stopShipping()
			if err := v.withDisk(p.Disk); err != nil {
				return "", err
			}
			peer, err := v.peer()
			if err != nil {
				return "", err
			}
			return "", v.offer(ctx, peer, "add-disk")
		}, Undo: func(ctx context.Context) error {
			err := v.withoutDisk(name)
			v.startShipping()
			return err // the replica's host learns it from the next offer
		}},
		{Name: "plane", Title: "Track the disk", Do: func(ctx context.Context) (string, error) {
			return "", v.replane(ctx, true, name)
		}, Undo: func(ctx context.Context) error {
			if err := v.withoutDisk(name); err != nil {
				return err
			}
			return v.replane(ctx, false, name)
		}},
	}
	if p.Running {
		steps = append(steps, failover.Step{
			Name: "insert", Title: "Put the export under the running guest",
			Do:   func(ctx context.Context) (string, error) { return "", v.insertOne(ctx, p.Disk) },
			Undo: func(ctx context.Context) error { return v.removeOne(ctx, p.Disk) },
		})
	}
	return append(steps, failover.Step{
		Name: "define", Title: "Point the definition at the export",
		Do: func(ctx context.Context) (string, error) {
			if _, err := v.pointIn(ctx); err != nil {
				return "", err
			}
			c, err := v.plane()
			if err != nil {
				return "", err
			}
			return "", c.LockQEMU(ctx, name)
		},
		Undo: func(ctx context.Context) error { return v.defineOut(ctx, name) },
	}, failover.Step{
		Name: "ship", Title: "Send it with the changes of the others", Commit: true,
		Do: func(context.Context) (string, error) {
			v.startShipping()
			return status.Bytes(p.Disk.Size) + " are to be copied", nil
		},
	})
}

func (v *VM) takeDiskSteps(p *diskVars) []failover.Step {
	name := p.Disk.Name
	var steps []failover.Step
	if p.Running {
		steps = append(steps, failover.Step{
			Name: "out", Title: "Put the running guest's disk back onto its own image",
			Do: func(ctx context.Context) (string, error) { return "", v.removeOne(ctx, p.Disk) },
			Undo: func(ctx context.Context) error {
				defer v.startShipping()
				return v.insertOne(ctx, p.Disk)
			},
		})
	}
	return append(steps,
		failover.Step{
			Name: "define", Title: "Restore its definition",
			Do: func(ctx context.Context) (string, error) { return "", v.defineOut(ctx, name) },
			Undo: func(ctx context.Context) error {
				_, err := v.pointIn(ctx)
				return err
			},
		},
		failover.Step{Name: "forget", Title: "End its protection", Commit: true, Do: func(context.Context) (string, error) {
			v.stopShipping()
			return "recovery points that have the disk keep it", v.withoutDisk(name)
		}},
		failover.Step{Name: "plane", Title: "Stop tracking it", Do: func(ctx context.Context) (string, error) {
			if err := v.replane(ctx, false, name); err != nil {
				return "", err
			}
			if err := v.cutAnyway(ctx); err != nil {
				return "", err
			}
			v.startShipping()
			return "", nil
		}},
	)
}

func (v *VM) withDisk(d Disk) error {
	return v.update(func(r *Record) error {
		if _, have := r.disk(d.Name); !have {
			r.Disks = append(slices.Clone(r.Disks), d)
		}
		return nil
	})
}

func (v *VM) withoutDisk(name wire.DiskName) error {
	return v.update(func(r *Record) error {
		r.Disks = slices.DeleteFunc(slices.Clone(r.Disks), func(d Disk) bool { return d.Name == name })
		return nil
	})
}

// replane starts the data plane anew with the record's disks, unless it serves
// them already. A running guest waits meanwhile.
func (v *VM) replane(ctx context.Context, with bool, name wire.DiskName) error {
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	c, err := v.plane()
	if err != nil {
		return err
	}
	st, err := c.Status(ctx)
	if err != nil {
		return fmt.Errorf("ask the data plane: %w", err)
	}
	if serves := slices.ContainsFunc(st.Disks, func(d dataplane.DiskStatus) bool { return d.Name == name }); serves == with {
		return nil
	}
	if err := v.stopPlane(ctx); err != nil {
		return err
	}
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	return v.openExports(ctx)
}

// cutAnyway makes the next cut one that is shipped although nothing changed: it
// tells the replica that there is a disk less.
func (v *VM) cutAnyway(ctx context.Context) error {
	c, err := v.plane()
	if err != nil {
		return err
	}
	r := v.record()
	return c.Mark(ctx, dataplane.MarkRequest{
		Disk: r.served()[0].Name, Ranges: []wire.Range{{Len: delta.Granule}}, Reason: "the VM has a disk less",
	})
}

// insertOne puts the export of one disk under a running guest; one that was
// shut down meanwhile starts on it.
func (v *VM) insertOne(ctx context.Context, d Disk) error {
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	if isOff, err := v.guestIsOff(ctx); err != nil || isOff {
		return err
	}
	return v.deps.Hyper.InsertDisks(ctx, string(v.id), v.swapsOf([]Disk{d}))
}

func (v *VM) removeOne(ctx context.Context, d Disk) error {
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	isOff, err := v.guestIsOff(ctx)
	if err != nil || isOff {
		return err
	}
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	return v.deps.Hyper.RemoveDisks(ctx, string(v.id), v.swapsOf([]Disk{d}))
}

// defineOut gives one disk its own source back in the definition.
func (v *VM) defineOut(ctx context.Context, name wire.DiskName) error {
	r := v.record()
	d, ok := r.disk(name)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if err != nil {
		return err
	}
	doc, changed, err := v.pointOut(doc, d, false)
	if err != nil || !changed {
		return err
	}
	r.Disks = slices.DeleteFunc(slices.Clone(r.Disks), func(k Disk) bool { return k.Name == name })
	if doc, err = libvirt.InsertMetadata(doc, metadata(r)); err != nil {
		return err
	}
	_, err = v.deps.Hyper.Define(ctx, doc)
	return err
}

// joined ends the addition of disks of which the replica has everything.
func (v *VM) joined(disks []wire.DiskName) {
	err := v.update(func(r *Record) error {
		r.Disks = slices.Clone(r.Disks)
		for i := range r.Disks {
			if d := &r.Disks[i]; d.State == joining && slices.Contains(disks, d.Name) {
				d.State = member
			}
		}
		return nil
	})
	if err != nil {
		v.log.Error("keep that a disk was added", "disks", disks, "err", err)
		return
	}
	v.log.Info("the replica has all of a disk that was added", "disks", disks)
}

// setChanges reports that a disk is on its way under the guest or away from it:
// that its export is not there means nothing then.
func (v *VM) setChanges() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, j := range []*failover.Journal{v.running, v.stuck} {
		if j != nil && (j.Kind == failover.AddDisk || j.Kind == failover.TakeDisk) {
			return true
		}
	}
	return false
}

// notJoining refuses what needs the replica to have every disk.
func (v *VM) notJoining() error {
	r := v.record()
	for _, d := range r.Disks {
		if d.State == joining {
			return &wire.Error{
				Kind: wire.KindRefused, Text: fmt.Sprintf("disk %s is still being added; the replica does not have all of it", d.Name),
				Hint: fmt.Sprintf("wait: replicactl vm watch %s; or take it out again: replicactl vm remove-disk %s %s", r.Name, r.Name, d.Name),
			}
		}
	}
	return nil
}
