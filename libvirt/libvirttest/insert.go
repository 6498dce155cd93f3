package libvirttest

import (
	"context"
	"fmt"

	"kvmreplica/libvirt"
)

// Graph reports what SetGraph set; else a disk whose live document, or whose
// insertion, puts it on its export is at the top, and any other is absent.
func (f *Fake) Graph(ctx context.Context, uuid string, exports map[string]libvirt.NBDSource) (out map[string]libvirt.DiskGraph, err error) {
	err = f.on(ctx, "Graph", uuid, "", func(d *domain) error {
		if d.state == libvirt.StateOff {
			return wrongState("Graph", d)
		}
		v, e := libvirt.ParseDomain(d.live)
		if e != nil {
			return e
		}
		out = map[string]libvirt.DiskGraph{}
		for _, k := range v.Disks {
			g, set := d.graph[k.Target]
			if !set {
				g = libvirt.DiskGraph{Target: k.Target, Position: libvirt.PositionAbsent}
				src := exports[k.Target]
				onExport := k.Kind == libvirt.SourceNBD && k.Socket == src.Socket && k.Export == src.Export
				if src.Socket != "" && (onExport || d.inserted[k.Target] > libvirt.InsertAdded) {
					g.Position, g.Ours = libvirt.PositionTop, "libvirt-1-storage"
				}
			}
			out[k.Target] = g
		}
		return nil
	})
	return out, err
}

// ResizeDisk remembers the size a running guest was shown.
func (f *Fake) ResizeDisk(ctx context.Context, uuid, target string, _ libvirt.NBDSource, size int64) error {
	return f.on(ctx, "ResizeDisk", uuid, fmt.Sprintf("%s %d", target, size), func(d *domain) error {
		if d.state == libvirt.StateOff {
			return wrongState("ResizeDisk", d)
		}
		return nil
	})
}

// Probe tells how far a disk is.
func (f *Fake) Probe(ctx context.Context, uuid string, r libvirt.InsertRequest) (s libvirt.InsertState, err error) {
	err = f.on(ctx, "Probe", uuid, r.Disk.Target, func(d *domain) error {
		s = d.state0(r)
		return nil
	})
	return s, err
}

// state0 is the present state of an insertion: a cold start on the export
// counts as in.
func (d *domain) state0(r libvirt.InsertRequest) libvirt.InsertState {
	if s, ok := d.inserted[r.Disk.Target]; ok {
		return s
	}
	if v, err := libvirt.ParseDomain(d.live); err == nil {
		if k, ok := v.Disk(r.Disk.Target); ok && k.Kind == libvirt.SourceNBD {
			return libvirt.InsertIn
		}
	}
	return libvirt.InsertOut
}

// InsertStep makes one step in, with the callbacks where the real one has them.
func (f *Fake) InsertStep(ctx context.Context, uuid string, r libvirt.InsertRequest) (libvirt.InsertState, error) {
	return f.step(ctx, "InsertStep", uuid, r, +1)
}

// RemoveStep makes one step out.
func (f *Fake) RemoveStep(ctx context.Context, uuid string, r libvirt.InsertRequest) (libvirt.InsertState, error) {
	return f.step(ctx, "RemoveStep", uuid, r, -1)
}

func (f *Fake) step(ctx context.Context, op, uuid string, r libvirt.InsertRequest, by int) (libvirt.InsertState, error) {
	var from libvirt.InsertState
	err := f.on(ctx, op, uuid, r.Disk.Target, func(d *domain) error {
		if d.state != libvirt.StateRunning && d.state != libvirt.StatePaused {
			return wrongState(op, d)
		}
		from = d.state0(r)
		return nil
	})
	if err != nil {
		return from, err
	}
	to := min(max(from+libvirt.InsertState(by), libvirt.InsertOut), libvirt.InsertIn)
	if from == libvirt.InsertBare && by < 0 && r.BeforeReopen != nil {
		if err := r.BeforeReopen(ctx); err != nil {
			return from, fmt.Errorf("before the image is opened again: %w", err)
		}
	}
	f.with(uuid, func(d *domain) { d.inserted[r.Disk.Target] = to })
	switch {
	case to == libvirt.InsertBare && by > 0 && r.AfterRelease != nil:
		err = r.AfterRelease(ctx)
	case to == libvirt.InsertAdded && by < 0 && r.AfterReopen != nil:
		err = r.AfterReopen(ctx)
	}
	return to, err
}

// InsertDisks walks all disks in, or all back out.
func (f *Fake) InsertDisks(ctx context.Context, uuid string, reqs []libvirt.InsertRequest) error {
	if err := f.on(ctx, "InsertDisks", uuid, "", func(d *domain) error {
		if d.state != libvirt.StateRunning && d.state != libvirt.StatePaused {
			return wrongState("InsertDisks", d)
		}
		return nil
	}); err != nil {
		return err
	}
	for _, r := range reqs {
		if err := f.walk(ctx, uuid, r, libvirt.InsertIn, f.InsertStep); err != nil {
			for i := len(reqs) - 1; i >= 0; i-- {
				if e := f.walk(context.WithoutCancel(ctx), uuid, reqs[i], libvirt.InsertOut, f.RemoveStep); e != nil {
					return fmt.Errorf("%w; and taking it back failed: %w", err, e)
				}
			}
			return fmt.Errorf("%w; everything was taken back", err)
		}
	}
	return nil
}

// RemoveDisks walks all disks out.
func (f *Fake) RemoveDisks(ctx context.Context, uuid string, reqs []libvirt.InsertRequest) error {
	if err := f.on(ctx, "RemoveDisks", uuid, "", func(d *domain) error {
		v, err := libvirt.ParseDomain(d.doc)
		for _, r := range reqs {
			if _, ok := v.Disk(r.Disk.Target); err == nil && !ok {
				err = &libvirt.Error{Op: "RemoveDisks", Kind: libvirt.KindNotFound, Msg: "the domain has no such disk"}
			}
		}
		return err
	}); err != nil {
		return err
	}
	for _, r := range reqs {
		if err := f.walk(ctx, uuid, r, libvirt.InsertOut, f.RemoveStep); err != nil {
			return err
		}
	}
	return nil
}

func (f *Fake) walk(ctx context.Context, uuid string, r libvirt.InsertRequest, until libvirt.InsertState, step func(context.Context, string, libvirt.InsertRequest) (libvirt.InsertState, error)) error {
	var st libvirt.InsertState
	f.with(uuid, func(d *domain) { st = d.state0(r) })
	for st != until {
		var err error
		if st, err = step(ctx, uuid, r); err != nil {
			return err
		}
	}
	return nil
}
