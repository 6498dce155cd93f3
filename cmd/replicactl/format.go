package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/term"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// bytesText is a size for people; negative ones are unknown.
func bytesText(n int64) string { return status.Bytes(n) }

func age(d time.Duration) string {
	switch {
	case d < 0:
		return "-"
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func (a *app) table(vms []status.VM) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tROLE\tSTATE\tHEALTH\tPRIMARY\tREPLICA\tRPO\tPENDING\tGUEST")
	for _, v := range vms {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", clean(v.Name), v.Role, v.State, v.Health,
			clean(v.Primary), clean(v.Replica), age(v.RPO), bytesText(v.Pending), guest(v.Running))
	}
	return w.Flush()
}

func guest(running bool) string {
	if running {
		return "running"
	}
	return "off"
}

// show prints one VM as a block of lines, HVR's "Replication Health" order.
func (a *app) show(v status.VM) {
	line := func(k, format string, args ...any) {
		fmt.Fprintf(a.out, "%-22s %s\n", k+":", clean(fmt.Sprintf(format, args...)))
	}
	line("Virtual machine", "%s (%s)", v.Name, v.ID)
	line("Replication state", "%s", v.State)
	line("Replication health", "%s", v.Health)
	line("Direction", "%s -> %s", v.Primary, v.Replica)
	line("This host is", "%s, guest %s", v.Role, guest(v.Running))
	if v.Reason != "" {
		line("Because", "%s", v.Reason)
	}
	line("Interval", "%s", v.Interval)
	if v.Rate > 0 {
		line("Limit", "%s/s", bytesText(v.Rate))
	}
	if v.OnSilent != "" {
		line("Settings", "on-silent-peer %s, shutdown-time %s", v.OnSilent, v.Shutdown)
	}
	if v.LastCommit.IsZero() {
		line("Last copy", "none: nothing could be failed over to")
	} else {
		line("Last copy", "%s (%s old)", v.LastCommit.Format(time.DateTime), age(v.RPO))
	}
	if v.Pending >= 0 {
		line("Pending", "%s", bytesText(v.Pending))
	}
	if p := v.Program; p != nil {
		line("Served by", "%s, process %d%s", p.Version, p.PID, map[bool]string{true: "; another program is installed"}[p.Outdated])
	}
	line("Position", "%s", v.Position)
	if v.Job != nil {
		line("Now", "%s", jobText(*v.Job))
	}
	if c := v.Compare; c != nil {
		line("Compared", "%s", compareText(*c))
	}
	if f := v.Failover; f != nil {
		line("Failover", "%s", failoverText(*f))
	}
	if v.Plan != nil {
		line("Plan", "%s, step %s%s", v.Plan.Kind, v.Plan.Step, map[bool]string{true: " (interrupted)"}[v.Plan.Interrupted])
	}
	for _, d := range v.Disks {
		pending := ""
		if d.Pending >= 0 {
			pending = "  pending " + bytesText(d.Pending)
		}
		switch d.State {
		case "joining":
			pending += fmt.Sprintf("  being added, the replica has %s", bytesText(d.Copied))
		case "leaving":
			pending += "  removed on the primary"
		case "left":
			pending += "  removed; recovery points have it"
		}
		line("Disk "+string(d.Name), "%s  %s%s", bytesText(d.Size), d.Path, pending)
	}
	if v.Role == status.Primary {
		showMeasured(v, line)
	}
	a.showTests(v, line)
	for _, c := range v.Conditions {
		fmt.Fprintf(a.out, "  [%s] %s: %s\n      -> %s\n", c.Severity, c.Code, clean(c.Text), clean(c.Remedy))
	}
}

// showMeasured prints what only the host that sends can measure.
func showMeasured(v status.VM, line func(k, format string, args ...any)) {
	s := v.Stats
	line("Cycles", "%d, missed %d, errors %d, abandoned %d", s.Cycles, s.CyclesMissed, s.Errors, s.Abandoned)
	line("Size of a cycle", "average %s, largest %s", bytesText(s.AverageBytes), bytesText(s.LargestBytes))
	line("Latency", "average %s", age(s.AverageLatency))
	line("RPO measured", "median %s, max %s", age(s.RPOMedian), age(s.RPOMax))
	line("Shipped", "%s changed, %s on the wire", bytesText(s.RawBytes), bytesText(s.SentBytes))
	if v.AppEvery > 0 {
		line("App-consistent", "every %s: %s, %d became crash-consistent", v.AppEvery, count.Of(s.AppPoints, "point"), s.AppFailed)
	}
	if s.LastError != "" {
		line("Last error", "%s", s.LastError)
	}
}

func failoverText(f status.Failover) string {
	s := fmt.Sprintf("on trial since the state of %s (%s); %s written; the commit ends %s", f.Cut.Format(time.DateTime), f.Point, bytesText(f.Bytes), count.Of(f.Points, "recovery point"))
	if f.Phase == status.Completing {
		s = fmt.Sprintf("final; %s are still beside the images, %s moved", bytesText(f.Bytes), bytesText(f.Moved))
	}
	if !f.Deadline.IsZero() {
		s += fmt.Sprintf("; %s by itself at %s", f.Then, f.Deadline.Format(time.DateTime))
	}
	return s
}

