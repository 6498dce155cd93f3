package vm

import (
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/stats"
	"kvmreplica/replicad/status"
)

const (
	figuresFile = "statistics.json"
	// figuresKept is how much of the figures a killed daemon may forget.
	figuresKept = 5 * time.Minute
	maxFigures  = 1 << 20
)

// figures are a VM's measurements; the lock is taken last.
type figures struct {
	mu     sync.Mutex
	ledger *stats.Ledger // guarded by mu; nil = not read yet
	saved  time.Time     // guarded by mu
}

// book is the ledger, read on first use; f.mu is held. Figures that cannot be
// read are given up with a word in the log: they are no protection.
func (v *VM) book() *stats.Ledger {
	f := &v.figures
	if f.ledger != nil {
		return f.ledger
	}
	var b json.RawMessage
	err := fsx.ReadJSON(v.fsys, figuresFile, maxFigures, &b)
	if err == nil {
		f.ledger, err = stats.Load(b, v.deps.Statistics)
	}
	if err != nil {
		if !absent(err) {
			v.log.Warn("statistics begin anew", "err", err)
		}
		f.ledger = stats.New(v.deps.Statistics, v.deps.Now())
	}
	return f.ledger
}

// measure counts what a session did.
func (v *VM) measure(s session.Status) {
	now := v.deps.Now()
	f := &v.figures
	f.mu.Lock()
	defer f.mu.Unlock()
	t := s.Stats
	closed := v.book().Observe(now, stats.Totals{
		Since: t.Since, Cycles: t.Cycles, Empty: t.Empty, Missed: t.CyclesMissed, Errors: t.Errors, Resumed: t.Resumed,
		Abandoned: t.Abandoned, RawBytes: t.RawBytes, SentBytes: t.SentBytes, Latency: t.TotalLatency, LastError: t.LastError,
	}, s.RPO(now))
	if closed || s.Phase == session.Idle || now.Sub(f.saved) >= figuresKept {
		if err := v.saveFigures(now); err != nil {
			v.log.Warn("keep the statistics", "err", err)
		}
	}
}

// saveFigures writes the ledger; f.mu is held. A failed write is tried again
// after figuresKept, not with every cycle.
func (v *VM) saveFigures(now time.Time) error {
	v.figures.saved = now
	b, err := v.figures.ledger.Marshal()
	if err != nil {
		return err
	}
	return fsx.WriteJSON(v.fsys, figuresFile, json.RawMessage(b))
}

// Statistics are the measurements of this host's shipping of the VM.
func (v *VM) Statistics() (status.Measurements, error) {
	f := &v.figures
	f.mu.Lock()
	defer f.mu.Unlock()
	l := v.book()
	l.Roll(v.deps.Now())
	m := l.Report()
	m.Name = v.record().Name
	return m, nil
}

// ResetStatistics begins the open window anew. Faults stay visible: they are
// conditions, not figures.
func (v *VM) ResetStatistics() error {
	f := &v.figures
	f.mu.Lock()
	defer f.mu.Unlock()
	now := v.deps.Now()
	l := v.book()
	l.Roll(now)
	l.Reset(now)
	if err := v.saveFigures(now); err != nil {
		return fmt.Errorf("reset the statistics: %w", err)
	}
	return nil
}
