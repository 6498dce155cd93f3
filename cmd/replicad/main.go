// Command replicad is the daemon of one host. Its other verbs are the data
// plane's processes, which it starts itself, and "replicad nbd", which serves
// one disk without the rest.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"kvmreplica/internal/version"
	"kvmreplica/replicad"
	"kvmreplica/replicad/config"
)

func main() {
	if err := newRoot().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "replicad:", err)
		os.Exit(1)
	}
}

const rootHelp = `The daemon that keeps standby copies of virtual machines on another host. It reads its configuration, brings every
protected VM into its role and serves replicactl until it is told to stop; guests keep their disks meanwhile and after.

EXIT STATUS
  0 stopped by a signal, or --check found nothing   1 failed`

func newRoot() *cobra.Command {
	var (
		path  string
		check bool
	)
	root := &cobra.Command{
		Use: "replicad", Short: "Replicate virtual machines to another host", Long: rootHelp, Args: cobra.NoArgs,
		SilenceUsage: true, SilenceErrors: true, Version: version.String(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(path)
			if err != nil || check {
				return err
			}
			return runDaemon(cmd.Context(), cfg)
		},
	}
	root.Flags().StringVar(&path, "config", config.DefaultPath, "configuration file")
	root.Flags().BoolVar(&check, "check", false, "read and check the configuration, then stop")
	root.AddCommand(newNBDCommand())
	root.AddCommand(newKeeperCommand(), newDataplaneCommand())
	return root
}

func runDaemon(ctx context.Context, cfg config.Config) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	opts := &slog.HandlerOptions{Level: cfg.LogLevel}
	var h slog.Handler = slog.NewTextHandler(os.Stderr, opts)
	if cfg.LogFormat == "json" {
		h = slog.NewJSONHandler(os.Stderr, opts)
	}
	d, err := replicad.Open(cfg, slog.New(h))
	if err != nil {
		return err
	}
	return d.Run(ctx)
}
