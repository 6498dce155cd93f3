package peer

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	vmA = wire.VMID("aaaaaaaa-0000-4000-8000-000000000001")
	vmB = wire.VMID("bbbbbbbb-0000-4000-8000-000000000002")
	vmC = wire.VMID("cccccccc-0000-4000-8000-000000000003")
)

// host is one side of a test.
type host struct {
	id    *Identity
	store *Store
	svc   *fakeService
	own   *fakeOwnership
	pair  *Pairing
	srv   *Server
	addr  string
	now   func() time.Time
}

func newHost(t testing.TB, name string) *host {
	t.Helper()
	id, err := OpenIdentity(fsxtest.NewMem(), name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return newHostAs(t, id)
}

func newHostAs(t testing.TB, id *Identity) *host {
	t.Helper()
	store, err := OpenStore(fsxtest.NewMem())
	if err != nil {
		t.Fatal(err)
	}
	return &host{id: id, store: store, svc: &fakeService{}, own: &fakeOwnership{rel: map[wire.VMID]Relation{}}, now: time.Now}
}

// serve starts h's server on loopback until the test ends.
func (h *host) serve(t testing.TB, change ...func(*ServerConfig)) {
	t.Helper()
	h.pair = NewPairing(h.id, h.store, nil, func() time.Time { return h.now() })
	cfg := ServerConfig{
		Identity: h.id, Store: h.store, Service: h.svc, Ownership: h.own, Pairing: h.pair,
		Receiving: func() bool { return true }, Now: func() time.Time { return h.now() },
	}
	for _, c := range change {
		c(&cfg)
	}
	srv, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.srv, h.addr = srv, l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
}

// all is an authorisation that stands in nobody's way.
func all() Authorisation {
	return Authorisation{MaySend: true, StorageRoot: "/srv/replicas", MaxVMs: 10, MayRequestReverse: true}
}

// trust makes h know o, as pairing would.
func (h *host) trust(t testing.TB, o *host, allow Authorisation) {
	t.Helper()
	err := h.store.Put(Record{Host: o.id.Host(), Name: o.id.Name(), Address: o.addr, Pin: o.id.Pin(), Anchor: o.id.Anchor(), Allow: allow})
	if err != nil {
		t.Fatal(err)
	}
}

// client calls o from h.
func (h *host) client(t testing.TB, o *host, change ...func(*ClientConfig)) *Client {
	t.Helper()
	cfg := ClientConfig{Identity: h.id, Store: h.store, Host: o.id.Host(), Now: func() time.Time { return h.now() }}
	for _, c := range change {
		c(&cfg)
	}
	c, err := NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// pairOf is a primary and a replica host that trust each other and share vmA.
func pairOf(t testing.TB, change ...func(*ServerConfig)) (p, r *host, c *Client) {
	t.Helper()
	p, r = newHost(t, "primary"), newHost(t, "replica")
	r.serve(t, change...)
	r.trust(t, p, all())
	p.trust(t, r, Authorisation{})
	r.own.set(vmA, Relation{Peer: p.id.Host(), Receives: true})
	return p, r, p.client(t, r)
}

type fakeOwnership struct {
	mu  sync.Mutex
	rel map[wire.VMID]Relation
	use Usage
}

func (o *fakeOwnership) set(vm wire.VMID, r Relation) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rel[vm] = r
}

func (o *fakeOwnership) Relation(vm wire.VMID) (Relation, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r, ok := o.rel[vm]
	return r, ok
}

func (o *fakeOwnership) Usage(wire.HostID, wire.VMID) Usage {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.use
}

// fakeService answers from its fields and remembers what it was asked.
type fakeService struct {
	mu    sync.Mutex
	calls []string
	seen  []any
	peer  wire.Peer
	body  []byte
	fail  error
	reply any
	put   func(ctx context.Context, body io.Reader) error
	wait  func(ctx context.Context) error
}

func (f *fakeService) note(ctx context.Context, name string, req any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls, f.seen = append(f.calls, name), append(f.seen, req)
	f.peer, _ = wire.PeerFrom(ctx)
	return f.fail
}

func (f *fakeService) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.calls)
}

