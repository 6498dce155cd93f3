package dataplane_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/dataplane/dataplanetest"
)

// starved fails its first calls.
type starved struct {
	net.Listener
	left atomic.Int32
}

func (s *starved) Accept() (net.Conn, error) {
	if s.left.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", syscall.ENOMEM)}
	}
	return s.Listener.Accept()
}

// A data plane that ends takes the guest's disks away for a moment: one that
// gets no memory for a control connection, or a guest's, must wait.
func TestADataPlaneThatCannotAcceptForAWhileGoesOn(t *testing.T) {
	cfg := dataplanetest.Config(t, 1<<20)
	p, err := dataplane.Open(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var ls [2]net.Listener
	for i, path := range []string{cfg.NBDSocket(), cfg.ControlSocket()} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		s := &starved{Listener: l}
		s.left.Store(3)
		ls[i] = s
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Serve(ctx, ls[0], ls[1]) }()
	c := dataplane.NewClient(cfg.ControlSocket())
	defer c.Close()
	if _, err := c.Status(t.Context()); err != nil {
		t.Errorf("the data plane does not answer: %v", err)
	}
	cancel()
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("the data plane ended with %v", err)
	}
}
