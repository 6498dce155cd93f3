package session

import (
	"maps"
	"math"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// onHandshake runs the decision table and prepares what next reads.
func (m *Machine) onHandshake(now time.Time, e EvHandshake) []Action {
	m.source = e.Source
	if e.Source.TrackingLost != "" {
		m.condition(CondTrackingLost, "check the state directory's disk", "%s", e.Source.TrackingLost)
	} else {
		delete(m.cond, CondTrackingLost)
	}
	m.adopt(e.Source.Frozen)
	d := lineage.Decide(e.Request, e.Reply)
	if !d.MayShip() {
		return m.halt(now, d)
	}
	m.stop, m.mark = nil, nil
	delete(m.cond, CondStop)
	if d.Alarm {
		m.condition(CondAlarm, d.Hint, "%s", d.Reason)
	} else {
		delete(m.cond, CondAlarm)
	}
	m.seeds, m.sizes, m.seeding = nil, map[wire.DiskName]int64{}, false
	for _, disk := range e.Request.Disks {
		m.sizes[disk.Name] = disk.Size
	}
	lost := m.startJoin(e, d)
	m.asked = e.Reply.Asked
	if d.Outcome == lineage.SeedContinue {
		return m.startSeed(now, d)
	}
	m.protected = !d.Parent.IsZero()
	acts := m.tellJoined()
	m.parent = d.Parent
	if lost != "" {
		d = m.remark(lostText(lost))
	}
	m.reconcile()
	if d.Outcome == lineage.VerifyAll || d.Outcome == lineage.VerifyUnion {
		return append(acts, m.startVerify(now, d)...)
	}
	m.verifyAll = false
	if m.verify = ""; m.source.Suspect > 0 && m.shipped == nil {
		m.verify = "changes since an unclean stop are not known exactly"
		if m.source.Recovered != "" {
			m.verify = m.source.Recovered
		}
	}
	return append(acts, m.next(now)...)
}

// adopt takes over what the data plane holds: our own epoch, or one frozen by
// a session before us.
func (m *Machine) adopt(frozen *dataplane.Epoch) {
	if frozen == nil {
		m.held, m.drop, m.resume = nil, false, false
		return
	}
	if m.held == nil || m.held.Nonce != frozen.Nonce {
		m.cutAt = frozen.Cut
	}
	h := *frozen
	m.held, m.resume = &h, true
	m.drop = h.Lost != "" || h.Nonce == m.dropNonce
}

// reconcile compares the frozen epoch with where the replica stands.
func (m *Machine) reconcile() {
	m.shipped = nil
	if m.held == nil {
		return
	}
	pos := delta.Pos{Generation: m.held.Generation, Epoch: m.held.Epoch}
	if m.held.Digest != nil {
		pos.Digest = *m.held.Digest
	}
	switch {
	case m.drop:
		// Committed or not: an epoch that was lost here cannot be acknowledged
		// any more. Its bits return and go with the next one.
	case m.held.Digest != nil && pos == m.parent:
		m.shipped = &EvShipped{Pos: pos} // committed; only the answer was lost
	case m.held.Parent != m.parent:
		m.drop = true
	}
}

func (m *Machine) startSeed(now time.Time, d lineage.Decision) []Action {
	m.parent, m.protected, m.seeding, m.verify = delta.Pos{}, false, true, ""
	m.lastCut, m.verified, m.scrub = time.Time{}, false, Cursor{}
	m.seeds = make(map[wire.DiskName]int64, len(m.sizes))
	for disk := range m.sizes {
		m.seeds[disk] = 0
	}
	if !d.Restart {
		maps.Copy(m.seeds, d.Cursors)
	}
	m.holes = m.cfg.Holes && !d.Restart
	m.reconcile()
	return m.next(now)
}

// startVerify marks what has to be compared, once per position, process and
// wish of the replica: after that the marks themselves know what is left. The position may be zero:
// the replica took over images that were never committed here, such as an old
// primary's, and what is equal in them is not sent.
func (m *Machine) startVerify(now time.Time, d lineage.Decision) []Action {
	m.shipped, m.verifyAll = nil, true
	fresh := m.markedBy == "" || m.markedBy != m.source.Instance || m.markedAt != m.parent || m.markedFor != m.asked
	if fresh || !m.compared {
		m.verify = d.Reason
	}
	if !fresh {
		return m.next(now)
	}
	m.mark, m.drop = &d, m.held != nil
	return m.next(now)
}

// proven tells the replica, by a handshake, that what it asked for was compared
// and that it has what differed. Until it knows, it asks at every handshake and
// everything is compared again.
func (m *Machine) proven() bool {
	if m.asked == 0 || !m.compared || m.markedFor != m.asked || m.verify != "" || m.mark != nil {
		return false
	}
	m.claim, m.again, m.asked = DoHandshake{Compared: m.asked, At: m.parent}, true, 0
	return true
}

// halt is the end of shipping until a new handshake says otherwise.
func (m *Machine) halt(now time.Time, d lineage.Decision) []Action {
	m.stop = &d
	m.condition(CondStop, d.Hint, "%s", d.Reason)
	m.verify, m.seeding = "", false
	if m.paused {
		return m.park()
	}
	acts := m.sleep(Stopped, now.Add(fullRetry))
	if m.final {
		m.final = false
		acts = append(acts, FinalFailed{d})
	}
	return acts
}

// onFailed decides how long to wait and what to keep.
func (m *Machine) onFailed(now time.Time, e EvFailed) []Action {
	m.meter.stats.SentBytes += e.Sent
	if m.paused && m.phase == PausedPhase {
		// The epoch could not be given back now; the handshake after the pause
		// finds it.
		m.held = nil
		return m.sleep(PausedPhase, time.Time{})
	}
	if e.Class == ClassCancelled {
		if m.paused {
			return m.park()
		}
		return m.connect()
	}
	m.meter.stats.Errors++
	m.meter.stats.LastError, m.lastErr = e.Text, e.Text
	if m.since.IsZero() {
		m.since = now
	}
	if e.Advanced {
		m.failures = 0
	}
	pause := m.backoff()
	switch e.Class {
	case ClassSource:
		m.condition(CondSource, "replicactl doctor", "the data plane does not answer: %s", e.Text)
	case ClassNoSpace:
		m.condition(CondNoSpace, "free space on the replica's storage root", "the replica is full: %s", e.Text)
		pause = m.jitter(fullRetry)
	case ClassRefused:
		m.condition(CondRefused, "replicactl peer test", "the replica host refuses: %s", e.Text)
		pause = m.jitter(fullRetry)
	case ClassCorrupt:
		m.onCorrupt(e)
	case ClassSuspect:
		m.condition(CondSuspect, "on the replica host: replicactl vm resync", "%s", e.Text)
	case ClassEpochLost:
		m.onEpochLost()
	case ClassMismatch:
	default:
		m.condition(CondLink, "replicactl peer test", "the replica host does not answer: %s", e.Text)
	}
	if m.paused {
		return m.park()
	}
	return m.sleep(BackingOff, now.Add(pause))
}

func (m *Machine) onCorrupt(e EvFailed) {
	m.condition(CondCorrupt, "check both hosts' memory and network", "what arrives is not what was sent: %s", e.Text)
	if m.corrupt++; m.corrupt >= corruptLimit && m.held != nil {
		m.corrupt = 0
		m.giveUp()
	}
}

func (m *Machine) onEpochLost() {
	if m.overload++; m.overload >= overloadLimit {
		m.condition(CondOverload, "a shorter interval or more capture memory",
			"%d epochs in a row could not be kept while the guest wrote", m.overload)
	}
	if m.join.open() {
		m.shrinkSlice() // a shorter cycle has fewer old contents to keep
	}
	m.giveUp()
}

// giveUp makes the next handshake abandon the held epoch.
func (m *Machine) giveUp() {
	if m.held != nil {
		m.drop, m.dropNonce = true, m.held.Nonce
	}
}

// backoff grows from backoffFirst to backoffMax.
func (m *Machine) backoff() time.Duration {
	d := min(float64(backoffFirst)*math.Pow(2, float64(m.failures)), float64(backoffMax))
	m.failures++
	return m.jitter(time.Duration(d))
}

// jitter spreads pauses over [0.5,1) of d, so that many sessions do not knock
// at once.
func (m *Machine) jitter(d time.Duration) time.Duration {
	return time.Duration((0.5 + m.cfg.Rand()/2) * float64(d))
}
