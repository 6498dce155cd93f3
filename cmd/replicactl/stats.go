package main

import (
	"encoding/csv"
	"fmt"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
)

func newStats(a *app) *cobra.Command {
	var history, asCSV, reset bool
	c := &cobra.Command{
		Use:   "stats NAME",
		Short: "What was measured of a VM's replication, by windows",
		Long: `What was measured of a VM's replication on the host that ships it: the present window, and with --history the
closed ones before it. Windows begin at a fixed time of the day (section [statistics] of replicad.toml). They survive
restarts; after a crash at most five minutes of figures are missing.` + exitHelp,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if reset {
				if err := a.act(cmd.Context(), api.Action{Verb: api.VMStatsReset, VM: args[0]}); err != nil {
					return err
				}
			}
			m, err := a.client().Statistics(cmd.Context(), args[0])
			switch {
			case err != nil:
				return err
			case a.json && !asCSV:
				return a.print(m)
			}
			windows := []status.Window{m.Window}
			if history {
				windows = append(m.History, m.Window)
			}
			if asCSV {
				return a.statsCSV(m.Name, windows)
			}
			return a.stats(m, windows)
		},
	}
	f := c.Flags()
	f.BoolVar(&history, "history", false, "also the closed windows, oldest first")
	f.BoolVar(&asCSV, "csv", false, "print comma-separated values with a head line, times in RFC 3339, durations in seconds")
	f.BoolVar(&reset, "reset", false, "begin the present window anew; the history stays")
	return c
}

func (a *app) stats(m status.Measurements, windows []status.Window) error {
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FROM\tTO\tCYCLES\tMISSED\tERRORS\tAVG SIZE\tLARGEST\tAVG LATENCY\tLONGEST\tMAX RPO\tCHANGED\tON THE WIRE")
	for _, x := range windows {
		to := "now"
		if !x.To.IsZero() {
			to = x.To.Local().Format(time.DateTime)
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", x.From.Local().Format(time.DateTime), to, x.Cycles, x.Missed, x.Errors,
			bytesText(x.AverageBytes()), bytesText(x.LargestBytes), age(x.AverageLatency()), age(x.LargestLatency), age(x.RPOMax), bytesText(x.RawBytes), bytesText(x.SentBytes))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(a.out, "The window ends %s; %d closed ones are kept.\n", m.Until.Local().Format(time.DateTime), len(m.History))
	if e := m.Window.LastError; e != "" {
		fmt.Fprintf(a.out, "Last error: %s\n", clean(e))
	}
	return nil
}

func (a *app) statsCSV(name string, windows []status.Window) error {
	w := csv.NewWriter(a.out)
	seconds := func(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 3, 64) }
	number := func(n int64) string { return strconv.FormatInt(n, 10) }
	when := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.UTC().Format(time.RFC3339)
	}
	rows := [][]string{{
		"vm", "from", "to", "cycles", "empty_cycles", "cycles_missed", "errors", "epochs_resumed", "epochs_abandoned", "average_bytes",
		"largest_bytes", "average_latency_s", "largest_latency_s", "rpo_max_s", "raw_bytes", "sent_bytes", "last_error",
	}}
	for _, x := range windows {
		rows = append(rows, []string{
			name, when(x.From), when(x.To), number(x.Cycles), number(x.Empty), number(x.Missed), number(x.Errors), number(x.Resumed),
			number(x.Abandoned), number(x.AverageBytes()), number(x.LargestBytes), seconds(x.AverageLatency()), seconds(x.LargestLatency),
			seconds(x.RPOMax), number(x.RawBytes), number(x.SentBytes), clean(x.LastError),
		})
	}
	return w.WriteAll(rows)
}
