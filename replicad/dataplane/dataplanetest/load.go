package dataplanetest

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Load is a guest that writes in the background. Its goroutine never outlives
// the test and never fails it: what went wrong is told by the calls below.
type Load struct {
	g       *Guest
	changes atomic.Int64
	stop    chan struct{}
	halt    func()
	done    chan struct{}
	err     error // valid once done is closed
}

// Start makes the guest write all the time, until Stop or the end of the test.
// The guest must not be used otherwise meanwhile, except for Disconnect.
func (g *Guest) Start() *Load {
	g.t.Helper()
	l := &Load{g: g, stop: make(chan struct{}), done: make(chan struct{})}
	l.halt = sync.OnceFunc(func() { close(l.stop) })
	go l.run()
	g.t.Cleanup(func() { // before the guest's own, which would wait for a request under way
		l.halt()
		g.off()
		g.Disconnect()
		<-l.done
	})
	return l
}

func (l *Load) run() {
	defer close(l.done)
	for {
		select {
		case <-l.stop:
			return
		default:
		}
		if l.err = l.g.change(); l.err != nil {
			return
		}
		l.changes.Add(1)
	}
}

// Changed returns when n more changes were answered; called by the test's own
// goroutine, which fails when the guest met an error.
func (l *Load) Changed(t testing.TB, n int64) {
	t.Helper()
	want := l.changes.Load() + n
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for l.changes.Load() < want {
		select {
		case <-l.done:
			t.Fatalf("the guest stopped after %d changes: %v", l.changes.Load(), l.err)
		case <-tick.C:
		}
	}
}

// Stop ends the writing after the request under way was answered. Every answer
// must have been good.
func (l *Load) Stop(t testing.TB) {
	t.Helper()
	l.halt()
	<-l.done
	if l.err != nil {
		t.Fatal(l.err)
	}
}
