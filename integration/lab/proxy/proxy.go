// Package proxy is a TCP relay that misbehaves on demand: a slow, lossy, cut or
// one-way network for tests, without privileges and without the kernel's
// traffic shaping.
//
// It guarantees that a fault takes hold at once for every connection, present
// and future, and that a cut after byte N lets exactly N bytes pass.
//
// The caller closes it; Close returns when every goroutine of it has ended.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Direction is one way through the proxy.
type Direction int

// The two directions.
const (
	Up   Direction = iota // from who dialled to the target
	Down                  // from the target back
)

func (d Direction) String() string {
	if d == Up {
		return "up"
	}
	return "down"
}

// dialTimeout bounds the connection to the target.
const dialTimeout = 10 * time.Second

// Proxy relays connections to one target.
type Proxy struct {
	dial   func(context.Context) (net.Conn, error)
	ln     net.Listener
	wg     sync.WaitGroup
	cancel context.CancelFunc

	mu     sync.Mutex
	closed bool           // guarded by mu, as all below
	down   bool           // no connection is accepted or kept
	faults [2]faults      // per direction
	change chan struct{}  // closed and replaced when a fault changes
	count  [2]int64       // bytes that have passed
	pairs  map[*pair]bool // open connections
}

// faults of one direction.
type faults struct {
	cutAt   int64         // total count at which connections are cut; 0 = never
	stalled bool          // bytes are read by nobody
	rate    int64         // bytes a second; 0 = unlimited
	latency time.Duration // added to every piece
}

// Listen starts a proxy on addr ("127.0.0.1:0" for any port) for target.
func Listen(addr, target string) (*Proxy, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("proxy for %s: %w", target, err)
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	return Serve(ln, func(ctx context.Context) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", target) }), nil
}

// Serve starts a proxy on a listener of the caller's, which it will close. dial
// makes the connection to the target; the two may be in different networks.
func Serve(ln net.Listener, dial func(context.Context) (net.Conn, error)) *Proxy {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Proxy{dial: dial, ln: ln, cancel: cancel, change: make(chan struct{}), pairs: map[*pair]bool{}}
	p.wg.Go(func() { p.accept(ctx) })
	return p
}

// Addr is where to dial.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// Close ends the proxy and every connection through it.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	err := p.ln.Close()
	p.CutAll()
	p.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// SetDown cuts every connection and ends each new one at once, until it is
// called with false.
func (p *Proxy) SetDown(down bool) {
	p.mu.Lock()
	p.down = down
	p.mu.Unlock()
	if down {
		p.CutAll()
	}
}

// CutAll resets every open connection.
func (p *Proxy) CutAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.pairs {
		c.cut()
	}
}

// CutAfter lets n more bytes pass in direction d, counted over all
// connections, and then resets the connection that carries the next one. It
// happens once.
func (p *Proxy) CutAfter(d Direction, n int64) {
	p.set(d, func(f *faults) { f.cutAt = p.count[d] + n + 1 })
}

// Stall holds direction d, or lets it go on. Nothing is lost; a stall of one
// direction is a one-way link.
func (p *Proxy) Stall(d Direction, on bool) { p.set(d, func(f *faults) { f.stalled = on }) }

// Rate limits direction d to so many bytes a second; 0 lifts the limit.
func (p *Proxy) Rate(d Direction, bytesPerSecond int64) {
	p.set(d, func(f *faults) { f.rate = bytesPerSecond })
}

// Latency delays direction d; 0 lifts it. It bounds the throughput of a
// connection to one piece (32 KiB) per delay, as a small window would.
func (p *Proxy) Latency(d Direction, delay time.Duration) {
	p.set(d, func(f *faults) { f.latency = delay })
}

// Bytes is how many bytes have passed in direction d.
func (p *Proxy) Bytes(d Direction) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count[d]
}

// Open is the number of connections at the moment.
func (p *Proxy) Open() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pairs)
}

// set changes the faults of a direction and wakes who waits for a change.
func (p *Proxy) set(d Direction, change func(*faults)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.faults[d])
	close(p.change)
	p.change = make(chan struct{})
}

func (p *Proxy) accept(ctx context.Context) {
	for {
		c, err := p.ln.Accept()
		if err != nil {
			return // closed
		}
		p.wg.Go(func() { p.serve(ctx, c) })
	}
}
