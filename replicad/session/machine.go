package session

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// Times the machine works with.
const (
	backoffFirst = 200 * time.Millisecond
	backoffMax   = 30 * time.Second
	fullRetry    = 30 * time.Second // a full replica, a refusal, a stop: ask again
	idleGap      = 200 * time.Millisecond
	appRetry     = time.Minute // an application-consistent cut that failed
	// corruptLimit attempts with wrong digests end in a new epoch: the fault
	// may sit in what was captured.
	corruptLimit = 3
	// overloadLimit abandoned epochs in a row are worth a condition.
	overloadLimit = 3
	scrubWindow   = 16 << 20
)

// MachineConfig is what a Machine decides by.
type MachineConfig struct {
	Interval  time.Duration
	AppEvery  time.Duration // of application-consistent cuts, 0 = none
	ScrubRate int64         // bytes per second
	Verified  bool
	Scrub     Cursor
	// Pass bounds an unfinished pass, Mismatched is what it found so far.
	Pass       Pass
	Mismatched int64
	Holes      bool
	LastCut    time.Time
	// Rand returns values in [0,1) for jitter.
	Rand func() float64
}

// Machine is the deterministic core of a session.
//
//	            ┌────────────── any failure: back off ──────────────┐
//	            ▼                                                   │
//	start ► connecting ─► seeding ─► (verifying) ─► waiting ─► freezing ─► shipping ─► ack ─┐
//	            │                                     ▲ ▲         │ empty: beat             │
//	            ▼                                     │ └─────────┴─────────────────────────┘
//	         stopped (asks again)                   scrub windows
//
// Invariant: at most one operation is outstanding (busy).
type Machine struct {
	cfg   MachineConfig
	phase Phase
	busy  bool
	// wake is when EvWake is due; zero = never.
	wake time.Time

	paused, final bool
	trigger       bool
	again         bool // a handshake was asked for while something was under way

	// parent is the replica's committed position.
	parent    delta.Pos
	protected bool
	held      *dataplane.Epoch // frozen and not ended
	drop      bool             // held must be abandoned
	dropNonce uint64           // ... also after a new handshake
	resume    bool             // held was being shipped before
	shipped   *EvShipped       // committed, not yet acknowledged to the data plane
	cutAt     time.Time
	lastCut   time.Time
	nextCut   time.Time
	nextApp   time.Time // next application-consistent cut
	appCut    bool      // the cut under way is one
	appFails  int       // of them in a row

	seeds   map[wire.DiskName]int64 // cursors of an unfinished seed
	sizes   map[wire.DiskName]int64
	holes   bool
	seeding bool
	verify  string // reason of the outstanding digest pass
	// verifyAll: everything was marked for that pass, so every mark is compared.
	verifyAll bool
	mark      *lineage.Decision // what has to be marked before the pass
	markedAt  delta.Pos         // everything was marked for a comparison with this position ...
	markedBy  string            // ... in this instance of the data plane
	markedFor uint64            // ... that the replica asked for by this number
	compared  bool              // ... and the comparison came to its end
	asked     uint64            // the replica wants to hear that it did; 0 = it does not
	claim     DoHandshake       // what the next handshake says of it

	join       joins
	verified   bool
	pass       Pass
	scrub      Cursor
	scrubAt    time.Time
	mismatched int64

	source   dataplane.Status
	failures int
	corrupt  int
	overload int
	since    time.Time
	lastErr  string
	cond     map[string]Condition
	stop     *lineage.Decision
	meter    meter
}

// NewMachine returns a machine that waits for EvStart.
func NewMachine(cfg MachineConfig, now time.Time) *Machine {
	m := &Machine{
		cfg: cfg, phase: Idle, verified: cfg.Verified, scrub: cfg.Scrub, lastCut: cfg.LastCut,
		pass: cfg.Pass, mismatched: cfg.Mismatched,
		cond: map[string]Condition{},
	}
	m.meter.stats.Since = now
	return m
}

// Wake returns when EvWake is due; ok is false when nothing is scheduled.
func (m *Machine) Wake() (at time.Time, ok bool) { return m.wake, !m.wake.IsZero() }

// Busy reports whether an operation is outstanding.
func (m *Machine) Busy() bool { return m.busy }

