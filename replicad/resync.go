package replicad

import (
	"context"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// resync says what comparing everything costs, and begins it.
func (d *Daemon) resync(ctx context.Context, v *vm.VM, a api.Action, request string, emit func(api.Event)) error {
	w, err := session.ParseWindow(a.Window)
	if err != nil {
		return &wire.Error{Kind: wire.KindInvalid, Text: "window: " + err.Error(), Hint: "--window 22:00-06:00"}
	}
	o := vm.ResyncOptions{Background: a.Background, Rate: a.Rate, Window: w, Stop: a.Stop, Request: request}
	lines, err := v.PlanResync(o)
	if err != nil {
		return err
	}
	for _, l := range lines {
		note(emit, "%s", l)
	}
	if a.DryRun {
		return nil
	}
	return v.Resync(ctx, o)
}
