package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptrace"
	"sync"
	"time"

	"kvmreplica/replicad/wire"
)

// callError is a *wire.Error that keeps its cause, so that a context's error
// or an AuthError can be told apart with errors.Is and errors.As.
type callError struct {
	wire  wire.Error
	cause error
}

func (e *callError) Error() string { return e.wire.Error() }

func (e *callError) Unwrap() []error { return []error{&e.wire, e.cause} }

func unavailable(cause error, hint, format string, args ...any) error {
	return &callError{wire.Error{Kind: wire.KindUnavailable, Text: fmt.Sprintf(format, args...), Hint: hint}, cause}
}

// onceReader stops reading its source once ended, and remembers the source's
// own error apart from the transport's.
type onceReader struct {
	mu    sync.Mutex
	r     io.Reader // guarded by mu
	err   error     // guarded by mu
	ended bool      // guarded by mu
}

func (o *onceReader) Read(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		return 0, io.ErrClosedPipe
	}
	n, err := o.r.Read(p)
	if err != nil && err != io.EOF {
		o.err = err
	}
	return n, err
}

// end waits for a Read under way and allows no other.
func (o *onceReader) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
}

func (o *onceReader) failed() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// dialed is a client's set of connections, so that they can be closed at once.
type dialed struct {
	mu     sync.Mutex
	set    map[*dialedConn]bool // guarded by mu
	closed bool                 // guarded by mu
}

type dialedConn struct {
	net.Conn
	owner   *dialed
	address string // as the host's record had it
}

func (d *dialed) add(c net.Conn, address string) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		_ = c.Close()
		return nil, errors.New("client is closed")
	}
	n := &dialedConn{Conn: c, owner: d, address: address}
	d.set[n] = true
	return n, nil
}

// end closes every connection and takes no new one.
func (d *dialed) end() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.closeBut("")
}

// closeBut closes every connection that does not lead to address.
func (d *dialed) closeBut(address string) {
	d.mu.Lock()
	var all []*dialedConn
	for c := range d.set {
		if address == "" || c.address != address {
			all = append(all, c)
		}
	}
	d.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
}

func (c *dialedConn) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.set, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

// readNote remembers why reading from a connection ended: when the other side
// refuses us, a failing write may be all that the HTTP client reports.
type readNote struct {
	net.Conn
	end *time.Timer // closes it when the certificate expires
	mu  sync.Mutex
	err error // guarded by mu
}

// Close implements net.Conn.
func (n *readNote) Close() error {
	n.end.Stop()
	return n.Conn.Close()
}

func (n *readNote) Read(p []byte) (int, error) {
	c, err := n.Conn.Read(p)
	if err != nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.err == nil {
			n.err = err
		}
	}
	return c, err
}

// noted returns a context that learns which connection a request used, and a
// function that tells how reading from it ended.
func noted(ctx context.Context) (context.Context, func() error) {
	var mu sync.Mutex
	var used *readNote
	trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		mu.Lock()
		defer mu.Unlock()
		used, _ = i.Conn.(*readNote)
	}}
	return httptrace.WithClientTrace(ctx, trace), func() error {
		mu.Lock()
		n := used
		mu.Unlock()
		if n == nil {
			return nil
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.err
	}
}
