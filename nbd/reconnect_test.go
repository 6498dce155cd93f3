package nbd_test

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/nbd"
)

// held is a device whose first write waits at a gate; it remembers the order
// in which writes began.
type held struct {
	*blocktest.Faulty
	gate *blocktest.Gate

	mu    sync.Mutex
	began []int64 // offsets
}

func newHeld(t *testing.T, size int64) *held {
	h := &held{Faulty: blocktest.NewFaulty(newFile(t, size), "held"), gate: blocktest.NewGate()}
	t.Cleanup(h.gate.Open)
	h.SetHook(func(op fsxtest.Op) error {
		if op.Kind != fsxtest.Write {
			return nil
		}
		h.mu.Lock()
		h.began = append(h.began, op.Off)
		first := len(h.began) == 1
		h.mu.Unlock()
		if first {
			h.gate.Hold(op)
		}
		return nil
	})
	return h
}

// letGo ends the hold, if it still lasts: a server cannot shut down before.
func (h *held) letGo() { h.gate.Open() }

func (h *held) writes() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.began)
}

// until waits for a condition that another goroutine brings about.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// silent checks that the server sends nothing for a while.
func (r *raw) silent() {
	r.t.Helper()
	must(r.t, r.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	n, err := r.Read(make([]byte, 1))
	if n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatalf("server answered before the old write was done (%d bytes, %v)", n, err)
	}
	must(r.t, r.SetReadDeadline(time.Now().Add(patience)))
}

// A client resends what was not answered: the old write must not land after
// what the new connection writes.
func TestResentWriteIsNotOvertakenByTheOldOne(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
	first, second := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)

	old := s.connect(t)
	old.enter(true)
	old.request(0, cmdWrite, 1, 8192, 4096, first...)
	<-dev.gate.Held()
	must(t, old.Close())

	fresh := s.connect(t)
	fresh.send(uint32(3), magicOption, optGo, uint32(6), make([]byte, 6))
	fresh.request(0, cmdWrite, 1, 8192, 4096, first...)
	fresh.request(0, cmdWrite, 2, 8192, 4096, second...)
	fresh.silent()
	if n := dev.writes(); n != 1 {
		t.Fatalf("%d writes began while the old one was held", n)
	}
	dev.gate.Open()
	fresh.read(20 + 12 + 20) // GO: info, ack
	for range 2 {
		if _, errno := fresh.simple(); errno != 0 {
			t.Fatalf("answer %d", errno)
		}
	}
	// The two of the new connection are concurrent; the old one is before both.
	fresh.request(0, cmdWrite, 3, 8192, 4096, second...)
	fresh.simple()
	expect(t, dev, 8192, second)
}

// The old connection's loop does not read while its budget is used up, so it
// cannot see that the client is gone; the new connection asks the kernel.
func TestHangUpIsSeenBehindAFullBudget(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{ParkedRequests: 1, Workers: 1}, nbd.Export{Device: dev})
	old := s.connect(t)
	old.enter(false)
	for i := range uint64(8) {
		old.request(0, cmdWrite, i, i*4096, 4096, bytes.Repeat([]byte{1}, 4096)...)
	}
	<-dev.gate.Held()
	must(t, old.Close())

	fresh := s.connect(t)
	fresh.send(uint32(3), magicOption, optGo, uint32(6), make([]byte, 6))
	fresh.silent()
	dev.gate.Open()
	fresh.read(20 + 12 + 20)
	before := dev.writes()
	if before != 1 {
		t.Errorf("%d old writes began, one had when the client left", before)
	}
	fresh.request(0, cmdWrite, 1, 4096, 4096, bytes.Repeat([]byte{2}, 4096)...)
	fresh.simple()
	expect(t, dev, 4096, bytes.Repeat([]byte{2}, 4096))
	if after := dev.writes(); after != before+1 {
		t.Errorf("%d old writes began after the new connection was let in", after-before-1)
	}
}

func TestRequestsNotStartedAreDroppedWhenTheClientIsGone(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{Workers: 1}, nbd.Export{Device: dev})
	old := s.connect(t)
	old.enter(false)
	for i := range uint64(4) {
		old.request(0, cmdWrite, i, i*4096, 4096, bytes.Repeat([]byte{1}, 4096)...)
	}
	<-dev.gate.Held()
	until(t, "all four are parked", func() bool { st, _ := s.srv.Stats(""); return st.InFlight == 4 })
	must(t, old.Close())
	until(t, "the loop sees the end", func() bool { return nbd.EndingConnections(s.srv, "") == 1 })
	dev.gate.Open()
	s.connect(t).enter(false)
	if n := dev.writes(); n != 1 {
		t.Fatalf("%d writes were executed, one had begun", n)
	}
}

func TestOrderlyDisconnectExecutesAndAnswersWhatWasSent(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{Workers: 1}, nbd.Export{Device: dev})
	r := s.connect(t)
	r.enter(false)
	for i := range uint64(3) {
		r.request(0, cmdWrite, i, i*4096, 4096, bytes.Repeat([]byte{9}, 4096)...)
	}
	r.request(0, cmdDisc, 0, 0, 0)
	<-dev.gate.Held()
	dev.gate.Open()
	for range 3 {
		if _, errno := r.simple(); errno != 0 {
			t.Errorf("answer %d", errno)
		}
	}
	r.closed()
	expect(t, dev, 0, bytes.Repeat([]byte{9}, 3*4096))
}

// A client with several connections may resend on one that lives already.
func TestLivingConnectionWaitsForAnEndedOne(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
	living, old := s.connect(t), s.connect(t)
	living.enter(false)
	old.enter(false)
	old.request(0, cmdWrite, 1, 0, 4096, bytes.Repeat([]byte{1}, 4096)...)
	<-dev.gate.Held()
	must(t, old.Close())
	until(t, "the server sees the end", func() bool { return nbd.EndingConnections(s.srv, "") == 1 })
	living.request(0, cmdWrite, 2, 0, 4096, bytes.Repeat([]byte{2}, 4096)...)
	living.silent()
	dev.gate.Open()
	if _, errno := living.simple(); errno != 0 {
		t.Fatalf("answer %d", errno)
	}
	expect(t, dev, 0, bytes.Repeat([]byte{2}, 4096))
}
