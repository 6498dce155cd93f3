package vm

import (
	"errors"
	"fmt"
	"os"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// A patch is mounted over a recovery point: each of its blocks as the old
// primary had it, all others as of the point. Over the first state that was
// committed after the return this is the old disk, block for block: what that
// state's epoch overwrote is in the patch, too (keepReplaced).

// firstOrdinal is the number of that state: a return begins a new store.
const firstOrdinal = 1

// MountPatch shows a patch over a recovery point, as MountPoint shows a point;
// with an empty point, over the one it belongs to.
func (v *VM) MountPatch(id string, o MountOptions) (status.Mount, error) {
	p, err := v.readablePatch(id)
	if err != nil {
		return status.Mount{}, err
	}
	own, err := v.pointOfPatch(p)
	if err != nil {
		return status.Mount{}, err
	}
	if o.Point == "" {
		if own == "" {
			return status.Mount{}, &wire.Error{
				Kind: wire.KindNotFound, Text: fmt.Sprintf("the recovery point that patch %s belongs to, the first after its return, is gone", p.ID),
				Hint: "over another one, which shows later changes of other blocks, too: --point oldest; the blocks alone: replicactl failover patch export " + v.record().Name + " " + p.ID,
			}
		}
		o.Point = own
	}
	o.patch = &p
	m, err := v.mountPoint(o, false)
	if err != nil {
		return status.Mount{}, err
	}
	v.log.Info("patch mounted", "mount", m.ID, "patch", p.ID, "pos", m.pos.Pos, "writable", o.Writable)
	return m.Mount, nil
}

// pointOfPatch names the recovery point that a patch belongs to; empty = it is
// gone.
func (v *VM) pointOfPatch(p Patch) (string, error) {
	if !v.HoldsReplica() {
		name := v.record().Name
		return "", &wire.Error{
			Kind: wire.KindRefused, Text: "a patch is shown over a recovery point, and this host keeps none of " + name + " now",
			Hint: "the blocks alone: replicactl failover patch export " + name + " " + p.ID + " --out DIR",
		}
	}
	s, err := v.store()
	if err != nil || v.record().Given != p.ID {
		return "", err
	}
	for _, q := range s.States() {
		if q.Ordinal == firstOrdinal && q.Damage == nil {
			return q.PosText(), nil
		}
	}
	return "", nil
}

// patched is a point's disks with a patch over them.
type patched struct {
	disks map[string]*overlay.Scratch
}

// overlayPatch lays a patch over the disks of a view. What it holds goes into
// files without a name, and is gone with them.
func (v *VM) overlayPatch(view *points.View, p *Patch) (*patched, error) {
	if err := os.MkdirAll(v.scratchDir(), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of scratch overlays: %w", err)
	}
	have, err := overlay.FreeBytes(v.scratchDir())
	if err != nil {
		return nil, err
	}
	if have-p.Bytes < v.deps.Store.Reserve {
		return nil, &wire.Error{
			Kind: wire.KindNoSpace, Text: fmt.Sprintf("a mounted patch takes its %d bytes in %s; %d are free, %d of them must stay so", p.Bytes, v.scratchDir(), have, v.deps.Store.Reserve),
			Hint: "free space there, or write it elsewhere: replicactl failover patch export",
		}
	}
	out := &patched{disks: map[string]*overlay.Scratch{}}
	for _, d := range view.Disks() {
		dev, err := view.Disk(d.Name)
		if err != nil {
			return nil, errors.Join(err, out.close())
		}
		if out.disks[d.Name], err = overlay.CreateScratch(v.scratchDir(), dev, 0, v.deps.Store.Reserve); err != nil {
			delete(out.disks, d.Name)
			return nil, errors.Join(err, out.close())
		}
	}
	_, _, err = walkPatch(p.File, func(h *delta.Header, c delta.Chunk) error {
		d := out.disks[h.Disks[c.Disk].Name]
		if d == nil {
			return &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("the VM has no disk %s any more", h.Disks[c.Disk].Name), Hint: "replicactl failover patch export"}
		}
		return c.Each(func(k delta.Extent, data []byte) error { return lay(d, k, data) })
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lay the patch over the point: %w", err), out.close())
	}
	return out, nil
}

// lay writes one extent, as far as the disk has it: it may be smaller now.
func lay(d block.Device, k delta.Extent, data []byte) error {
	n := min(k.Len, d.Size()-k.Off)
	if n <= 0 {
		return nil
	}
	if data == nil {
		return d.ZeroAt(k.Off, n, true)
	}
	_, err := d.WriteAt(data[:n], k.Off)
	return err
}

func (p *patched) close() error {
	if p == nil {
		return nil
	}
	var err error
	for _, d := range p.disks {
		err = errors.Join(err, d.Close())
	}
	return err
}