func jobText(j status.Job) string {
	s := fmt.Sprintf("%s %s", j.Phase, bytesText(j.Done))
	if j.Total > 0 {
		s = fmt.Sprintf("%s %3d%% %s of %s", j.Phase, min(100, j.Done*100/j.Total), bytesText(j.Done), bytesText(j.Total))
	}
	s += fmt.Sprintf(", %s/s", bytesText(j.Rate))
	if j.ETA >= 0 {
		s += ", " + j.ETA.Round(time.Second).String() + " left"
	}
	return s
}

func (a *app) check(c wire.Check) {
	fmt.Fprintf(a.out, "  %-8s %-28s %s\n", c.Result, clean(c.Name), clean(c.Detail))
	if c.Remedy != "" && c.Result != wire.OK {
		fmt.Fprintf(a.out, "           -> %s\n", clean(c.Remedy))
	}
}

// act runs an action and prints its events, one line per step with its result.
func (a *app) act(ctx context.Context, act api.Action) error {
	failed := 0
	err := a.client().Act(ctx, act, func(e api.Event) {
		if a.json {
			_ = json.NewEncoder(a.out).Encode(e)
			return
		}
		switch {
		case e.Step != nil && e.Step.Result != "":
			verb := ""
			if e.Undo {
				verb = "take back: "
			}
			fmt.Fprintf(a.out, "  %-8s %s%s (%s)  %s\n", e.Step.Result, verb, clean(e.Step.Name), e.Step.Took.Round(time.Millisecond), clean(e.Step.Detail))
		case e.Check != nil:
			a.check(*e.Check)
			if e.Check.Result == wire.Failed {
				failed++
			}
		case e.Note != "":
			fmt.Fprintln(a.out, clean(e.Note))
		case e.VM != nil:
			a.show(*e.VM)
		case e.Mount != nil:
			a.mount(*e.Mount)
		case e.Upgrade != nil:
			fmt.Fprintln(a.out, clean(upgradeText(*e.Upgrade)))
		case e.Job != nil:
			fmt.Fprintln(a.err, jobText(*e.Job))
		}
	})
	if err == nil && failed > 0 && act.Verb == api.PeerTest {
		return &exitError{exitFailed, fmt.Errorf("%s failed", count.Of(failed, "check"))}
	}
	return err
}

// planThenAsk shows the dry run of act and asks unless sure.
func (a *app) planThenAsk(ctx context.Context, act api.Action, sure bool) error {
	dry := act
	dry.DryRun = true
	if !a.json || act.DryRun {
		if err := a.act(ctx, dry); err != nil {
			return err
		}
	}
	return a.ask(sure)
}

// ask has a person agree to what was shown, unless sure.
func (a *app) ask(sure bool) error {
	if sure {
		return nil
	}
	if !isTerminal(a.in) {
		return usagef("standard input is no terminal: repeat with --yes to go on")
	}
	fmt.Fprint(a.err, "Go on? [y/N] ")
	s, _ := bufio.NewReader(a.in).ReadString('\n')
	if s = strings.ToLower(strings.TrimSpace(s)); s != "y" && s != "yes" {
		return &exitError{exitFailed, fmt.Errorf("nothing was changed")}
	}
	return nil
}

// isTerminal reports whether a person sits at a stream.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// watchEvery is how often watch asks.
const watchEvery = 500 * time.Millisecond

// watchLines is how often it prints a line where nothing but figures changes
// and no terminal shows them in place.
const watchLines = 10 * time.Second

// watch prints a VM's state until done says so or ctx ends.
func (a *app) watch(ctx context.Context, name string, done func(status.VM) bool) error {
	live := !a.json && isTerminal(a.out)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var last string
	var at time.Time
	for {
		v, err := a.client().VM(ctx, name)
		if err != nil {
			return err
		}
		switch s := watchLine(v); {
		case a.json:
			_ = json.NewEncoder(a.out).Encode(v)
		case live:
			fmt.Fprintf(a.out, "\r\x1b[K%s", clean(s))
		case watchKey(v) != last || time.Since(at) >= watchLines || done(v):
			fmt.Fprintln(a.out, clean(s))
			last, at = watchKey(v), time.Now()
		}
		if done(v) {
			if live {
				fmt.Fprintln(a.out)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// watchKey is what makes a new line worth its place in a log.
func watchKey(v status.VM) string {
	s := fmt.Sprint(v.State, v.Health)
	if v.Job != nil && v.Job.Total > 0 {
		s += fmt.Sprint(v.Job.Phase, v.Job.Done*10/v.Job.Total)
	}
	return s
}

func watchLine(v status.VM) string {
	s := fmt.Sprintf("%s %s/%s rpo %s pending %s", v.Name, v.State, v.Health, age(v.RPO), bytesText(v.Pending))
	if v.Job != nil {
		s += "  " + jobText(*v.Job)
	}
	return s
}

func (a *app) health(vms []status.VM) error {
	worst := 0
	for _, v := range vms {
		if !a.json {
			fmt.Fprintf(a.out, "%-20s %-9s %-8s %s\n", clean(v.Name), v.Role, v.Health, clean(v.Reason))
			for _, c := range v.Conditions {
				fmt.Fprintf(a.out, "  [%s] %s: %s\n      -> %s\n", c.Severity, c.Code, clean(c.Text), clean(c.Remedy))
			}
		}
		if v.Health != health.Normal {
			worst++
		}
	}
	if a.json {
		if err := a.print(vms); err != nil {
			return err
		}
	}
	if worst > 0 {
		return &exitError{exitUnhealthy, fmt.Errorf("not well: %d of %s", worst, count.Of(len(vms), "VM"))}
	}
	return nil
}
