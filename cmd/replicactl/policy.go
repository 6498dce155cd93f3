package main

import (
	"context"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

func newPolicy(a *app) *cobra.Command {
	c := &cobra.Command{Use: "policy", Short: "Policies: how VMs are to be protected, and which are not", RunE: needVerb}
	c.AddCommand(newPolicyList(a), newPolicyApply(a))
	return c
}

func newPolicyList(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List policies, and per VM of this host which one fits and what differs from it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			p, err := a.client().Policies(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return a.print(p)
			}
			return a.policies(p)
		},
	}
}

func (a *app) policies(p status.Policies) error {
	if len(p.Policies) == 0 {
		fmt.Fprintln(a.out, "no [[policy]] in replicad.toml")
	}
	for _, q := range p.Policies {
		fmt.Fprintf(a.out, "%s: %s\n", clean(q.Name), clean(policyText(q)))
	}
	fmt.Fprintln(a.out)
	return a.domains(p.Domains)
}

// policyText says in one line whom a policy is for and what it says.
func policyText(p status.Policy) string {
	var s []string
	list := func(what string, l []string) {
		if len(l) > 0 {
			s = append(s, what+" "+strings.Join(l, ", "))
		}
	}
	list("match", p.Match)
	list("tags", p.Tags)
	list("except", p.Exclude)
	s = append(s, "to "+p.To)
	span := func(what string, d *time.Duration) {
		if d != nil {
			s = append(s, what+" "+d.String())
		}
	}
	span("every", p.Every)
	span("app-every", p.AppEvery)
	if p.Points != "" {
		s = append(s, "points "+p.Points)
	}
	if p.Bandwidth != nil {
		s = append(s, "bandwidth "+bytesText(*p.Bandwidth)+"/s")
	}
	span("shutdown-time", p.Shutdown)
	if p.OnSilent != "" {
		s = append(s, "on-silent-peer "+p.OnSilent)
	}
	if p.Initial != "" {
		s = append(s, "initial copy "+p.Initial)
	}
	if p.Alarm {
		s = append(s, "alarm after "+p.AlarmAfter.String())
	}
	return strings.Join(s, "; ")
}

func (a *app) domains(ds []status.Domain) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tSTATE\tSIZE\tPOLICY\tPROTECTED\tDIFFERS")
	for _, d := range ds {
		policy, protected := d.Policy, "no"
		if policy == "" {
			policy = "-"
		}
		switch d.Role {
		case status.Primary:
			protected = "to " + d.Peer
		case status.Replica:
			protected = "from " + d.Peer
		}
		size := "?"
		if d.Bytes >= 0 {
			size = bytesText(d.Bytes)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", clean(d.Name), clean(d.State), size, clean(policy), clean(protected),
			clean(strings.Join(append(append([]string(nil), d.Drift...), d.Fixed...), "; ")))
	}
	return w.Flush()
}

func newPolicyApply(a *app) *cobra.Command {
	var dry, yes bool
	c := &cobra.Command{
		Use: "apply [NAME...]", Short: "Protect what policies fit and is not protected, and set what differs",
		Long: `Protect the VMs of this host that a policy fits and that are not protected, and set what differs from the policy on
those that are (named ones only, if any are named). The plan of all is shown first. They are done one after the
other; one that fails does not stop the others. No protection is ever ended, nothing is done that is done already.` + exitHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := a.client().Policies(cmd.Context())
			if err != nil {
				return err
			}
			todo, fixed, err := a.toApply(p, args)
			if err != nil {
				return err
			}
			a.tellFixed(todo, fixed)
			return a.applyAll(cmd.Context(), todo, dry, yes)
		},
	}
	c.Flags().BoolVar(&dry, "dry-run", false, "print the checks and the plan of all, change nothing")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