// Status is the machine's part of a snapshot.
func (m *Machine) Status() Status {
	s := Status{
		Phase: m.phase, Protected: m.protected, Seeding: m.seeding, Verifying: m.verify, Paused: m.paused,
		Committed: m.parent, LastCut: m.lastCut, Pending: m.source.Pending, Suspect: m.source.Suspect,
		Stats: m.meter.snapshot(), Verified: m.verified, Pass: m.pass, Scrub: m.scrub, Mismatched: m.mismatched,
		Failures: m.failures, LastError: m.lastErr, Since: m.since,
	}
	if m.shipped != nil {
		s.Committed = m.shipped.Pos // the data plane is about to be told
	}
	s.Joining = maps.Clone(m.join.disks)
	for _, code := range slices.Sorted(maps.Keys(m.cond)) {
		s.Conditions = append(s.Conditions, m.cond[code])
	}
	if m.stop != nil {
		d := *m.stop
		s.Stop = &d
	}
	if m.phase == BackingOff || m.phase == Stopped {
		s.Retry = m.wake
	}
	return s
}

// Step takes one event and returns what to do, in order.
func (m *Machine) Step(now time.Time, ev Event) []Action {
	switch e := ev.(type) {
	case EvStart, EvRetry:
		return m.onRetry(now)
	case EvWake:
		return m.onWake(now)
	case EvPause:
		return m.onPause()
	case EvResume:
		m.paused = false
		return m.onRetry(now)
	case EvTrigger:
		m.trigger = true
		return m.onWake(now)
	case EvFinal:
		m.final, m.paused = true, false
		return m.onWake(now)
	case EvFinalCancel:
		m.final = false
		return nil
	case EvInterval:
		return m.onInterval(now, e.Interval)
	case EvAppEvery:
		m.cfg.AppEvery, m.nextApp = e.Every, time.Time{}
		return m.onWake(now)
	case EvScan:
		return m.onScan(now, e)
	}
	m.busy = false
	switch e := ev.(type) {
	case EvFailed:
		return m.onFailed(now, e)
	case EvHandshake:
		return m.onHandshake(now, e)
	case EvMarked:
		m.mark = nil
		m.markedAt, m.markedBy, m.markedFor, m.compared = m.parent, m.source.Instance, m.asked, false
		return m.next(now)
	case EvSeeded:
		return m.onSeeded(now, e)
	case EvVerified:
		m.verify, m.source.Suspect, m.compared = "", 0, true
		m.settled()
		return m.next(now)
	case EvFrozen:
		return m.onFrozen(now, e)
	case EvShipped:
		return m.onShipped(now, e)
	case EvAcked:
		return m.onAcked(now, e)
	case EvAbandoned:
		return m.onAbandoned(now)
	case EvBeaten:
		return m.onBeaten(now)
	case EvScrubbed:
		return m.onScrubbed(now, e)
	}
	return nil
}

// do starts an operation.
func (m *Machine) do(p Phase, a Action) []Action {
	m.phase, m.busy, m.wake = p, true, time.Time{}
	return []Action{a}
}

// sleep waits for EvWake.
func (m *Machine) sleep(p Phase, until time.Time) []Action {
	m.phase, m.wake = p, until
	return nil
}

func (m *Machine) onRetry(now time.Time) []Action {
	if m.busy || m.paused {
		m.again = !m.paused // the end of a pause asks for itself
		return nil
	}
	m.failures, m.stop = 0, nil
	return m.connect()
}

func (m *Machine) connect() []Action {
	claim := m.claim
	m.again, m.claim = false, DoHandshake{}
	return m.do(Connecting, claim)
}

func (m *Machine) onWake(now time.Time) []Action {
	if m.busy {
		return nil
	}
	switch m.phase {
	case BackingOff, Stopped:
		if m.final || !now.Before(m.wake) {
			return m.connect()
		}
		return nil
	case PausedPhase, Finished:
		if m.final {
			return m.connect()
		}
		return nil
	case Idle:
		return nil
	}
	return m.next(now)
}

func (m *Machine) onInterval(now time.Time, d time.Duration) []Action {
	m.cfg.Interval = d
	if m.busy || m.phase != Waiting {
		return nil
	}
	m.nextCut = m.cutAt.Add(d)
	return m.next(now)
}

