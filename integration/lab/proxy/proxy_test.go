package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 2 * time.Minute

// echo is a target that sends everything back.
func echo(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		<-done
	})
	return ln.Addr().String()
}

func start(t *testing.T) (*Proxy, net.Conn) {
	p, err := Listen("127.0.0.1:0", echo(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p, dial(t, p)
}

func dial(t *testing.T, p *Proxy) net.Conn {
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

func exchange(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(s))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != s {
		t.Fatalf("got %q, %v; want %q back", got, err, s)
	}
}

func TestRelaysAndCountsBothDirections(t *testing.T) {
	p, c := start(t)
	exchange(t, c, "hello")
	if p.Bytes(Up) != 5 || p.Bytes(Down) != 5 || p.Open() != 1 {
		t.Errorf("counted %d up, %d down, %d open; want 5, 5, 1", p.Bytes(Up), p.Bytes(Down), p.Open())
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(c); err != nil || len(rest) != 0 {
		t.Errorf("after an orderly end: %q, %v; want an orderly end back", rest, err)
	}
}

func TestCutAfterLetsExactlySoManyBytesPass(t *testing.T) {
	for _, n := range []int64{0, 1, 4, 5, 100_000} {
		p, c := start(t)
		exchange(t, c, "before")
		p.CutAfter(Down, n)
		go func() { _, _ = c.Write(make([]byte, 200_000)) }()
		got, err := io.ReadAll(c)
		// A reset may overtake bytes on their way; none may be too many.
		if int64(len(got)) > n || err == nil {
			t.Errorf("cut after %d: %d bytes arrived, %v; want at most %d and an error", n, len(got), err, n)
		}
		if p.Bytes(Down) != 6+n {
			t.Errorf("cut after %d: %d bytes counted, want %d", n, p.Bytes(Down), 6+n)
		}
		exchange(t, dial(t, p), "a cut happens once")
	}
}

func TestStalledDirectionHoldsWhileTheOtherFlows(t *testing.T) {
	p, c := start(t)
	exchange(t, c, "before")
	p.Stall(Down, true)
	if _, err := io.WriteString(c, "held"); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	if n, err := c.Read(b); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d bytes, %v through a stalled direction", n, err)
	}
	if up := p.Bytes(Up); up != 10 {
		t.Errorf("%d bytes went up, want 10: only one direction is stalled", up)
	}
	p.Stall(Down, false)
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "held" {
		t.Errorf("after the stall: %q, %v; want what was held", b, err)
	}
}

func TestDownEndsConnectionsUntilItIsUpAgain(t *testing.T) {
	p, c := start(t)
	exchange(t, c, "before")
	p.SetDown(true)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlived the link")
	}
	// The reset may meet the dial itself.
	if c, err := net.DialTimeout("tcp", p.Addr(), patience); err == nil {
		t.Cleanup(func() { _ = c.Close() })
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("a connection was served while the link was down")
		}
	}
	p.SetDown(false)
	exchange(t, dial(t, p), "after")
}

func TestRateAndLatencyTakeTheirTime(t *testing.T) {
	p, c := start(t)
	p.Latency(Up, 30*time.Millisecond)
	began := time.Now()
	exchange(t, c, "x")
	if took := time.Since(began); took < 30*time.Millisecond {
		t.Errorf("took %v with a latency of 30ms", took)
	}
	p.Latency(Up, 0)
	p.Rate(Up, 100_000)
	began = time.Now()
	want := bytes.Repeat([]byte("r"), 20_000)
	exchange(t, c, string(want))
	if took := time.Since(began); took < 190*time.Millisecond {
		t.Errorf("20,000 bytes at 100,000 a second took %v, want 0.2 s", took)
	}
}

func TestCloseEndsStalledConnections(t *testing.T) {
	p, c := start(t)
	exchange(t, c, "before")
	p.Stall(Up, true)
	p.Stall(Down, true)
	if err := p.Close(); err != nil { // the leak check of TestMain does the rest
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlived its proxy")
	}
}
