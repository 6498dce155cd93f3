package nbd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"kvmreplica/internal/block"
)

// Export is one disk offered by a Server. Name and Device are required.
type Export struct {
	// Name is what clients ask for; empty is the default export.
	Name string
	// Device answers the requests. Try methods, Map, FastZero and ReadFD are
	// used where it has them.
	Device block.Device
	// ReadOnly refuses every change with EPERM and says so in the handshake.
	ReadOnly bool
	// Description is shown to clients that list exports.
	Description string
	// MaxPiece cuts a write into pieces, each wholly in our buffer before the
	// device sees it. Zero means 64 KiB for a device that takes writes from the
	// loop (block.TryWriter) and 256 KiB, the most there is, for others.
	MaxPiece int
	// MaxConns bounds the connections. Zero means 16.
	MaxConns int
	// SingleClient admits one client process at a time (by its pid on a unix
	// socket; elsewhere one connection). Others are refused while it lives.
	SingleClient bool
	// AllowPID, when set, may refuse a client process. The pid is 0 when the
	// transport does not tell.
	AllowPID func(pid int) error
}

// ExportStats are counters of one export since Add.
type ExportStats struct {
	Name         string
	Connections  int
	ClientPID    int // of a SingleClient export, 0 when nobody is connected
	Requests     uint64
	Errors       uint64 // requests answered with an error
	Parked       uint64 // requests that left the loop
	BytesRead    uint64
	BytesWritten uint64
	InFlight     int // parked and unanswered now
	LastActivity time.Time
}

const (
	maxPiece = 256 << 10
	// loopPiece stays in the processor's cache between its two copies, which
	// makes writes of 1 MiB a quarter faster than maxPiece.
	loopPiece       = 64 << 10
	defaultMaxConns = 16
)

// counters of a connection, or of all that ended.
type counters struct {
	requests, errors, parked, bytesRead, bytesWritten atomic.Uint64
	lastActivity                                      atomic.Int64 // unix nanoseconds
}

func (c *counters) addTo(s *ExportStats) {
	s.Requests += c.requests.Load()
	s.Errors += c.errors.Load()
	s.Parked += c.parked.Load()
	s.BytesRead += c.bytesRead.Load()
	s.BytesWritten += c.bytesWritten.Load()
	if ns := c.lastActivity.Load(); ns != 0 && ns > s.LastActivity.UnixNano() {
		s.LastActivity = time.Unix(0, ns)
	}
}

func (c *counters) absorb(o *counters) {
	c.requests.Add(o.requests.Load())
	c.errors.Add(o.errors.Load())
	c.parked.Add(o.parked.Load())
	c.bytesRead.Add(o.bytesRead.Load())
	c.bytesWritten.Add(o.bytesWritten.Load())
	c.lastActivity.Store(max(c.lastActivity.Load(), o.lastActivity.Load()))
}

// export is an Export being served.
type export struct {
	Export
	size   atomic.Int64    // changed by Resized
	writer block.TryWriter // nil: WriteAt may wait
	reader block.TryReader
	mapper block.Mapper
	fd     int // for sendfile, -1 without

	ending   atomic.Int32 // connections that ended and have requests running
	syncCost atomic.Int64 // nanoseconds, running mean
	total    counters     // of connections that ended

	mu      sync.Mutex
	conns   map[*conn]struct{} // guarded by mu
	removed bool               // guarded by mu
	gone    chan struct{}      // closed with removed
}

// errRefused: an export turned a client away; the text is sent to it.
var (
	errRefused = errors.New("client refused")
	errRemoved = errors.New("export is being removed")
)

func newExport(x Export) (*export, error) {
	switch {
	case x.Device == nil:
		return nil, errors.New("export without a device")
	case len(x.Name) > maxName || len(x.Description) > maxName:
		return nil, fmt.Errorf("export name or description longer than %d bytes", maxName)
	case x.Device.Size() < 0:
		return nil, fmt.Errorf("export %q: negative size %d", x.Name, x.Device.Size())
	}
	writer, _ := x.Device.(block.TryWriter)
	switch {
	case x.MaxPiece > maxPiece, x.MaxPiece <= 0 && writer == nil:
		x.MaxPiece = maxPiece
	case x.MaxPiece <= 0:
		x.MaxPiece = loopPiece
	}
	if x.MaxConns <= 0 {
		x.MaxConns = defaultMaxConns
	}
	e := &export{Export: x, fd: -1, conns: map[*conn]struct{}{}, gone: make(chan struct{})}
	e.size.Store(x.Device.Size())
	e.syncCost.Store(int64(slowSync))
	e.writer = writer
	e.reader, _ = x.Device.(block.TryReader)
	e.mapper, _ = x.Device.(block.Mapper)
	if b, ok := x.Device.(block.FileBacked); ok {
		if fd, ok := b.ReadFD(); ok {
			e.fd = fd
		}
	}
	return e, nil
}

