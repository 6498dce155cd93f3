package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
)

// testFlags are those of tests and drills.
func testFlags(f *pflag.FlagSet, act *api.Action) {
	f.StringVar(&act.Point, "point", "latest", "which recovery point (see POINTS)")
	f.StringVar(&act.Network, "network", "", "put its network cards into this network of this host (bridge:NAME for a bridge); the copy is NOT isolated then")
	f.BoolVar(&act.Isolated, "isolated", false, "isolate it although the configuration names a test network")
	f.StringVar(&act.Name, "name", "", "what the copy is called (default: see [test] name in the configuration)")
	f.Func("quota", "`SIZE` the copy may write, e.g. 20G (default: see [test] quota in the configuration)", func(text string) error {
		n, err := parseSize(text)
		act.Quota = &n
		return err
	})
}

func newTest(a *app) *cobra.Command {
	act := api.Action{Verb: api.FailoverTest}
	c := &cobra.Command{
		Use: "test NAME", Short: "Start a copy of the VM from a recovery point, beside the replication that goes on",
		Long: `Start a copy of the VM from any recovery point, on the replica host. Replication goes on, the replica and its points are
not touched. The copy has its own name, UUID, network addresses and generation id; what it writes goes into a scratch
overlay and ends with it. Unless told otherwise its network cards are in a network made for it alone: that this
leads nowhere is proven before its guest runs, and every second from then on; when somebody plugs something in,
the copy is destroyed. Several copies, also of one VM, may exist at once. End it with: replicactl failover test-stop
` + pointHelp + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			return a.act(cmd.Context(), act)
		},
	}
	testFlags(c.Flags(), &act)
	c.Flags().BoolVar(&act.DryRun, "dry-run", false, "only check")
	return c
}

func newTestStop(a *app) *cobra.Command {
	act := api.Action{Verb: api.TestStop}
	c := &cobra.Command{
		Use: "test-stop NAME", Short: "Take test copies of the VM away, with everything that was made for them",
		Long: `Take a test copy away: its domain, its network, what it wrote. It may be repeated, and cleans up as well
when the domain was destroyed or undefined by hand, or when something of the copy is missing.` + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().StringVar(&act.Name, "test", "", "which one, by its name or id (needed only when there are several)")
	c.Flags().BoolVar(&act.All, "all", false, "all of them")
	c.MarkFlagsMutuallyExclusive("test", "all")
	return c
}

func newDrill(a *app) *cobra.Command {
	act := api.Action{Verb: api.Drill}
	c := &cobra.Command{
		Use: "drill NAME", Short: "Prove that the replica works: test failover, proof of the guest, measured RTO, cleanup, report",
		Long: `Make a test copy of the VM on the replica host, wait for the proof that its guest works, measure how long that took
since the command, take the copy away again whatever happened, and keep a report (Markdown and JSON).
The proofs:
  agent            the guest agent answers
  console:TEXT     the guest prints TEXT on its first serial port
  tcp:PORT         it accepts connections (not when isolated); the address is the reserved one, or what its agent says
  command:PROGRAM  a program of this host succeeds; it finds the copy in KVMREPLICA_TEST_* of its environment
` + pointHelp + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			act.VM = args[0]
			return a.act(cmd.Context(), act)
		},
	}
	testFlags(c.Flags(), &act)
	c.Flags().StringVar(&act.Proof, "proof", "agent", "how it is known that the guest works")
	c.Flags().DurationVar(&act.Timeout, "timeout", 10*time.Minute, "how long the proof may take")
	c.AddCommand(newDrillList(a), newDrillReport(a))
	return c
}

func newDrillList(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list NAME", Short: "List the kept reports of a VM's drills", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ds, err := a.client().Drills(cmd.Context(), args[0])
			if err != nil || a.json {
				if err == nil {
					err = a.print(ds)
				}
				return err
			}
			w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "BEGUN\tRESULT\tRTO\tPROOF\tPOINT\tWHY")
			for _, d := range ds {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", d.Started.UTC().Format(time.RFC3339), drillResult(d), rto(d), clean(d.Proof), clean(d.Point), clean(d.Failure))
			}
			return w.Flush()
		},
	}
}

func newDrillReport(a *app) *cobra.Command {
	var when string
	c := &cobra.Command{
		Use: "report NAME", Short: "Print the report of a drill", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := a.client().DrillReport(cmd.Context(), args[0], when)
			if err != nil {
				return err
			}
			if a.json {
				return a.print(t)
			}
			fmt.Fprint(a.out, t.Text)
			return nil
		},
	}
	c.Flags().StringVar(&when, "when", "", "the beginning of its time, as listed (default: the newest)")
	return c
}

func drillResult(d status.Drill) string {
	if d.OK {
		return "passed"
	}
	return "FAILED"
}

func rto(d status.Drill) string {
	if d.RTO == 0 {
		return "-"
	}
	return d.RTO.Round(100 * time.Millisecond).String()
}

// showTests prints the test copies of a VM and what its drills proved.
func (a *app) showTests(v status.VM, line func(k, format string, args ...any)) {
	for _, t := range v.Tests {
		where := "isolated"
		if !t.Isolated {
			where = "NOT isolated"
		}
		line("Test copy", "%s: %s, cut %s, guest %s, %s, wrote %s of %s", t.Name, t.Phase, t.Cut.Format(time.DateTime), or(t.Guest, "unknown"), where,
			bytesText(t.Written), bytesText(t.Quota))
	}
	if v.TestsThere > 0 {
		other := v.Primary
		if v.Role == status.Primary {
			other = v.Replica
		}
		line("Test copies", "%d on %s", v.TestsThere, other)
	}
	if l := v.LastTest; l != nil {
		s := "ended as asked"
		if l.Reason != "" {
			s = "ended because " + l.Reason
		}
		line("Last test", "%s%s, cut %s, %s", l.Started.Format(time.DateTime), on(l.Host), l.Cut.Format(time.DateTime), s)
	}
	if d := v.LastDrill; d != nil {
		line("Last drill", "%s%s, %s, RTO %s, by %s", d.Started.Format(time.DateTime), on(d.Host), drillResult(*d), rto(*d), d.Proof)
	}
	if d := v.Proven; d != nil {
		line("Last proven", "cut %s (%s), by the drill of %s%s", d.Cut.Format(time.DateTime), d.Point, d.Started.Format(time.DateTime), on(d.Host))
	}
}

// on says on which host something was.
func on(host string) string {
	if host == "" {
		return ""
	}
	return " on " + host
}

func or(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
