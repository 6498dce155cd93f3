package nbd_test

import (
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// heldSync is a disk whose next sync can be held, or take its time.
type heldSync struct {
	*block.File
	hold    atomic.Pointer[chan struct{}] // a sync waits for it to be closed
	slow    atomic.Bool                   // a sync takes 30 ms
	waiting chan struct{}                 // a sync waits now
}

// Sync implements block.Device.
func (d *heldSync) Sync() error {
	if d.slow.Swap(false) {
		<-time.After(30 * time.Millisecond)
	}
	if hold := d.hold.Load(); hold != nil {
		d.waiting <- struct{}{}
		<-*hold
	}
	return d.File.Sync()
}

// Where syncs take no time the loop does them itself. The first slow one ends
// that: the next is held by a worker, and a read behind it is answered.
func TestFlushesAreParkedUnlessTheyTakeNoTime(t *testing.T) {
	dev := &heldSync{File: newFile(t, 1<<20), waiting: make(chan struct{}, 1)}
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
	r := s.connect(t)
	r.enter(false)
	flush := func(cookie uint64) {
		t.Helper()
		r.request(0, cmdFlush, cookie, 0, 0)
		if got, errno := r.simple(); got != cookie || errno != 0 {
			t.Fatalf("flush %d: answer %d, errno %d", cookie, got, errno)
		}
	}
	parked := func() uint64 {
		stats, _ := s.srv.Stats("")
		return stats.Parked
	}
	for deadline := time.Now().Add(patience); ; {
		before := parked()
		if flush(1); parked() == before {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("flushes that take no time are parked for ever")
		}
	}
	for before := parked(); parked() == before; { // a busy machine may have parked it anyway
		dev.slow.Store(true)
		flush(2)
		flush(3)
	}
	hold := make(chan struct{})
	dev.hold.Store(&hold)
	r.request(0, cmdFlush, 4, 0, 0)
	<-dev.waiting
	r.request(0, cmdRead, 5, 0, 512)
	if cookie, errno := r.simple(); cookie != 5 || errno != 0 {
		t.Fatalf("read behind a flush that waits: answer %d, errno %d", cookie, errno)
	}
	r.read(512)
	dev.hold.Store(nil)
	close(hold)
	if cookie, errno := r.simple(); cookie != 4 || errno != 0 {
		t.Fatalf("flush that waited: answer %d, errno %d", cookie, errno)
	}
}
