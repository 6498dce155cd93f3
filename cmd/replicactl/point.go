package main

import (
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/wire"
)

// pointHelp is how every command lets a person name a point.
const pointHelp = `
POINTS
  latest (the default), oldest, latest-app (application-consistent), the number that
  "point list" shows, the beginning of its time in UTC (2026-11-22T10:3, 10:31) or of
  its position (4b1f20c1/17). What fits several points is refused with the candidates.`

func newPoint(a *app) *cobra.Command {
	c := &cobra.Command{Use: "point", Short: "Recovery points: list, keep, pin, mount and export them", RunE: needVerb}
	c.AddCommand(newPointList(a), newPointKeep(a), newPointPin(a, "pin NAME POINT", "Keep a point whatever the retention says", api.PointPin),
		newPointPin(a, "unpin NAME POINT", "Leave a point to the retention again", api.PointUnpin),
		newPointApp(a), newPointMount(a), newPointMounts(a), newPointUnmount(a), newPointExport(a))
	return c
}

func newPointList(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list NAME", Short: "List recovery points, oldest first, wherever they are kept", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := a.client().Points(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				return a.print(r)
			}
			return a.points(r, time.Now())
		},
	}
}

// points prints the list and what becomes of it.
func (a *app) points(r wire.PointsReply, now time.Time) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NUMBER\tTIME (UTC)\tAGE\tKIND\tOWN SIZE\tPOSITION\tREMARKS")
	for _, p := range r.Points {
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Ordinal, p.Cut.UTC().Format("2006-01-02T15:04:05Z"), age(now.Sub(p.Cut)),
			kind(p), bytesText(p.Bytes), p.Pos, clean(remarks(p)))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(r.Points) == 0 {
		fmt.Fprintln(a.out, "nothing has been committed yet")
	}
	if r.Orphan != "" {
		fmt.Fprintf(a.out, "Orphan: %s\n", clean(r.Orphan))
	} else {
		fmt.Fprintf(a.out, "Kept on %s: %s\n", clean(r.Host), clean(r.Retention))
	}
	fmt.Fprintf(a.out, "They take %s%s%s; %s a day are written at present%s\n", bytesText(r.Used), quota(r), room(r), bytesText(r.PerDay), outlook(r))
	return nil
}

func kind(p wire.Point) string {
	if p.App {
		return "app"
	}
	return "crash"
}

func remarks(p wire.Point) string {
	var out []string
	if p.Latest {
		out = append(out, "latest")
	}
	if p.Pinned {
		out = append(out, "pinned")
	}
	if p.Mounted > 0 {
		out = append(out, "mounted")
	}
	if p.Damage != "" {
		out = append(out, "DAMAGED: "+p.Damage)
	}
	return strings.Join(out, ", ")
}

func quota(r wire.PointsReply) string {
	if r.Quota == 0 {
		return ""
	}
	return " of " + bytesText(r.Quota)
}

func room(r wire.PointsReply) string {
	if r.Free < 0 {
		return ""
	}
	return fmt.Sprintf(", %s are free and %s stay free", bytesText(r.Free), bytesText(r.Reserve))
}

func outlook(r wire.PointsReply) string {
	s := ""
	if r.Full >= 0 {
		s = fmt.Sprintf(": room is used up in %s, the oldest unpinned points are given up then", r.Full.Round(time.Minute))
	}
	if r.GivenUp > 0 {
		s += fmt.Sprintf("; %d were given up for want of room", r.GivenUp)
	}
	return s
}

func newPointPin(a *app, use, short string, verb api.Verb) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Long: short + ".\n" + pointHelp + "\n" + exitHelp, Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.act(cmd.Context(), api.Action{Verb: verb, VM: args[0], Point: args[1]})
		},
	}
}

func newPointKeep(a *app) *cobra.Command {
	var size string
	c := &cobra.Command{
		Use: "keep NAME [POINTS]", Short: "Change which recovery points this host keeps of a VM",
		Long: `Change which recovery points the replica keeps. It is typed on the replica's host: the primary asks
once, when protection is enabled, and cannot shorten it later.

POINTS is a number of hourly points, 0 to 24, as Hyper-V Replica has it (0: the newest state only), or
rows EVERY:FOR with units s m h d w, such as all:1h,1h:1d,1d:30d (every point of the last hour, hourly
ones for a day, daily ones for a month).

When room is short, the oldest unpinned points are given up first, never the newest; then
acknowledgements are held back and the primary keeps what it cannot send.` + "\n" + exitHelp,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			act := api.Action{Verb: api.PointKeep, VM: args[0]}
			if len(args) == 2 {
				act.Retention = args[1]
			}
			if cmd.Flags().Changed("quota") {
				n, err := parseSize(size)
				if err != nil {
					return err
				}
				act.Quota = &n
			}
			if act.Retention == "" && act.Quota == nil {
				return usagef("say which POINTS to keep, or --quota SIZE")
			}
			return a.act(cmd.Context(), act)
		},
	}
	c.Flags().StringVar(&size, "quota", "", "what all points of the VM may take, e.g. 200G; 0 = no limit but the reserve")
	return c
}

// parseSize reads a number of bytes with an optional unit K, M, G or T.
func parseSize(s string) (int64, error) {
	digits, shift := strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(s), "B"), "I"), 0
	if n := len(digits); n > 0 {
		if i := strings.IndexByte("KMGT", digits[n-1]); i >= 0 {
			digits, shift = digits[:n-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > 1<<62>>shift {
		return 0, usagef("%q is no size: use a number of bytes, or a unit as in 512M, 20G, 2T", s)
	}
	return n << shift, nil
}

func newPointApp(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "app NAME INTERVAL", Short: "Take application-consistent points so often; 0 = none",
		Long: `Take application-consistent points: the guest agent freezes the guest's file systems (and runs its
freeze hooks), the cut is made, and they are thawed at once. It is typed on the primary. A cut for which
the agent does not answer is crash-consistent; "vm status" counts it.` + "\n" + exitHelp,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			every, err := time.ParseDuration(args[1])
			if err != nil {
				return usagef("%q is no interval: say 1h, 90m, or 0", args[1])
			}
			return a.act(cmd.Context(), api.Action{Verb: api.PointApp, VM: args[0], AppEvery: every})
		},
	}
}