// onPause lets nothing new begin. What is under way is interrupted; a frozen
// epoch is given back, because holding it costs the guest. One that the replica
// has is acknowledged first: given back, all of it would be sent again.
func (m *Machine) onPause() []Action {
	m.paused, m.trigger = true, false
	switch {
	case m.busy && m.shipped != nil:
		return nil
	case m.busy:
		return []Action{DoCancel{}}
	case m.shipped != nil:
		return m.do(Shipping, DoAck{m.shipped.Pos})
	}
	return m.park()
}

// park is the way into the pause.
func (m *Machine) park() []Action {
	m.shipped = nil // could not be acknowledged, or there is none
	if m.held != nil {
		return m.do(PausedPhase, DoAbandon{m.held.Epoch})
	}
	return m.sleep(PausedPhase, time.Time{})
}

// next decides what to do when nothing is outstanding and the handshake said
// that we may ship. The order of the cases is the order of the protocol.
func (m *Machine) next(now time.Time) []Action {
	seed := m.unseeded()
	switch {
	case m.shipped != nil:
		return m.do(Shipping, DoAck{m.shipped.Pos})
	case m.paused:
		return m.park()
	case m.again:
		return m.connect()
	case m.held != nil && (m.drop || m.verify != "" || seed != "" || m.mark != nil):
		return m.do(m.phase, DoAbandon{m.held.Epoch})
	case m.mark != nil:
		return m.do(Verifying, DoMark{*m.mark})
	case seed != "":
		return m.do(Seeding, m.seedPiece(seed))
	case m.verify != "":
		return m.do(Verifying, DoVerify{m.parent, m.verify, m.verifyAll, m.join.below()})
	case m.held != nil:
		return m.do(Shipping, DoShip{*m.held, m.resume})
	case m.scrubDue(now):
		return m.do(Waiting, DoScrub{m.parent, m.scrub, m.join.below()})
	case m.due(now):
		m.appCut = m.appDue(now)
		m.trigger = false
		m.cutAt = now
		return m.do(Freezing, DoFreeze{m.parent, m.appCut, m.join.limits()})
	}
	at := m.nextCut
	if m.cfg.AppEvery > 0 && m.nextApp.Before(at) {
		at = m.nextApp
	}
	if due := m.scrubTime(now); m.scrubbing() && due.Before(at) {
		at = due
	}
	return m.sleep(Waiting, at)
}

// due: while a disk joins, the next cut follows the last one at once. Its slice
// is as large as fits the interval, so the other disks' cuts are never later
// for it and at most about twice as many; waiting for the interval would only
// leave the link idle, half a day at an interval of a day.
func (m *Machine) due(now time.Time) bool {
	return m.final || m.trigger || m.join.open() || !m.protected || !now.Before(m.nextCut) || m.appDue(now)
}

// appDue: this cut is to be application-consistent. The last cuts of a planned
// failover are those of a guest that was shut down.
func (m *Machine) appDue(now time.Time) bool {
	return m.cfg.AppEvery > 0 && m.protected && !m.final && !now.Before(m.nextApp)
}

// unseeded names a disk whose initial copy is not complete.
func (m *Machine) unseeded() wire.DiskName {
	for _, d := range slices.Sorted(maps.Keys(m.seeds)) {
		if m.seeds[d] < m.sizes[d] {
			return d
		}
	}
	return ""
}

func (m *Machine) seedPiece(disk wire.DiskName) DoSeed {
	a := DoSeed{Generation: m.source.Generation, Disk: disk, Offset: m.seeds[disk], Holes: m.holes}
	for d, size := range m.sizes {
		a.Total += size
		a.Done += min(m.seeds[d], size)
	}
	return a
}

// settled ends a row of failures: something durable was achieved.
func (m *Machine) settled() {
	m.failures, m.since = 0, time.Time{}
	for _, c := range []string{CondLink, CondSource, CondNoSpace, CondRefused, CondCorrupt, CondSuspect} {
		delete(m.cond, c)
	}
}

func (m *Machine) condition(code, remedy, format string, a ...any) {
	m.cond[code] = Condition{Code: code, Text: fmt.Sprintf(format, a...), Remedy: remedy}
}
