package peer

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"kvmreplica/replicad/wire"
)

// conns counts the connections of a Server and knows whose each one is, so
// that strangers are bounded and a removed host's connections can be closed.
type conns struct {
	limits Limits

	mu      sync.Mutex
	all     map[*conn]bool      // guarded by mu
	waiting []*conn             // not authenticated, oldest first; guarded by mu
	source  map[string]int      // of waiting, by address; guarded by mu
	peers   map[wire.HostID]int // authenticated, by host; guarded by mu
}

func newConns(l Limits) *conns {
	return &conns{limits: l, all: map[*conn]bool{}, source: map[string]int{}, peers: map[wire.HostID]int{}}
}

// conn is an accepted connection below TLS.
type conn struct {
	net.Conn
	set    *conns
	source string
	once   sync.Once
	// refused: the alert that says so must arrive before the connection ends.
	refused atomic.Bool

	// host is empty until authenticated; guarded by set.mu, as what follows.
	host wire.HostID
	end  *time.Timer // closes the connection when its certificate expires
}

var errTooMany = errors.New("too many connections")

// admit takes c in, or closes it. A full waiting room drops its oldest member:
// honest handshakes take milliseconds, so the oldest is the likeliest silent one.
func (s *conns) admit(c net.Conn) (*conn, error) {
	host := hostPart(c.RemoteAddr())
	n := &conn{Conn: c, set: s, source: host}
	var victim *conn
	s.mu.Lock()
	if s.source[host] >= s.limits.PreAuthPerSource || len(s.all) >= s.limits.Conns {
		s.mu.Unlock()
		_ = c.Close()
		return nil, errTooMany
	}
	if len(s.waiting) >= s.limits.PreAuth {
		victim = s.waiting[0]
	}
	s.all[n] = true
	s.waiting = append(s.waiting, n)
	s.source[host]++
	s.mu.Unlock()
	if victim != nil {
		_ = victim.Close()
	}
	return n, nil
}

func hostPart(a net.Addr) string {
	host, _, err := net.SplitHostPort(a.String())
	if err != nil {
		return a.String()
	}
	return host
}

// authenticated moves c from the waiting room to its host's connections. It
// ends, whatever it is doing, with its certificate.
func (s *conns) authenticated(c *conn, host wire.HostID, valid time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.all[c] || c.host != "" {
		return errors.New("connection is closed")
	}
	if s.peers[host] >= s.limits.PerPeer {
		return errTooMany
	}
	s.leaveRoom(c)
	c.host = host
	c.end = time.AfterFunc(valid, func() { _ = c.Close() })
	s.peers[host]++
	return nil
}

// leaveRoom takes c out of the waiting room. s.mu is held.
func (s *conns) leaveRoom(c *conn) {
	for i, w := range s.waiting {
		if w == c {
			s.waiting = append(s.waiting[:i], s.waiting[i+1:]...)
			break
		}
	}
	if s.source[c.source]--; s.source[c.source] <= 0 {
		delete(s.source, c.source)
	}
}

// closeOf closes every connection of host.
func (s *conns) closeOf(host wire.HostID) {
	s.mu.Lock()
	var hit []*conn
	for c := range s.all {
		if c.host == host {
			hit = append(hit, c)
		}
	}
	s.mu.Unlock()
	for _, c := range hit {
		_ = c.Close()
	}
}

// linger is how long a refused caller has to read that it was.
const linger = 300 * time.Millisecond

// drainRefused lets the alert arrive: closing at once, with the caller's first
// request unread, would reset the connection and lose it.
func (c *conn) drainRefused() {
	tcp, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok || tcp.CloseWrite() != nil || c.Conn.SetReadDeadline(time.Now().Add(linger)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, c.Conn, maxHeader)
}

// Close implements net.Conn and gives the place back.
func (c *conn) Close() error {
	if c.refused.CompareAndSwap(true, false) {
		c.drainRefused()
	}
	c.once.Do(func() {
		s := c.set
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.all, c)
		if c.end != nil {
			c.end.Stop()
		}
		if c.host == "" {
			s.leaveRoom(c)
			return
		}
		if s.peers[c.host]--; s.peers[c.host] <= 0 {
			delete(s.peers, c.host)
		}
	})
	return c.Conn.Close()
}

// counts is for tests and metrics.
func (s *conns) counts() (all, waiting int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.all), len(s.waiting)
}

// stallConn fails a Write that does not move for limit. Reads are bounded by
// whoever waits for an answer.
type stallConn struct {
	net.Conn
	limit time.Duration
}

func (c *stallConn) Write(p []byte) (int, error) {
	if err := c.Conn.SetWriteDeadline(time.Now().Add(c.limit)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}
