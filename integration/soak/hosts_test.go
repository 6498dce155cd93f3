package soak_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"kvmreplica/integration/lab/proxy"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/peer"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/session/sessiontest"
	"kvmreplica/replicad/wire"
)

const (
	disks    = 2
	diskSize = 16 << 20
)

// vm is one protected machine.
type vm struct {
	cfg     dataplane.Config
	plane   *dataplane.Client
	guest   *dt.Guest
	store   *points.Store
	session *session.Session
}

// hosts are two paired hosts in this process, and the line between them.
type hosts struct {
	client  *peer.Client
	service *service
	line    *proxy.Proxy
}

// service answers for the replica's host.
type service struct {
	wire.Service // what a session does not ask for
	from         wire.HostID

	mu  sync.Mutex
	vms map[wire.VMID]*sessiontest.Replica // guarded by mu
}

var _ peer.Ownership = (*service)(nil)

func (s *service) of(id wire.VMID) *sessiontest.Replica {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vms[id]
}

// Relation implements peer.Ownership.
func (s *service) Relation(id wire.VMID) (peer.Relation, bool) {
	return peer.Relation{Peer: s.from, Receives: true}, s.of(id) != nil
}

// Usage implements peer.Ownership.
func (s *service) Usage(wire.HostID, wire.VMID) peer.Usage { return peer.Usage{} }

func (s *service) Handshake(ctx context.Context, r wire.HandshakeRequest) (wire.HandshakeReply, error) {
	return s.of(r.VM).Handshake(ctx, r)
}

func (s *service) PutSeed(ctx context.Context, r wire.SeedRequest, b io.Reader) (wire.SeedReply, error) {
	return s.of(r.VM).PutSeed(ctx, r, b)
}

func (s *service) EpochProgress(ctx context.Context, k wire.EpochKey) (uint32, error) {
	return s.of(k.VM).EpochProgress(ctx, k)
}

func (s *service) PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, b io.Reader) (delta.Pos, error) {
	return s.of(k.VM).PutEpoch(ctx, k, from, b)
}

func (s *service) Beat(ctx context.Context, r wire.Beat) error { return s.of(r.VM).Beat(ctx, r) }

func (s *service) Digests(ctx context.Context, r wire.DigestRequest) (wire.DigestReply, error) {
	return s.of(r.VM).Digests(ctx, r)
}

// newHosts pairs two hosts whose connections go through a proxy.
func newHosts(t *testing.T) *hosts {
	t.Helper()
	open := func(name string) (*peer.Identity, *peer.Store) {
		id, err := peer.OpenIdentity(fsxtest.NewMem(), name, time.Now())
		must(t, err)
		store, err := peer.OpenStore(fsxtest.NewMem())
		must(t, err)
		return id, store
	}
	pid, pstore := open("primary")
	rid, rstore := open("replica")
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	line, err := proxy.Listen("127.0.0.1:0", ln.Addr().String())
	must(t, err)
	must(t, rstore.Put(peer.Record{
		Host: pid.Host(), Name: "primary", Address: "127.0.0.1:9", Pin: pid.Pin(), Anchor: pid.Anchor(),
		Allow: peer.Authorisation{MaySend: true, StorageRoot: "/srv", MaxVMs: 10},
	}))
	must(t, pstore.Put(peer.Record{Host: rid.Host(), Name: "replica", Address: line.Addr(), Pin: rid.Pin(), Anchor: rid.Anchor()}))
	h := &hosts{service: &service{from: pid.Host(), vms: map[wire.VMID]*sessiontest.Replica{}}, line: line}
	srv, err := peer.NewServer(peer.ServerConfig{
		Identity: rid, Store: rstore, Service: h.service, Ownership: h.service, Receiving: func() bool { return true },
	})
	must(t, err)
	h.client, err = peer.NewClient(peer.ClientConfig{Identity: pid, Store: pstore, Host: rid.Host(), Stall: 10 * time.Second})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, ln) }()
	t.Cleanup(func() {
		_ = h.client.Close()
		cancel()
		if err := errors.Join(<-done, line.Close()); err != nil {
			t.Error(err)
		}
	})
	return h
}

// protect makes a VM: data plane and guest on one side, a store on the other, a
// session between them.
func (h *hosts) protect(t *testing.T, bin string, i int, seed uint64) *vm {
	t.Helper()
	v := &vm{cfg: dt.Config(t, diskSize, diskSize)}
	v.cfg.Binary, v.cfg.BootID, v.cfg.Name = bin, "", fmt.Sprintf("vm%d", i)
	v.cfg.CaptureBytes = 8 << 20 // soon used to the full, so that what grows afterwards is seen
	v.cfg.VM = wire.VMID(fmt.Sprintf("11111111-2222-3333-4444-%012d", i))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	plane, err := dataplane.Ensure(ctx, v.cfg)
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		plane.Close()
		if err := dataplane.Stop(ctx, v.cfg); err != nil {
			t.Error(err)
		}
	})
	v.plane = plane
	gen := dt.Generation(byte(i + 1))
	must(t, plane.CreateTracker(ctx, dataplane.CreateRequest{Generation: gen}))
	must(t, plane.Export(ctx, dataplane.ExportRequest{On: true}))
	v.guest = dt.Boot(t, v.cfg, seed)
	v.store = open(t, v.cfg)
	replica := &sessiontest.Replica{Get: func() (*points.Store, error) { return v.store, nil }, Generation: gen}
	h.service.mu.Lock()
	h.service.vms[v.cfg.VM] = replica
	h.service.mu.Unlock()
	v.session = session.New(session.Config{
		VM: v.cfg.VM, Name: v.cfg.Name, Source: plane, Replica: h.client, Interval: 500 * time.Millisecond, ScrubRate: 8 << 20,
	})
	run(t, v.session.Run)
	run(t, v.store.Run)
	return v
}

// open makes a store in a directory of its own that keeps few points.
func open(t *testing.T, plane dataplane.Config) *points.Store {
	t.Helper()
	id, err := delta.ParseVM(string(plane.VM))
	must(t, err)
	cfg := points.Config{VM: id, Policy: points.Policy{MinDistance: 2 * time.Second, Max: 20}, Limits: points.Limits{SpoolStep: 1 << 20, KeepSpool: 8 << 20}}
	dir := filepath.Join(t.TempDir(), plane.Name)
	must(t, os.Mkdir(dir, 0o700))
	must(t, (&points.Dir{Path: dir}).Configure(&cfg))
	var list []delta.Disk
	for _, d := range plane.Disks {
		list = append(list, delta.Disk{Name: string(d.Name), Size: diskSize})
	}
	if len(list) != disks {
		t.Fatalf("%d disks", len(list))
	}
	s, err := points.Create(cfg, list)
	must(t, err)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// run lets something run until the test ends.
func run(t *testing.T, fn func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
