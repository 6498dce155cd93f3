package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/status"
)

func newVM(a *app) *cobra.Command {
	c := &cobra.Command{Use: "vm", Short: "Protect virtual machines and look at them", RunE: needVerb}
	c.AddCommand(newVMEnable(a), newVMDisable(a), newVMList(a), newVMStatus(a), newVMWatch(a), newVMStart(a), newVMUpgrade(a), newVMExport(a), newVMImport(a),
		simple(a, "pause NAME", "Stop shipping changes; tracking goes on", api.VMPause),
		simple(a, "resume NAME", "Ship changes again", api.VMResume),
		simple(a, "sync NAME", "Run one cycle now and wait for its commit", api.VMSync), newVMResync(a), newVMSet(a), newVMLimit(a), newVMResize(a), newVMAddDisk(a), newVMRemoveDisk(a))
	return c
}

func needVerb(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s has no verb %q; see %s --help", cmd.Name(), args[0], cmd.CommandPath())
	}
	return cmd.Help()
}

// simple is a verb that needs a VM's name and nothing else.
func simple(a *app, use, short string, verb api.Verb) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.act(cmd.Context(), api.Action{Verb: verb, VM: args[0]})
		},
	}
}

func newVMEnable(a *app) *cobra.Command {
	var (
		act  = api.Action{Verb: api.VMEnable}
		set  settingFlags
		yes  bool
		wait bool
		when string
	)
	c := &cobra.Command{
		Use:   "enable NAME [--to PEER]",
		Short: "Protect a virtual machine, running or not, on another host",
		Long: `Protect a virtual machine on another host. A running guest is not stopped: its disks are put behind
replicad's exports one by one, and taken out again if anything fails. The plan is printed first.
Without --to the policy that fits the VM (replicactl policy list) says where to and how; what is typed counts instead.` + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			err := set.check()
			if err != nil {
				return err
			}
			if act.Peer == "" { // by the policy, but for what was typed
				act.Set, act.Initial = set.given(cmd), cmd.Flags().Changed("initial")
			} else {
				act.Interval, act.AppEvery, act.Shutdown, act.OnSilent = set.every, set.appEvery, set.shutdown, set.onSilent
			}
			if act.Existing = when == "existing"; !act.Existing {
				if act.StartAt, err = parseStart(when, time.Now()); err != nil {
					return err
				}
			}
			if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
				return err
			}
			if err := a.act(cmd.Context(), act); err != nil {
				return err
			}
			if wait {
				return a.watch(cmd.Context(), act.VM, func(v status.VM) bool { return v.State == status.Replicating })
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&act.Peer, "to", "", "paired host that keeps the copy (default: as the policy that fits says)")
	set.add(c)
	f.StringSliceVar(&act.Disks, "disk", nil, "protect only these disks (target names, e.g. vda)")
	f.StringVar(&when, "initial", "now", `initial copy: now; "in 8h", "at 22:00" or "at 2026-01-31 22:00" (up to seven days ahead); existing: compare with images that lie ready on the replica host`)
	f.StringVar(&act.Retention, "points", "", "recovery points the replica is asked to keep: 0 to 24 hourly ones, or rows such as all:1h,1h:1d,1d:30d (default all:1h,1h:1d)")
	f.BoolVar(&act.DryRun, "dry-run", false, "print the checks and the plan, change nothing")
	f.BoolVarP(&yes, "yes", "y", false, "do not ask")
	f.BoolVar(&wait, "wait", false, "stay until the initial copy is complete")
	return c
}

func newVMDisable(a *app) *cobra.Command {
	var (
		act = api.Action{Verb: api.VMDisable}
		yes bool
	)
	c := &cobra.Command{
		Use: "disable NAME", Short: "End protection; the domain comes back byte for byte", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			if err := a.planThenAsk(cmd.Context(), act, yes || act.DryRun); err != nil || act.DryRun {
				return err
			}
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.Delete, "delete-replica", false, "on the replica's host: delete the copy and its recovery points, too")
	c.Flags().BoolVar(&act.Force, "force", false, "go on although the other host does not answer")
	c.Flags().BoolVar(&act.DryRun, "dry-run", false, "print the plan, change nothing")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

func newVMStart(a *app) *cobra.Command {
	act := api.Action{Verb: api.VMStart}
	c := &cobra.Command{
		Use: "start NAME", Short: "Start a protected VM after asking the other host", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().BoolVar(&act.Force, "force", false, "start although the other host cannot be asked (dangerous: two copies may run)")
	c.Flags().BoolVar(&act.WithoutSnapshot, "without-snapshot", false, "give up what the guest wrote into a snapshot above its disks that its definition does not name")
	return c
}

func newVMList(a *app) *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use: "list", Short: "List VMs that replicate from or to this host", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			vms, err := a.client().VMs(cmd.Context())
			if err != nil {
				return err
			}
			switch {
			case all:
				return a.listAll(cmd.Context(), vms)
			case a.json:
				return a.print(vms)
			}
			return a.table(vms)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "also this host's domains that are not protected, with the policy that would apply")
	return c
}

