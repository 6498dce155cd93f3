package main

import (
	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
)

func newVMAddDisk(a *app) *cobra.Command {
	act := api.Action{Verb: api.VMAddDisk}
	c := &cobra.Command{
		Use: "add-disk NAME DISK", Short: "Protect one disk more of a protected VM, with the guest running or off",
		Long: `Protect one more disk (vdb) of a protected VM: one that was attached since, or left out when the protection was enabled. The domain has it already.
Only this disk is copied, a piece with each cycle, so that the changes of the others go on being sent. Until all of it is there a failover goes
without it, and a planned one is refused. Recovery points from before do not have it.` + exitHelp,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM, act.Disks = args[0], args[1:2]
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.DryRun, "dry-run", false, "only check")
	return c
}

func newVMRemoveDisk(a *app) *cobra.Command {
	var (
		act = api.Action{Verb: api.VMTakeDisk}
		yes bool
	)
	c := &cobra.Command{
		Use: "remove-disk NAME DISK", Short: "End the protection of one disk of a VM, with the guest running or off",
		Long: `End the protection of one disk (vdb): the guest keeps it, on its own image, and a failover from now on goes without it. Nothing of the other
disks is copied anew. Recovery points that have the disk keep it, and its copy is deleted with the last of them. Before a disk is detached
for good it is removed here.` + exitHelp,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM, act.Disks = args[0], args[1:2]
			if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.DryRun, "dry-run", false, "only check")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}
