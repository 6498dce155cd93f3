// Package listen keeps a listener accepting when a call fails that may succeed
// later. net/http ends a server on most of them, and with it a process that
// serves guests.
package listen

import (
	"errors"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"
)

// Waits between calls that fail.
const (
	firstWait = 5 * time.Millisecond
	lastWait  = time.Second
)

// Patient returns l with an Accept that goes on after an error, waiting longer
// from one to the next, and tells log of each. Only that the
// listener is closed, is none, or has met its deadline is reported to the caller.
func Patient(l net.Listener, log *slog.Logger) net.Listener {
	return &patient{Listener: l, log: log, closed: make(chan struct{})}
}

type patient struct {
	net.Listener
	log    *slog.Logger
	once   sync.Once
	closed chan struct{}
}

// Accept implements net.Listener.
func (p *patient) Accept() (net.Conn, error) {
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		c, err := p.Listener.Accept()
		if err == nil || !passing(err) {
			return c, err
		}
		p.log.Warn("a connection could not be accepted; trying again", "address", p.Addr().String(), "err", err)
		select {
		case <-time.After(wait):
		case <-p.closed:
			return nil, net.ErrClosed
		}
	}
}

// Close implements net.Listener.
func (p *patient) Close() error {
	p.once.Do(func() { close(p.closed) })
	return p.Listener.Close()
}

// passing says that a later call may succeed: accept(2) passes on whatever went
// wrong with one connection, and the lack of descriptors, memory or permission
// may end. A listener that was closed, or is none, stays that.
func passing(err error) bool {
	var e syscall.Errno
	return errors.As(err, &e) && e != syscall.EBADF && e != syscall.EINVAL && e != syscall.ENOTSOCK
}
