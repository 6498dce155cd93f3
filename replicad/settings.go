package replicad

import (
	"context"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// setVM changes settings of a protected VM and says which.
func setVM(ctx context.Context, v *vm.VM, a api.Action, emit func(api.Event)) error {
	if a.Set == nil {
		return &wire.Error{Kind: wire.KindInvalid, Text: "no setting is named", Hint: "replicactl vm set --help"}
	}
	changed, err := v.Set(ctx, vm.Settings(*a.Set))
	if err != nil {
		return err
	}
	for _, c := range changed {
		note(emit, "%s", c)
	}
	if len(changed) == 0 {
		note(emit, "It is as asked already.")
	}
	return nil
}
