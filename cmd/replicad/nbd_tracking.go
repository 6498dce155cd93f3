package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spf13/pflag"

	"kvmreplica/internal/block"
)

// trackingFlags place change tracking in front of the image.
type trackingFlags struct {
	state string
}

func (f *trackingFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.state, "state", "", "directory of the change tracker's state (default: no tracking)")
}

// wrap returns the device to serve and what closes the tracker before the
// image.
func (f *trackingFlags) wrap(_ context.Context, src *source, _ bool, _ *slog.Logger) (block.Device, func() error, error) {
	if f.state == "" {
		return src.Device, func() error { return nil }, nil
	}
	return nil, nil, errors.New("tracking is not built in yet; leave --state out")
}
