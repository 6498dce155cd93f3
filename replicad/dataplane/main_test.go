package dataplane_test

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"

	"kvmreplica/replicad/dataplane"
)

// TestMain lets the test binary be the keeper and the data plane as well, so
// that tests can kill real processes.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "keeper" || os.Args[1] == "dataplane") {
		if err := verb(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func verb(name string, args []string) error {
	file := args[len(args)-1]
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch {
	case name == "dataplane":
		return dataplane.RunPlane(ctx, file)
	case args[0] == "--detach":
		return dataplane.Detach(file)
	}
	return dataplane.RunKeeper(ctx, file)
}
