package main

import (
	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
)

func newVMResize(a *app) *cobra.Command {
	var (
		act = api.Action{Verb: api.VMResize}
		yes bool
	)
	c := &cobra.Command{
		Use: "resize NAME DISK SIZE", Short: "Give a protected disk another size, with the guest running or off",
		Long: `Give a disk (vda) of a protected VM another size (40G), or, with "image", the one its image, volume or server has by now:
a volume is enlarged first (lvextend). Nothing is copied anew: what is new is sent with the next changes, and the copy follows. A running guest
sees it at once where QEMU can, else at its next start. Recovery points keep the size they had, also in a failover to one of them.
--shrink cuts off what lies behind SIZE; only while the guest is off.` + exitHelp,
		Args: cobra.ExactArgs(3),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM, act.Disks = args[0], args[1:2]
			if args[2] != "image" {
				n, err := parseSize(args[2])
				if err != nil {
					return err
				}
				if n <= 0 || n%512 != 0 {
					return usagef("SIZE takes a number of bytes above 0 in whole sectors of 512, such as 40G, or the word image")
				}
				act.Size = n
			}
			if act.Shrink || act.DryRun {
				if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
					return err
				}
			}
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.Shrink, "shrink", false, "cut off what lies behind SIZE; the bytes are shown first")
	c.Flags().BoolVar(&act.DryRun, "dry-run", false, "only check")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}
