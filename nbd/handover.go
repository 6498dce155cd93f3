package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Handing connections on: an upgrade gives the connected sockets of a Server to
// another process. Hold stops every connection between two requests, with
// everything answered that was read; the rest waits in the sockets. Then either
// Resume goes on as if nothing had been asked, or Leave lets go of the sockets
// without a word to the clients. The other process calls Adopt.

// Handed is what a successor must know of one connection besides its socket.
type Handed struct {
	// Export is what the handshake agreed on; meaningless when Fresh.
	Export string `json:"export"`
	// Structured and BlockStatus are what was negotiated.
	Structured  bool `json:"structured,omitempty"`
	BlockStatus bool `json:"block_status,omitempty"`
	// Fresh: accepted, and not a byte was exchanged.
	Fresh bool `json:"fresh,omitempty"`
	// Counters of the connection so far.
	Requests     uint64 `json:"requests,omitempty"`
	Errors       uint64 `json:"errors,omitempty"`
	Parked       uint64 `json:"parked,omitempty"`
	BytesRead    uint64 `json:"bytes_read,omitempty"`
	BytesWritten uint64 `json:"bytes_written,omitempty"`
	LastActivity int64  `json:"last_activity,omitempty"` // unix nanoseconds

	c *conn
}

// Control calls f with the connection's descriptor, which stays valid until
// f returns.
func (h Handed) Control(f func(fd uintptr)) error {
	if h.c == nil || h.c.raw == nil {
		return errNoDescriptor
	}
	return h.c.raw.Control(f)
}

// PID is the client process, 0 when the transport does not tell.
func (h Handed) PID() int {
	if h.c == nil {
		return 0
	}
	return h.c.pid
}

var (
	errNoDescriptor = errors.New("the connection has no descriptor to hand on")
	errLeft         = errors.New("connection was handed on")
	// errHold: nothing of a request was read and the connection is to rest.
	errHold = errors.New("connection is to rest")
	// ErrHeld: the server is being held already.
	ErrHeld = errors.New("nbd server is held already")
)

// hold is one attempt to stop a server.
type hold struct {
	over chan struct{} // closed when decided
	left bool          // valid once over is closed: the sockets are somebody else's

	resting map[*conn]chan struct{}        // closed when that connection rests
	quiet   map[net.Listener]chan struct{} // closed when nothing is accepted there any more

	mu   sync.Mutex
	late []lateConn // guarded by mu: accepted meanwhile, not started
}

// lateConn is a connection that nothing was said on.
type lateConn struct {
	ctx context.Context
	c   *conn
}

// deadliner is a listener whose Accept can be ended for a while.
type deadliner interface{ SetDeadline(time.Time) error }

// Hold stops accepting and brings every connection to rest between two
// requests: what was read is executed and answered, what follows stays in the
// socket. A client whose handshake does not end at once is dropped. It returns what a successor needs, in no order. When ctx ends first
// everything goes on as if nothing had been asked. After success the caller
// must call Resume or Leave.
func (s *Server) Hold(ctx context.Context) ([]Handed, error) {
	h := &hold{over: make(chan struct{}), resting: map[*conn]chan struct{}{}, quiet: map[net.Listener]chan struct{}{}}
	s.mu.Lock()
	switch {
	case s.closed:
		s.mu.Unlock()
		return nil, ErrServerClosed
	case s.held.Load() != nil:
		s.mu.Unlock()
		return nil, ErrHeld
	}
	for c := range s.conns {
		h.resting[c] = make(chan struct{})
	}
	for ln := range s.lns {
		h.quiet[ln] = make(chan struct{})
	}
	s.held.Store(h) // the maps do not change any more
	s.mu.Unlock()
	for ln := range h.quiet {
		if d, ok := ln.(deadliner); ok {
			_ = d.SetDeadline(time.Unix(1, 0))
		}
	}
	for c := range h.resting {
		if c.serving.Load() { // else it looks before its first request
			_ = c.nc.SetReadDeadline(time.Unix(1, 0))
		}
	}
	slow := time.AfterFunc(handshakeGrace, h.dropSlow)
	defer slow.Stop()
	if err := s.awaitRest(ctx, h); err != nil {
		s.Resume()
		return nil, err
	}
	return s.handed(h), nil
}

// handshakeGrace is how long a hold waits for a client that has not chosen an
// export yet: the guests' requests wait meanwhile.
const handshakeGrace = 100 * time.Millisecond

// dropSlow ends the connections whose handshake does not come to an end.
func (h *hold) dropSlow() {
	for c := range h.resting {
		if !c.serving.Load() && !c.admitted.Load() {
			_ = c.nc.Close()
		}
	}
}

func (s *Server) awaitRest(ctx context.Context, h *hold) error {
	for ln, at := range h.quiet {
		if _, ok := ln.(deadliner); !ok {
			continue
		}
		select {
		case <-at:
		case <-ctx.Done():
			return fmt.Errorf("hold %v: %w", ln.Addr(), ctx.Err())
		}
	}
	for c, at := range h.resting {
		select {
		case <-at:
		case <-c.done: // ended by itself
		case <-ctx.Done():
			return fmt.Errorf("hold the connection of process %d between two requests: %w", c.pid, ctx.Err())
		}
	}
	return nil
}

