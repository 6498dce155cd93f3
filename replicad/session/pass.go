package session

import (
	"fmt"
	"strings"
	"time"
)

// Pass bounds the background comparison of everything.
type Pass struct {
	ID     string // of whoever asked; empty = the pass after the initial copy
	Rate   int64  // bytes per second read on each host; 0 = the session's
	Window Window
}

// Window is a time of day on this host's clock in which something may be done;
// the zero value is the whole day. It may reach over midnight.
type Window struct {
	From time.Duration `json:"from_ns"` // since midnight
	To   time.Duration `json:"to_ns"`
}

const (
	day        = 24 * time.Hour
	clockStyle = "15:04"
)

// ParseWindow reads "22:00-06:00"; empty is the whole day.
func ParseWindow(s string) (Window, error) {
	if s == "" {
		return Window{}, nil
	}
	a, b, ok := strings.Cut(s, "-")
	from, err1 := time.Parse(clockStyle, a)
	to, err2 := time.Parse(clockStyle, b)
	if !ok || err1 != nil || err2 != nil || from.Equal(to) {
		return Window{}, fmt.Errorf("%.32q is no time of day such as 22:00-06:00", s)
	}
	return Window{From: sinceMidnight(from), To: sinceMidnight(to)}, nil
}

// String is what ParseWindow reads.
func (w Window) String() string {
	if w == (Window{}) {
		return ""
	}
	at := func(d time.Duration) string { return time.Time{}.Add(d).Format(clockStyle) }
	return at(w.From) + "-" + at(w.To)
}

// Length is how much of a day it holds.
func (w Window) Length() time.Duration {
	if w == (Window{}) {
		return day
	}
	return (w.To - w.From + day) % day
}

// Holds reports whether now lies in the window.
func (w Window) Holds(now time.Time) bool {
	return (sinceMidnight(now)-w.From+day)%day < w.Length()
}

// next is now, or when the window begins.
func (w Window) next(now time.Time) time.Time {
	if w.Holds(now) {
		return now
	}
	return now.Add((w.From - sinceMidnight(now) + day) % day)
}

// sinceMidnight is the time of day as the wall clock shows it.
func sinceMidnight(t time.Time) time.Duration {
	h, m, s := t.Clock()
	return time.Duration(h)*time.Hour + time.Duration(m)*time.Minute + time.Duration(s)*time.Second + time.Duration(t.Nanosecond())
}

// Rescan compares everything with the replica in the background, between the
// cycles, whose cuts go on: what differs goes with the next epoch. A pass of
// this ID that is under way goes on where it is, with the new bounds; any other
// begins anew, because what it has compared may have changed since.
func (s *Session) Rescan(p Pass) { s.send(EvScan{Pass: p}) }

// StopScan ends the background pass; verified is what was known before it.
func (s *Session) StopScan(verified bool) { s.send(EvScan{Stop: true, Verified: verified}) }

// onScan begins, bounds or ends the background pass.
func (m *Machine) onScan(now time.Time, e EvScan) []Action {
	switch {
	case e.Stop:
		m.verified, m.scrub = e.Verified, Cursor{}
	case m.verified || e.Pass.ID != m.pass.ID:
		m.verified, m.scrub, m.mismatched = false, Cursor{}, 0
		delete(m.cond, CondMismatch)
	}
	m.pass, m.scrubAt = e.Pass, now
	if m.busy || m.phase != Waiting {
		return nil
	}
	return m.next(now)
}

// scrubbed: one window of the background pass is done.
func (m *Machine) onScrubbed(now time.Time, e EvScrubbed) []Action {
	m.settled()
	if m.verified { // it was stopped meanwhile
		return m.next(now)
	}
	m.scrub = e.Next
	if e.Done {
		m.verified, m.scrub = true, Cursor{}
	}
	if e.Mismatched > 0 {
		m.mismatched += e.Mismatched
		m.condition(CondMismatch, "look for writers past the tracker and for failing memory or disks",
			"%d bytes differed from the replica although they were not marked; they are sent again", m.mismatched)
	}
	m.scrubAt = now.Add(time.Duration(float64(e.Bytes) / float64(m.scrubRate()) * float64(time.Second)))
	return m.next(now)
}

func (m *Machine) scrubRate() int64 {
	if m.pass.Rate > 0 {
		return m.pass.Rate
	}
	return m.cfg.ScrubRate
}

func (m *Machine) scrubbing() bool { return !m.verified && m.protected && !m.final }

// scrubTime is when the next piece of the background pass is due.
func (m *Machine) scrubTime(now time.Time) time.Time {
	if m.scrubAt.After(now) {
		now = m.scrubAt
	}
	return m.pass.Window.next(now)
}

func (m *Machine) scrubDue(now time.Time) bool {
	return m.scrubbing() && !m.trigger && !m.scrubTime(now).After(now)
}