// transmissionFlags is what the handshake says of the export.
func (e *export) transmissionFlags(structured bool) uint16 {
	f := transHasFlags | transFlush | transFUA | transMultiConn | transCache
	if e.ReadOnly {
		f |= transReadOnly
	} else {
		f |= transTrim | transZeroes | transFastZero
	}
	if structured {
		f |= transDF
	}
	return f
}

// validate decides a request from its header alone. Nothing is allocated or
// executed for a request that is refused here.
func (e *export) validate(h header, structured, blockStatus bool) Errno {
	size := uint64(e.size.Load())
	allowed := cmdFUA
	limit := uint32(1<<32 - 1)
	writes := false
	switch h.cmd {
	case cmdRead:
		if structured {
			allowed |= cmdDF
		}
		limit = maxPayload
	case cmdWrite:
		limit, writes = maxPayload, true
	case cmdTrim:
		writes = true
	case cmdZeroes:
		allowed |= cmdNoHole | cmdFastZero
		writes = true
	case cmdFlush:
		if h.off != 0 || h.length != 0 {
			return EINVAL
		}
	case cmdCache:
	case cmdBlockStatus:
		allowed |= cmdReqOne
		if !blockStatus || h.length == 0 {
			return EINVAL
		}
	default:
		return EINVAL
	}
	switch {
	case h.flags&^allowed != 0:
		return EINVAL
	case writes && e.ReadOnly:
		return EPERM
	case h.off > size || uint64(h.length) > size-h.off:
		return errnoRange(h.cmd)
	case h.length > limit && h.flags&cmdDF != 0:
		return EOVERFLOW
	case h.length > limit:
		return EINVAL
	}
	return OK
}

// admit lets a connection in. It first waits until every connection that has
// ended, or whose peer has hung up, has no request left: see the package
// comment. On success the connection counts until leave.
func (e *export) admit(ctx context.Context, c *conn) error {
	if e.AllowPID != nil {
		if err := e.AllowPID(c.pid); err != nil {
			return fmt.Errorf("%w: %w", errRefused, err)
		}
	}
	for {
		old, err := e.tryAdmit(c)
		if old == nil || err != nil {
			return err
		}
		old.hangUp()
		select {
		case <-old.done:
		case <-e.gone:
			return errRemoved
		case <-c.srv.quit:
			return ErrServerClosed
		case <-ctx.Done():
			return fmt.Errorf("waiting for requests of an ended connection: %w", ctx.Err())
		}
	}
}

// tryAdmit returns a connection to wait for, or the verdict.
func (e *export) tryAdmit(c *conn) (*conn, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.removed {
		return nil, errRemoved
	}
	for o := range e.conns {
		if o.isEnding() || o.peerHungUp() {
			return o, nil
		}
	}
	if len(e.conns) >= e.MaxConns {
		return nil, fmt.Errorf("%w: export has %d connections already", errRefused, len(e.conns))
	}
	if e.SingleClient {
		for o := range e.conns {
			if c.pid == 0 || o.pid != c.pid {
				return nil, fmt.Errorf("%w: export is in use by process %d and serves one client process at a time", errRefused, o.pid)
			}
		}
	}
	e.conns[c] = struct{}{}
	return nil, nil
}

// leave is the end of a connection that has no request running any more.
func (e *export) leave(c *conn) {
	e.mu.Lock()
	delete(e.conns, c)
	e.total.absorb(&c.counters)
	e.mu.Unlock()
}

// awaitEnded holds an established connection back while another one that ended
// still has requests running: a client with several connections may resend
// them here.
func (e *export) awaitEnded(c *conn) {
	for e.ending.Load() > 0 {
		var old *conn
		e.mu.Lock()
		for o := range e.conns {
			if o != c && o.isEnding() {
				old = o
				break
			}
		}
		e.mu.Unlock()
		if old == nil || c.isEnding() {
			return
		}
		<-old.done
	}
}

func (e *export) stats() ExportStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := ExportStats{Name: e.Name, Connections: len(e.conns)}
	e.total.addTo(&s)
	for c := range e.conns {
		c.addTo(&s)
		s.InFlight += c.budget.inFlight()
		if e.SingleClient {
			s.ClientPID = c.pid
		}
	}
	return s
}

// connections is a copy of the present set.
func (e *export) connections() []*conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	list := make([]*conn, 0, len(e.conns))
	for c := range e.conns {
		list = append(list, c)
	}
	return list
}
