package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// conn is one client connection. Its loop (transmit) owns the input window and
// the output buffer and takes no lock; workers run what was parked.
//
// Lock order: export.mu, then budget.mu; sendMu alone. Whole replies, or whole
// chunks of structured replies, are sent under sendMu.
type conn struct {
	counters
	srv    *Server
	nc     net.Conn
	raw    syscall.RawConn // nil: the transport has no descriptor
	via    net.Listener
	pid    int // peer process, 0 when the transport does not tell
	done   chan struct{}
	budget budget

	// Set by the handshake or Adopt, constant afterwards.
	exp         *export
	structured  bool
	blockStatus bool

	// Owned by the loop. Invariant: 0 <= r <= w <= len(in).
	in   []byte
	r, w int
	out  []byte // whole replies not yet sent
	// between: the receive that waits is for a new request.
	between bool
	probe   [1]byte
	file    fileSender

	sendMu sync.Mutex
	broken bool // guarded by sendMu: part of a reply is lost, send nothing more

	tasks   chan task
	workers sync.WaitGroup
	started int          // workers; owned by the loop
	idle    atomic.Int32 // workers waiting for a task

	ending   atomic.Bool // the loop is over
	canceled atomic.Bool // tasks not yet started are dropped
	draining atomic.Bool // reads fail because of drain
	refusing atomic.Bool // new requests are answered ESHUTDOWN
	serving  atomic.Bool // the handshake is over
	admitted atomic.Bool // an export was chosen; what is waited for is not the client's
}

const (
	inSize  = maxPiece + 64<<10
	outSize = 256 << 10
	// replyRoom holds any reply without data.
	replyRoom = 64
	// drainGrace is how long requests are answered ESHUTDOWN before the
	// connection of a removed export ends.
	drainGrace = 100 * time.Millisecond
)

var (
	errBadMagic = errors.New("client sent no request where one had to be")
	errEnding   = errors.New("connection is ending")
	errDrained  = errors.New("connection was drained")
)

func newConn(s *Server, nc net.Conn, via net.Listener) *conn {
	c := &conn{srv: s, via: via, pid: peerPID(nc), done: make(chan struct{})}
	nc = s.line(nc)
	c.nc = nc
	c.budget.init(s.opts.ParkedRequests, s.opts.ParkedBytes)
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			c.raw = raw
		}
	}
	return c
}

// run serves the connection from handshake to the end of its last request.
func (c *conn) run(ctx context.Context) {
	defer close(c.done)
	log := c.srv.opts.Log.With("pid", c.pid)
	e := c.exp
	var err error
	if e == nil {
		e, err = c.srv.negotiate(ctx, c)
	}
	if err != nil {
		log.Debug("handshake ended", "err", err)
		_ = c.nc.Close()
		return
	}
	log = log.With("export", e.Name)
	log.Info("client connected", "structured", c.structured)
	c.exp = e
	c.in = make([]byte, inSize)
	c.out = make([]byte, 0, outSize)
	c.tasks = make(chan task, c.srv.opts.ParkedRequests)
	c.file.init()
	_ = c.nc.SetDeadline(time.Time{})
	if c.draining.Load() {
		c.drain(drainSilent) // its deadline was just undone
	}
	graceful, err := c.transmit()
	c.end(graceful)
	log.Info("client disconnected", "reason", ending(err), "requests", c.requests.Load(), "errors", c.errors.Load())
}

// ending says why a connection ended; its client asked for it when there was no
// error.
func ending(err error) string {
	if err == nil {
		return "the client asked for it"
	}
	return err.Error()
}

// end awaits what runs; requests not yet started are dropped unless the end is
// an orderly one.
func (c *conn) end(graceful bool) {
	c.exp.ending.Add(1)
	c.ending.Store(true)
	if !graceful {
		c.canceled.Store(true)
	}
	c.budget.close()
	_ = c.nc.SetWriteDeadline(time.Now().Add(lingerTimeout))
	_ = c.flush()
	close(c.tasks)
	c.workers.Wait()
	_ = c.nc.Close()
	c.exp.leave(c)
	c.exp.ending.Add(-1)
}

func (c *conn) isEnding() bool { return c.ending.Load() }

// hangUp makes a loop that waits for its budget see that nobody listens.
func (c *conn) hangUp() { c.budget.close() }

type drainMode int

const (
	drainSilent drainMode = iota // leave further requests unanswered
	drainAnswer                  // answer them ESHUTDOWN for drainGrace
)

// drain ends the connection after the requests that run.
func (c *conn) drain(mode drainMode) {
	until := time.Unix(1, 0)
	if mode == drainAnswer {
		c.refusing.Store(true)
		until = time.Now().Add(drainGrace)
	}
	c.draining.Store(true)
	_ = c.nc.SetReadDeadline(until)
}

