package peer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

func TestEveryCallArrivesWholeAndItsAnswerReturns(t *testing.T) {
	p, r, c := pairOf(t)
	ctx := soon(t)
	pos := delta.Pos{Generation: delta.Generation{9}, Epoch: 1<<64 - 1, Digest: delta.Digest{8}}
	hs := wire.HandshakeRequest{VM: vmA, Generation: delta.Generation{1}, Ancestors: []delta.Pos{pos}, Base: pos, Highest: 1<<64 - 1, Disks: offer().Disks, Running: true, Between: true}
	dg := wire.DigestRequest{VM: vmA, Pos: pos, Disk: "vda", Key: [32]byte{5}, Ranges: []wire.Range{{Off: 1 << 40, Len: 1 << 20}, {Off: 0, Len: 512}}}
	seed := wire.SeedRequest{VM: vmA, Generation: delta.Generation{1}, Disk: "vda", Offset: 1 << 40}
	body := make([]byte, 3<<20+17)
	rng := rand.NewChaCha8([32]byte{1})
	_, _ = rng.Read(body)
	for _, e := range []struct {
		name  string
		sent  any
		reply any
		call  func() (any, error)
	}{
		{"check", wire.CheckRequest{VM: vmA, For: "planned", Need: 5}, wire.CheckReply{Checks: []wire.Check{{Name: "room", Result: wire.OK, Detail: "<&>"}}}, func() (any, error) {
			return c.Check(ctx, wire.CheckRequest{VM: vmA, For: "planned", Need: 5})
		}},
		{"offer", offer(), wire.OfferReply{State: "created", Dropped: []string{"tpm"}}, func() (any, error) { return c.Offer(ctx, offer()) }},
		{"withdraw", wire.Withdraw{VM: vmA, Delete: true, Request: "x"}, nil, func() (any, error) {
			return nil, c.Withdraw(ctx, wire.Withdraw{VM: vmA, Delete: true, Request: "x"})
		}},
		{"handshake", hs, wire.HandshakeReply{Role: "replica", Generation: pos.Generation, Committed: pos, Seeding: map[wire.DiskName]int64{"vda": 7}, Partial: &wire.EpochKey{VM: vmA, Nonce: 1 << 63}}, func() (any, error) {
			return c.Handshake(ctx, hs)
		}},
		{"progress", key(), uint32(1<<32 - 1), func() (any, error) { return c.EpochProgress(ctx, key()) }},
		{"beat", wire.Beat{VM: vmA, Pos: pos, Pending: 3, Interval: time.Second}, nil, func() (any, error) {
			return nil, c.Beat(ctx, wire.Beat{VM: vmA, Pos: pos, Pending: 3, Interval: time.Second})
		}},
		{"digests", dg, wire.DigestReply{Digests: [][16]byte{{1}, {2}}}, func() (any, error) { return c.Digests(ctx, dg) }},
		{"status", vmA, wire.PeerVM{VM: vmA, Name: "db", Committed: pos}, func() (any, error) { return c.Status(ctx, vmA) }},
		{"points", vmA, wire.PointsReply{Host: "b", Retention: "24", Points: []wire.Point{{Ordinal: 3, Pos: pos, App: true}}}, func() (any, error) { return c.Points(ctx, vmA) }},
		{"failover", wire.FailoverRequest{VM: vmA, Step: "promote", At: pos, Start: true}, wire.FailoverReply{State: "promoted", Parent: pos, Steps: []wire.Step{{Name: "a", Took: 3}}}, func() (any, error) {
			return c.Failover(ctx, wire.FailoverRequest{VM: vmA, Step: "promote", At: pos, Start: true})
		}},
		{"seed", seed, wire.SeedReply{Cursor: 1 << 41}, func() (any, error) { return c.PutSeed(ctx, seed, bytes.NewReader(body)) }},
		{"epoch", epochArgs{key(), 1<<32 - 1}, pos, func() (any, error) { return c.PutEpoch(ctx, key(), 1<<32-1, bytes.NewReader(body)) }},
	} {
		r.svc.mu.Lock()
		r.svc.reply, r.svc.body = e.reply, nil
		r.svc.mu.Unlock()
		got, err := e.call()
		if err != nil {
			t.Errorf("%s: %v", e.name, err)
			continue
		}
		name, sent := r.svc.last()
		if name != e.name || !cmp.Equal(sent, e.sent) {
			t.Errorf("%s: arrived as %s: %s", e.name, name, cmp.Diff(e.sent, sent))
		}
		if d := cmp.Diff(e.reply, got); d != "" {
			t.Errorf("%s: answer changed: %s", e.name, d)
		}
		if e.name == "seed" || e.name == "epoch" {
			if !bytes.Equal(r.svc.body, body) {
				t.Errorf("%s: body of %d bytes arrived as %d", e.name, len(body), len(r.svc.body))
			}
		}
		if r.svc.peer.Host != p.id.Host() || r.svc.peer.Name != "primary" {
			t.Errorf("%s: called as %+v", e.name, r.svc.peer)
		}
	}
}

