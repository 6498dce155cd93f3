package replicad

import (
	"context"
	"fmt"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

func (d *Daemon) setDisk(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	verb, hint := "added", "replicactl vm add-disk NAME DISK"
	if a.Verb == api.VMTakeDisk {
		verb, hint = "removed", "replicactl vm remove-disk NAME DISK"
	}
	if len(a.Disks) != 1 {
		return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("one disk is %s at a time", verb), Hint: hint}
	}
	o := vm.DiskOptions{Disk: wire.DiskName(a.Disks[0]), Remove: a.Verb == api.VMTakeDisk, Request: request}
	if a.DryRun {
		checks, err := v.PlanDisk(ctx, o)
		if err != nil {
			return err
		}
		if o.Remove {
			note(emit, "The guest keeps disk %s, on its own image; replication ends for it. Recovery points that have it keep it.", o.Disk)
		} else {
			note(emit, "Disk %s is copied with the changes of the others, which go on meanwhile; until the copy is complete a failover goes without it.", o.Disk)
		}
		return refusedBy(emitChecks(checks, emit))
	}
	if err := v.SetDisk(ctx, o, step); err != nil {
		return err
	}
	return d.result(ctx, v, emit)
}