// listAll lists VMs, and the domains that are none.
func (a *app) listAll(ctx context.Context, vms []status.VM) error {
	p, err := a.client().Policies(ctx)
	if err != nil {
		return err
	}
	none := []status.Domain{}
	for _, d := range p.Domains {
		if d.Role == status.None {
			none = append(none, d)
		}
	}
	if a.json {
		return a.print(map[string]any{"vms": vms, "not_protected": none})
	}
	if err := a.table(vms); err != nil {
		return err
	}
	fmt.Fprintf(a.out, "\nNot protected: %d\n", len(none))
	if len(none) == 0 {
		return nil
	}
	return a.domains(none)
}

func newVMStatus(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "status NAME", Short: "Show one VM's relationship, health and figures", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := a.client().VM(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				return a.print(v)
			}
			a.show(v)
			return nil
		},
	}
}

func newVMWatch(a *app) *cobra.Command {
	var until string
	c := &cobra.Command{
		Use: "watch NAME", Short: "Follow a VM: progress, RPO, pending bytes", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.watch(cmd.Context(), args[0], func(v status.VM) bool { return until != "" && string(v.State) == until })
		},
	}
	c.Flags().StringVar(&until, "until", "", "end when the VM is in this state, e.g. replicating")
	return c
}

func newHealth(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "health [NAME]", Short: "Say what is not well and how to mend it", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var vms []status.VM
			if len(args) == 1 {
				v, err := a.client().VM(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				vms = append(vms, v)
			} else {
				var err error
				if vms, err = a.client().VMs(cmd.Context()); err != nil {
					return err
				}
				h, err := a.client().Host(cmd.Context())
				if err != nil {
					return err
				}
				vms = append(vms, missing(h)...)
			}
			return a.health(vms)
		},
	}
}

// missing are the domains that should be protected and are not, as VMs of which
// there is nothing else to say.
func missing(h status.Host) (out []status.VM) {
	for _, n := range h.NotProtected {
		out = append(out, status.VM{
			Name: n.Name, ID: n.ID, Role: status.None, State: status.Unprotected, Health: n.Condition.Severity, Reason: n.Condition.Text,
			Conditions: []health.Condition{n.Condition}, RPO: -1, Pending: -1,
		})
	}
	return out
}

func newReload(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "reload", Short: "Have the daemon read its configuration again", Args: cobra.NoArgs,
		Long: `Have the daemon read its configuration again, as systemctl reload replicad does. What a running daemon can take over
counts at once: bandwidth, network, policy, log_level, receiving, storage_roots, advertise, on_silent_peer, access. Other keys that
changed are named and take a restart. A bad file changes nothing.` + exitHelp,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.act(cmd.Context(), api.Action{Verb: api.Reload}) },
	}
}

func newDoctor(a *app) *cobra.Command {
	var stacks bool
	c := &cobra.Command{
		Use: "doctor", Short: "Check this host against good practice, with remedies", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if stacks {
				v, err := a.client().Stacks(cmd.Context())
				if err == nil {
					_, err = io.WriteString(a.out, v.Text)
				}
				return err
			}
			cs, err := a.client().Doctor(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return a.print(cs)
			}
			bad := 0
			for _, k := range cs {
				a.check(k)
				if k.Result != "ok" {
					bad++
				}
			}
			if bad > 0 {
				return &exitError{exitUnhealthy, fmt.Errorf("%d of %d checks need attention", bad, len(cs))}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&stacks, "stacks", false, "print what the daemon's threads of execution do instead: for a report of one that hangs")
	return c
}
