package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// relay is a row of servers on one listening socket, each of which takes the
// connections of the one before over.
type relay struct {
	t      *testing.T
	dev    block.Device
	socket string
	ln     *net.UnixListener
	srv    *nbd.Server
	served chan error
}

func newRelay(t *testing.T, dev block.Device) *relay {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbdt")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r := &relay{t: t, dev: dev, socket: filepath.Join(dir, "s")}
	r.ln, err = net.ListenUnix("unix", &net.UnixAddr{Name: r.socket})
	must(t, err)
	t.Cleanup(func() { _ = r.ln.Close() })
	r.srv, r.served = r.open()
	r.serve(r.srv, r.served)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := r.srv.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		<-r.served
	})
	return r
}

func (r *relay) open() (*nbd.Server, chan error) {
	r.t.Helper()
	s := nbd.NewServer(nbd.Options{})
	must(r.t, s.Add(nbd.Export{Device: r.dev, SingleClient: true}))
	return s, make(chan error, 1)
}

func (r *relay) serve(s *nbd.Server, served chan error) {
	r.t.Helper()
	f, err := r.ln.File()
	must(r.t, err)
	ln, err := net.FileListener(f)
	must(r.t, err)
	must(r.t, f.Close())
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	go func() { served <- s.Serve(context.Background(), ln) }()
}

// next hands everything to a new server and returns how many connections went.
func (r *relay) next(held []nbd.Handed) int {
	r.t.Helper()
	s, served := r.open()
	var all []nbd.Adopted
	for _, h := range held {
		all = append(all, nbd.Adopted{Conn: duplicate(r.t, h), Handed: h})
	}
	start, err := s.Adopt(context.Background(), all)
	must(r.t, err)
	r.srv.Leave()
	if err := <-r.served; err != nil && !errors.Is(err, nbd.ErrServerClosed) {
		r.t.Error(err)
	}
	start()
	r.serve(s, served)
	r.srv, r.served = s, served
	return len(all)
}

func duplicate(t *testing.T, h nbd.Handed) net.Conn {
	t.Helper()
	var fd int
	var derr error
	must(t, h.Control(func(x uintptr) { fd, derr = unix.FcntlInt(x, unix.F_DUPFD_CLOEXEC, 0) }))
	must(t, derr)
	f := os.NewFile(uintptr(fd), "conn")
	nc, err := net.FileConn(f)
	must(t, err)
	must(t, f.Close())
	return nc
}

func (r *relay) hold(limit time.Duration) ([]nbd.Handed, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return r.srv.Hold(ctx)
}

// taken waits until the server has received everything that was sent.
func (r *raw) taken(t *testing.T) {
	t.Helper()
	rc, err := r.Conn.(*net.UnixConn).SyscallConn()
	must(t, err)
	until(t, "the server has received it", func() bool {
		left := -1
		must(t, rc.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }))
		return left == 0
	})
}

// stripe is a worker with a connection and a part of the disk of its own; it
// knows what every byte must be.
type stripe struct {
	c    *nbd.Client
	off  int64
	want []byte
	r    *rand.Rand
	ops  *atomic.Int64
}

func (s *stripe) step() error {
	s.ops.Add(1)
	n := 1 + s.r.IntN(8192)
	at := s.r.IntN(len(s.want) - n)
	p := s.want[at : at+n]
	switch s.r.IntN(8) {
	case 0:
		return s.c.Sync()
	case 1:
		clear(p)
		return s.c.ZeroAt(s.off+int64(at), int64(n), true)
	case 2, 3:
		got := make([]byte, n)
		_, err := s.c.ReadAt(got, s.off+int64(at))
		if err == nil && !bytes.Equal(got, p) {
			err = fmt.Errorf("%d bytes at %d are not what was written", n, s.off+int64(at))
		}
		return err
	}
	for i := range p {
		p[i] = byte(s.r.Uint32())
	}
	_, err := s.c.WriteAt(p, s.off+int64(at))
	return err
}

func (s *stripe) run(stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		if err := s.step(); err != nil {
			return err
		}
	}
}

