package testcopy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/wire"
)

// DrillOptions are a person's choices for a drill.
type DrillOptions struct {
	Options
	Proof     string        // see ParseProof
	Timeout   time.Duration // from the command to the proof; 0 = DefaultDrill
	Scheduled bool
}

// DefaultDrill is how long the proof of a drill may take unless it is said.
const DefaultDrill = 10 * time.Minute

const maxDrill = 24 * time.Hour

// Drill makes a test copy, waits for the proof that its guest works, measures
// how long that took, takes the copy away again whatever happened, and keeps a
// report. The report of a drill that failed comes back with the error.
func (m *Manager) Drill(ctx context.Context, s Subject, o DrillOptions, event func(failover.Event)) (Report, error) {
	proof, err := ParseProof(o.Proof)
	if err != nil {
		return Report{}, err
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultDrill
	}
	if o.Timeout < time.Second || o.Timeout > maxDrill {
		return Report{}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("timeout %s", o.Timeout), Hint: "from 1s to 24h"}
	}
	o.Purpose = "drill"
	r := Report{Version: reportVersion, VM: s.ID(), Name: s.Name(), Request: o.Request, Scheduled: o.Scheduled, Proof: proof.String(), Timeout: o.Timeout, Started: m.deps.Now().UTC()}
	step := func(e failover.Event) {
		if e.Result != "" {
			r.Steps = append(r.Steps, ReportStep{Name: e.Name, Result: string(e.Result), Detail: e.Detail, Took: e.Took, Undo: e.Undo})
		}
		if event != nil {
			event(e)
		}
	}
	err = m.drill(ctx, s, o, proof, &r, step)
	r.Finished, r.OK = m.deps.Now().UTC(), err == nil
	if err != nil {
		r.Failure = err.Error()
	}
	if serr := m.keepReport(&r); serr != nil {
		return r, errors.Join(err, serr)
	}
	if err != nil {
		return r, fmt.Errorf("the drill failed (report: %s): %w", r.File, err)
	}
	return r, nil
}

func (m *Manager) drill(ctx context.Context, s Subject, o DrillOptions, proof Proof, r *Report, step func(failover.Event)) error {
	began := m.deps.Now()
	pctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	release, err := o.Take(s)
	if err != nil {
		return err
	}
	defer release()
	p, err := m.Prepare(pctx, s, o.Options)
	r.setPlan(p)
	if err != nil {
		return err
	}
	if f := p.Failed(); f != nil {
		return &wire.Error{Kind: wire.KindRefused, Text: f.Name + ": " + f.Detail, Hint: f.Remedy}
	}
	if err := proof.possible(p.Copy); err != nil {
		return err
	}
	m.conduct(p.Copy.ID, true)
	defer m.conduct(p.Copy.ID, false)
	if _, err := m.startPlanned(pctx, s, p, step); err != nil {
		return err
	}
	c := m.get(p.Copy.ID)
	if c == nil {
		return errors.New("the copy ended at once")
	}
	waited := m.deps.Now()
	step(failover.Event{Step: wire.Step{Name: "Wait for the proof: " + proof.String()}})
	detail, err := m.await(pctx, proof, c)
	ev := failover.Event{Step: wire.Step{Name: "Wait for the proof: " + proof.String(), Result: wire.OK, Detail: detail, Took: m.deps.Now().Sub(waited)}}
	if err == nil {
		r.RTO = m.deps.Now().Sub(began)
	} else {
		ev.Result, ev.Detail = wire.Failed, err.Error()
	}
	step(ev)
	if n := c.record().NICs; len(n) > 0 {
		r.Address, _ = m.address(pctx, c.record()) // none is known without an agent
	}
	r.Console = m.consoleEnd(c.record())
	cctx, end := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
	defer end()
	if _, cerr := m.Stop(cctx, p.Copy.VM, p.Copy.ID, step); cerr != nil {
		err = errors.Join(err, fmt.Errorf("take the copy away (it is tried again): %w", cerr))
	}
	return err
}

// Known reports whether a domain is a test copy.
func (m *Manager) Known(uuid string) bool { return m.get(uuid) != nil }

func (m *Manager) get(id string) *copied {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.copies[id]
}

// conduct says whose copy a drill's is: one that nobody conducts is ended.
func (m *Manager) conduct(id string, on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if on {
		m.conducted[id] = true
	} else {
		delete(m.conducted, id)
	}
}

const consoleShown = 4 << 10

// consoleEnd is the end of what the guest printed, for the report.
func (m *Manager) consoleEnd(c Copy) string {
	if !c.Serial {
		return ""
	}
	t := &tail{path: m.console(c)}
	if err := t.read(); err != nil {
		return ""
	}
	return string(t.kept[max(0, len(t.kept)-consoleShown):])
}

// Schedule is a drill that is due by itself.
type Schedule struct {
	VM      string
	Every   time.Duration
	At      time.Duration // since midnight, local time; negative = any time
	Point   string
	Network string
	Proof   string
	Timeout time.Duration
}

const (
	dueWindow = time.Hour // a drill begins within it after At
	dueAgain  = time.Hour // after a try that left no report
)

// due says whether a drill begins now, when the last one began at last.
func (s Schedule) due(now, last time.Time) bool {
	if !last.IsZero() && now.Sub(last) < s.Every-dueWindow/2 && s.At >= 0 || !last.IsZero() && now.Sub(last) < s.Every && s.At < 0 {
		return false
	}
	if s.At < 0 {
		return true
	}
	midnight := time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, now.Location())
	since := now.Sub(midnight) - s.At
	return since >= 0 && since < dueWindow
}

// ready says whether there is anything to drill: a replica that holds no
// complete copy yet is shown as such, and its drill waits for that.
func ready(v Subject) bool {
	_, _, err := v.TestSource(delta.Pos{})
	if err == nil {
		_, err = v.ChoosePoint("latest")
	}
	return err == nil
}

// runDue begins at most one drill that is due; it goes on in the background.
func (m *Manager) runDue(ctx context.Context) {
	m.mu.Lock()
	busy := m.drilling
	m.mu.Unlock()
	if busy {
		return
	}
	for _, s := range m.deps.Drills {
		v, ok := m.deps.Named(s.VM)
		if !ok || !v.HoldsReplica() {
			continue
		}
		now := m.deps.Now()
		m.mu.Lock()
		last := m.drilled[v.ID()]
		if n := len(m.drills[v.ID()]); n > 0 && m.drills[v.ID()][n-1].Started.After(last) {
			last = m.drills[v.ID()][n-1].Started
		}
		due := s.due(now, last) && now.Sub(m.drilled[v.ID()]) >= min(dueAgain, s.Every)
		m.mu.Unlock()
		if !due || !ready(v) {
			continue
		}
		m.mu.Lock()
		m.drilled[v.ID()], m.drilling = now, true
		m.mu.Unlock()
		m.background.Add(1)
		go func() {
			defer m.background.Done()
			defer func() {
				m.mu.Lock()
				m.drilling = false
				m.mu.Unlock()
			}()
			o := DrillOptions{Options: Options{Point: s.Point, Network: s.Network, Request: newID()}, Proof: s.Proof, Timeout: s.Timeout, Scheduled: true}
			if _, err := m.Drill(ctx, v, o, nil); err != nil {
				m.deps.Log.Error("the scheduled drill failed", "vm", s.VM, "err", err)
			}
		}()
		return
	}
}
