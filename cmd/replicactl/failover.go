package main

import (
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
)

func newFailover(a *app) *cobra.Command {
	c := &cobra.Command{Use: "failover", Short: "Try, or do, a move of a VM to the other host", RunE: needVerb}
	c.AddCommand(newTest(a), newTestStop(a), newPlanned(a), newUnplanned(a), newCommit(a), newCancel(a), newReverse(a), newPatch(a),
		simple(a, "log NAME", "Who changed the roles of a VM, when, with what result; the id is the same on both hosts", api.AuditLog),
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
	f.BoolVar(&act.KeepPoints, "keep-points", false, "keep the recovery points, which end otherwise, as files on the other host")
	f.DurationVar(&act.Timeout, "shutdown-timeout", 0, "how long the guest may take to shut down (default: the VM's, see vm set --shutdown-time)")
	f.BoolVar(&act.Force, "force-off", false, "switch the guest off when it has not shut down in time")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

func newUnplanned(a *app) *cobra.Command {
	var (
		act                = api.Action{Verb: api.Unplanned}
		commitIn, cancelIn time.Duration
		yes                bool
	)
	c := &cobra.Command{
		Use:   "unplanned NAME",
		Short: "Start the replica here because the primary is dead; shows first what will be lost",
		Long: `Start the replica on this host from its last committed cut, or from an older recovery point. The primary is asked
first: when it answers and its guest runs, the failover is refused; when it does not answer, --force says that you are sure it is dead.
The guest runs beside the replica, which keeps all its recovery points, until "failover commit" or "failover cancel".
--point takes latest, oldest, latest-app, a number from "point list", or the beginning of a time (10:31) or position (4b1f20c1/17).` + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			switch {
			case commitIn > 0 && cancelIn > 0:
				return usagef("--commit-within and --cancel-within exclude each other")
			case commitIn > 0:
				act.Within, act.Then = commitIn, "commit"
			case cancelIn > 0:
				act.Within, act.Then = cancelIn, "cancel"
			}
			if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	f := c.Flags()
	f.StringVar(&act.Point, "point", "latest", "the state to start from")
	f.BoolVar(&act.KeepPoints, "keep-points", false, "keep the recovery points, which end otherwise, as files on this host: with --in-place now, else at the commit, whoever commits")
	f.BoolVar(&act.InPlace, "in-place", false, "final at once: the images are changed, all recovery points end")
	f.DurationVar(&commitIn, "commit-within", 0, "commit by itself after this time")
	f.DurationVar(&cancelIn, "cancel-within", 0, "cancel by itself after this time")
	f.BoolVar(&act.Unfenced, "unfenced", false, "go on although the fencing command failed: the old primary is certainly off")
	f.BoolVar(&act.DryRun, "dry-run", false, "only show the loss and the checks")
	f.BoolVar(&act.Force, "force", false, "the primary cannot be asked, or must not be believed")
	f.BoolVar(&act.NoStart, "no-start", false, "do not start the guest")
	f.StringVar(&act.Reason, "reason", "", "kept in both hosts' journals")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

func newCommit(a *app) *cobra.Command {
	return newTrialEnd(a, api.Commit, "commit NAME", "Make an unplanned failover final; its recovery points end", `The guest goes on running while the images are brought to what it wrote; "vm status" shows how far that is.`)
}

func newCancel(a *app) *cobra.Command {
	return newTrialEnd(a, api.Cancel, "cancel NAME", "Give an unplanned failover up: stop the guest, be the replica again", `What the guest wrote since the failover is dropped. All recovery points stay; another one can be tried.`)
}

const keepPointsHelp = "keep the recovery points, which end otherwise, as files on this host"

func newTrialEnd(a *app, verb api.Verb, use, short, long string) *cobra.Command {
	var (
		act = api.Action{Verb: verb}
		yes bool
	)
	c := &cobra.Command{
		Use: use, Short: short, Long: short + ".\n" + long + exitHelp, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.DryRun, "dry-run", false, "only show what would happen")
	if verb == api.Commit {
		c.Flags().BoolVar(&act.KeepPoints, "keep-points", false, keepPointsHelp)
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

func newPatch(a *app) *cobra.Command {
	c := &cobra.Command{Use: "patch", Short: "What an old primary gave up in a return: list, mount, export, delete", RunE: needVerb}
	export := api.Action{Verb: api.PatchExport}
	e := &cobra.Command{
		Use: "export NAME PATCH", Short: "Write the blocks that were given up to raw files", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			act := export
			act.VM, act.Patch = args[0], args[1]
			dir, err := filepath.Abs(export.To)
			if err != nil || export.To == "" {
				return usagef("--out wants a directory")
			}
			act.To = dir
			return a.act(cmd.Context(), act)
		},
	}
	e.Flags().StringVar(&export.To, "out", "", "directory for DISK.raw and DISK.map; files there are never written over")
	mount := api.Action{Verb: api.PatchMount}
	m := &cobra.Command{
		Use: "mount NAME PATCH", Short: "Show the old disk as it was to NBD clients of this host: the patch over the recovery point it belongs to",
		Long: `Show the disks over NBD as they were when this host gave its writes up: each block of the patch as this host had it, all
others as of the recovery point, by default the first after the return: over that one it is the old disk, block for block.
It ends as every mount does: replicactl point unmount NAME` + "\n" + pointHelp + "\n" + exitHelp,
		Args: cobra.ExactArgs(2),
	}
	a.mounting(m, &mount)
	m.Flags().StringVar(&mount.Point, "point", "", "over another recovery point (default the one the patch belongs to)")
	var yes bool
	d := &cobra.Command{
		Use: "delete NAME PATCH", Short: "Delete a patch for good", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			act := api.Action{Verb: api.PatchDelete, VM: args[0], Patch: args[1]}
			if err := a.planThenAsk(cmd.Context(), act, yes); err != nil {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	d.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.AddCommand(simple(a, "list NAME", "List what this host gave up and keeps", api.PatchList), m, e, d)
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
	c.Flags().BoolVar(&act.KeepPoints, "keep-points", false, keepPointsHelp+"; while the failover is on trial")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}
