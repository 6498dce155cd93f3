package libvirt

import (
	"context"
	"sync"
	"time"

	lv "github.com/digitalocean/go-libvirt"
)

// EventKind is what happened.
type EventKind string

// The kinds of events. Lifecycle ones carry a UUID; the first three concern
// the host.
const (
	// EventSync carries the complete list of domains: after the start, after a
	// reconnection, and after events had to be dropped. Compare, do not replay.
	EventSync EventKind = "sync"
	// EventLost: the connection broke; events are missed until the next sync.
	EventLost EventKind = "lost"

	EventDefined   EventKind = "defined"
	EventUndefined EventKind = "undefined"
	EventStarted   EventKind = "started" // check the block graph
	EventSuspended EventKind = "suspended"
	EventResumed   EventKind = "resumed" // check the block graph
	EventShutdown  EventKind = "shutdown"
	EventStopped   EventKind = "stopped"
	EventCrashed   EventKind = "crashed"
	EventAsleep    EventKind = "suspended-by-guest"
	EventIOError   EventKind = "io-error"
	EventBlockJob  EventKind = "block-job" // check the block graph
	EventAgent     EventKind = "agent"
	EventDevice    EventKind = "device-removed"
)

// Event is one thing that happened on a host.
type Event struct {
	Kind EventKind
	Name string
	UUID string
	// Detail is libvirt's detail of a lifecycle event: why it started
	// ("booted", "migrated", "restored", "snapshot"), was suspended
	// ("io-error", …), stopped ("shutdown", "destroyed", "crashed",
	// "migrated", "saved", "failed"); the action of an I/O error ("none",
	// "pause", "report"); the state of the agent or of a block job.
	Detail string
	Device string    // alias or path, for I/O errors, block jobs and devices
	List   []Summary // of EventSync
	Err    error     // of EventLost
}

// Limits of a watch.
const (
	maxQueued    = 1024 // then the queue becomes one sync
	redialFrom   = 200 * time.Millisecond
	redialAtMost = 10 * time.Second
)

