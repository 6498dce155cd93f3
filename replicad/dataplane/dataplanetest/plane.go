package dataplanetest

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"

	"kvmreplica/replicad/dataplane"
)

// Run is a data plane in this process.
type Run struct {
	*dataplane.Client
	t      testing.TB
	cancel context.CancelFunc
	done   chan error
}

// Serve opens a data plane in this process and serves it on cfg's sockets
// until Stop or the end of the test.
func Serve(t testing.TB, cfg dataplane.Config) *Run {
	t.Helper()
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	if os.Getenv("DATAPLANE_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	p, err := dataplane.Open(context.Background(), cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	var ls [2]net.Listener
	for i, path := range []string{cfg.NBDSocket(), cfg.ControlSocket()} {
		_ = os.Remove(path)
		if ls[i], err = net.Listen("unix", path); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Run{Client: dataplane.NewClient(cfg.ControlSocket()), t: t, cancel: cancel, done: make(chan error, 1)}
	go func() { r.done <- p.Serve(ctx, ls[0], ls[1]) }()
	t.Cleanup(r.Stop)
	return r
}

// Stop drains the data plane. Twice is harmless.
func (r *Run) Stop() {
	r.t.Helper()
	r.Client.Close()
	r.cancel()
	err, ok := <-r.done
	if !ok {
		return
	}
	close(r.done)
	if err != nil && !errors.Is(err, context.Canceled) {
		r.t.Errorf("data plane: %v", err)
	}
}

// Create makes the tracker and opens all exports.
func (r *Run) Create(req dataplane.CreateRequest) {
	r.t.Helper()
	ctx := context.Background()
	if err := r.CreateTracker(ctx, req); err != nil {
		r.t.Fatal(err)
	}
	if err := r.Export(ctx, dataplane.ExportRequest{On: true}); err != nil {
		r.t.Fatal(err)
	}
}