func (f *fakeService) last() (string, any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.calls) == 0 {
		return "", nil
	}
	return f.calls[len(f.calls)-1], f.seen[len(f.seen)-1]
}

func answer[T any](f *fakeService) (t T) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v, ok := f.reply.(T); ok {
		return v
	}
	return t
}

func (f *fakeService) stream(ctx context.Context, name string, req any, body io.Reader) error {
	if err := f.note(ctx, name, req); err != nil {
		return err
	}
	f.mu.Lock()
	put := f.put
	f.mu.Unlock()
	if put != nil {
		return put(ctx, body)
	}
	data, err := io.ReadAll(body)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.body = data
	return err
}

func (f *fakeService) Hello(ctx context.Context, r wire.HelloRequest) (wire.HelloReply, error) {
	a := answer[wire.HelloReply](f)
	if a.Now.IsZero() {
		a.Now = time.Now()
	}
	return a, f.note(ctx, "hello", r)
}

func (f *fakeService) Check(ctx context.Context, r wire.CheckRequest) (wire.CheckReply, error) {
	return answer[wire.CheckReply](f), f.note(ctx, "check", r)
}

func (f *fakeService) Offer(ctx context.Context, r wire.Offer) (wire.OfferReply, error) {
	return answer[wire.OfferReply](f), f.note(ctx, "offer", r)
}

func (f *fakeService) Withdraw(ctx context.Context, r wire.Withdraw) error {
	return f.note(ctx, "withdraw", r)
}

func (f *fakeService) Handshake(ctx context.Context, r wire.HandshakeRequest) (wire.HandshakeReply, error) {
	return answer[wire.HandshakeReply](f), f.note(ctx, "handshake", r)
}

func (f *fakeService) PutSeed(ctx context.Context, r wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	return answer[wire.SeedReply](f), f.stream(ctx, "seed", r, body)
}

func (f *fakeService) EpochProgress(ctx context.Context, k wire.EpochKey) (uint32, error) {
	return answer[uint32](f), f.note(ctx, "progress", k)
}

type epochArgs struct {
	Key  wire.EpochKey
	From uint32
}

func (f *fakeService) PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error) {
	return answer[delta.Pos](f), f.stream(ctx, "epoch", epochArgs{k, from}, body)
}

func (f *fakeService) Beat(ctx context.Context, r wire.Beat) error { return f.note(ctx, "beat", r) }

func (f *fakeService) Digests(ctx context.Context, r wire.DigestRequest) (wire.DigestReply, error) {
	return answer[wire.DigestReply](f), f.note(ctx, "digests", r)
}

func (f *fakeService) Status(ctx context.Context, vm wire.VMID) (wire.PeerVM, error) {
	return answer[wire.PeerVM](f), f.note(ctx, "status", vm)
}

func (f *fakeService) Points(ctx context.Context, vm wire.VMID) (wire.PointsReply, error) {
	return answer[wire.PointsReply](f), f.note(ctx, "points", vm)
}

func (f *fakeService) Failover(ctx context.Context, r wire.FailoverRequest) (wire.FailoverReply, error) {
	if f.wait != nil {
		if err := f.wait(ctx); err != nil {
			return wire.FailoverReply{}, err
		}
	}
	return answer[wire.FailoverReply](f), f.note(ctx, "failover", r)
}

// kindOf is the kind of a *wire.Error, or -1.
func kindOf(err error) wire.Kind {
	var e *wire.Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return -1
}

// patience is for loaded machines: what must merely happen gets this long.
const patience = 2 * time.Minute

// soon is for calls that must come to an end.
func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func key() wire.EpochKey {
	return wire.EpochKey{VM: vmA, Generation: delta.Generation{1}, Epoch: 7, Nonce: 1<<64 - 1}
}

func offer() wire.Offer {
	return wire.Offer{
		VM: vmA, Name: "db", Disks: []wire.Disk{{Name: "vda", Size: 1 << 30, Format: "raw"}},
		Spec: json.RawMessage(`{"cpus":2}`), Interval: time.Minute, Generation: delta.Generation{1}, Points: 3, Request: "r1",
	}
}
