package replicad

import (
	"context"
	"fmt"
	"strings"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/mount"
	"kvmreplica/replicad/status"
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

// Mounts lists the recovery points that are mounted on this host.
func (d *Daemon) Mounts(context.Context) ([]status.Mount, error) {
	out := []status.Mount{}
	for _, v := range d.vms.All() {
		out = append(out, v.Mounts()...)
	}
	return out, nil
}

func (d *Daemon) pointAction(ctx context.Context, v *vm.VM, a api.Action, emit func(api.Event)) error {
	switch a.Verb {
	case api.PointKeep:
		return keepPoints(v, a, emit)
	case api.PointApp:
		if err := v.SetAppEvery(ctx, a.AppEvery); err != nil {
			return err
		}
		if a.AppEvery == 0 {
			note(emit, "No application-consistent points are taken.")
		} else {
			note(emit, "An application-consistent point is taken now and every %s.", a.AppEvery)
		}
		return nil
	case api.PointMount:
		m, err := v.MountPoint(mountOptions(a))
		if err == nil {
			emit(api.Event{Mount: &m})
		}
		return err
	case api.PointUnmount:
		n, err := v.UnmountPoint(a.Mount, a.Force)
		if err == nil {
			note(emit, "%s ended.", count.Of(n, "mount"))
		}
		return err
	case api.PointExport:
		return exportPoint(ctx, v, a, emit)
	}
	return pinPoint(ctx, v, a, emit)
}

func mountOptions(a api.Action) vm.MountOptions {
	o := vm.MountOptions{Point: a.Point, Writable: a.Writable, TCP: a.TCP}
	if a.Quota != nil {
		o.Quota = *a.Quota
	}
	return o
}

// keepPoints changes the retention.
func keepPoints(v *vm.VM, a api.Action, emit func(api.Event)) error {
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

func pinPoint(ctx context.Context, v *vm.VM, a api.Action, emit func(api.Event)) error {
	p, err := v.PinPoint(ctx, a.Point, a.Verb == api.PointPin)
	if err != nil {
		return err
	}
	what := "is pinned: it is neither thinned nor given up"
	if a.Verb == api.PointUnpin {
		what = "is no longer pinned"
		if p.Pinned {
			what = "is no longer pinned by you; it stays as long as " + strings.Join(p.Owners, ", ") + " needs it"
		}
	}
	note(emit, "Recovery point %d of %s (%s) %s.", p.Ordinal, p.TimeText(), p.Pos, what)
	return nil
}

// progressEvery is how often an export tells how far it is.
const progressEvery = time.Second

func exportPoint(ctx context.Context, v *vm.VM, a api.Action, emit func(api.Event)) error {
	begun, last := time.Now(), time.Time{}
	files, err := v.ExportPoint(ctx, vm.ExportOptions{Point: a.Point, To: a.To, Format: a.Format}, func(p mount.Progress) {
		if now := time.Now(); now.Sub(last) >= progressEvery {
			last = now
			j := status.Job{Phase: "export", Done: p.Done, Total: p.Total, ETA: -1}
			if s := now.Sub(begun).Seconds(); s > 0 {
				j.Rate = int64(float64(p.Done) / s)
			}
			emit(api.Event{Job: &j})
		}
	})
	for _, f := range files {
		note(emit, "Written: %s", f)
	}
	return err
}

func quotaText(n int64) string {
	if n == 0 {
		return "as much space as there is above the reserve"
	}
	return fmt.Sprintf("at most %d bytes", n)
}
