package nbd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Options of a Server. The zero value is usable.
type Options struct {
	// Log receives one line per connection and refusal. Nil discards.
	Log *slog.Logger
	// HandshakeTimeout bounds the time from accept to the first request,
	// without waiting for an ended connection's requests. Zero means 30 s.
	HandshakeTimeout time.Duration
	// MaxConns bounds the connections of the server, those in the handshake
	// included. Zero means 1024. More are hung up on at once.
	MaxConns int
	// Workers bounds the parked requests of one connection that run at once.
	// Zero means 16.
	Workers int
	// ParkedRequests and ParkedBytes bound what one connection may have
	// parked before its loop stops reading. Zero means 128 and 64 MiB.
	ParkedRequests int
	ParkedBytes    int
	// Lines bounds the connections that have a thread of their own, which
	// makes them faster; others share the runtime's poller. A program with
	// lines should have as many processors (GOMAXPROCS) to spare. Zero means
	// DefaultLines.
	Lines int
}

// DefaultLines is enough for the disks of a usual VM.
const DefaultLines = 16

const (
	defaultHandshakeTimeout = 30 * time.Second
	defaultServerConns      = 1024
	defaultWorkers          = 16
	defaultParkedRequests   = 128
	defaultParkedBytes      = 64 << 20
	// lingerTimeout bounds how long the reply of an ended connection's request
	// may take to be sent. The request itself has no limit.
	lingerTimeout = 5 * time.Second
)

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	for _, d := range []struct {
		field *int
		value int
	}{
		{&o.MaxConns, defaultServerConns},
		{&o.Workers, defaultWorkers},
		{&o.ParkedRequests, defaultParkedRequests},
		{&o.ParkedBytes, defaultParkedBytes},
		{&o.Lines, DefaultLines},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	if o.HandshakeTimeout <= 0 {
		o.HandshakeTimeout = defaultHandshakeTimeout
	}
	return o
}

// Errors of a Server.
var (
	ErrServerClosed  = errors.New("nbd server is shut down")
	ErrExportExists  = errors.New("an export of this name exists")
	ErrUnknownExport = errors.New("no export of this name")
)

// Server offers exports on any number of listeners. Exports come and go while
// it serves.
type Server struct {
	opts Options
	pool bufferPool

	mu      sync.Mutex
	exports map[string]*export // guarded by mu
	conns   map[*conn]struct{} // guarded by mu
	lns     map[net.Listener]struct{}
	closed  bool // guarded by mu
	quit    chan struct{}
	held    atomic.Pointer[hold] // set under mu: an upgrade is under way
	lines   atomic.Int32         // connections with a thread of their own
	wg      sync.WaitGroup       // connections; Add under mu while not closed
}

// NewServer makes a server without exports.
func NewServer(opts Options) *Server {
	return &Server{
		opts:    opts.withDefaults(),
		exports: map[string]*export{},
		conns:   map[*conn]struct{}{},
		lns:     map[net.Listener]struct{}{},
		quit:    make(chan struct{}),
	}
}

// Add offers an export from now on.
func (s *Server) Add(x Export) error {
	e, err := newExport(x)
	if err != nil {
		return fmt.Errorf("add export %q: %w", x.Name, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return ErrServerClosed
	case s.exports[x.Name] != nil:
		return fmt.Errorf("add export %q: %w", x.Name, ErrExportExists)
	}
	s.exports[x.Name] = e
	return nil
}

// Remove withdraws an export for good: new clients do not find it, requests
// that arrive are answered ESHUTDOWN, those that run are awaited and answered,
// then its connections end. When ctx ends first the connections are cut and
// the error says how many requests still run in the device.
func (s *Server) Remove(ctx context.Context, name string) error {
	s.mu.Lock()
	e := s.exports[name]
	delete(s.exports, name)
	s.mu.Unlock()
	if e == nil {
		return fmt.Errorf("remove export %q: %w", name, ErrUnknownExport)
	}
	e.mu.Lock()
	if !e.removed {
		e.removed = true
		close(e.gone)
	}
	e.mu.Unlock()
	conns := e.connections()
	for _, c := range conns {
		c.drain(drainAnswer)
	}
	if err := awaitConns(ctx, conns); err != nil {
		return fmt.Errorf("remove export %q: %w", name, err)
	}
	return nil
}

// Stats returns the counters of an export; false when there is none.
func (s *Server) Stats(name string) (ExportStats, bool) {
	e := s.lookup(name)
	if e == nil {
		return ExportStats{}, false
	}
	return e.stats(), true
}

func (s *Server) lookup(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[name]
}

// list is all exports in the order of their names.
func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*export, 0, len(s.exports))
	for _, e := range s.exports {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *export) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// Serve accepts connections until ctx ends or Shutdown; it closes ln, drains
