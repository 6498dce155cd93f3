package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"
)

// HandedClient is what a process that takes a Client's connection over must
// know besides its socket.
type HandedClient struct {
	Size       int64  `json:"size"`
	Flags      uint16 `json:"flags"`
	Structured bool   `json:"structured,omitempty"`
	Context    bool   `json:"context,omitempty"`
	MinBlock   int64  `json:"min_block"`
	MaxPayload int64  `json:"max_payload"`
}

// clientHold is one attempt to bring a Client to rest.
type clientHold struct{ resting, over chan struct{} }

// HandOver waits until no request is under way and stops receiving, so that
// somebody else may speak on the connection. Requests wait until resume is
// called; a process whose successor took over never calls it. When ctx ends
// first, nothing has changed.
func (c *Client) HandOver(ctx context.Context) (h HandedClient, resume func(), err error) {
	var free []*call
	giveBack := func() {
		for _, q := range free {
			c.slots <- q
		}
	}
	for range c.table {
		select {
		case q := <-c.slots:
			free = append(free, q)
		case <-c.dead:
			giveBack()
			return h, nil, c.Err()
		case <-ctx.Done():
			giveBack()
			return h, nil, fmt.Errorf("wait for %d requests to the nbd server: %w", len(c.table)-len(free), ctx.Err())
		}
	}
	try := &clientHold{resting: make(chan struct{}), over: make(chan struct{})}
	c.held.Store(try)
	_ = c.nc.SetReadDeadline(time.Unix(1, 0))
	resume = func() {
		c.held.Store(nil)
		close(try.over)
		giveBack()
	}
	select {
	case <-try.resting: // soon: nothing is to be received
	case <-c.dead:
		resume()
		return h, nil, c.Err()
	}
	i := c.info
	return HandedClient{i.size, i.flags, i.structured, i.context, i.minBlock, i.maxPayload}, resume, nil
}

// rest waits while the connection is held; true: go on receiving.
func (c *Client) rest(err error, buffered int) bool {
	try := c.held.Load()
	if try == nil || buffered > 0 || !errors.Is(err, syscallTimeout) {
		return false
	}
	close(try.resting)
	select {
	case <-try.over:
	case <-c.dead:
		return false
	}
	_ = c.nc.SetReadDeadline(time.Time{})
	return true
}

// Control calls f with the connection's descriptor, which stays valid until f
// returns.
func (c *Client) Control(f func(fd uintptr)) error {
	sc, ok := c.nc.(syscall.Conn)
	if !ok {
		return errNoDescriptor
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(f)
}

// AdoptClient continues a connection that another process handed over, and owns
// it from now on, also when it fails.
func AdoptClient(nc net.Conn, h HandedClient, opts ClientOptions) (*Client, error) {
	info := serverInfo{size: h.Size, flags: h.Flags, structured: h.Structured, context: h.Context, minBlock: h.MinBlock, maxPayload: h.MaxPayload}
	if err := info.acceptable(opts); err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("adopt nbd connection: %w", err)
	}
	return startClient(nc, info, opts), nil
}
