package peer

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"kvmreplica/replicad/wire"
)

// results runs the connection test and indexes it.
func results(t *testing.T, c *Client) map[string]wire.Check {
	t.Helper()
	m := map[string]wire.Check{}
	for _, x := range c.Test(soon(t), TestInfo{Version: "1.0"}) {
		if _, twice := m[x.Name]; twice {
			t.Errorf("check %s is listed twice", x.Name)
		}
		m[x.Name] = x
		if (x.Result == wire.Failed || x.Result == wire.Warning) && x.Remedy == "" {
			t.Errorf("%s is %s without a remedy: %s", x.Name, x.Result, x.Detail)
		}
	}
	return m
}

func expect(t *testing.T, got map[string]wire.Check, want map[string]wire.Result) {
	t.Helper()
	for _, name := range []string{"certificate", "paired", "reach", "path", "tls", "identity", "authorised", "versions", "clock", "receiving", "remote"} {
		w, ok := want[name]
		if !ok {
			w = wire.OK
		}
		if got[name].Result != w {
			t.Errorf("%s: %s (%s), want %s", name, got[name].Result, got[name].Detail, w)
		}
	}
}

func TestConnectionTestOfAHealthyPair(t *testing.T) {
	_, r, c := pairOf(t)
	r.svc.reply = wire.CheckReply{Checks: []wire.Check{{Name: "space", Result: wire.Warning, Detail: "tight\x1b[0m", Remedy: "add disks"}, {Name: "odd", Result: "fine"}}}
	got := results(t, c)
	expect(t, got, nil)
	if x := got["there: space"]; x.Result != wire.Warning || x.Remedy != "add disks" || x.Detail != "tight?[0m" {
		t.Errorf("the other host's check came as %+v", x)
	}
	if x := got["there: odd"]; x.Result != wire.Unknown {
		t.Errorf("an unknown result came as %+v", x)
	}
}

func TestConnectionTestNamesTheFirstThingThatFails(t *testing.T) {
	unknown := func(from int) map[string]wire.Result {
		names := []string{"certificate", "paired", "reach", "path", "tls", "identity", "authorised", "versions", "clock", "receiving", "remote"}
		m := map[string]wire.Result{}
		for _, n := range names[from:] {
			m[n] = wire.Unknown
		}
		return m
	}
	with := func(m map[string]wire.Result, name string, r wire.Result) map[string]wire.Result {
		m[name] = r
		return m
	}
	t.Run("nobody answers", func(t *testing.T) {
		p, r, _ := pairOf(t)
		c := p.client(t, r, func(cfg *ClientConfig) {
			cfg.Dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("connection refused") }
		})
		m := with(unknown(4), "reach", wire.Failed)
		expect(t, results(t, c), m)
	})
	t.Run("removed here", func(t *testing.T) {
		p, r, c := pairOf(t)
		errFatal(t, p.store.Remove(r.id.Host()))
		expect(t, results(t, c), with(unknown(2), "paired", wire.Failed))
	})
	t.Run("removed there", func(t *testing.T) {
		p, r, c := pairOf(t)
		errFatal(t, r.store.Remove(p.id.Host()))
		expect(t, results(t, c), with(unknown(7), "authorised", wire.Failed))
	})
	t.Run("another host answers", func(t *testing.T) {
		p, r, c := pairOf(t)
		imp := newHost(t, "impostor")
		imp.serve(t)
		errFatal(t, p.store.SetAddress(r.id.Host(), imp.addr))
		expect(t, results(t, c), with(unknown(6), "identity", wire.Failed))
	})
	t.Run("another host answers at an address to be tried", func(t *testing.T) {
		_, _, c := pairOf(t)
		imp := newHost(t, "impostor")
		imp.serve(t)
		m := map[string]wire.Result{}
		for _, x := range c.Test(soon(t), TestInfo{Address: imp.addr}) {
			m[x.Name] = x.Result
		}
		if m["reach"] != wire.OK || m["identity"] != wire.Failed {
			t.Errorf("got %v", m)
		}
		expect(t, results(t, c), nil) // nothing was recorded
	})
	t.Run("clock and receiving", func(t *testing.T) {
		_, r, c := pairOf(t, func(cfg *ServerConfig) { cfg.Receiving = nil })
		r.svc.reply = wire.HelloReply{Now: time.Now().Add(-time.Hour)}
		expect(t, results(t, c), map[string]wire.Result{"clock": wire.Warning, "receiving": wire.Warning})
	})
	t.Run("versions", func(t *testing.T) {
		_, r, c := pairOf(t)
		r.svc.fail = &wire.Error{Kind: wire.KindVersion, Text: "too old", Hint: "upgrade the older host"}
		expect(t, results(t, c), with(unknown(8), "versions", wire.Failed))
	})
	t.Run("not TLS", func(t *testing.T) {
		p, r, c := pairOf(t)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		errFatal(t, err)
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn, err := l.Accept()
			if err == nil {
				_, _ = conn.Write([]byte("SSH-2.0-OpenSSH\r\n"))
				_ = conn.Close()
			}
		}()
		t.Cleanup(func() { _ = l.Close(); <-done })
		errFatal(t, p.store.SetAddress(r.id.Host(), l.Addr().String()))
		expect(t, results(t, c), with(unknown(5), "tls", wire.Failed))
	})
}
