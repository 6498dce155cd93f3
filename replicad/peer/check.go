package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/wire"
)

// Clock differences the connection test mentions. Nothing but certificate
// dates depends on clocks.
const (
	skewWarning  = 30 * time.Second
	skewCritical = 12 * time.Hour
)

// TestInfo is what this host says about itself during a connection test.
type TestInfo struct {
	Version string // product version
	Need    int64  // bytes that would be needed there; 0 = unknown
	Address string // host:port to try instead of the recorded one
}

// Test tries everything a replication over this client needs, in order, and
// says for each thing whether it works and what to do if not. Checks that could
// not be made because an earlier one failed are Unknown.
func (c *Client) Test(ctx context.Context, info TestInfo) []wire.Check {
	ctx, cancel := context.WithTimeout(ctx, testTimeout)
	defer cancel()
	t := &test{c: c, info: info}
	for _, step := range []func(context.Context) bool{t.ours, t.reach, t.handshake, t.hello, t.remote} {
		if !step(ctx) {
			break
		}
	}
	t.rest()
	return t.out
}

type test struct {
	c    *Client
	info TestInfo
	rec  Record
	raw  net.Conn
	out  []wire.Check
}

func (t *test) add(name string, r wire.Result, remedy, format string, args ...any) {
	detail := wire.CleanText(fmt.Sprintf(format, args...), wire.MaxText)
	t.out = append(t.out, wire.Check{Name: name, Result: r, Detail: detail, Remedy: remedy})
}

// rest fills in what was not reached.
func (t *test) rest() {
	if t.raw != nil {
		_ = t.raw.Close()
	}
	have := map[string]bool{}
	for _, c := range t.out {
		have[c.Name] = true
	}
	for _, n := range []string{"certificate", "paired", "reach", "path", "tls", "identity", "authorised", "versions", "clock", "receiving", "remote"} {
		if !have[n] {
			t.add(n, wire.Unknown, "", "not tried: an earlier check failed")
		}
	}
}

// ours looks at this host alone.
func (t *test) ours(context.Context) bool {
	soon := t.c.cfg.Identity.Expiries(t.c.cfg.Now())
	if len(soon) == 0 {
		t.add("certificate", wire.OK, "", "valid until %s", t.c.cfg.Identity.Leaf().NotAfter.UTC().Format(time.DateOnly))
	}
	for _, e := range soon[:min(1, len(soon))] {
		r := wire.Warning
		if e.Days < 0 {
			r = wire.Failed
		}
		t.add("certificate", r, e.Hint, "%s ends %s", e.What, e.Ends.UTC().Format(time.RFC3339))
	}
	rec, err := t.c.cfg.Store.trusted(t.c.cfg.Host)
	if t.info.Address != "" {
		rec.Address = t.info.Address
	}
	switch {
	case err != nil:
		t.add("paired", wire.Failed, "replicactl peer invite", "%s", err)
		return false
	case rec.Address == "":
		t.add("paired", wire.Failed, "let it connect to this host, or: replicactl peer address PEER HOST", "no address is known for %s", rec.Name)
		return false
	}
	t.rec = rec
	t.add("paired", wire.OK, "", "%s, key %.16s", rec.Name, rec.Pin)
	return true
}

func (t *test) reach(ctx context.Context) bool {
	start := time.Now()
	raw, err := t.c.cfg.Dial(ctx, "tcp", t.rec.Address)
	if err != nil {
		t.add("reach", wire.Failed, "is replicad running there, does a firewall let the port through?", "%s: %s", t.rec.Address, err)
		t.path(nil)
		return false
	}
	t.raw = raw
	t.add("reach", wire.OK, "", "%s in %v", t.rec.Address, time.Since(start).Round(time.Microsecond))
	t.path(raw)
	return true
}

func (t *test) handshake(ctx context.Context) bool {
	hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var auth error
	conn := tls.Client(t.raw, baseTLS(t.c.cfg.Identity, protoMain, func(cs tls.ConnectionState) error {
		auth = t.c.verify(cs)
		return auth
	}))
	err := conn.HandshakeContext(hctx)
	switch {
	case auth != nil:
		t.add("tls", wire.OK, "", "TLS 1.3")
		t.add("identity", wire.Failed, hintOf(auth), "%s", auth)
		return false
	case err != nil:
		t.add("tls", wire.Failed, "a connection that opens and then stalls is often an MTU problem; compare both hosts' MTU", "%s", err)
		return false
	}
	t.add("tls", wire.OK, "", "TLS 1.3")
	t.add("identity", wire.OK, "", "host %s, as pinned", t.rec.Host)
	return true
}

func hintOf(err error) string {
	var a *AuthError
	var e *wire.Error
	switch {
	case errors.As(err, &a):
		return a.Hint
	case errors.As(err, &e):
		return e.Hint
	}
	return ""
}

func (t *test) hello(ctx context.Context) bool {
	sent := t.c.cfg.Now()
	id := t.c.cfg.Identity
	a, err := t.c.Hello(ctx, wire.HelloRequest{
		Min: wire.ProtocolMin, Max: wire.ProtocolMax, Host: id.Host(), Name: id.Name(), Version: t.info.Version, Now: sent,
	})
	var e *wire.Error
	if errors.As(err, &e) && e.Kind == wire.KindVersion {
		t.add("authorised", wire.OK, "", "the other host knows this one")
		t.add("versions", wire.Failed, e.Hint, "%s", e.Text)
		return false
	}
	if err != nil {
		t.add("authorised", wire.Failed, hintOf(err), "%s", err)
		return false
	}
	t.add("authorised", wire.OK, "", "the other host knows this one")
	t.add("versions", wire.OK, "", "protocol %d, %s there", a.Protocol, a.Version)
	t.clock(a.Now, sent, t.c.cfg.Now())
	if a.Receiving {
		t.add("receiving", wire.OK, "", "the other host receives replicas")
	} else {
		t.add("receiving", wire.Warning, "set receiving = true in replicad.toml there", "the other host does not receive replicas")
	}
	return true
}

func (t *test) clock(theirs, sent, got time.Time) {
	skew := theirs.Sub(sent.Add(got.Sub(sent) / 2)).Abs().Round(time.Millisecond)
	switch {
	case skew > skewCritical:
		t.add("clock", wire.Failed, "set both clocks (chrony, systemd-timesyncd)", "the clocks differ by %v; certificates may seem invalid", skew)
	case skew > skewWarning:
		t.add("clock", wire.Warning, "set both clocks (chrony, systemd-timesyncd)", "the clocks differ by %v", skew)
	default:
		t.add("clock", wire.OK, "", "the clocks differ by %v", skew)
	}
}

// remote appends the other host's own list: authorisation in detail, free space.
func (t *test) remote(ctx context.Context) bool {
	a, err := t.c.Check(ctx, wire.CheckRequest{For: "connection", Need: t.info.Need})
	if err != nil {
		t.add("remote", wire.Failed, hintOf(err), "%s", err)
		return false
	}
	t.add("remote", wire.OK, "", "%s made there", count.Of(len(a.Checks), "check"))
	for _, c := range a.Checks[:min(len(a.Checks), 64)] {
		switch c.Result {
		case wire.OK, wire.Failed, wire.Unknown, wire.Warning:
		default:
			c.Result = wire.Unknown
		}
		t.add("there: "+wire.CleanText(c.Name, 64), c.Result, wire.CleanText(c.Remedy, wire.MaxText), "%s", c.Detail)
	}
	return true
}