// toApply are the domains that something is to be done with, and those that
// differ only in what cannot be set; named ones must be there and have a policy.
func (a *app) toApply(p status.Policies, names []string) (todo, fixed []status.Domain, err error) {
	take := func(d status.Domain) {
		switch {
		case d.Policy == "":
		case d.Role == status.None || len(d.Drift) > 0:
			todo = append(todo, d)
		case len(d.Fixed) > 0:
			fixed = append(fixed, d)
		}
	}
	if len(names) == 0 {
		for _, d := range p.Domains {
			take(d)
		}
		return todo, fixed, nil
	}
	seen := map[wire.VMID]bool{}
	for _, name := range names {
		found := false
		for _, d := range p.Domains {
			if d.Name != name && string(d.ID) != strings.ToLower(name) {
				continue
			}
			found = true
			if d.Policy == "" {
				return nil, nil, &wire.Error{Kind: wire.KindRefused, Text: "no policy of this host fits " + name, Hint: "replicactl policy list; or: replicactl vm enable " + name + " --to PEER"}
			}
			if !seen[d.ID] {
				seen[d.ID] = true
				take(d)
			}
		}
		if !found {
			return nil, nil, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("libvirt has no domain %q", name), Hint: "virsh list --all"}
		}
	}
	return todo, fixed, nil
}

// tellFixed says what differs and cannot be set from here, or that nothing does.
func (a *app) tellFixed(todo, fixed []status.Domain) {
	if a.json {
		return // policy list --json has it
	}
	for _, d := range fixed {
		fmt.Fprintf(a.out, "%s (policy %s) differs and cannot be set: %s\n", clean(d.Name), clean(d.Policy), clean(strings.Join(d.Fixed, "; ")))
	}
	switch {
	case len(todo) > 0:
	case len(fixed) > 0:
		fmt.Fprintln(a.out, "There is nothing to set.")
	default:
		fmt.Fprintln(a.out, "Everything that a policy fits is as it says.")
	}
}

// applyAll shows the plan of all, asks once, and does them in turn.
func (a *app) applyAll(ctx context.Context, todo []status.Domain, dry, yes bool) error {
	if len(todo) == 0 {
		return nil
	}
	failed := map[wire.VMID]bool{}
	if !a.json || dry {
		a.eachDomain(ctx, todo, failed, true)
		if dry {
			return partly(len(todo), len(failed), "could not be done")
		}
		if len(failed) == len(todo) {
			return partly(len(todo), len(failed), "cannot be done")
		}
	}
	if err := a.ask(yes); err != nil {
		return err
	}
	a.eachDomain(ctx, todo, failed, false)
	if err := ctx.Err(); err != nil {
		return err
	}
	return partly(len(todo), len(failed), "failed")
}

// eachDomain plans or does one after the other, and notes what failed; what
// failed before is not tried.
func (a *app) eachDomain(ctx context.Context, todo []status.Domain, failed map[wire.VMID]bool, dry bool) {
	for _, d := range todo {
		if failed[d.ID] || ctx.Err() != nil {
			continue
		}
		if !a.json {
			fmt.Fprintf(a.out, "%s (policy %s):\n", clean(d.Name), clean(d.Policy))
		}
		if err := a.act(ctx, api.Action{Verb: api.PolicyApply, VM: string(d.ID), DryRun: dry}); err != nil {
			failed[d.ID] = true
			a.printError(fmt.Errorf("%s: %w", d.Name, err), codeOf(ctx, err), "replicactl policy apply")
		}
	}
}

// partly is the outcome of all of n of which some failed.
func partly(n, failed int, what string) error {
	switch {
	case failed == 0:
		return nil
	case failed == n && n == 1:
		return &exitError{exitFailed, fmt.Errorf("the only VM %s", what)}
	case failed == n:
		return &exitError{exitFailed, fmt.Errorf("all %d VMs %s", n, what)}
	}
	return &exitError{exitPartly, fmt.Errorf("%d of %d VMs %s", failed, n, what)}
}