// Watch follows the host on a connection of its own until ctx ends, and then
// closes the channel. It subscribes first and lists then, so nothing falls
// between; it reconnects for ever. A slow reader never stalls libvirt: when
// maxQueued events wait they are replaced by one EventSync.
func (h *Host) Watch(ctx context.Context) <-chan Event {
	out := make(chan Event)
	q := newEventQueue()
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		h.watch(ctx, q)
	}()
	go func() {
		defer close(out)
		defer wg.Wait()
		for {
			e, overflow, ok := q.pop(ctx)
			if !ok {
				return
			}
			if overflow {
				e = Event{Kind: EventSync}
				if e.List, e.Err = h.List(ctx); e.Err != nil {
					e = Event{Kind: EventLost, Err: e.Err}
				}
			}
			select {
			case out <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// watch connects, subscribes, reconciles, and starts over when that ends.
func (h *Host) watch(ctx context.Context, q *eventQueue) {
	wait := redialFrom
	for ctx.Err() == nil {
		began := time.Now()
		err := h.watchOnce(ctx, q)
		if ctx.Err() != nil {
			return
		}
		q.push(Event{Kind: EventLost, Err: err})
		if time.Since(began) > redialAtMost {
			wait = redialFrom
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, redialAtMost)
	}
}

// watchOnce lives as long as one connection.
func (h *Host) watchOnce(ctx context.Context, q *eventQueue) error {
	c, err := h.dial(ctx)
	if err != nil {
		return wrapErr("watch libvirt", err, false)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() {
		// Closing the socket first ends the subscriptions without a call that
		// might hang; their goroutines then see closed streams.
		c.nc.Close()
		wg.Wait()
		cancel()
	}()
	stop := context.AfterFunc(ctx, func() { c.nc.Close() })
	defer stop()
	if err := subscribe(ctx, c.l, q, &wg); err != nil {
		return wrapErr("watch libvirt", err, false)
	}
	list, err := h.timedList(ctx, c)
	if err != nil {
		return wrapErr("watch libvirt", err, false)
	}
	q.push(Event{Kind: EventSync, List: list})
	t := time.NewTicker(h.opt.KeepAlive)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.l.Disconnected():
			return &Error{Op: "watch libvirt", Kind: KindUnavailable, Msg: "libvirtd closed the connection"}
		case <-t.C:
			if err := ping(ctx, c); err != nil {
				return err
			}
		}
	}
}

// timedList lists domains on the event connection.
func (h *Host) timedList(ctx context.Context, c *conn) ([]Summary, error) {
	t := time.AfterFunc(h.opt.CallTimeout, func() { c.nc.Close() })
	defer t.Stop()
	return listDomains(c.l)
}

// ping is the keep-alive: any answer will do, silence ends the connection.
func ping(_ context.Context, c *conn) error {
	t := time.AfterFunc(keepAliveWithin, func() { c.nc.Close() })
	defer t.Stop()
	_, err := c.l.ConnectGetLibVersion()
	return wrapErr("keep the event connection alive", err, false)
}

// subscribe registers for everything we decide on. Readers never block: the
// queue is bounded and takes at once.
func subscribe(ctx context.Context, l *lv.Libvirt, q *eventQueue, wg *sync.WaitGroup) error {
	for _, id := range []lv.DomainEventID{
		lv.DomainEventIDLifecycle, lv.DomainEventIDIoErrorReason, lv.DomainEventIDBlockJob,
		lv.DomainEventIDAgentLifecycle, lv.DomainEventIDDeviceRemoved,
	} {
		ch, err := l.SubscribeEvents(ctx, id, nil)
		if kindOf := KindOf(wrapErr("subscribe", err, false)); err != nil && kindOf == KindUnsupported {
			continue // the test driver knows only some of them
		}
		if err != nil {
			return err
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			for e := range ch {
				if ev, ok := translate(e); ok {
					q.push(ev)
				}
			}
		}()
	}
	return nil
}

// translate turns go-libvirt's messages into ours.
func translate(e any) (Event, bool) {
	on := func(k EventKind, d lv.Domain) Event {
		return Event{Kind: k, Name: d.Name, UUID: uuidString(d.UUID)}
	}
	switch m := e.(type) {
	case *lv.DomainEventCallbackLifecycleMsg:
		k, detail := lifecycleOf(m.Msg.Event, m.Msg.Detail)
		ev := on(k, m.Msg.Dom)
		ev.Detail = detail
		return ev, k != ""
	case *lv.DomainEventCallbackIOErrorReasonMsg:
		ev := on(EventIOError, m.Msg.Dom)
		ev.Device, ev.Detail = m.Msg.DevAlias, nth(m.Msg.Action, "none", "pause", "report")
		return ev, true
	case *lv.DomainEventCallbackBlockJobMsg:
		ev := on(EventBlockJob, m.Msg.Dom)
		ev.Device, ev.Detail = m.Msg.Path, nth(m.Msg.Status, "completed", "failed", "canceled", "ready")
		return ev, true
	case *lv.DomainEventCallbackAgentLifecycleMsg:
		ev := on(EventAgent, m.Dom)
		ev.Detail = nth(m.State, "", "connected", "disconnected")
		return ev, true
	case *lv.DomainEventCallbackDeviceRemovedMsg:
		ev := on(EventDevice, m.Msg.Dom)
		ev.Device = m.Msg.DevAlias
		return ev, true
	}
	return Event{}, false
}

func nth(i int32, names ...string) string {
	if i >= 0 && int(i) < len(names) {
		return names[i]
	}
	return "other"
}

func lifecycleOf(event, detail int32) (EventKind, string) {
	switch lv.DomainEventType(event) {
	case lv.DomainEventDefined:
		return EventDefined, nth(detail, "added", "updated", "renamed", "snapshot")
	case lv.DomainEventUndefined:
		return EventUndefined, nth(detail, "removed", "renamed")
	case lv.DomainEventStarted:
		return EventStarted, nth(detail, "booted", "migrated", "restored", "snapshot", "wakeup")
	case lv.DomainEventSuspended:
		return EventSuspended, nth(detail, "paused", "migrated", "io-error", "watchdog", "restored", "snapshot", "api-error")
	case lv.DomainEventResumed:
		return EventResumed, nth(detail, "unpaused", "migrated", "snapshot")
	case lv.DomainEventStopped:
		return EventStopped, nth(detail, "shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "snapshot")
	case lv.DomainEventShutdown:
		return EventShutdown, nth(detail, "finished", "guest", "host")
	case lv.DomainEventPmsuspended:
		return EventAsleep, nth(detail, "memory", "disk")
	case lv.DomainEventCrashed:
		return EventCrashed, nth(detail, "panicked", "crashloaded")
	}
	return "", ""
}

// eventQueue is a bounded queue whose overflow is remembered as such.
type eventQueue struct {
	wake chan struct{} // capacity 1

	mu       sync.Mutex // guards the rest
	queue    []Event
	overflow bool
}

func newEventQueue() *eventQueue { return &eventQueue{wake: make(chan struct{}, 1)} }

func (q *eventQueue) push(e Event) {
	q.mu.Lock()
	if len(q.queue) >= maxQueued {
		q.queue, q.overflow = nil, true
	}
	q.queue = append(q.queue, e)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// pop waits for the next event; overflow says that older ones were dropped and
// a sync must come first.
func (q *eventQueue) pop(ctx context.Context) (e Event, overflow, ok bool) {
	for {
		q.mu.Lock()
		switch {
		case q.overflow:
			q.overflow = false
			q.mu.Unlock()
			return Event{}, true, true
		case len(q.queue) > 0:
			e, q.queue = q.queue[0], q.queue[1:]
			q.mu.Unlock()
			return e, false, true
		}
		q.mu.Unlock()
		select {
		case <-ctx.Done():
			return Event{}, false, false
		case <-q.wake:
		}
	}
}
