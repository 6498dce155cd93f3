package session

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// Slots bounds how many sessions read, compare and send at once, so that a
// hundred VMs do not share a disk and a line into a hundred late epochs. A free
// slot goes to whoever has to be done first, so that a VM with a short interval
// is not late behind many with long ones, and whoever waits long enough is the
// first. It is safe for concurrent use. Sessions to different peers should not
// share one: a transfer into a dead line keeps its slot until it is given up.
type Slots struct {
	mu      sync.Mutex
	free    int     // guarded by mu
	waiting waiters // guarded by mu; not empty only while free == 0
}

// NewSlots returns n slots; n must be positive.
func NewSlots(n int) *Slots { return &Slots{free: n} }

// Acquire waits for a slot; release gives it back, once. A zero deadline goes
// before all others. The error is ctx's.
func (s *Slots) Acquire(ctx context.Context, deadline time.Time) (release func(), err error) {
	w := &waiter{deadline: deadline, ready: make(chan struct{})}
	s.mu.Lock()
	if s.free > 0 {
		s.free--
		s.mu.Unlock()
		return s.release(), nil
	}
	heap.Push(&s.waiting, w)
	s.mu.Unlock()
	select {
	case <-w.ready:
		return s.release(), nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	got := w.index < 0
	if !got {
		heap.Remove(&s.waiting, w.index)
	}
	s.mu.Unlock()
	if got {
		s.give()
	}
	return nil, context.Cause(ctx)
}

func (s *Slots) release() func() { return sync.OnceFunc(s.give) }

// give hands a slot to the next in line.
func (s *Slots) give() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) == 0 {
		s.free++
		return
	}
	w, _ := heap.Pop(&s.waiting).(*waiter) // nothing else is pushed
	close(w.ready)
}

type waiter struct {
	deadline time.Time
	ready    chan struct{}
	index    int // in the heap; -1 = has got a slot
}

// waiters is a heap by deadline.
type waiters []*waiter

func (w waiters) Len() int           { return len(w) }
func (w waiters) Less(i, j int) bool { return w[i].deadline.Before(w[j].deadline) }
func (w waiters) Swap(i, j int) {
	w[i], w[j] = w[j], w[i]
	w[i].index, w[j].index = i, j
}

func (w *waiters) Push(x any) {
	n, _ := x.(*waiter) // nothing else is pushed
	n.index = len(*w)
	*w = append(*w, n)
}

func (w *waiters) Pop() any {
	old := *w
	n := old[len(old)-1]
	old[len(old)-1] = nil
	*w = old[:len(old)-1]
	n.index = -1
	return n
}

// bulkGrace is how long seeds, comparisons and scrubs let epochs go first.
const bulkGrace = time.Minute

// needsSlot: a reads or sends much. A cut needs it too, so that a frozen epoch,
// which costs the guest, never waits for one.
func needsSlot(a Action) bool {
	switch a.(type) {
	case DoFreeze, DoShip, DoSeed, DoVerify, DoScrub:
		return true
	}
	return false
}

// keepsSlot: a is the next step of what a slot was taken for.
func keepsSlot(a Action) bool {
	switch a.(type) {
	case DoShip, DoAck, DoBeat:
		return true
	}
	return false
}

// mustQueue: a begins only with a slot that the session does not have.
func (s *Session) mustQueue(a Action) bool {
	return s.cfg.Slots != nil && needsSlot(a) && (s.slot == nil || !keepsSlot(a))
}

// admit waits for a's turn. It runs in the operation's goroutine; only one
// operation runs at a time, so s.slot needs no lock.
func (s *Session) admit(ctx context.Context, a Action, deadline time.Time) error {
	if s.slot != nil && !keepsSlot(a) {
		s.slot()
		s.slot = nil
	}
	if !s.mustQueue(a) {
		return nil
	}
	defer s.queued.Store(false)
	var err error
	s.slot, err = s.cfg.Slots.Acquire(ctx, deadline)
	return err
}

// yield gives the slot back when nothing is under way.
func (s *Session) yield() {
	if !s.m.Busy() && s.slot != nil {
		s.slot()
		s.slot = nil
	}
}

// Deadline is when a should be done, for the order in which sessions are
// served; zero = before all others.
func (m *Machine) Deadline(now time.Time, a Action) time.Time {
	switch {
	case m.final:
		return time.Time{}
	case keepsSlot(a):
		return m.cutAt.Add(m.cfg.Interval)
	}
	if _, cut := a.(DoFreeze); cut {
		return now.Add(m.cfg.Interval)
	}
	return now.Add(max(m.cfg.Interval, bulkGrace))
}
