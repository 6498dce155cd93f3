package session

import "time"

// onSeeded: one disk, or a part of it, is durable at the replica.
func (m *Machine) onSeeded(now time.Time, e EvSeeded) []Action {
	advanced := e.Cursor > m.seeds[e.Disk]
	m.seeds[e.Disk] = e.Cursor
	m.meter.stats.SentBytes += e.Sent
	if !advanced {
		return m.onFailed(now, EvFailed{Class: ClassLink, Text: "the initial copy does not get further"})
	}
	m.settled()
	return m.next(now)
}

// onFrozen: an empty cut becomes a beat; the first epoch after a seed is what
// makes the replica consistent and is shipped even when it is empty.
func (m *Machine) onFrozen(now time.Time, e EvFrozen) []Action {
	m.source.Pending = m.join.behind()
	for n, limit := range e.Epoch.Limits {
		m.source.Pending -= max(0, limit-m.join.disks[n].Done)
	}
	if e.Epoch.Cut.After(m.cutAt) {
		m.cutAt = e.Epoch.Cut // it had to wait for its turn
	}
	m.appTaken(e)
	if !e.Epoch.Empty {
		h := e.Epoch
		m.held, m.resume, m.drop = &h, false, false
		return m.next(now)
	}
	if m.join.open() {
		// Nothing is marked, and yet a disk is not whole.
		d := m.remark("nothing is marked although the replica has not all of a disk that joins")
		m.mark, m.verify, m.verifyAll = &d, d.Reason, true
		return m.next(now)
	}
	if m.proven() {
		m.schedule(now, true) // a replica that does not take it is not asked without end
	}
	switch {
	case m.paused:
		return m.park()
	case m.again:
		return m.connect()
	case m.final:
		m.lastCut = m.cutAt
		m.final = false
		return append(m.sleep(Finished, time.Time{}), FinalDone{m.parent})
	}
	return m.do(Shipping, DoBeat{m.parent, m.cfg.Interval})
}

// appTaken notes how a cut that was to be application-consistent went. One that
// failed is made up for before its interval is over, which may be half a day:
// after a minute, then after twice as long each time.
func (m *Machine) appTaken(e EvFrozen) {
	wait := m.cfg.AppEvery
	switch {
	case e.AppError != "":
		m.meter.stats.AppError = e.AppError
		m.meter.stats.AppFailed++
		wait = min(wait, appRetry<<min(m.appFails, 16))
		m.appFails++
	case e.Epoch.App:
		m.meter.stats.AppError, m.appFails = "", 0
	}
	if m.appCut {
		m.nextApp = m.cutAt.Add(wait)
	}
}

// onShipped: the replica committed; the data plane has to know before
// anything else happens.
func (m *Machine) onShipped(now time.Time, e EvShipped) []Action {
	m.meter.stats.SentBytes += e.Sent
	if e.From > 0 {
		m.meter.stats.Resumed++
	}
	if m.held == nil {
		return m.connect() // cannot happen; a handshake sorts it out
	}
	m.meter.committed(now, m.cutAt, m.lastCut, m.held.Bytes)
	m.lastCut = m.cutAt
	m.shipped = &e
	m.settled()
	return m.next(now)
}

// onAcked: the cycle is complete.
func (m *Machine) onAcked(now time.Time, e EvAcked) []Action {
	if m.lastCut.Before(m.cutAt) { // the answer of the replica had been lost
		m.meter.committed(now, m.cutAt, m.lastCut, m.held.Bytes)
		m.lastCut = m.cutAt
	}
	var acts []Action
	if m.held != nil && m.held.App {
		m.meter.stats.AppPoints++
		m.meter.stats.LastApp = m.cutAt
	}
	if m.held != nil && m.held.Blobs {
		acts = append(acts, Committed{})
	}
	m.parent, m.protected, m.seeding = m.shipped.Pos, true, false
	m.source = e.Source
	if m.held != nil {
		m.joined(now, m.held)
	}
	acts = append(acts, m.tellJoined()...)
	m.held, m.shipped, m.drop, m.resume = nil, nil, false, false
	m.seeds, m.corrupt, m.overload = nil, 0, 0
	delete(m.cond, CondOverload)
	m.schedule(now, false)
	m.proven()
	return append(acts, m.next(now)...)
}

// onAbandoned: the frozen epoch was given back.
func (m *Machine) onAbandoned(now time.Time) []Action {
	if !m.paused {
		m.meter.stats.Abandoned++
	}
	if m.held != nil && m.held.App {
		m.nextApp = m.cutAt.Add(min(m.cfg.AppEvery, appRetry)) // it became no point
	}
	m.held, m.drop, m.resume = nil, false, false
	return m.next(now)
}

func (m *Machine) onBeaten(now time.Time) []Action {
	m.meter.committed(now, m.cutAt, m.lastCut, 0)
	m.lastCut = m.cutAt
	m.settled()
	m.schedule(now, true)
	return m.next(now)
}

// schedule sets the next cut: one interval after this one, at once when that
// is over already (the missed ones coalesce into it).
func (m *Machine) schedule(now time.Time, empty bool) {
	m.nextCut = m.cutAt.Add(m.cfg.Interval)
	if m.cfg.Interval <= 0 {
		if empty {
			m.nextCut = now.Add(idleGap)
		}
		return
	}
	if late := now.Sub(m.nextCut); late > 0 {
		m.meter.stats.CyclesMissed += 1 + int64(late/m.cfg.Interval)
		m.nextCut = now
	}
}
