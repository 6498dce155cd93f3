package nbd

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// request is a parked request. It is answered by whoever drops the last part.
type request struct {
	h      header
	parts  atomic.Int32  // pieces not yet done, and the loop while it adds some
	errno  atomic.Uint32 // first error wins
	silent atomic.Bool   // no answer: the client never sent all of it
}

func (q *request) fail(e Errno)  { q.errno.CompareAndSwap(uint32(OK), uint32(e)) }
func (q *request) result() Errno { return Errno(q.errno.Load()) }

// task is one piece of work for a worker.
type task struct {
	q    *request
	buf  *buffer // payload of a write
	off  int64
	cost int // bytes of the budget
}

// park hands a whole request (not a write with payload) to a worker.
func (c *conn) park(h header, cost int) error {
	if err := c.acquire(cost); err != nil {
		return err
	}
	c.parked.Add(1)
	c.submit(task{q: c.srv.pool.request(h), off: int64(h.off), cost: cost})
	return nil
}

// acquire takes from the budget. Before it waits, replies are sent.
func (c *conn) acquire(n int) error {
	if c.budget.try(n) {
		return nil
	}
	if err := c.flush(); err != nil {
		return err
	}
	if !c.budget.wait(n) {
		return errEnding
	}
	return nil
}

// submit queues a task whose budget is taken, and starts a worker when all are
// busy. It does not block: the queue is as long as the budget's count.
func (c *conn) submit(t task) {
	if c.started < c.srv.opts.Workers && int(c.idle.Load()) <= len(c.tasks) {
		c.started++
		c.workers.Add(1)
		go c.worker()
	}
	c.tasks <- t
}

func (c *conn) worker() {
	defer c.workers.Done()
	scratch := make([]byte, 0, replyRoom)
	for {
		c.idle.Add(1)
		t, ok := <-c.tasks
		c.idle.Add(-1)
		if !ok {
			return
		}
		if c.canceled.Load() {
			t.q.silent.Store(true)
			c.srv.pool.put(t.buf)
			c.finish(t.q, scratch)
		} else {
			c.execute(t, scratch)
		}
		c.budget.release(t.cost)
	}
}

// budget bounds what is parked, in requests and bytes. One request of any size
// always fits into an empty budget.
type budget struct {
	maxCount, maxBytes int

	mu           sync.Mutex
	freed        sync.Cond
	count, bytes int
	closed       bool
}

func (b *budget) init(count, bytes int) {
	b.maxCount, b.maxBytes = count, bytes
	b.freed.L = &b.mu
}

func (b *budget) fits(n int) bool {
	return b.count == 0 || b.count < b.maxCount && b.bytes+n <= b.maxBytes
}

func (b *budget) try(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.fits(n) {
		return false
	}
	b.count++
	b.bytes += n
	return true
}

// wait is try that waits; false when the budget was closed meanwhile.
func (b *budget) wait(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.fits(n) {
		if b.closed {
			return false
		}
		b.freed.Wait()
	}
	b.count++
	b.bytes += n
	return true
}

func (b *budget) release(n int) {
	b.mu.Lock()
	b.count--
	b.bytes -= n
	b.mu.Unlock()
	b.freed.Signal()
}

// close ends waits. What was taken can still be released.
func (b *budget) close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.freed.Broadcast()
}

func (b *budget) inFlight() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.count
}

// buffer is memory from the pool.
type buffer struct {
	b     []byte
	whole []byte
	class int
}

// bufferPool keeps buffers in powers of two from 4 KiB to 1 MiB, and requests.
// Longer buffers are rare and not kept.
type bufferPool struct {
	classes  [poolClasses]sync.Pool
	requests sync.Pool
}

const (
	poolMinShift = 12
	poolClasses  = 9
)

// get returns n bytes of arbitrary content.
func (p *bufferPool) get(n int) *buffer {
	class := max(0, bits.Len(uint(max(1, n)-1))-poolMinShift)
	if class >= poolClasses {
		return &buffer{b: make([]byte, n), class: -1}
	}
	if v, ok := p.classes[class].Get().(*buffer); ok {
		v.b = v.whole[:n]
		return v
	}
	whole := make([]byte, 1<<(poolMinShift+class))
	return &buffer{b: whole[:n], whole: whole, class: class}
}

// put takes a buffer back; nil is harmless.
func (p *bufferPool) put(b *buffer) {
	if b != nil && b.class >= 0 {
		p.classes[b.class].Put(b)
	}
}

// request returns a fresh request with one part.
func (p *bufferPool) request(h header) *request {
	q, ok := p.requests.Get().(*request)
	if !ok {
		q = new(request)
	}
	q.h = h
	q.parts.Store(1)
	q.errno.Store(0)
	q.silent.Store(false)
	return q
}

func (p *bufferPool) putRequest(q *request) { p.requests.Put(q) }
