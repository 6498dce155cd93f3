package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/pflag"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// trackingFlags place change tracking in front of the image.
type trackingFlags struct {
	state string
}

const (
	trackedVM   = "replicad-nbd"
	trackedDisk = "disk"
	cleanEvery  = 30 * time.Second
)

func (f *trackingFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.state, "state", "", "directory of a change tracker to keep; it counts from its first start on (default: no tracking)")
}

// wrap returns the device to serve and what closes the tracker; call it before
// the image is closed.
func (f *trackingFlags) wrap(src *source, readOnly bool, log *slog.Logger) (block.Device, func() error, error) {
	if f.state == "" || readOnly {
		return src.dev, func() error { return nil }, nil
	}
	group, err := f.open(src, log)
	if err != nil {
		return nil, nil, fmt.Errorf("change tracker in %s: %w", f.state, err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		keepClean(group, stop, log)
	}()
	return group.Disk(trackedDisk), func() error {
		close(stop)
		<-stopped
		ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
		defer cancel()
		return group.Close(ctx)
	}, nil
}

// open continues the tracker in the directory, or starts one. Nobody holds a
// copy that has to become equal, so what it records is what was written since
// it began: with everything dirty from the start it would record nothing, and
// no write would ever have to wait for a mark.
func (f *trackingFlags) open(src *source, log *slog.Logger) (*cbt.Group, error) {
	if err := os.MkdirAll(f.state, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	dir, err := fsx.OS(f.state)
	if err != nil {
		return nil, err
	}
	disk := cbt.DiskConfig{Name: trackedDisk, Device: src.dev}
	if src.file != nil {
		disk.Identity = src.file.Identity
	}
	cfg := cbt.Config{FS: dir, VMID: trackedVM, Log: log, Disks: []cbt.DiskConfig{disk}}
	group, report, err := cbt.Open(cfg)
	switch {
	case errors.Is(err, cbt.ErrNoTracker):
		start := cbt.Start{Dirty: cbt.DirtyNone}
		_, _ = rand.Read(start.Generation[:]) // never fails
		log.Info("new change tracker, counting from now on", "state", f.state)
		return cbt.Create(cfg, start)
	case err != nil:
		return nil, err
	}
	log.Info("change tracker opened", "source", report.Source, "reason", report.Reason, "dirty", report.DirtyBytes[trackedDisk])
	return group, nil
}

// keepClean forgets clean regions now and then.
func keepClean(g *cbt.Group, stop <-chan struct{}, log *slog.Logger) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	tick := time.NewTicker(cleanEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-tick.C:
			if err := g.CleanStep(ctx, now); err != nil {
				log.Warn("clean step", "err", err)
			}
		}
	}
}
