package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
)

func newVMResync(a *app) *cobra.Command {
	var (
		act  = api.Action{Verb: api.VMResync}
		rate string
	)
	c := &cobra.Command{
		Use: "resync NAME", Short: "Compare everything by digest and send what differs",
		Long: `Compare everything with the replica by digest; only what differs is sent, with an ordinary epoch, so that
recovery points stay. Both hosts read all of it; the size and the time are shown first.

Without --background the tracker is distrusted: no cut is made until all is compared. That is right when
something may have written past it. With --background (or --rate, --window) the cuts go on, and what differs
is counted: a proof that the copy is good. It survives restarts; "vm status" shows how far it is. Typed
again it goes on where it is, with the new bounds.` + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			if rate != "" {
				n, err := parseSize(rate)
				if err != nil {
					return err
				}
				if n == 0 {
					return usagef("--rate takes a number of bytes per second above 0")
				}
				act.Rate = n
			}
			act.Background = !act.Stop && (act.Background || act.Rate > 0 || act.Window != "")
			if act.Stop && (act.Rate > 0 || act.Window != "") {
				return usagef("--stop goes without --rate and --window")
			}
			return a.act(cmd.Context(), act)
		},
	}
	f := c.Flags()
	f.BoolVar(&act.Background, "background", false, "compare between the cycles, which go on")
	f.StringVar(&rate, "rate", "", "at most so many bytes per second, e.g. 20M (default 64M); implies --background")
	f.StringVar(&act.Window, "window", "", "only in this time of day, e.g. 22:00-06:00; implies --background")
	f.BoolVar(&act.Stop, "stop", false, "end a comparison in the background")
	f.BoolVar(&act.DryRun, "dry-run", false, "say what it would cost, change nothing")
	return c
}

func compareText(c status.Compare) string {
	if !c.Ended.IsZero() {
		return fmt.Sprintf("everything, %s, ended %s: %s differed", bytesText(c.Total), c.Ended.Local().Format(time.DateTime), bytesText(c.Differs))
	}
	s := fmt.Sprintf("%s of %s in the background, %s differed so far", bytesText(c.Done), bytesText(c.Total), bytesText(c.Differs))
	if c.Window != "" {
		s += ", from " + c.Window
	}
	return s
}

func newVMLimit(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "limit NAME RATE", Short: "Bound what is sent of a VM; 0 = only the host's own limits",
		Long: `Bound the initial copy and the changes of a VM to RATE bytes per second (e.g. 20M), beside the host's
[[bandwidth]] schedule. It takes effect at once and lasts; each host has its own, for when it is the primary.` + "\n" + exitHelp,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseSize(args[1])
			if err != nil {
				return err
			}
			return a.act(cmd.Context(), api.Action{Verb: api.VMLimit, VM: args[0], Rate: n})
		},
	}
}
