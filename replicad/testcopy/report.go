package testcopy

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// Report is what is kept of a drill.
type Report struct {
	Version   int           `json:"version"`
	VM        wire.VMID     `json:"vm"`
	Name      string        `json:"name"`
	Copy      string        `json:"copy,omitempty"`
	Request   string        `json:"request"`
	Scheduled bool          `json:"scheduled"`
	Started   time.Time     `json:"started"`
	Finished  time.Time     `json:"finished"`
	Point     string        `json:"point,omitempty"`
	Ordinal   uint64        `json:"ordinal,omitempty"`
	Cut       time.Time     `json:"cut,omitzero"`
	Isolated  bool          `json:"isolated"`
	Proof     string        `json:"proof"`
	Timeout   time.Duration `json:"timeout_ns"`
	OK        bool          `json:"ok"`
	// RTO is the time from the command to the proof; 0 = there was none.
	RTO     time.Duration `json:"rto_ns"`
	Failure string        `json:"failure,omitempty"`
	Address string        `json:"address,omitempty"`
	Checks  []ReportStep  `json:"checks,omitempty"`
	Steps   []ReportStep  `json:"steps,omitempty"`
	// Console is the end of the guest's serial output.
	Console string `json:"console,omitempty"`
	// File is the Markdown beside it.
	File string `json:"-"`
}

// ReportStep is one line of a report.
type ReportStep struct {
	Name   string        `json:"name"`
	Result string        `json:"result"`
	Detail string        `json:"detail,omitempty"`
	Took   time.Duration `json:"took_ns,omitempty"`
	Undo   bool          `json:"undo,omitempty"`
}

const (
	drillsDir     = "drills"
	reportVersion = 1
	maxReport     = 1 << 20
	// keptReports bounds the reports of one VM.
	keptReports = 50
	// reportTime makes names that sort by time.
	reportTime = "20060102T150405.000Z"
)

func (r *Report) setPlan(p Plan) {
	c := p.Copy
	r.Copy, r.Ordinal, r.Cut = c.Name, c.Ordinal, c.Cut
	if !c.At.IsZero() {
		r.Point, r.Isolated = c.At.String(), c.Isolated()
	}
	for _, k := range p.Checks {
		r.Checks = append(r.Checks, ReportStep{Name: k.Name, Result: string(k.Result), Detail: k.Detail})
	}
}

func (r *Report) base() string { return string(r.VM) + "/" + r.Started.UTC().Format(reportTime) }

// keepReport writes both files and drops the oldest beyond the bound.
func (m *Manager) keepReport(r *Report) error {
	drills := fsx.Sub(m.root, drillsDir)
	if err := drills.MkdirAll(string(r.VM)); err != nil {
		return fmt.Errorf("keep the drill's report: %w", err)
	}
	// The JSON is last: a report is one that has it.
	if err := fsx.WriteAtomic(drills, r.base()+".md", []byte(r.Markdown())); err != nil {
		return fmt.Errorf("keep the drill's report: %w", err)
	}
	if err := saveJSON(drills, r.base()+".json", r, "keep the drill's report"); err != nil {
		return err
	}
	r.File = filepath.Join(m.deps.StateDir, drillsDir, r.base()+".md")
	m.mu.Lock()
	all := append(m.drills[r.VM], *r)
	var old []Report
	if n := len(all) - keptReports; n > 0 {
		old, all = all[:n], all[n:]
	}
	m.drills[r.VM] = all
	m.mu.Unlock()
	for _, o := range old {
		for _, ext := range []string{".json", ".md"} {
			if err := drills.Remove(o.base() + ext); err != nil && !absent(err) {
				return fmt.Errorf("drop an old report: %w", err)
			}
		}
	}
	return nil
}