// holdListener waits while the server is held; true: it is not to go on.
func (s *Server) holdListener(ln net.Listener) (left bool) {
	for {
		if d, ok := ln.(deadliner); ok {
			_ = d.SetDeadline(time.Time{})
		}
		h := s.held.Load()
		if h == nil {
			return false
		}
		if at := h.quiet[ln]; at != nil {
			close(at)
		}
		select {
		case <-h.over:
		case <-s.quit:
			return true
		}
		if h.left {
			return true
		}
	}
}

// handed lists what rests. Connections that ended meanwhile are left out.
func (s *Server) handed(h *hold) []Handed {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []Handed
	for c := range h.resting {
		select {
		case <-c.done:
			continue
		default:
		}
		all = append(all, Handed{
			Export: c.exp.Name, Structured: c.structured, BlockStatus: c.blockStatus, c: c,
			Requests: c.requests.Load(), Errors: c.errors.Load(), Parked: c.parked.Load(),
			BytesRead: c.bytesRead.Load(), BytesWritten: c.bytesWritten.Load(), LastActivity: c.lastActivity.Load(),
		})
	}
	for _, l := range h.late {
		all = append(all, Handed{Fresh: true, c: l.c})
	}
	return all
}

// Resume lets everything go on that Hold stopped.
func (s *Server) Resume() { s.decide(false) }

// Leave gives the sockets up: nothing is read from them or written to them any
// more and their descriptors here are closed, which a client does not notice as
// long as somebody else has them open. The server serves nobody afterwards.
func (s *Server) Leave() { s.decide(true) }

func (s *Server) decide(left bool) {
	s.mu.Lock()
	h := s.held.Load()
	if h == nil {
		s.mu.Unlock()
		return
	}
	h.left = left
	s.held.Store(nil)
	close(h.over)
	if left && !s.closed {
		s.closed = true
		close(s.quit)
		for ln := range s.lns {
			_ = ln.Close()
		}
	}
	s.mu.Unlock()
	h.mu.Lock()
	late := h.late
	h.late = nil
	h.mu.Unlock()
	for _, l := range late {
		if left {
			_ = l.c.nc.Close()
		} else {
			s.start(l.ctx, l.c)
		}
	}
}

// keepLate puts a connection aside that was accepted while the server is held.
func (s *Server) keepLate(ctx context.Context, c *conn) bool {
	h := s.held.Load()
	if h == nil {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-h.over:
		return false
	default:
	}
	h.late = append(h.late, lateConn{ctx, c})
	return true
}

// rest ends what runs, says so and waits for the decision.
func (c *conn) rest(h *hold) error {
	if err := c.flush(); err != nil {
		return err
	}
	if !c.budget.idle(h.over) {
		return nil // given up meanwhile
	}
	if c.isBroken() {
		return errEnding
	}
	if at := h.resting[c]; at != nil {
		close(at)
	}
	select {
	case <-h.over:
	case <-c.srv.quit:
		return errDrained
	}
	if h.left {
		return errLeft
	}
	c.rearm()
	return nil
}

// rearm takes back the deadline of Hold, unless the connection is to end.
func (c *conn) rearm() {
	_ = c.nc.SetReadDeadline(time.Time{})
	if c.draining.Load() || c.isBroken() {
		_ = c.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

func (c *conn) isBroken() bool {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return c.broken
}

// interrupted decides what a failed receive means. Nil: it was Hold's deadline
// in the middle of a request, go on receiving.
func (c *conn) interrupted(err error) error {
	if !errors.Is(err, syscallTimeout) || c.draining.Load() || c.isBroken() {
		return c.readError(err)
	}
	c.rearm()
	if c.between && c.r == c.w && c.srv.held.Load() != nil {
		return errHold
	}
	return nil
}

// idle waits until nothing is parked; false when over is closed first.
func (b *budget) idle(over <-chan struct{}) bool {
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() { // wakes the wait below
		defer close(ended)
		select {
		case <-over:
			b.mu.Lock()
			b.freed.Broadcast()
			b.mu.Unlock()
		case <-stop:
		}
	}()
	defer func() { close(stop); <-ended }()
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.count > 0 {
		select {
		case <-over:
			return false
		default:
		}
		b.freed.Wait()
	}
	return true
}

// Adopted is a connection that another server held.
type Adopted struct {
	Conn net.Conn
	Handed
}

// Adopt takes connections over that another server holds. Nothing is read from
// them before start is called, which the caller does once the other one has
// let go. The exports must be there.
func (s *Server) Adopt(ctx context.Context, all []Adopted) (start func(), err error) {
	var conns []*conn
	for _, a := range all {
		c := newConn(s, a.Conn, nil)
		if !a.Fresh {
			e := s.lookup(a.Export)
			if e == nil {
				return nil, fmt.Errorf("adopt a connection of export %q: %w", a.Export, ErrUnknownExport)
			}
			c.exp, c.structured, c.blockStatus = e, a.Structured, a.BlockStatus
			c.requests.Store(a.Requests)
			c.errors.Store(a.Errors)
			c.parked.Store(a.Parked)
			c.bytesRead.Store(a.BytesRead)
			c.bytesWritten.Store(a.BytesWritten)
			c.lastActivity.Store(a.LastActivity)
		}
		conns = append(conns, c)
	}
	return func() {
		for _, c := range conns {
			if c.exp != nil {
				c.exp.mu.Lock()
				c.exp.conns[c] = struct{}{}
				c.exp.mu.Unlock()
			}
			s.mu.Lock()
			s.conns[c] = struct{}{}
			s.wg.Add(1)
			s.mu.Unlock()
			s.launch(ctx, c)
		}
	}, nil
}
