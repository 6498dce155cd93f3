// Command replicactl is what an administrator types: singular noun, then verb.
// It only talks to the daemon's local control socket; results go to standard
// output, everything else to standard error, --json everywhere.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr, os.Stdin)
	stop()
	os.Exit(code)
}
