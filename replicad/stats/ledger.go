package stats

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"kvmreplica/replicad/status"
)

// Totals are a session's counters since it began.
type Totals struct {
	Since     time.Time // identifies the session
	Cycles    int64     // cuts the replica holds
	Empty     int64     // of which nothing had changed
	Missed    int64
	Errors    int64
	Resumed   int64
	Abandoned int64
	RawBytes  int64
	SentBytes int64
	Latency   time.Duration // sum over the cycles that were not empty
	LastError string
}

// maxHistory bounds the closed windows that are kept: two months of the default.
const maxHistory = 120

// version of the file.
const version = 1

// Ledger is the measurements of one VM. Make it with New or Load.
type Ledger struct {
	sched   Schedule
	last    Totals
	open    status.Window
	history []status.Window // oldest first
}

// New begins the first window at now; it ends with the schedule's.
func New(s Schedule, now time.Time) *Ledger {
	return &Ledger{sched: s, open: status.Window{From: now}}
}

// Observe takes a session's totals. age is that of the newest cut the replica
// holds, negative when there is none. It reports whether a window was closed.
func (l *Ledger) Observe(now time.Time, t Totals, age time.Duration) (closed bool) {
	closed = l.Roll(now)
	was := l.last
	if !t.Since.Equal(was.Since) {
		was = Totals{} // another session: its totals are all new
	}
	l.last = t
	w := &l.open
	w.Cycles += t.Cycles - was.Cycles
	w.Empty += t.Empty - was.Empty
	w.Missed += t.Missed - was.Missed
	w.Errors += t.Errors - was.Errors
	w.Resumed += t.Resumed - was.Resumed
	w.Abandoned += t.Abandoned - was.Abandoned
	w.RawBytes += t.RawBytes - was.RawBytes
	w.SentBytes += t.SentBytes - was.SentBytes
	if n := (t.Cycles - t.Empty) - (was.Cycles - was.Empty); n > 0 {
		w.LargestBytes = max(w.LargestBytes, (t.RawBytes-was.RawBytes)/n)
		took := t.Latency - was.Latency
		w.Latency += took
		w.LargestLatency = max(w.LargestLatency, took/time.Duration(n))
	}
	w.RPOMax = max(w.RPOMax, age)
	if t.LastError != "" && t.Errors > was.Errors {
		w.LastError = t.LastError
	}
	return closed
}

// Roll closes the window when its time is over.
func (l *Ledger) Roll(now time.Time) bool {
	end := l.sched.End(l.open.From)
	if now.Before(end) {
		return false
	}
	l.open.To = end
	l.history = append(l.history, l.open)
	if n := len(l.history) - maxHistory; n > 0 {
		l.history = l.history[n:]
	}
	l.open = status.Window{From: l.sched.Begin(now)}
	return true
}

// Reset begins the open window anew; the history stays.
func (l *Ledger) Reset(now time.Time) { l.open = status.Window{From: now} }

// Report is the open window and the history, oldest first.
func (l *Ledger) Report() status.Measurements {
	return status.Measurements{Window: l.open, Until: l.sched.End(l.open.From), History: append([]status.Window{}, l.history...)}
}

// file is what is kept over a restart.
type file struct {
	Version int             `json:"version"`
	Open    status.Window   `json:"open"`
	Last    Totals          `json:"last"`
	History []status.Window `json:"history"`
}

// Marshal is the ledger's file.
func (l *Ledger) Marshal() ([]byte, error) {
	return json.Marshal(file{version, l.open, l.last, l.history})
}

// Load reads Marshal's bytes. A file that cannot be read costs the figures and
// nothing else: the caller reports the error and begins with New.
func Load(b []byte, s Schedule) (*Ledger, error) {
	var f file
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("read statistics: %w", err)
	}
	if f.Version != version {
		return nil, fmt.Errorf("read statistics: version %d, this program knows %d", f.Version, version)
	}
	if f.Open.From.IsZero() || len(f.History) > maxHistory {
		return nil, errors.New("read statistics: no window, or too many")
	}
	return &Ledger{sched: s, last: f.Last, open: f.Open, history: f.History}, nil
}
