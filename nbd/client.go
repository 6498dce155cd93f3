package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"kvmreplica/internal/block"
)

// ClientOptions choose what a Client asks for. The zero value is usable.
type ClientOptions struct {
	// Export is the name asked for.
	Export string
	// ReadOnly refuses changes on our side.
	ReadOnly bool
	// AllowUnsafe accepts a writable server without FLUSH: Sync then does
	// nothing, and a power failure loses data the guest believes safe.
	AllowUnsafe bool
	// InFlight bounds the requests awaiting a reply. Zero means 64.
	InFlight int
	// Timeout bounds dialing and the handshake. Zero means 30 s.
	Timeout time.Duration
}

const (
	defaultInFlight = 64
	// clientChunk is the longest READ or WRITE we send.
	clientChunk = 2 << 20
	// clientZeroChunk is the longest WRITE_ZEROES or BLOCK_STATUS, a multiple
	// of every sane block size below 4 GiB.
	clientZeroChunk = 1 << 30
)

// Errors of a Client.
var (
	// ErrDisconnected: the connection is gone; whether requests under way were
	// executed is unknown. Dial anew and send them again.
	ErrDisconnected = errors.New("nbd connection lost")
	// ErrNoFlush: the server cannot make writes durable.
	ErrNoFlush = errors.New("server offers no FLUSH, so nothing written is ever known to be durable")
	// ErrProtocol: the server broke the protocol.
	ErrProtocol = errors.New("server broke the nbd protocol")
)

// RequestError is a refusal by the server.
type RequestError struct {
	Op    string
	Off   int64
	Len   int64
	Errno Errno
}

// Error says what was asked and the answer.
func (e *RequestError) Error() string {
	return fmt.Sprintf("nbd %s of %d bytes at %d: %v", e.Op, e.Len, e.Off, e.Errno)
}

// Unwrap gives the Errno.
func (e *RequestError) Unwrap() error { return e.Errno }

// Client is one connection to somebody's NBD server, used as a Device. Requests
// of many goroutines are in flight at once. It does not reconnect: after
// ErrDisconnected every call fails.
type Client struct {
	nc    net.Conn
	opts  ClientOptions
	info  serverInfo
	slots chan *call // free ones; capacity InFlight
	table []*call    // by cookie
	held  atomic.Pointer[clientHold]

	sendMu sync.Mutex
	sendBf []byte // guarded by sendMu

	// rmwMu is held by an unaligned change, and for reading by every other
	// one, when the server's blocks are longer than a byte.
	rmwMu sync.RWMutex

	dead   chan struct{} // closed with err set
	mu     sync.Mutex
	err    error // guarded by mu
	closed bool  // guarded by mu
	done   chan struct{}
}

// serverInfo is what the handshake told.
type serverInfo struct {
	size       int64
	flags      uint16
	structured bool
	context    bool
	minBlock   int64
	maxPayload int64
}

var (
	_ block.Device     = (*Client)(nil)
	_ block.Mapper     = (*Client)(nil)
	_ block.FastZeroer = (*Client)(nil)
	_ block.TryReader  = (*Client)(nil)
	_ block.TryWriter  = (*Client)(nil)
)

// DialURI connects to an address such as nbd://host:port/export or
// nbd+unix:///export?socket=path; the export in it replaces opts.Export.
func DialURI(ctx context.Context, uri string, opts ClientOptions) (*Client, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	opts.Export = u.Export
	return Dial(ctx, u.Network, u.Address, opts)
}

// Dial connects to a server on network "unix" or "tcp".
func Dial(ctx context.Context, network, address string, opts ClientOptions) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, opts.timeout())
	defer cancel()
	var d net.Dialer
	nc, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("connect to nbd server: %w", err)
	}
	return NewClient(ctx, nc, opts)
}

func (o ClientOptions) timeout() time.Duration {
	if o.Timeout > 0 {
		return o.Timeout
	}
	return defaultHandshakeTimeout
}

// NewClient negotiates on an open connection, which it owns from now on, also
// when it fails.
func NewClient(ctx context.Context, nc net.Conn, opts ClientOptions) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	_ = nc.SetDeadline(time.Now().Add(opts.timeout()))
	info, err := clientHandshake(nc, opts.Export)
	if canceled := !stop(); canceled {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = info.acceptable(opts)
	}
	if err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("negotiate nbd export %q: %w", opts.Export, err)
	}
	_ = nc.SetDeadline(time.Time{})
	return startClient(nc, info, opts), nil
}

// startClient begins to receive on a negotiated connection.
func startClient(nc net.Conn, info serverInfo, opts ClientOptions) *Client {
	if opts.InFlight <= 0 {
		opts.InFlight = defaultInFlight
	}
	c := &Client{
		nc: nc, opts: opts, info: info,
		slots: make(chan *call, opts.InFlight),
		dead:  make(chan struct{}), done: make(chan struct{}),
	}
	for i := range opts.InFlight {
		q := &call{index: uint32(i), done: make(chan struct{}, 1)}
		c.table = append(c.table, q)
		c.slots <- q
	}
	go c.receive()
	return c
}

// acceptable refuses servers that cannot do what the caller needs.
func (i serverInfo) acceptable(opts ClientOptions) error {
	switch {
	case i.size < 0:
		return fmt.Errorf("%w: size %d", ErrProtocol, uint64(i.size))
	case i.minBlock <= 0 || i.minBlock&(i.minBlock-1) != 0 || i.minBlock > 1<<16:
		return fmt.Errorf("%w: minimum block size %d", ErrProtocol, i.minBlock)
	case opts.ReadOnly:
		return nil
	case i.flags&transReadOnly != 0:
		return fmt.Errorf("server offers it read-only; open it with --read-only: %w", block.ErrReadOnly)
	case i.flags&transFlush == 0 && !opts.AllowUnsafe:
		return fmt.Errorf("%w; use another server, or open it read-only", ErrNoFlush)
	}
	return nil
}

// Size implements block.Device.
func (c *Client) Size() int64 { return c.info.size }

// ReadOnly reports whether changes are refused.
func (c *Client) ReadOnly() bool { return c.opts.ReadOnly || c.info.flags&transReadOnly != 0 }

// FastZero implements block.FastZeroer.
func (c *Client) FastZero() bool { return c.info.flags&transFastZero != 0 }

// MultiConn reports whether the server promises that a flush on one connection
// covers the others.
func (c *Client) MultiConn() bool { return c.info.flags&transMultiConn != 0 }

// Done is closed when the connection is gone; Err then tells why.
func (c *Client) Done() <-chan struct{} { return c.dead }

// Err is nil while the connection works.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// fail makes the connection unusable. The first reason stays; after Close it
// is that.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.closed {
		err = fmt.Errorf("%w: %w", ErrDisconnected, block.ErrClosed)
	}
	if c.err == nil {
		c.err = err
		close(c.dead)
	}
	c.mu.Unlock()
	_ = c.nc.Close()
}

// Close says goodbye and ends the connection. Requests under way fail with
// ErrDisconnected: wait for them first. It does not imply Sync.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return block.ErrClosed
	}
	c.closed = true
	c.mu.Unlock()
	if c.sendMu.TryLock() {
		_ = c.nc.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = c.nc.Write(appendHeader(nil, header{cmd: cmdDisconnect}))
		c.sendMu.Unlock()
	}
	c.fail(block.ErrClosed)
	<-c.done
	return nil
}
