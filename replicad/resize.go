package replicad

import (
	"context"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

func (d *Daemon) resize(ctx context.Context, v *vm.VM, a api.Action, request string, emit func(api.Event)) error {
	if len(a.Disks) != 1 {
		return &wire.Error{Kind: wire.KindInvalid, Text: "one disk is resized at a time", Hint: "replicactl vm resize NAME DISK SIZE"}
	}
	r, err := v.Resize(ctx, vm.ResizeOptions{Disk: wire.DiskName(a.Disks[0]), Size: a.Size, Shrink: a.Shrink, DryRun: a.DryRun, Request: request})
	for _, n := range r.Notes {
		note(emit, "%s", n)
	}
	return err
}
