package main

import (
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/dataplane"
)

// newKeeperCommand is "replicad keeper": started by the daemon, not by people.
func newKeeperCommand() *cobra.Command {
	var config string
	var detach bool
	cmd := &cobra.Command{
		Use:    "keeper --config FILE",
		Short:  "Hold a VM's sockets and keep its data plane running",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if detach {
				return dataplane.Detach(config)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return dataplane.RunKeeper(ctx, config)
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "the VM's data-plane configuration (required)")
	cmd.Flags().BoolVar(&detach, "detach", false, "start in a session of its own and return")
	cobra.CheckErr(cmd.MarkFlagRequired("config"))
	return cmd
}

// newDataplaneCommand is "replicad dataplane": started by the keeper, which
// hands over the listening sockets as descriptors 3 and 4.
func newDataplaneCommand() *cobra.Command {
	var config string
	var successor bool
	cmd := &cobra.Command{
		Use:    "dataplane --config FILE",
		Short:  "Serve and track one VM's disks",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			spareProcessors()
			if successor {
				return dataplane.RunSuccessor(ctx, config)
			}
			return dataplane.RunPlane(ctx, config)
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "the VM's data-plane configuration (required)")
	cmd.Flags().BoolVar(&successor, "successor", false, "take over from the data plane that started this process")
	cobra.CheckErr(cmd.MarkFlagRequired("config"))
	return cmd
}
