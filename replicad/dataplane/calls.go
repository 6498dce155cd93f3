package dataplane

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"strings"
	"sync"

	"golang.org/x/sync/semaphore"
)

// calls keeps control calls and a hand-over apart: calls share, a hand-over has
// it alone. Streams would keep a hand-over waiting for minutes, so it ends them;
// whoever reads them begins again.
type calls struct {
	sem *semaphore.Weighted

	mu      sync.Mutex
	next    int                        // guarded by mu
	streams map[int]context.CancelFunc // guarded by mu
}

func newCalls() *calls {
	return &calls{sem: semaphore.NewWeighted(math.MaxInt32), streams: map[int]context.CancelFunc{}}
}

// enter begins a call; it waits while a hand-over runs.
func (c *calls) enter(ctx context.Context) (leave func(), err error) {
	if err := c.sem.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	return func() { c.sem.Release(1) }, nil
}

// stream makes a context that a hand-over ends.
func (c *calls) stream(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next++
	id := c.next
	c.streams[id] = cancel
	return ctx, func() {
		cancel()
		c.mu.Lock()
		delete(c.streams, id)
		c.mu.Unlock()
	}
}

// exclude ends streams and waits for calls; nothing enters until release.
func (c *calls) exclude(ctx context.Context) (release func(), err error) {
	c.mu.Lock()
	for _, cancel := range c.streams {
		cancel()
	}
	c.mu.Unlock()
	if err := c.sem.Acquire(ctx, math.MaxInt32); err != nil {
		return nil, err
	}
	return func() { c.sem.Release(math.MaxInt32) }, nil
}

// excludeCalls is exclude for as long as a hand-over may wait.
func (p *Plane) excludeCalls() (func(), error) {
	ctx, cancel := context.WithTimeout(context.Background(), callsTimeout)
	defer cancel()
	release, err := p.calls.exclude(ctx)
	if err != nil {
		return nil, fmt.Errorf("wait for control calls under way: %w", err)
	}
	return release, nil
}

// movedHeader is set where the process that answers has been succeeded: the
// connection ends, and the client asks again.
const movedHeader = "Replicad-Moved"

func (p *Plane) moveOn(w http.ResponseWriter) {
	w.Header().Set(movedHeader, "1")
	w.Header().Set("Connection", "close")
	reply(w, nil, errMoved(p.cfg))
}

// gated passes control calls on, but not while or after everything is handed
// over. What only looks, and the upgrade itself, pass while it is: nobody is told
// of a process that has gone.
func (p *Plane) gated(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch strings.TrimPrefix(r.URL.Path, "/v1/") {
		case "upgrade":
			next.ServeHTTP(w, r)
			return
		case "status", "counters", "shutdown":
			if p.left.Load() {
				p.moveOn(w)
			} else {
				next.ServeHTTP(w, r)
			}
			return
		}
		leave, err := p.calls.enter(r.Context())
		if err != nil {
			return // the client is gone
		}
		defer leave()
		if p.left.Load() {
			p.moveOn(w)
			return
		}
		if r.Method == http.MethodGet {
			ctx, end := p.calls.stream(r.Context())
			defer end()
			r = r.WithContext(ctx)
		}
		next.ServeHTTP(w, r)
	})
}