// transmit is the loop: parse what is there, answer with one send, receive.
// graceful means that parked requests shall still be executed and answered.
func (c *conn) transmit() (graceful bool, err error) {
	c.serving.Store(true)
	for {
		c.lastActivity.Store(time.Now().UnixNano())
		half := c.half()
		for c.w-c.r >= requestSize {
			h, ok := parseHeader(c.in[c.r:c.w])
			if !ok {
				return false, errBadMagic
			}
			c.r += requestSize
			if h.cmd == cmdDisconnect {
				return true, nil
			}
			if err := c.request(h); err != nil {
				return errors.Is(err, errDrained), err
			}
			if c.r >= half && c.r < c.w {
				half = len(c.in)
				if err := c.flush(); err != nil {
					return false, err
				}
			}
		}
		if h := c.srv.held.Load(); h != nil && c.r == c.w {
			if err := c.rest(h); err != nil {
				return errors.Is(err, errDrained), err
			}
			continue // the next attempt may be under way
		}
		c.between = true
		err := c.need(requestSize, inSize)
		c.between = false
		if err != nil && !errors.Is(err, errHold) {
			return errors.Is(err, errDrained), err
		}
	}
}

// half is where, in a batch of small requests, the replies so far are sent: the
// client then makes its next requests while we work on the rest, and neither
// waits for the other to wake up. Large requests keep both busy anyway.
func (c *conn) half() int {
	if c.w-c.r < 4*requestSize {
		return len(c.in)
	}
	if h, ok := parseHeader(c.in[c.r:c.w]); !ok || h.length > smallRequest {
		return len(c.in)
	}
	return c.r + (c.w-c.r)/2
}

// smallRequest costs less than waking somebody up.
const smallRequest = 16 << 10

// request decides and executes, parks, or refuses one request.
func (c *conn) request(h header) error {
	c.requests.Add(1)
	errno := ESHUTDOWN
	if !c.refusing.Load() {
		errno = c.exp.validate(h, c.structured, c.blockStatus)
	}
	if errno != OK {
		if h.cmd == cmdWrite {
			if err := c.skip(int64(h.length)); err != nil {
				return err
			}
		}
		return c.reply(h, errno)
	}
	switch h.cmd {
	case cmdRead:
		return c.read(h)
	case cmdWrite:
		return c.write(h)
	case cmdFlush:
		return c.sync(h)
	case cmdZeroes:
		if h.flags&cmdFastZero != 0 && !fastZero(c.exp.Device) {
			return c.reply(h, ENOTSUP)
		}
	}
	return c.park(h, 0)
}

// need makes at least n bytes available in the input window, receiving at most
// up to limit bytes. Replies are sent before it waits.
func (c *conn) need(n, limit int) error {
	for c.w-c.r < n {
		if err := c.flush(); err != nil {
			return err
		}
		if have := c.w - c.r; have <= smallMove || len(c.in)-c.r < n {
			copy(c.in, c.in[c.r:c.w])
			c.r, c.w = 0, have
		}
		if c.srv.held.Load() != nil {
			limit = n // nothing of the next request: the loop is to rest before it
		}
		m, err := c.nc.Read(c.in[c.w:min(len(c.in), c.r+limit)])
		c.w += m
		if err != nil && c.w-c.r < n {
			if err := c.interrupted(err); err != nil {
				return err
			}
		}
		if c.exp.ending.Load() > 0 {
			c.exp.awaitEnded(c)
		}
	}
	return nil
}

// smallMove is what is always worth moving to the front of the window.
const smallMove = 4096

func (c *conn) readError(err error) error {
	if c.draining.Load() && errors.Is(err, syscallTimeout) {
		return errDrained
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("client hung up: %w", err)
	}
	return err
}

// skip drops n bytes of payload of a refused write.
func (c *conn) skip(n int64) error {
	for n > 0 {
		if c.r == c.w {
			if err := c.need(int(min(n, smallMove)), inSize); err != nil {
				return err
			}
		}
		step := min(n, int64(c.w-c.r))
		c.r += int(step)
		n -= step
	}
	return nil
}

// room makes sure that n more bytes fit into the output buffer.
func (c *conn) room(n int) error {
	if cap(c.out)-len(c.out) >= n {
		return nil
	}
	return c.flush()
}

// reply answers a request without data, from the loop.
func (c *conn) reply(h header, errno Errno) error {
	if err := c.room(replyRoom); err != nil {
		return err
	}
	c.out = c.appendReply(c.out, h, errno)
	return nil
}

// appendReply is the reply without data. Reads and block status are answered
// by a chunk when structured replies were agreed.
func (c *conn) appendReply(p []byte, h header, errno Errno) []byte {
	if errno != OK {
		c.errors.Add(1)
	}
	if !c.structured || h.cmd != cmdRead && h.cmd != cmdBlockStatus {
		return appendSimple(p, h.cookie, errno)
	}
	if errno == OK {
		return appendChunk(p, chunkDone, chunkNone, h.cookie, 0)
	}
	p = appendChunk(p, chunkDone, chunkError, h.cookie, 6)
	return append(p, byte(errno>>24), byte(errno>>16), byte(errno>>8), byte(errno), 0, 0)
}

// flush sends what the loop has gathered.
func (c *conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	err := c.send(c.out)
	c.out = c.out[:0]
	return err
}

// send sends whole replies.
func (c *conn) send(p []byte) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return c.sendLocked(p)
}

func (c *conn) sendLocked(p []byte) error {
	if c.broken {
		return errEnding
	}
	if c.isEnding() {
		_ = c.nc.SetWriteDeadline(time.Now().Add(lingerTimeout))
	}
	if _, err := c.nc.Write(p); err != nil {
		c.breakLocked()
		return err
	}
	return nil
}

// breakLocked: the stream cannot be continued; wake the loop.
func (c *conn) breakLocked() {
	c.broken = true
	_ = c.nc.SetReadDeadline(time.Unix(1, 0))
}
