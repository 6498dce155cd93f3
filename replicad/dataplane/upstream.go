package dataplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// Pauses between attempts to reach an upstream server again.
const (
	redialFirst = 100 * time.Millisecond
	redialMax   = 5 * time.Second
)

// upstream is a disk on another NBD server. When the connection is lost the
// requests under way wait for a new one and are sent again, as QEMU's own
// client does; the guest sees a delay. What the server had not made durable
// may be gone after that, so every loss is reported and everything marked.
type upstream struct {
	uri  string
	opts nbd.ClientOptions
	size int64
	// lost tells of a loss; capacity 1.
	lost chan string
	// unmarked: a loss was not followed by marking everything yet.
	unmarked atomic.Bool
	// late is what lost connections may still do.
	late *late
	ctx  context.Context // ends with Close
	stop context.CancelFunc

	mu sync.Mutex  // held while dialling: everybody waits for the same
	c  *nbd.Client // guarded by mu
}

var _ block.Device = (*upstream)(nil)

func dialUpstream(ctx context.Context, uri string, opts nbd.ClientOptions) (*upstream, error) {
	c, err := nbd.DialURI(ctx, uri, opts)
	if err != nil {
		return nil, err
	}
	return newUpstream(uri, opts, c), nil
}

func newUpstream(uri string, opts nbd.ClientOptions, c *nbd.Client) *upstream {
	u := &upstream{uri: uri, opts: opts, size: c.Size(), lost: make(chan string, 1), late: newLate(), c: c}
	u.ctx, u.stop = context.WithCancel(context.Background())
	return u
}

// handOver brings the connection to rest for a successor. While it is being
// made anew, or a loss is not marked yet, nothing can be handed on.
func (u *upstream) handOver(ctx context.Context) (*nbd.Client, nbd.HandedClient, func(), error) {
	var h nbd.HandedClient
	if !u.mu.TryLock() {
		return nil, h, nil, fmt.Errorf("the connection to %s is being made anew", u.uri)
	}
	if u.c == nil || u.unmarked.Load() {
		u.mu.Unlock()
		return nil, h, nil, fmt.Errorf("the connection to %s was lost", u.uri)
	}
	c := u.c
	h, resume, err := c.HandOver(ctx)
	if err != nil {
		u.mu.Unlock()
		return nil, h, nil, err
	}
	return c, h, func() { resume(); u.mu.Unlock() }, nil
}

// adoptUpstream continues a connection that was handed over.
func adoptUpstream(nc net.Conn, h nbd.HandedClient, d DiskConfig) (*upstream, error) {
	opts := nbd.ClientOptions{ReadOnly: d.ReadOnly}
	c, err := nbd.AdoptClient(nc, h, opts)
	if err != nil {
		return nil, err
	}
	return newUpstream(d.URI, opts, c), nil
}

// do runs one request until it is answered.
func (u *upstream) do(f func(c *nbd.Client) error) error {
	for {
		c, err := u.client()
		if err != nil {
			return err
		}
		if err = f(c); !errors.Is(err, nbd.ErrDisconnected) {
			return err
		}
		u.drop(c)
	}
}

// client returns the connection, dialling for as long as it takes.
func (u *upstream) client() (*nbd.Client, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for pause := redialFirst; u.c == nil; pause = min(2*pause, redialMax) {
		if u.ctx.Err() != nil {
			return nil, block.ErrClosed
		}
		c, err := nbd.DialURI(u.ctx, u.uri, u.opts)
		if err == nil && c.Size() != u.size {
			_ = c.Close()
			return nil, fmt.Errorf("upstream %s: the export had %d bytes, now it has %d", u.uri, u.size, c.Size())
		}
		if err == nil {
			u.c = c
			break
		}
		select {
		case <-u.ctx.Done():
		case <-time.After(pause):
		}
	}
	return u.c, nil
}

// drop forgets a connection that was lost.
func (u *upstream) drop(c *nbd.Client) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.c != c {
		return
	}
	_ = c.Close()
	u.c = nil
	u.late.lost()
	u.unmarked.Store(true)
	select {
	case u.lost <- "the connection to " + u.uri + " was lost; what it had not made durable may be gone":
	default:
	}
}

// ReadAt implements block.Device.
func (u *upstream) ReadAt(p []byte, off int64) (n int, err error) {
	err = u.do(func(c *nbd.Client) (err error) { n, err = c.ReadAt(p, off); return err })
	return n, err
}

// WriteAt implements block.Device.
func (u *upstream) WriteAt(p []byte, off int64) (n int, err error) {
	defer u.late.end(u.late.begin(off, int64(len(p))))
	err = u.do(func(c *nbd.Client) (err error) { n, err = c.WriteAt(p, off); return err })
	return n, err
}

// ZeroAt implements block.Device.
func (u *upstream) ZeroAt(off, n int64, punch bool) error {
	defer u.late.end(u.late.begin(off, n))
	return u.do(func(c *nbd.Client) error { return c.ZeroAt(off, n, punch) })
}

// Sync implements block.Device.
func (u *upstream) Sync() error { return u.do((*nbd.Client).Sync) }

// Size implements block.Device.
func (u *upstream) Size() int64 { return u.size }

// Close implements block.Device; requests that wait for a connection end.
func (u *upstream) Close() error {
	u.stop()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.c == nil {
		return nil
	}
	err := u.c.Close()
	u.c = nil
	return err
}
