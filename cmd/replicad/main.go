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
	"path/filepath"
	"sync"
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
protected VM into its role and serves replicactl until it is told to stop; guests keep their disks meanwhile and after. On SIGHUP it reads its configuration again (replicactl reload).

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
			path, err := filepath.Abs(path)
			if err != nil {
				return err
			}
			cfg, err := config.Load(path)
			if err != nil || check {
				return err
			}
			return runDaemon(cmd.Context(), path, cfg)
		},
	}
	root.Flags().StringVar(&path, "config", config.DefaultPath, "configuration file")
	root.Flags().BoolVar(&check, "check", false, "read and check the configuration, then stop")
	root.AddCommand(newNBDCommand())
	root.AddCommand(newKeeperCommand(), newDataplaneCommand())
	return root
}

func runDaemon(ctx context.Context, path string, cfg config.Config) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	// From the first moment on: the signal's default would end the daemon.
	again := make(chan os.Signal, 1)
	signal.Notify(again, syscall.SIGHUP)
	defer signal.Stop(again)
	level := new(slog.LevelVar)
	level.Set(cfg.LogLevel)
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewTextHandler(os.Stderr, opts)
	if cfg.LogFormat == "json" {
		h = slog.NewJSONHandler(os.Stderr, opts)
	}
	log := slog.New(h)
	d, err := replicad.Open(cfg, log)
	if err != nil {
		return err
	}
	d.ReloadFrom(path, level)
	var reloads sync.WaitGroup
	defer reloads.Wait()
	ctx, end := context.WithCancel(ctx)
	defer end()
	reloads.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-again:
				if _, err := d.Reload(); err != nil {
					log.Error("read the configuration again", "err", err)
				}
			}
		}
	})
	return d.Run(ctx)
}
