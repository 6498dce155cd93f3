package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	lv "github.com/digitalocean/go-libvirt"
)

// Deadlines and limits of the package, by name.
const (
	dialTimeout     = 5 * time.Second
	callTimeout     = time.Minute // when the caller's context has none; a libvirtd that is asked first examines every QEMU
	keepAliveEvery  = 10 * time.Second
	keepAliveWithin = 10 * time.Second
	// libvirtd serves five requests of one client at a time (max_client_requests)
	// and then stops reading; we stay below.
	callsPerConn = 4
	maxConns     = 8
)

// Options of Dial. The zero value finds the system's libvirtd.
type Options struct {
	// Socket is the path of libvirtd's or virtqemud's socket; empty tries the
	// usual ones, modular first.
	Socket string
	// URI is the driver, "qemu:///system" when empty. Tests use
	// "test:///default".
	URI string
	// CallTimeout bounds calls whose context has no deadline; 0 is a minute.
	CallTimeout time.Duration
	// KeepAlive is the interval of probes on the event connection; 0 is 10 s.
	KeepAlive time.Duration
}

// Host is one hypervisor host. All methods are safe for concurrent use. Lost
// connections are made again by the next call.
type Host struct {
	opt    Options
	socket string

	mu      sync.Mutex // guards what follows; never held across a call
	conns   []*conn
	dialing int // connections being made
	closed  bool
}

// conn is one connection to libvirtd. Guarded by Host.mu but for l and nc.
type conn struct {
	l        *lv.Libvirt
	nc       *line
	inflight int  // calls that have not returned
	hung     int  // those of them whose caller has left
	retired  bool // no new calls
}

// defaultSockets are tried in order by Dial.
func defaultSockets() []string {
	return []string{"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock", "/var/run/libvirt/libvirt-sock"}
}

// Dial connects to libvirtd (monolithic) or virtqemud (modular). ctx bounds
// the connecting only.
func Dial(ctx context.Context, opt Options) (*Host, error) {
	if opt.URI == "" {
		opt.URI = string(lv.QEMUSystem)
	}
	if opt.CallTimeout <= 0 {
		opt.CallTimeout = callTimeout
	}
	if opt.KeepAlive <= 0 {
		opt.KeepAlive = keepAliveEvery
	}
	candidates := defaultSockets()
	if opt.Socket != "" {
		candidates = []string{opt.Socket}
	}
	var errs []error
	for _, s := range candidates {
		h := &Host{opt: opt, socket: s}
		c, err := h.dial(ctx)
		if err == nil {
			h.conns = append(h.conns, c)
			return h, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", s, err))
	}
	return nil, &Error{
		Op: "connect to libvirt", Kind: KindUnavailable, Err: errors.Join(errs...),
		Msg: fmt.Sprintf("no daemon answers (tried %s); run: systemctl status libvirtd virtqemud", strings.Join(candidates, ", ")),
	}
}

// Socket is the path this host was reached by.
func (h *Host) Socket() string { return h.socket }

// Close ends all connections; calls in flight fail. A Watch ends with its own
// context.
func (h *Host) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, c := range h.conns {
		c.nc.Close()
	}
	h.conns = nil
	return nil
}

// line is a net.Conn that knows at its first error that it is of no use any
// more. The RPC library notices later: a call made in between would fail
// although libvirtd is there.
type line struct {
	net.Conn
	gone atomic.Bool
}

func (c *line) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.gone.Store(true)
	}
	return n, err
}

func (c *line) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err != nil {
		c.gone.Store(true)
	}
	return n, err
}

func (c *line) Close() error {
	c.gone.Store(true)
	return c.Conn.Close()
}

// keptConn is the socket.Dialer of one connection; it keeps the net.Conn so
// that we can close it when a call hangs.
type keptConn struct{ nc *line }

func (k keptConn) Dial() (net.Conn, error) { return k.nc, nil }

func (h *Host) dial(ctx context.Context) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if _, err := os.Stat(h.socket); err != nil {
		return nil, err
	}
	var d net.Dialer
	raw, err := d.DialContext(ctx, "unix", h.socket)
	if err != nil {
		return nil, err
	}
	nc := &line{Conn: raw}
	l := lv.NewWithDialer(keptConn{nc})
	// ConnectToURI knows no context: closing the socket ends it.
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	err = l.ConnectToURI(lv.ConnectURI(h.opt.URI))
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &conn{l: l, nc: nc}, nil
}

// call runs one RPC with a deadline. When the deadline passes the connection
// is retired: others on it finish, new calls go elsewhere, and it is closed as
// soon as only hung calls are left on it. The value travels by channel, so a
// call that ends late writes nothing its caller still reads.
func call[T any](ctx context.Context, h *Host, op string, fn func(l *lv.Libvirt) (T, error)) (T, error) {
	var zero T
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, h.opt.CallTimeout)
		defer cancel()
	}
	if err := ctx.Err(); err != nil {
		return zero, wrapErr(op, err, false)
	}
	c, err := h.acquire(ctx)
	if err != nil {
		return zero, wrapErr(op, err, false)
	}
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := fn(c.l)
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		h.release(c, false)
		if r.err != nil {
			return zero, wrapErr(op, r.err, true)
		}
		return r.v, nil
	case <-ctx.Done():
		h.abandon(c)
		go func() { <-done; h.release(c, true) }()
		return zero, wrapErr(op, ctx.Err(), true)
	}
}

// do is call for RPCs without a result.
func (h *Host) do(ctx context.Context, op string, fn func(l *lv.Libvirt) error) error {
	_, err := call(ctx, h, op, func(l *lv.Libvirt) (struct{}, error) { return struct{}{}, fn(l) })
	return err
}

// acquire picks a living connection with room, or makes one.
func (h *Host) acquire(ctx context.Context) (*conn, error) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil, net.ErrClosed
	}
	h.dropDead()
	var best *conn
	for _, c := range h.conns {
		if !c.retired && (best == nil || c.inflight < best.inflight) {
			best = c
		}
	}
	if best != nil && (best.inflight < callsPerConn || len(h.conns)+h.dialing >= maxConns) {
		best.inflight++
		h.mu.Unlock()
		return best, nil
	}
	h.dialing++
	h.mu.Unlock()
	c, err := h.dial(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.dialing--
	if err != nil {
		return nil, err
	}
	if h.closed {
		c.nc.Close()
		return nil, net.ErrClosed
	}
	c.inflight = 1
	h.conns = append(h.conns, c)
	return c, nil
}

// dropDead forgets connections libvirtd has closed. Called with mu held.
func (h *Host) dropDead() {
	kept := h.conns[:0]
	for _, c := range h.conns {
		if !c.nc.gone.Load() && c.l.IsConnected() {
			kept = append(kept, c)
		} else {
			c.nc.Close()
		}
	}
	h.conns = kept
}

func (h *Host) abandon(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.hung++
	c.retired = true
	h.closeIfIdle(c)
}

func (h *Host) release(c *conn, hung bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.inflight--
	if hung {
		c.hung--
	}
	h.closeIfIdle(c)
}

// closeIfIdle closes a retired connection on which nobody waits any more.
// Called with mu held.
func (h *Host) closeIfIdle(c *conn) {
	if !c.retired || c.inflight > c.hung {
		return
	}
	c.nc.Close()
	for i := range h.conns {
		if h.conns[i] == c {
			h.conns = append(h.conns[:i], h.conns[i+1:]...)
			return
		}
	}
}
