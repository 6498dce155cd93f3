package nbd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"kvmreplica/internal/block"
)

// linePair is two lines that talk to each other.
func linePair(t testing.TB) (a, b *line, closed *atomic.Int32) {
	t.Helper()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	near, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	closed = new(atomic.Int32)
	count := func() { closed.Add(1) }
	a, b = newLine(near, count), newLine(far, count)
	if a == nil || b == nil {
		t.Fatal("a unix socket cannot become a line")
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b, closed
}

func TestALineIsANetConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		a, b, _ := linePair(t)
		return a, b, func() { _, _ = a.Close(), b.Close() }, nil
	})
}

func TestAClosedLineTouchesNoDescriptorOfOthers(t *testing.T) {
	a, b, closed := linePair(t)
	fds := []int{a.fd, a.wake}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	// Whoever opens something now gets the same numbers.
	var files []*os.File
	for range 4 {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	for _, call := range []func() error{
		a.Close, a.Close,
		func() error { _, err := a.Read(make([]byte, 1)); return err },
		func() error { _, err := a.Write([]byte{1}); return err },
		func() error { return a.SetDeadline(time.Now()) },
	} {
		if err := call(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("on a closed line: %v", err)
		}
	}
	for _, f := range files {
		if _, err := f.Stat(); err != nil {
			t.Errorf("a call on a closed line (descriptors %v) closed descriptor %d: %v", fds, f.Fd(), err)
		}
	}
	if _, err := b.Read(make([]byte, 1)); err == nil {
		t.Error("the peer does not see the end")
	}
	if n := closed.Load(); n != 1 {
		t.Errorf("closed was told %d times", n)
	}
}

func TestCloseEndsWhatWaits(t *testing.T) {
	a, _, _ := linePair(t)
	ends := make(chan error, 2)
	go func() { _, err := a.Read(make([]byte, 1)); ends <- err }()
	go func() { _, err := a.Write(make([]byte, 64<<20)); ends <- err }()
	for a.state.Load() < 2 {
		runtime.Gosched()
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-ends; !errors.Is(err, net.ErrClosed) {
			t.Errorf("ended with %v", err)
		}
	}
}

func TestWatchingIsGivenUpWhereItIsInVain(t *testing.T) {
	var w watcher
	looked := 0
	for range 5000 {
		seen := false
		w.look(func() bool { seen = true; return false })
		if seen {
			looked++
		}
	}
	if looked < 10 || looked > 20 {
		t.Errorf("of 5000 waits in vain %d were watched", looked)
	}
	for range 2000 { // worth it again
		w.look(func() bool { return true })
	}
	if w.skip != 0 || w.misses != 0 {
		t.Errorf("watching is worth it again, but skip is %d after %d misses", w.skip, w.misses)
	}
}

// Lines are bounded; connections beyond the bound work all the same, and a line
// that ended makes room.
func TestConnectionsBeyondTheLinesAreServed(t *testing.T) {
	srv := NewServer(Options{Lines: 2})
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	image, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	if err := srv.Add(Export{Device: image}); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ctx, ln) }()
	defer func() { cancel(); <-served }()
	var clients []*Client
	dial := func() {
		c, err := Dial(ctx, "unix", socket, ClientOptions{})
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
		if _, err := c.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
	}
	for range 5 {
		dial()
	}
	if n := srv.lines.Load(); n != 2 {
		t.Fatalf("%d lines for 5 connections, 2 are allowed", n)
	}
	for _, c := range clients {
		_ = c.Close()
	}
	for deadline := time.Now().Add(10 * time.Second); srv.lines.Load() != 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d lines are left of connections that ended", srv.lines.Load())
		}
	}
	dial()
	if n := srv.lines.Load(); n != 1 {
		t.Fatalf("%d lines for the connection that came later", n)
	}
	_ = clients[len(clients)-1].Close()
}
