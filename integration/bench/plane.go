package main

import (
	"context"
	"os"
	"path/filepath"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// The VM of a plane, and its one disk.
const (
	planeVM   = wire.VMID("5eed0000-0000-4000-8000-0000000000be")
	planeDisk = wire.DiskName("vda")
)

// plane is a keeper and a data plane of the built program around an image that
// equals its replica: nothing is marked, every first touch of a MiB is one.
type plane struct {
	*dataplane.Client
	cfg dataplane.Config
}

// startPlane starts one in dir. launcher is put in front of the keeper.
func startPlane(ctx context.Context, dir, program, image string, launcher ...string) (*plane, error) {
	p := &plane{cfg: dataplane.Config{
		VM: planeVM, Name: "bench", AnyClient: true, Binary: program, Launcher: launcher,
		Disks:    []dataplane.DiskConfig{{Name: planeDisk, Kind: dataplane.Raw, Path: image}},
		StateDir: filepath.Join(dir, "state"), SharedDir: filepath.Join(dir, "shared"), RunDir: filepath.Join(dir, "run"),
	}}
	for _, d := range []string{p.cfg.StateDir, p.cfg.SharedDir, p.cfg.RunDir} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return p, err
		}
	}
	var err error
	if p.Client, err = dataplane.Ensure(ctx, p.cfg); err != nil {
		return p, err
	}
	if err := p.CreateTracker(ctx, dataplane.CreateRequest{Generation: delta.Generation{1}}); err != nil {
		return p, err
	}
	return p, p.Export(ctx, dataplane.ExportRequest{On: true})
}

// end drains the data plane; nil is harmless.
func (p *plane) end(ctx context.Context) error {
	if p == nil {
		return nil
	}
	if p.Client != nil {
		p.Close()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	return dataplane.Stop(ctx, p.cfg)
}
