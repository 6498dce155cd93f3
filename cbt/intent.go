package cbt

import (
	"errors"
	"math/bits"
	"sync"
	"sync/atomic"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// intentMap is the durable set of regions of one disk that may differ from the
// replica. Writers that need marks form batches: one of them leads, writes the
// pages, syncs, and only then shows the marks to the others.
//
// Invariant: a bit in durable is on stable storage, or "verify everything" is
// (void). It is set after the sync returned and cleared before the page that
// no longer has it is written.
type intentMap struct {
	geo     mapGeometry
	durable []atomic.Uint64
	marked  atomic.Int64 // bits in durable
	// flush makes the marks of spans durable; called by the leader only.
	flush func(m *intentMap, spans []span) error

	mu sync.Mutex
	// guarded by mu
	wake    *sync.Cond
	want    []span
	spare   []span
	taken   uint64 // batches taken so far
	leading bool
	closed  bool

	// owned by whoever leads
	id    id16
	file  fsx.File
	next  []uint64 // what the file holds or is about to hold
	seqs  []uint64
	pages []bool // pages to write
	buf   []byte
	// broken: the superblock may name another file; this one does not count.
	broken bool
	syncs  atomic.Uint64

	// void: intents are not recorded, "verify everything" is durable. Set
	// under Group.healMu by whoever leads.
	void atomic.Bool
}

func newIntentMap(geo mapGeometry, id id16, file fsx.File, words, seqs []uint64) *intentMap {
	m := &intentMap{
		geo: geo, id: id, file: file, next: words, seqs: seqs,
		durable: make([]atomic.Uint64, geo.words()),
		pages:   make([]bool, geo.pages), buf: make([]byte, pageSize),
	}
	m.wake = sync.NewCond(&m.mu)
	m.publish()
	return m
}

// publish shows all of next as durable.
func (m *intentMap) publish() {
	for w, v := range m.next {
		if old := m.durable[w].Load(); old != v {
			m.durable[w].Store(v)
			m.marked.Add(int64(bits.OnesCount64(v) - bits.OnesCount64(old)))
		}
	}
}

// has reports whether regions [lo, hi) are all durably marked.
func (m *intentMap) has(lo, hi uint64) bool {
	if lo >= hi {
		return true
	}
	for w := lo / 64; w <= (hi-1)/64; w++ {
		k := mask(w, lo, hi)
		if m.durable[w].Load()&k != k {
			return false
		}
	}
	return true
}

// mark returns once regions [lo, hi) are durably marked. Regions up to ahead
// are marked along the way if somebody has to be marked at all. The caller
// holds the range lock of what it is about to write, so that nobody can clear
// the marks again.
func (m *intentMap) mark(lo, hi, ahead uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var mine uint64 // the batch my request is in
	for asked := false; !m.has(lo, hi); {
		if m.closed {
			return block.ErrClosed
		}
		if !asked || m.taken > mine {
			m.want = append(m.want, span{lo, max(hi, ahead)})
			asked, mine = true, m.taken
		}
		if m.leading {
			m.wake.Wait()
			continue
		}
		if err := m.lead(); err != nil {
			return err
		}
	}
	return nil
}

// lead runs one batch. Called with mu held.
func (m *intentMap) lead() error {
	m.leading = true
	spans := m.want
	m.want = m.spare[:0]
	m.taken++
	m.mu.Unlock()
	err := m.flush(m, spans)
	if err == nil {
		for _, s := range spans {
			m.show(s)
		}
	}
	m.mu.Lock()
	m.spare = spans
	m.leading = false
	m.wake.Broadcast()
	return err
}

var errBroken = errors.New("the map file in use is not the recorded one")

// show marks one span as durable in memory.
func (m *intentMap) show(s span) {
	for w := s.lo / 64; w <= (s.hi-1)/64; w++ {
		k := mask(w, s.lo, s.hi)
		old := m.durable[w].Load()
		m.durable[w].Store(old | k)
		m.marked.Add(int64(bits.OnesCount64(k &^ old)))
	}
}

// acquire makes the caller the leader without a batch; wait says whether to
// queue behind another one. It reports whether the role was taken.
func (m *intentMap) acquire(wait bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.leading && !m.closed {
		if !wait {
			return false
		}
		m.wake.Wait()
	}
	if m.leading {
		return false
	}
	m.leading = true
	return true
}

func (m *intentMap) release() {
	m.mu.Lock()
	m.leading = false
	m.wake.Broadcast()
	m.mu.Unlock()
}

// shut wakes everybody and refuses further marks.
func (m *intentMap) shut() {
	m.mu.Lock()
	m.closed = true
	m.wake.Broadcast()
	m.mu.Unlock()
}

// record writes the pages of spans to both copies and syncs once. Leader only.
func (m *intentMap) record(spans []span) error {
	if m.broken {
		m.include(spans)
		return errBroken
	}
	clear(m.pages)
	for _, s := range spans {
		for w := s.lo / 64; w <= (s.hi-1)/64; w++ {
			if k := mask(w, s.lo, s.hi); m.durable[w].Load()&k != k {
				m.pages[w/pageWords] = true
			}
		}
	}
	m.include(spans)
	if err := m.writePages(); err != nil {
		return err
	}
	m.syncs.Add(1)
	return m.file.Sync()
}

// include adds spans to what the map should hold. Leader only.
func (m *intentMap) include(spans []span) {
	for _, s := range spans {
		for w := s.lo / 64; w <= (s.hi-1)/64; w++ {
			m.next[w] |= mask(w, s.lo, s.hi)
		}
	}
}

// writePages writes both copies of the pages to write. Leader only.
func (m *intentMap) writePages() error {
	for p, dirty := range m.pages {
		if !dirty {
			continue
		}
		m.seqs[p]++
		for c := range 2 {
			encodePage(m.buf, m.id, c, p, m.seqs[p], m.next[p*pageWords:])
			if _, err := m.file.WriteAt(m.buf, m.geo.offset(c, p)); err != nil {
				return err
			}
		}
	}
	return nil
}

// dropDurable clears bit r in memory; the caller then writes its page.
func (m *intentMap) dropDurable(r uint64) {
	k := uint64(1) << (r % 64)
	for {
		old := m.durable[r/64].Load()
		if old&k == 0 {
			return
		}
		if m.durable[r/64].CompareAndSwap(old, old&^k) {
			m.marked.Add(-1)
			return
		}
	}
}
