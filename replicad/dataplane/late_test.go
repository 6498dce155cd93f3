package dataplane_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
)

// slow keeps one write waiting until it is let go.
type slow struct {
	block.Device
	mu   sync.Mutex
	hold *held // guarded by mu; the next write at its offset
}

type held struct {
	off         int64
	came, letGo chan struct{}
	carriedOut  chan struct{}
}

func (s *slow) WriteAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	h := s.hold
	if h != nil && off == h.off {
		s.hold = nil
	} else {
		h = nil
	}
	s.mu.Unlock()
	if h == nil {
		return s.Device.WriteAt(p, off)
	}
	p = bytes.Clone(p)
	close(h.came)
	<-h.letGo
	defer close(h.carriedOut)
	return s.Device.WriteAt(p, off)
}

// Close does nothing: the disk survives its servers.
func (s *slow) Close() error { return nil }

// server serves a disk as some NBD servers do: a connection knows nothing of
// what another one still has to do.
type server struct {
	t    *testing.T
	disk block.Device
	mu   sync.Mutex
	open []*os.File // guarded by mu; the connections' sockets
}

// single is a listener of one connection.
type single struct {
	net.Listener
	c   chan net.Conn
	end context.Context
}

func (s single) Accept() (net.Conn, error) {
	select {
	case c := <-s.c:
		return c, nil
	case <-s.end.Done():
		return nil, net.ErrClosed
	}
}

func (single) Close() error { return nil }

func (s *server) serve(ctx context.Context, l net.Listener, done *sync.WaitGroup) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		f, err := c.(*net.UnixConn).File()
		if err != nil {
			s.t.Error(err)
			return
		}
		s.mu.Lock()
		s.open = append(s.open, f)
		s.mu.Unlock()
		srv := nbd.NewServer(nbd.Options{})
		if err := srv.Add(nbd.Export{Name: "x", Device: s.disk}); err != nil {
			s.t.Error(err)
		}
		one := single{l, make(chan net.Conn, 1), ctx}
		one.c <- c
		done.Go(func() { _ = srv.Serve(ctx, one) })
	}
}

// cut ends the connections there are.
func (s *server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.open {
		_ = unix.Shutdown(int(f.Fd()), unix.SHUT_RDWR) // it may have ended
		_ = f.Close()
	}
	s.open = nil
}

// A connection to an NBD server ends with a write under way: cut, or because the
// data plane was killed. The write is sent again and answered, the guest writes
// something else there, that is shipped and acknowledged; then the server
// carries out the first one. Nobody can tell the guest, but the copy follows.
func TestAWriteThatAnotherServerCarriesOutLateReachesTheCopy(t *testing.T) {
	for how, kills := range map[string]int{"cut": 0, "killed": 1, "cut, then killed": -1, "killed twice": 2} {
		t.Run(how, func(t *testing.T) { lateWrite(t, kills > 0, kills == 2 || kills < 0) })
	}
}

// With again the data plane is killed once more when all has been shipped: what
// the first process knew is all that tells of the late write.
func lateWrite(t *testing.T, kill, again bool) {
	t.Parallel()
	ctx, done := context.WithTimeout(t.Context(), dt.Patience)
	defer done()
	served, cancel := context.WithCancel(context.Background()) // the data plane's end needs the server
	cfg := dt.Config(t, 8*mib)
	socket := filepath.Join(cfg.RunDir, "up.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	const at = 5 * mib
	h := &held{off: at, came: make(chan struct{}), letGo: make(chan struct{}), carriedOut: make(chan struct{})}
	disk := &slow{Device: block.NewMem(8 * mib), hold: h}
	up := &server{t: t, disk: disk}
	var all sync.WaitGroup
	all.Go(func() { up.serve(served, l, &all) })
	letGo := sync.OnceFunc(func() { close(h.letGo) })
	t.Cleanup(func() { letGo(); cancel(); _ = l.Close(); up.cut(); all.Wait() })
	cfg.Disks[0] = dataplane.DiskConfig{Name: "vda", Kind: dataplane.NBD, URI: "nbd+unix:///x?socket=" + socket}
	c := dt.Ensure(t, &cfg)
	open(t, c, 1)
	if status(t, c).Disks[0].Late {
		t.Error("something is late from the start")
	}
	g := dt.Boot(t, cfg, 3)

	first, second := bytes.Repeat([]byte("first..."), 512), bytes.Repeat([]byte("second.."), 512)
	written := make(chan struct{})
	go func() { defer close(written); g.Write("vda", first, at) }()
	<-h.came
	if kill {
		dt.Kill(t, status(t, c).PID)
	} else {
		up.cut()
	}
	<-written
	g.Write("vda", second, at)
	if !kill { // then a loss is marked, by its own goroutine
		for status(t, c).Pending != 8*mib {
			if ctx.Err() != nil {
				t.Fatal("the loss was not marked")
			}
		}
	}
	copyOf := map[string]*block.Mem{}
	parent := shipOnto(t, c, delta.Pos{}, copyOf)
	if got := dt.Content(t, copyOf["vda"]); !bytes.Equal(got[at:at+len(second)], second) {
		t.Fatal("the copy does not have what the guest wrote last")
	}
	if again {
		dt.Kill(t, status(t, c).PID)
	}
	if !status(t, c).Disks[0].Late {
		t.Error("the status does not say that something may come late")
	}
	letGo()
	<-h.carriedOut
	for got := []byte(nil); !bytes.Equal(got, first); got = dt.Content(t, copyOf["vda"])[at : at+len(first)] {
		if ctx.Err() != nil {
			t.Fatal("the copy never has what the server carried out late")
		}
		parent = shipOnto(t, c, parent, copyOf)
	}
	dt.SameContent(t, "copy", dt.Content(t, copyOf["vda"]), dt.Content(t, disk.Device))
}

// shipOnto freezes, applies and acknowledges one epoch, unless nothing has changed.
func shipOnto(t *testing.T, c *dataplane.Client, parent delta.Pos, to map[string]*block.Mem) delta.Pos {
	t.Helper()
	e, err := c.Freeze(t.Context(), dataplane.FreezeRequest{Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	if e.Empty {
		return parent
	}
	r, err := c.Frames(t.Context(), e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	pos := dt.MustApply(t, r, to).Pos
	if err := c.Ack(t.Context(), pos); err != nil {
		t.Fatal(err)
	}
	return pos
}