// the connections that came through it as Shutdown does, and returns when they
// are gone. The error is nil then.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		_ = ln.Close()
		return ErrServerClosed
	}
	s.lns[ln] = struct{}{}
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()

	err := s.accept(ctx, ln)
	_ = ln.Close()
	s.mu.Lock()
	delete(s.lns, ln)
	var mine []*conn
	for c := range s.conns {
		if c.via == ln {
			mine = append(mine, c)
		}
	}
	s.mu.Unlock()
	for _, c := range mine {
		c.drain(drainSilent)
	}
	for _, c := range mine {
		<-c.done
	}
	if ctx.Err() != nil || s.isClosed() {
		return nil
	}
	return fmt.Errorf("accept: %w", err)
}

const acceptRetry = 50 * time.Millisecond

func (s *Server) accept(ctx context.Context, ln net.Listener) error {
	if s.held.Load() != nil && s.holdListener(ln) {
		return ErrServerClosed
	}
	for {
		if s.isClosed() { // the next one in the queue is a successor's
			return ErrServerClosed
		}
		nc, err := ln.Accept()
		if err != nil {
			if errors.Is(err, syscallTimeout) && ctx.Err() == nil {
				if s.holdListener(ln) {
					return ErrServerClosed
				}
				continue
			}
			if ctx.Err() != nil || !passing(err) {
				return err
			}
			s.opts.Log.Warn("accept", "err", err)
			select {
			case <-time.After(acceptRetry):
			case <-ctx.Done():
			}
			continue
		}
		if c := newConn(s, nc, ln); !s.keepLate(ctx, c) {
			s.start(ctx, c)
		}
	}
}

// line makes a line of a connection as long as there may be more of them.
func (s *Server) line(nc net.Conn) net.Conn {
	if int(s.lines.Add(1)) <= s.opts.Lines {
		if l := newLine(nc, func() { s.lines.Add(-1) }); l != nil {
			return l
		}
	}
	s.lines.Add(-1)
	return nc
}

// passing says whether accept may succeed later: everything but a listener that
// is closed, or is none. A guest whose connections nobody takes has no disk, so
// the lack of descriptors, memory or permission is waited out.
func passing(err error) bool {
	var e syscall.Errno
	return errors.As(err, &e) && e != syscall.EBADF && e != syscall.EINVAL && e != syscall.ENOTSOCK
}

// start begins a connection, or hangs up on it.
func (s *Server) start(ctx context.Context, c *conn) {
	s.mu.Lock()
	refuse := s.closed || len(s.conns) >= s.opts.MaxConns
	if !refuse {
		s.conns[c] = struct{}{}
		s.wg.Add(1)
	}
	s.mu.Unlock()
	if refuse {
		s.opts.Log.Warn("connection refused", "reason", "too many connections", "limit", s.opts.MaxConns)
		_ = c.nc.Close()
		return
	}
	s.launch(ctx, c)
}

// launch runs a connection that is counted.
func (s *Server) launch(ctx context.Context, c *conn) {
	go func() {
		defer s.wg.Done()
		c.run(ctx)
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// Shutdown stops every listener and connection for a restart: requests that
// run are awaited and answered, others are left unanswered, so that a client
// that reconnects sends them again. When ctx ends first the connections are
// cut and the error says how many requests still run in the devices. Twice is
// harmless.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.quit)
	}
	for ln := range s.lns {
		_ = ln.Close()
	}
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.drain(drainSilent)
	}
	if err := awaitConns(ctx, conns); err != nil {
		return fmt.Errorf("shut down nbd server: %w", err)
	}
	s.wg.Wait()
	return nil
}

// awaitConns waits for the connections to end, cutting them when ctx does.
func awaitConns(ctx context.Context, conns []*conn) error {
	for _, c := range conns {
		select {
		case <-c.done:
		case <-ctx.Done():
			running := 0
			for _, o := range conns {
				_ = o.nc.Close()
				running += o.budget.inFlight()
			}
			return fmt.Errorf("requests that still run in the device: %d: %w", running, ctx.Err())
		}
	}
	return nil
}
