package main

import (
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
)

func newFailover(a *app) *cobra.Command {
	c := &cobra.Command{Use: "failover", Short: "Move a VM to the other host, planned or not", RunE: needVerb}
	c.AddCommand(newPlanned(a), newUnplanned(a), newReverse(a),
		simple(a, "resume NAME", "Continue an interrupted plan", api.PlanResume),
		newTakeBack(a))
	return c
}

func newTakeBack(a *app) *cobra.Command {
	act := api.Action{Verb: api.PlanUndo}
	c := &cobra.Command{
		Use: "take-back NAME", Short: "Take a running or interrupted plan back, where that is still possible", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.Force, "force", false, "the other host cannot be asked and has certainly not taken over (recorded as a new generation)")
	return c
}

func newPlanned(a *app) *cobra.Command {
	var (
		act = api.Action{Verb: api.Planned}
		yes bool
	)
	c := &cobra.Command{
		Use:   "planned NAME",
		Short: "Shut the guest down, send the last changes, start it on the other host, reverse replication",
		Long: `Move a VM without losing anything: prerequisites are checked and listed, the guest is shut down cleanly,
the last changes are sent and committed, the roles change, the guest starts on the other host and
replication is reversed. It may be typed on either host. A failure before the role change takes everything back.` + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	f := c.Flags()
	f.BoolVar(&act.DryRun, "dry-run", false, "only check")
	f.BoolVar(&act.NoStart, "no-start", false, "do not start the guest on the other host")
	f.BoolVar(&act.NoReverse, "no-reverse", false, "do not reverse replication")
	f.DurationVar(&act.Timeout, "shutdown-timeout", 5*time.Minute, "how long the guest may take to shut down")
	f.BoolVar(&act.Force, "force-off", false, "switch the guest off when it has not shut down in time")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

func newUnplanned(a *app) *cobra.Command {
	var (
		act = api.Action{Verb: api.Unplanned}
		yes bool
	)
	c := &cobra.Command{
		Use:   "unplanned NAME",
		Short: "Start the replica here because the primary is dead; shows first what will be lost",
		Long: `Start the replica on this host from its last committed cut. The primary is asked first: when it answers and its
guest runs, the failover is refused; when it does not answer, --force says that you are sure it is dead.` + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	f := c.Flags()
	f.BoolVar(&act.DryRun, "dry-run", false, "only show the loss and the checks")
	f.BoolVar(&act.Force, "force", false, "the primary cannot be asked, or must not be believed")
	f.BoolVar(&act.NoStart, "no-start", false, "do not start the guest")
	f.StringVar(&act.Reason, "reason", "", "kept in both hosts' journals")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

func newReverse(a *app) *cobra.Command {
	var (
		act = api.Action{Verb: api.Reverse}
		yes bool
	)
	c := &cobra.Command{
		Use: "reverse NAME", Short: "Replicate back to the old primary after an unplanned failover; its own later changes are discarded", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.DryRun, "dry-run", false, "only show what will be discarded and sent")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}