// loadDrills reads the kept reports; one that cannot be read is left out.
func (m *Manager) loadDrills() error {
	drills := fsx.Sub(m.root, drillsDir)
	vms, err := drills.List(".")
	if absent(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the drills' reports: %w", err)
	}
	for _, id := range vms {
		names, err := drills.List(id)
		if err != nil {
			return fmt.Errorf("read the drills' reports: %w", err)
		}
		for _, n := range names {
			if !strings.HasSuffix(n, ".json") {
				continue
			}
			var r Report
			err := fsx.ReadJSON(drills, id+"/"+n, maxReport, &r)
			if err != nil || string(r.VM) != id || r.Version != reportVersion {
				m.deps.Log.Warn("a drill's report cannot be read", "file", id+"/"+n, "err", err)
				continue
			}
			r.File = filepath.Join(m.deps.StateDir, drillsDir, r.base()+".md")
			m.drills[r.VM] = append(m.drills[r.VM], r)
		}
	}
	return nil
}

// Drills returns a VM's kept reports, oldest first.
func (m *Manager) Drills(id wire.VMID) []Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]Report(nil), m.drills[id]...)
}

// ShowDrills is the last drill and the last one that succeeded.
func (m *Manager) ShowDrills(id wire.VMID) (last, proven *status.Drill) {
	all := m.Drills(id)
	for i := len(all) - 1; i >= 0; i-- {
		d := all[i].Show()
		if last == nil {
			last = &d
		}
		if d.OK {
			return last, &d
		}
	}
	return last, nil
}

// Show is the report in short.
func (r *Report) Show() status.Drill {
	return status.Drill{
		VM: r.Name, Started: r.Started, OK: r.OK, Point: r.Point, Cut: r.Cut, Proof: r.Proof, RTO: r.RTO, Failure: r.Failure, Report: r.File,
	}
}

// Markdown is the report for people. What the guest printed stands in a block
// of its own, which nothing in it can end.
func (r *Report) Markdown() string {
	var b strings.Builder
	p := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	verdict := "FAILED"
	if r.OK {
		verdict = "passed"
	}
	p("# Failover drill of %s: %s", cell(r.Name), verdict)
	p("")
	p("| | |")
	p("|---|---|")
	p("| Begun | %s%s |", r.Started.UTC().Format(time.RFC3339), map[bool]string{true: " (by schedule)"}[r.Scheduled])
	p("| Ended | %s |", r.Finished.UTC().Format(time.RFC3339))
	if r.Point != "" {
		p("| Recovery point | %s, cut %s, %s old |", cell(r.Point), r.Cut.UTC().Format(time.RFC3339), r.Started.Sub(r.Cut).Round(time.Second))
		p("| Network | %s |", map[bool]string{true: "an isolated one, made for the copy", false: "a network of this host"}[r.Isolated])
	}
	p("| Proof | %s, within %s |", cell(r.Proof), r.Timeout)
	if r.RTO > 0 {
		p("| RTO, from the command to the proof | %s |", r.RTO.Round(time.Millisecond))
	} else {
		p("| RTO | not proven |")
	}
	if r.Address != "" {
		p("| Address of the guest | %s |", cell(r.Address))
	}
	if r.Failure != "" {
		p("| Failure | %s |", cell(r.Failure))
	}
	p("| VM, copy, request | %s, %s, %s |", r.VM, cell(r.Copy), cell(r.Request))
	for _, t := range []struct {
		title string
		rows  []ReportStep
	}{{"Checks", r.Checks}, {"Steps", r.Steps}} {
		if len(t.rows) == 0 {
			continue
		}
		p("")
		p("## %s", t.title)
		p("")
		p("| Result | What | Took | Detail |")
		p("|---|---|---|---|")
		for _, s := range t.rows {
			p("| %s | %s | %s | %s |", s.Result, cell(map[bool]string{true: "take back: "}[s.Undo]+s.Name), took(s.Took), cell(s.Detail))
		}
	}
	if r.Console != "" {
		p("")
		p("## End of the guest's console")
		p("")
		for line := range strings.Lines(r.Console) {
			p("    %s", printable(line))
		}
	}
	return b.String()
}

func took(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.Round(time.Millisecond).String()
}

// cell keeps text in its cell of a table.
func cell(s string) string {
	return strings.NewReplacer("|", "\\|", "<", "&lt;", "`", "'").Replace(printable(s))
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\r' {
			return ' '
		}
		if r < ' ' || r == 0x7f || r == 0xfffd {
			return '.'
		}
		return r
	}, strings.TrimRight(s, "\r\n"))
}
