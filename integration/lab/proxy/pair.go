package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

const pieceSize = 32 << 10

// errCut: the connection has reached its CutAfter.
var errCut = errors.New("cut")

// pair is one connection through the proxy: both its ends.
type pair struct {
	ends [2]net.Conn // who dialled, the target
	once sync.Once
	gone chan struct{}
}

// cut resets both ends.
func (c *pair) cut() {
	c.once.Do(func() {
		close(c.gone)
		for _, e := range c.ends {
			if t, ok := e.(*net.TCPConn); ok {
				_ = t.SetLinger(0) // a reset, not an orderly end
			}
			_ = e.Close()
		}
	})
}

// serve relays one connection until both directions have ended.
func (p *Proxy) serve(ctx context.Context, client net.Conn) {
	server, err := p.dial(ctx)
	if err != nil {
		_ = client.Close()
		return
	}
	c := &pair{ends: [2]net.Conn{client, server}, gone: make(chan struct{})}
	p.mu.Lock()
	refused := p.down || p.closed
	if !refused {
		p.pairs[c] = true
	}
	p.mu.Unlock()
	if refused {
		c.cut()
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.relay(c, Up, client, server) })
	wg.Go(func() { p.relay(c, Down, server, client) })
	wg.Wait()
	c.cut()
	p.mu.Lock()
	delete(p.pairs, c)
	p.mu.Unlock()
}

// relay copies one direction. An orderly end is passed on as one; anything
// else resets the connection.
func (p *Proxy) relay(c *pair, d Direction, from, to net.Conn) {
	buf := make([]byte, pieceSize)
	for {
		if !p.awaitFlow(c, d) {
			return
		}
		n, err := from.Read(buf)
		if sendErr := p.send(c, d, to, buf[:n]); sendErr != nil {
			c.cut()
			return
		}
		if errors.Is(err, io.EOF) {
			if t, ok := to.(interface{ CloseWrite() error }); ok {
				_ = t.CloseWrite() // the other direction notices if this failed
			}
			return
		}
		if err != nil {
			c.cut()
			return
		}
	}
}

// awaitFlow waits while the direction is stalled; false when the connection
// has ended.
func (p *Proxy) awaitFlow(c *pair, d Direction) bool {
	for {
		p.mu.Lock()
		stalled, change := p.faults[d].stalled, p.change
		p.mu.Unlock()
		if !stalled {
			return true
		}
		select {
		case <-c.gone:
			return false
		case <-change:
		}
	}
}

// send passes one piece on, under the faults in force.
func (p *Proxy) send(c *pair, d Direction, to net.Conn, b []byte) error {
	for len(b) > 0 {
		if !p.awaitFlow(c, d) {
			return net.ErrClosed
		}
		n, wait, cut := p.admit(d, len(b))
		if wait > 0 && !sleep(c, wait) {
			return net.ErrClosed
		}
		if _, err := to.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
		if cut {
			return errCut
		}
	}
	return nil
}

// admit says how many of want bytes may pass now, after which wait, and
// whether the connection is to be cut behind them. It counts them.
func (p *Proxy) admit(d Direction, want int) (n int, wait time.Duration, cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := &p.faults[d]
	n, wait = want, f.latency
	if f.rate > 0 { // at most a twentieth of a second at once
		n = min(n, max(int(f.rate/20), 1))
		wait += time.Duration(int64(n) * int64(time.Second) / f.rate)
	}
	if f.cutAt > 0 && p.count[d]+int64(n) >= f.cutAt {
		n = int(f.cutAt - 1 - p.count[d])
		f.cutAt, cut = 0, true
	}
	p.count[d] += int64(n)
	return n, wait, cut
}

// sleep waits; false when the connection ended meanwhile.
func sleep(c *pair, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c.gone:
		return false
	case <-t.C:
		return true
	}
}
