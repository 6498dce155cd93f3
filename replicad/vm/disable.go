package vm

import (
	"context"
	"errors"
	"fmt"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// DisableOptions are a person's choices.
type DisableOptions struct {
	Delete  bool // on the replica's host: also delete the copy
	Force   bool // go on although the other host does not answer
	Request string
}

// disableVars is what disabling needs after a restart.
type disableVars struct {
	Delete, Force bool
	Replica       bool // this host is the replica
}

// Disable ends the protection of a VM: a running guest goes back onto its own
// images without a stop, and the definition is as it was.
func (m *Manager) Disable(ctx context.Context, v *VM, o DisableOptions, event func(failover.Event)) error {
	unlock, err := v.lockAsked(ctx, "disable")
	if err != nil {
		return err
	}
	defer unlock()
	switch { // an interrupted try may have come to its end meanwhile
	case v.forgotten():
		return nil
	case v.over():
		return m.remove(v)
	}
	st := v.record().Lineage.State
	switch st {
	case lineage.Primary, lineage.Promoted, lineage.Replica:
	default:
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("a role change is under way (%s)", st), Hint: "replicactl failover resume " + v.record().Name}
	}
	if err := v.imagesOnly(ctx); err != nil {
		return err
	}
	if st == lineage.Replica && !o.Force && v.record().Orphan == nil {
		return &wire.Error{Kind: wire.KindRefused, Text: "this host is the replica", Hint: "disable protection on the primary; with --force only this host's part is removed"}
	}
	if text := snapshotText(v.record().Snapshots); text != "" && st != lineage.Replica && !o.Force {
		return &wire.Error{Kind: wire.KindRefused, Text: "the guest's newest writes lie in a snapshot above its export: " + text, Hint: "finish the backup (virsh blockcommit " + v.record().Name + " … --active --pivot) first; with --force the snapshot stays as it is"}
	}
	vars := &disableVars{Delete: o.Delete, Force: o.Force, Replica: st == lineage.Replica}
	if err := v.disable(ctx, vars, o.Request, event); err != nil {
		return err
	}
	return m.remove(v)
}

// disable runs the plan. A force that comes while an unforced try waits for the
// other host goes to that one.
func (v *VM) disable(ctx context.Context, vars *disableVars, request string, event func(failover.Event)) error {
	j, err := failover.Load(v.fsys, planFile)
	if err != nil {
		return err
	}
	if j != nil && j.Kind == failover.Disable && vars.Force {
		r := v.runner()
		r.Resume(j)
		if err := r.SetVars(vars); err != nil {
			return err
		}
		return v.drive(ctx, r, event)
	}
	if !vars.Replica && !vars.Force {
		if err := v.reachable(ctx); err != nil {
			return err
		}
	}
	return v.execute(ctx, failover.Disable, request, vars, event)
}

// reachable refuses to begin what only the other host can complete.
func (v *VM) reachable(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	p, err := v.peer()
	if err == nil {
		_, err = p.Hello(ctx, wire.HelloRequest{Min: wire.ProtocolMin, Max: wire.ProtocolMax, Host: v.deps.Host, Name: v.deps.HostName, Now: v.deps.Now()})
	}
	if err != nil {
		return &wire.Error{Kind: wire.KindUnavailable, Text: "the replica host cannot be told: " + err.Error(), Hint: "repeat when it answers, or with --force"}
	}
	return nil
}

func (v *VM) disableSteps(p *disableVars) []failover.Step {
	if p.Replica {
		return []failover.Step{
			{Name: "undefine", Title: "Remove the replica's domain", Commit: true, Do: func(ctx context.Context) (string, error) {
				return "", errors.Join(v.stopKeeping(), v.undefineReplica(ctx), v.restoreNative(ctx))
			}},
			{Name: "images", Title: "Remove the replica's images", Do: func(context.Context) (string, error) {
				if !p.Delete {
					return "kept", nil
				}
				return "", v.deleteImages()
			}},
			{Name: "forget", Title: "Forget the relationship", Do: v.end},
		}
	}
	return []failover.Step{
		{Name: "withdraw", Title: "End the relationship on the replica host", Commit: true, Do: func(ctx context.Context) (string, error) {
			v.stopShipping()
			return v.withdraw(ctx, p.Delete, p.Force)
		}},
		{Name: "out", Title: "Put the running guest back onto its own images", Do: func(ctx context.Context) (string, error) {
			if v.outOfHands() {
				return "it stands on them already", nil
			}
			return "", v.takeOut(ctx)
		}},
		{Name: "define", Title: "Restore the definition", Do: func(ctx context.Context) (string, error) {
			if v.record().Native {
				return "", v.restoreDomain(ctx)
			}
			return "", v.keepRendered(ctx)
		}},
		{Name: "plane", Title: "Stop the data plane", Do: func(ctx context.Context) (string, error) {
			return "", v.stopPlane(ctx)
		}},
		{Name: "forget", Title: "Forget the relationship", Do: v.end},
	}
}

// end marks the record as the last thing to remove.
func (v *VM) end(context.Context) (string, error) {
	return "", v.update(func(r *Record) error { r.Ended = true; return nil })
}

func (v *VM) restoreNative(ctx context.Context) error {
	if !v.record().Native {
		return nil
	}
	return v.restoreDomain(ctx)
}

// keepRendered leaves a domain that was rendered here on its own images: the
// VM lives here now.
func (v *VM) keepRendered(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if err != nil {
		return err
	}
	d, err := libvirt.ParseDomain(doc)
	if err != nil {
		return err
	}
	for name, src := range v.exports() {
		if k, ok := d.Disk(name); !ok || k.Kind != libvirt.SourceNBD || k.Socket != src.Socket {
			return nil // done before
		}
	}
	if doc, err = v.offExports(doc); err != nil {
		return err
	}
	_, err = v.deps.Hyper.Define(ctx, doc)
	return err
}

// withdraw ends the relationship at the peer; force lets a silent peer be.
func (v *VM) withdraw(ctx context.Context, del, force bool) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	peer, err := v.peer()
	if err == nil {
		err = peer.Withdraw(ctx, wire.Withdraw{VM: v.id, Delete: del, Request: "withdraw"})
	}
	var w *wire.Error
	switch {
	case err == nil, errors.As(err, &w) && w.Kind == wire.KindNotFound:
		host := v.mgr.peerName(v.record().Peer)
		return fmt.Sprintf("a copy on %s stays until it is deleted there: replicactl vm disable %s --delete-replica", host, v.record().Name), nil
	case force:
		v.log.Warn("the replica host was not told that the relationship ended", "err", err)
		return "the other host was not told", nil
	}
	return "", &wire.Error{Kind: wire.KindUnavailable, Text: "end the relationship on the replica host: " + err.Error(), Hint: "repeat when it answers, or with --force"}
}