func TestConnectionsGoFromServerToServerUnderVerifiedLoad(t *testing.T) {
	const seed, workers, rounds, part = 4711, 4, 40, 1 << 20
	t.Logf("seed %d", seed)
	r := newRelay(t, newFile(t, workers*part))
	var wg sync.WaitGroup
	var ops atomic.Int64
	stop := make(chan struct{})
	errs := make(chan error, workers)
	var stripes []*stripe
	for w := range workers {
		c, err := nbd.Dial(t.Context(), "unix", r.socket, nbd.ClientOptions{})
		must(t, err)
		defer c.Close()
		s := &stripe{c: c, off: int64(w) * part, want: make([]byte, part), r: rand.New(rand.NewPCG(seed, uint64(w))), ops: &ops}
		stripes = append(stripes, s)
		wg.Go(func() {
			if err := s.run(stop); err != nil {
				errs <- err
			}
		})
	}
	var gaveUp int
	for done := 0; done < rounds && len(errs) == 0; {
		for seen := ops.Load(); ops.Load() < seen+30 && len(errs) == 0; { // the load goes on in between
			runtime.Gosched()
		}
		held, err := r.hold(patience)
		if err != nil {
			t.Errorf("hold: %v", err)
			break
		}
		if done++; done%5 == 0 {
			gaveUp++
			r.srv.Resume()
			continue
		}
		if n := r.next(held); n != workers {
			t.Errorf("%d connections were handed on, want %d", n, workers)
			break
		}
	}
	close(stop)
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	for _, s := range stripes {
		got := make([]byte, part)
		if _, err := stripes[0].c.ReadAt(got, s.off); err != nil || !bytes.Equal(got, s.want) {
			t.Errorf("the part at %d is not what was written (%v)", s.off, err)
		}
	}
	st, _ := r.srv.Stats("")
	if st.Connections != workers || st.ClientPID != os.Getpid() || st.Requests < uint64(ops.Load()) {
		t.Errorf("the last server says %+v after %d operations", st, ops.Load())
	}
	t.Logf("%d operations, %d hand-overs, %d taken back", ops.Load(), rounds-gaveUp, gaveUp)
}

func TestAHoldThatCannotEndLeavesEverythingAsItWas(t *testing.T) {
	dev := newHeld(t, 1<<20)
	r := newRelay(t, dev)
	c := service{socket: r.socket}.connect(t)
	c.enter(true)
	c.request(0, cmdWrite, 1, 0, 4096, bytes.Repeat([]byte{1}, 4096)...)
	<-dev.gate.Held()
	if _, err := r.hold(20 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("held although a write runs: %v", err)
	}
	c.request(0, cmdRead, 2, 8192, 512) // read and answered meanwhile
	if cookie, errno := c.answer(); cookie != 2 || errno != 0 {
		t.Fatalf("a read after the attempt: cookie %d, error %d", cookie, errno)
	}
	dev.gate.Open()
	if cookie, errno := c.answer(); cookie != 1 || errno != 0 {
		t.Fatalf("the write: cookie %d, error %d", cookie, errno)
	}
	held, err := r.hold(patience)
	must(t, err)
	if _, err := r.hold(patience); !errors.Is(err, nbd.ErrHeld) {
		t.Errorf("held twice: %v", err)
	}
	r.next(held)
	c.request(0, cmdRead, 3, 0, 512)
	if cookie, errno := c.answer(); cookie != 3 || errno != 0 {
		t.Fatalf("after the hand-over: cookie %d, error %d", cookie, errno)
	}
}

func TestNoServerIsHeldInTheMiddleOfARequest(t *testing.T) {
	r := newRelay(t, newFile(t, 1<<20))
	c := service{socket: r.socket}.connect(t)
	c.enter(false)
	payload := bytes.Repeat([]byte{7}, 8192)
	// A header cut short, then a payload cut short, then a refused write's.
	for i, parts := range [][]any{
		{magicRequest, uint16(0)},
		{cmdWrite, uint64(1), uint64(4096), uint32(8192), payload[:100]},
	} {
		c.send(parts...)
		c.taken(t)
		if _, err := r.hold(30 * time.Millisecond); err == nil {
			t.Fatalf("part %d: held in the middle of a request", i)
		}
	}
	c.send(payload[100:])
	if cookie, errno := c.simple(); cookie != 1 || errno != 0 {
		t.Fatalf("the write in pieces: cookie %d, error %d", cookie, errno)
	}
	c.send(magicRequest, uint16(0), cmdWrite, uint64(2), uint64(1<<20), uint32(8192), payload[:1])
	c.taken(t)
	if _, err := r.hold(30 * time.Millisecond); err == nil {
		t.Fatal("held within a refused write")
	}
	c.send(payload[1:])
	if cookie, errno := c.simple(); cookie != 2 || errno == 0 {
		t.Fatalf("the write outside: cookie %d, error %d", cookie, errno)
	}
	// What is sent while the server is held is answered by the next one.
	held, err := r.hold(patience)
	must(t, err)
	c.request(0, cmdRead, 3, 4096, 512)
	r.next(held)
	if cookie, errno := c.simple(); cookie != 3 || errno != 0 {
		t.Fatalf("read by the next server: cookie %d, error %d", cookie, errno)
	}
	if got := c.read(512); !bytes.Equal(got, payload[:512]) {
		t.Fatalf("read % x", got[:16])
	}
}

