package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
)

const upgradeHelp = `Let the installed program serve a VM's disks. Each VM has a process of its own for that, which goes on with the program it was
started from when another one is installed. The installed program takes the guest's connections, the images with their locks and the
change tracking over between two requests: the guest does not notice, nothing is compared. If not everything comes to rest within
200 ms, or the installed program does not understand something, all goes on as before; the former is tried again up to 8 times.

A VM that runs the installed program already is left alone; --force upgrades it, too. Run it on the host where the guest runs.`

func newVMUpgrade(a *app) *cobra.Command {
	act := api.Action{Verb: api.VMUpgrade}
	var all bool
	c := &cobra.Command{
		Use: "upgrade NAME|--all", Short: "Let the installed program serve a running VM's disks", Long: upgradeHelp + exitHelp,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) == 1) {
				return usagef("name one VM, or say --all")
			}
			if !all {
				act.VM = args[0]
				return a.act(cmd.Context(), act)
			}
			return a.upgradeAll(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "every VM this host serves, one after the other; stops at the first failure")
	c.Flags().BoolVar(&act.DryRun, "dry-run", false, "ask the installed program whether it could, change nothing")
	c.Flags().BoolVar(&act.Force, "force", false, "also when it runs the installed program already")
	return c
}

// upgradeAll goes from VM to VM; a failure ends it, before more guests get a
// program that does not do.
func (a *app) upgradeAll(ctx context.Context, act api.Action) error {
	vms, err := a.client().VMs(ctx)
	if err != nil {
		return err
	}
	for _, v := range vms {
		if v.Program == nil {
			continue // no data plane here: a replica
		}
		act.VM = string(v.ID)
		if err := a.act(ctx, act); err != nil {
			return fmt.Errorf("upgrade %s: %w", v.Name, err)
		}
	}
	return nil
}

func upgradeText(u status.Upgrade) string {
	switch {
	case u.DryRun && !u.Outdated:
		return fmt.Sprintf("%s: runs the installed program already (%s)", u.VM, u.From)
	case u.DryRun:
		return fmt.Sprintf("%s: runs %s; %s (%s) could take over", u.VM, u.From, u.To, u.Program)
	case u.Done && u.Connections > 0:
		return fmt.Sprintf("%s: %s -> %s, %s handed on, pause %s%s", u.VM, u.From, u.To, count.Of(u.Connections, "connection"), u.Pause.Round(10*time.Microsecond), keeperText(u))
	case u.Done:
		return fmt.Sprintf("%s: %s -> %s%s", u.VM, u.From, u.To, keeperText(u))
	case u.Keeper:
		return fmt.Sprintf("%s: %s%s", u.VM, u.From, keeperText(u))
	}
	return fmt.Sprintf("%s: runs the installed program already (%s)", u.VM, u.From)
}

func keeperText(u status.Upgrade) string {
	if u.Keeper {
		return ", keeper replaced"
	}
	return ""
}
