package dataplanetest

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"time"

	"kvmreplica/nbd"
)

// Patience bounds how long a client waits for a data plane that is gone. It is
// for loaded machines; nothing waits this long when all is well.
const Patience = 2 * time.Minute

// Line is a client's connection to one export, made anew after it was lost: a
// client that waits, as QEMU does with a long reconnect-delay. Safe for
// concurrent use.
type Line struct {
	Socket string
	Export string

	mu sync.Mutex
	c  *nbd.Client // guarded by mu; nil when there is none
}

// Once runs one request. An error that Lost knows means that the connection
// broke under it: nobody can say whether it was executed. Connecting is tried
// until ctx ends; a socket nobody listens on is an error at once.
func (l *Line) Once(ctx context.Context, f func(c *nbd.Client) error) error {
	c, err := l.client(ctx)
	for Lost(err) && ctx.Err() == nil { // it broke before it was negotiated
		c, err = l.client(ctx)
	}
	if err != nil {
		return err
	}
	if err = f(c); Lost(err) {
		l.drop(c)
	}
	return err
}

// Do runs one request and sends it again as long as its connection is lost.
func (l *Line) Do(ctx context.Context, f func(c *nbd.Client) error) error {
	for {
		if err := l.Once(ctx, f); !Lost(err) || ctx.Err() != nil {
			return err
		}
	}
}

// Close ends the connection; the next request makes a new one.
func (l *Line) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.c != nil {
		_ = l.c.Close()
		l.c = nil
	}
}

func (l *Line) client(ctx context.Context) (*nbd.Client, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.c != nil {
		return l.c, nil
	}
	c, err := nbd.Dial(ctx, "unix", l.Socket, nbd.ClientOptions{Export: l.Export, Timeout: Patience})
	if err != nil {
		return nil, err
	}
	l.c = c
	return c, nil
}

func (l *Line) drop(c *nbd.Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.c == c {
		_ = c.Close()
		l.c = nil
	}
}

// Lost tells a connection that ended, under a request or before it was
// negotiated, from an answer.
func Lost(err error) bool {
	for _, e := range []error{nbd.ErrDisconnected, io.EOF, io.ErrUnexpectedEOF, syscall.EPIPE, syscall.ECONNRESET} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