func TestAClientThatConnectsWhileAServerIsHeldIsGreetedLater(t *testing.T) {
	r := newRelay(t, newFile(t, 1<<20))
	for range 10 {
		held, err := r.hold(patience)
		must(t, err)
		nc, err := net.Dial("unix", r.socket)
		must(t, err)
		r.next(held)
		c, err := nbd.NewClient(t.Context(), nc, nbd.ClientOptions{})
		must(t, err)
		if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		must(t, c.Close())
	}
}

// A server that is left while its listener is only coming up takes no client
// out of the queue: that client is the next server's.
func TestAListenerThatComesUpTooLateTakesNobody(t *testing.T) {
	for range 500 {
		dir := t.TempDir()
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
		must(t, err)
		s := nbd.NewServer(nbd.Options{})
		f, err := ln.File()
		must(t, err)
		mine, err := net.FileListener(f)
		must(t, errors.Join(err, f.Close()))
		mine.(*net.UnixListener).SetUnlinkOnClose(false)
		served := make(chan error, 1)
		go func() { served <- s.Serve(context.Background(), mine) }()
		_, err = s.Hold(t.Context())
		must(t, err)
		nc, err := net.Dial("unix", ln.Addr().String())
		must(t, err)
		s.Leave()
		<-served
		must(t, ln.SetDeadline(time.Now().Add(patience)))
		next, err := ln.Accept()
		must(t, err) // it is still there
		must(t, errors.Join(next.Close(), nc.Close(), ln.Close()))
	}
}

func TestAClientsConnectionIsHandedOnBetweenTwoRequests(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20)})
	c := s.dial(t, nbd.ClientOptions{})
	for i := range 20 {
		want := bytes.Repeat([]byte{byte(i + 1)}, 512)
		if _, err := c.WriteAt(want, int64(i)*512); err != nil {
			t.Fatal(err)
		}
		h, resume, err := c.HandOver(t.Context())
		must(t, err)
		if i%4 == 3 { // taken back
			resume()
			continue
		}
		var fd int
		var derr error
		must(t, c.Control(func(x uintptr) { fd, derr = unix.FcntlInt(x, unix.F_DUPFD_CLOEXEC, 0) }))
		must(t, derr)
		f := os.NewFile(uintptr(fd), "conn")
		nc, err := net.FileConn(f)
		must(t, err)
		must(t, f.Close())
		next, err := nbd.AdoptClient(nc, h, nbd.ClientOptions{})
		must(t, err)
		t.Cleanup(func() { _ = next.Close() })
		got := make([]byte, 512)
		if _, err := next.ReadAt(got, int64(i)*512); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("round %d: %v", i, err)
		}
		c = next
	}
}

// A client that never chooses an export must not keep the guests' requests
// waiting while a hold waits for it.
func TestAHoldDoesNotWaitForAHandshakeThatDoesNotEnd(t *testing.T) {
	dev := newHeld(t, 1<<20)
	dev.gate.Open()
	r := newRelay(t, dev)
	guest := service{socket: r.socket}.connect(t)
	guest.enter(true)
	silent, err := net.Dial("unix", r.socket)
	must(t, err)
	defer silent.Close()
	_, err = io.ReadFull(silent, make([]byte, 18)) // greeted, and no word of it
	must(t, err)
	begun := time.Now()
	held, err := r.hold(patience)
	must(t, err)
	if took := time.Since(begun); took > patience/4 {
		t.Fatalf("the hold took %v", took)
	}
	if n := r.next(held); n != 1 {
		t.Fatalf("%d connections were handed on, one has chosen an export", n)
	}
	if _, err := silent.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("the silent client: %v", err)
	}
	guest.request(0, cmdRead, 1, 0, 512)
	if cookie, errno := guest.answer(); cookie != 1 || errno != 0 {
		t.Fatalf("after the hand-over: cookie %d, error %d", cookie, errno)
	}
}
