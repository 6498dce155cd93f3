package cbt

import "sync"

// rangeLock serialises overlapping writes of one disk, in order of arrival:
// a request waits for every earlier one it overlaps, whether running or
// waiting, so nobody starves. Requests in flight are few (a queue depth), so a
// scan beats a tree.
type rangeLock struct {
	mu      sync.Mutex
	entries []rangeEntry // in order of arrival
	waiters int
	lastID  uint64
}

type rangeEntry struct {
	span
	id    uint64
	ready chan struct{} // nil once granted
}

// lock waits until [lo, hi) is free and takes it.
func (l *rangeLock) lock(lo, hi uint64) uint64 {
	l.mu.Lock()
	l.lastID++
	id := l.lastID
	var ready chan struct{}
	if l.conflict(len(l.entries), lo, hi) {
		ready = make(chan struct{})
		l.waiters++
	}
	l.entries = append(l.entries, rangeEntry{span{lo, hi}, id, ready})
	l.mu.Unlock()
	if ready != nil {
		<-ready
	}
	return id
}

// tryLock takes [lo, hi) if nothing earlier overlaps it.
func (l *rangeLock) tryLock(lo, hi uint64) (uint64, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conflict(len(l.entries), lo, hi) {
		return 0, false
	}
	l.lastID++
	l.entries = append(l.entries, rangeEntry{span{lo, hi}, l.lastID, nil})
	return l.lastID, true
}

// conflict reports whether one of the first n entries overlaps [lo, hi).
func (l *rangeLock) conflict(n int, lo, hi uint64) bool {
	for i := range l.entries[:n] {
		if e := &l.entries[i]; lo < e.hi && e.lo < hi {
			return true
		}
	}
	return false
}

// unlock gives a range back and starts whoever waited only for it.
func (l *rangeLock) unlock(id uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.entries {
		if l.entries[i].id == id {
			l.entries = append(l.entries[:i], l.entries[i+1:]...)
			break
		}
	}
	if l.waiters == 0 {
		return
	}
	for i := range l.entries {
		e := &l.entries[i]
		if e.ready != nil && !l.conflict(i, e.lo, e.hi) {
			close(e.ready)
			e.ready = nil
			l.waiters--
		}
	}
}

// inFlight calls fn for every granted range while none can be granted or
// given back. fn must be quick and must not use l.
func (l *rangeLock) inFlight(fn func(span)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.entries {
		if l.entries[i].ready == nil {
			fn(l.entries[i].span)
		}
	}
}