func TestHelloSaysWhatTheTransportKnows(t *testing.T) {
	_, r, c := pairOf(t)
	ctx := soon(t)
	r.svc.reply = wire.HelloReply{Host: "somebody else", Protocol: 99, Name: "replica", Now: time.Now()}
	a, err := c.Hello(ctx, wire.HelloRequest{Min: 1, Max: 7})
	if err != nil || a.Host != r.id.Host() || a.Protocol != wire.ProtocolMax || !a.Receiving {
		t.Fatalf("hello: %+v, %v", a, err)
	}
	if _, err := c.Hello(ctx, wire.HelloRequest{Min: 2, Max: 3}); kindOf(err) != wire.KindVersion {
		t.Errorf("future protocol only: %v", err)
	}
	if _, err := c.Hello(ctx, wire.HelloRequest{Min: 0, Max: 0}); kindOf(err) != wire.KindVersion {
		t.Errorf("downgrade: %v", err)
	}
}

func TestErrorsCrossWithKindHintAndPosition(t *testing.T) {
	_, r, c := pairOf(t)
	ctx := soon(t)
	have := delta.Pos{Generation: delta.Generation{3}, Epoch: 4}
	for k := wire.KindInternal; k <= wire.KindSuspect; k++ {
		r.svc.fail = &wire.Error{Kind: k, Text: "because", Hint: "do this", Have: &have}
		_, err := c.Status(ctx, vmA)
		var e *wire.Error
		if !errors.As(err, &e) || e.Kind != k || e.Text != "because" || e.Hint != "do this" || e.Have == nil || *e.Have != have {
			t.Errorf("kind %d came back as %+v", k, err)
		}
	}
	r.svc.fail = &delta.PosMismatchError{Have: have}
	_, err := c.PutEpoch(ctx, key(), 0, bytes.NewReader(make([]byte, 1<<20)))
	var e *wire.Error
	if !errors.As(err, &e) || e.Kind != wire.KindPosMismatch || e.Have == nil || *e.Have != have {
		t.Errorf("position mismatch came back as %v", err)
	}
	r.svc.fail = errors.New("disk \x1b[31mred\x1b[0m\nroot:x:0")
	if _, err = c.Status(ctx, vmA); kindOf(err) != wire.KindInternal || bytes.ContainsAny([]byte(err.Error()), "\x1b\n") {
		t.Errorf("terminal characters crossed: %q", err)
	}
}

func TestARefusedBodyIsNeverSent(t *testing.T) {
	_, r, c := pairOf(t)
	r.svc.fail = &wire.Error{Kind: wire.KindNoSpace, Text: "full"}
	body := &counting{}
	if _, err := c.PutEpoch(soon(t), key(), 0, body); kindOf(err) != wire.KindNoSpace {
		t.Fatalf("got %v", err)
	}
	if n := body.read(); n != 0 {
		t.Fatalf("%d bytes were sent before the refusal", n)
	}
}

func TestASourceThatFailsIsNotTheLinksFault(t *testing.T) {
	_, r, c := pairOf(t)
	r.svc.put = func(_ context.Context, body io.Reader) error { _, err := io.Copy(io.Discard, body); return err }
	bad := errors.New("read of disk vda failed")
	_, err := c.PutEpoch(soon(t), key(), 0, io.MultiReader(bytes.NewReader(make([]byte, 100_000)), failing{bad}))
	if !errors.Is(err, bad) {
		t.Fatalf("got %v", err)
	}
}

func TestTheBodyIsNotReadAfterTheCallReturned(t *testing.T) {
	_, r, c := pairOf(t)
	r.svc.put = func(_ context.Context, body io.Reader) error {
		_, err := io.ReadFull(body, make([]byte, 10))
		return errors.Join(err, &wire.Error{Kind: wire.KindCorrupt, Text: "bad frame"})
	}
	for range 20 {
		body := &counting{}
		_, err := c.PutEpoch(soon(t), key(), 0, body)
		if err == nil {
			t.Fatal("accepted")
		}
		n := body.read()
		if kindOf(err) != wire.KindCorrupt {
			t.Fatalf("got %v", err)
		}
		if _, err := c.Status(soon(t), vmA); err != nil {
			t.Fatalf("after a refused body: %v", err)
		}
		if m := body.read(); m != n {
			t.Fatalf("%d bytes were read after the call returned", m-n)
		}
	}
}

func TestACallOfACancelledContextEndsAtOnce(t *testing.T) {
	_, r, c := pairOf(t)
	started := make(chan struct{})
	r.svc.put = func(ctx context.Context, _ io.Reader) error {
		close(started)
		<-ctx.Done()
		return ctx.Err()
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-started; cancel() }()
	if _, err := c.PutEpoch(ctx, key(), 0, bytes.NewReader([]byte("x"))); !errors.Is(err, context.Canceled) || kindOf(err) != wire.KindUnavailable {
		t.Fatalf("got %v", err)
	}
}

func TestAPanicCostsOnlyItsConnection(t *testing.T) {
	_, r, c := pairOf(t)
	r.svc.put = func(context.Context, io.Reader) error { panic("boom") }
	if _, err := c.PutEpoch(soon(t), key(), 0, bytes.NewReader([]byte("x"))); kindOf(err) != wire.KindUnavailable {
		t.Fatalf("got %v", err)
	}
	if _, err := c.Status(soon(t), vmA); err != nil {
		t.Fatalf("the server is gone: %v", err)
	}
}

// counting is an endless body that counts what was read of it.
type counting struct{ n atomic.Int64 }

func (c *counting) Read(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

func (c *counting) read() int64 { return c.n.Load() }

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }
