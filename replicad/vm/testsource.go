package vm

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// Name is what the VM is called here.
func (v *VM) Name() string { return v.record().Name }

// HoldsReplica reports whether this host keeps recovery points of the VM now.
func (v *VM) HoldsReplica() bool { return v.record().Lineage.State == lineage.Replica }

// TestSource is what a test copy of a state of the VM is made from: the
// description with the disks that the state has whole (zero = the newest), and
// this host's policy for it. Disk sources and networks of the policy
// are those of the real VM, for the caller to replace. It refuses where there is no replica.
func (v *VM) TestSource(at delta.Pos) (libvirt.Spec, libvirt.Policy, error) {
	r := v.record()
	if r.Lineage.State != lineage.Replica {
		return libvirt.Spec{}, libvirt.Policy{}, &wire.Error{
			Kind: wire.KindRefused, Text: fmt.Sprintf("this host is %s for %s and holds no recovery points", r.Lineage.State, r.Name),
			Hint: "type the command on the replica host; which one that is: replicactl vm status " + r.Name,
		}
	}
	if r.Incomplete {
		return libvirt.Spec{}, libvirt.Policy{}, &wire.Error{Kind: wire.KindRefused, Text: "the replica holds no complete copy now", Hint: "replicactl vm watch " + r.Name}
	}
	has := Disk.whole
	if !at.IsZero() {
		st, err := v.store()
		if err != nil {
			return libvirt.Spec{}, libvirt.Policy{}, err
		}
		disks, err := v.wholeAt(st, at)
		if err != nil {
			return libvirt.Spec{}, libvirt.Policy{}, err
		}
		has = func(d Disk) bool {
			return slices.ContainsFunc(disks, func(k delta.Disk) bool { return k.Name == string(d.Name) })
		}
	}
	s, err := r.specWith(has)
	if err != nil {
		return s, libvirt.Policy{}, err
	}
	return s, v.policy(s), nil
}

// OpenView opens a recovery point for reading. It ends when the role does; when
// the store is opened anew it must be opened anew, too.
func (v *VM) OpenView(pos delta.Pos) (*points.View, error) {
	s, err := v.store()
	if err != nil {
		return nil, err
	}
	return s.View(pos)
}

// HoldPoint keeps a recovery point from being thinned, durably, for an owner
// that is no person. The newest state becomes a recovery point for that, which
// it does only while a view of it is open.
func (v *VM) HoldPoint(ctx context.Context, pos delta.Pos, owner string) error {
	s, err := v.store()
	if err != nil {
		return err
	}
	if err = s.Hold(pos, owner); !errors.Is(err, points.ErrNoPoint) {
		return err
	}
	if err := s.ApplyAll(ctx); err != nil {
		return err
	}
	if _, err := s.Step(ctx); err != nil { // what is viewed and applied becomes a point
		return err
	}
	return s.Hold(pos, owner)
}

// ReleasePoint takes that back. A point that is gone is fine.
func (v *VM) ReleasePoint(pos delta.Pos, owner string) error {
	s, err := v.store()
	if err != nil {
		return err
	}
	if err := s.Release(pos, owner); !errors.Is(err, points.ErrPromoted) {
		return err
	}
	return nil
}

// PointFirmware is the NVRAM and TPM state of a recovery point.
func (v *VM) PointFirmware(pos delta.Pos) (libvirt.FirmwareState, error) {
	s, err := v.store()
	if err != nil {
		return libvirt.FirmwareState{}, err
	}
	blobs, err := s.Firmware(pos)
	if err != nil {
		return libvirt.FirmwareState{}, err
	}
	var out libvirt.FirmwareState
	for _, b := range blobs {
		switch b.Kind {
		case delta.BlobNVRAM:
			out.NVRAM = b.Data
		case delta.BlobTPM:
			out.TPM = b.Data
		}
	}
	return out, nil
}
