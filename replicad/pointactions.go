package replicad

import (
	"context"
	"fmt"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// Points lists a VM's recovery points, wherever they are kept.
func (d *Daemon) Points(ctx context.Context, name string) (wire.PointsReply, error) {
	v, err := d.vms.Lookup(name)
	if err != nil {
		return wire.PointsReply{}, err
	}
	out, err := v.ListPoints(ctx)
	return out, d.explain(err, name)
}

// pointAction changes what is kept.
func (d *Daemon) pointAction(ctx context.Context, v *vm.VM, a api.Action, emit func(api.Event)) error {
	if a.Verb == api.PointKeep {
		o := vm.RetentionOptions{Quota: a.Quota}
		if a.Retention != "" {
			o.Retention = &a.Retention
		}
		r, err := v.SetRetention(o)
		if err != nil {
			return err
		}
		note(emit, "Kept on %s: %s, %s.", r.Host, r.Retention, quotaText(r.Quota))
		return nil
	}
	p, err := v.PinPoint(ctx, a.Point, a.Verb == api.PointPin)
	if err != nil {
		return err
	}
	what := "is pinned: it is neither thinned nor given up"
	if a.Verb == api.PointUnpin {
		what = "is no longer pinned"
	}
	note(emit, "Recovery point %d of %s (%s) %s.", p.Ordinal, p.TimeText(), p.Pos, what)
	return nil
}

func quotaText(n int64) string {
	if n == 0 {
		return "as much space as there is above the reserve"
	}
	return fmt.Sprintf("at most %d bytes", n)
}
