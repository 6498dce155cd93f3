package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/peer"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// host is one side of the pair: its identity and whom it knows.
type host struct {
	id    *peer.Identity
	known *peer.Store
}

func openHost(dir, name string) (*host, error) {
	dir = filepath.Join(dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	files, err := fsx.OS(dir)
	if err != nil {
		return nil, err
	}
	h := &host{}
	if h.id, err = peer.OpenIdentity(files, name, time.Now()); err != nil {
		return nil, err
	}
	sub := filepath.Join(dir, "peers")
	if err := os.MkdirAll(sub, 0o700); err != nil {
		return nil, err
	}
	if files, err = fsx.OS(sub); err != nil {
		return nil, err
	}
	h.known, err = peer.OpenStore(files)
	return h, err
}

// trust makes h know o, as pairing would.
func (h *host) trust(o *host, address string) error {
	return h.known.Put(peer.Record{
		Host: o.id.Host(), Name: o.id.Name(), Address: address, Pin: o.id.Pin(), Anchor: o.id.Anchor(),
		Allow: peer.Authorisation{MaySend: true, StorageRoot: "/srv/replicas", MaxVMs: 1},
	})
}

// replicaHost offers one VM's store to its peer: what the daemon does, without
// records and roles.
type replicaHost struct {
	wire.Service // whatever is not needed here
	store        *points.Store
	from         wire.HostID
	gen          delta.Generation
}

var (
	_ session.Replica = (*replicaHost)(nil)
	_ peer.Ownership  = (*replicaHost)(nil)
)

// Relation implements peer.Ownership.
func (r *replicaHost) Relation(vm wire.VMID) (peer.Relation, bool) {
	return peer.Relation{Peer: r.from, Receives: true}, vm == planeVM
}

// Usage implements peer.Ownership.
func (r *replicaHost) Usage(wire.HostID, wire.VMID) peer.Usage { return peer.Usage{} }

// Handshake implements session.Replica.
func (r *replicaHost) Handshake(_ context.Context, q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	st := r.store.Status()
	h := wire.HandshakeReply{VM: q.VM, Role: "replica", Generation: r.gen}
	if st.State == points.Seeding {
		h.Seeding = map[wire.DiskName]int64{}
		for d, c := range st.Seeded {
			h.Seeding[wire.DiskName(d)] = c
		}
		return h, nil
	}
	h.Committed, h.Generation = st.Committed, st.Committed.Generation
	return h, nil
}

// EpochProgress implements session.Replica.
func (r *replicaHost) EpochProgress(_ context.Context, k wire.EpochKey) (uint32, error) {
	return r.store.Progress(k.Generation, k.Epoch, k.Nonce), nil
}

// PutEpoch implements session.Replica.
func (r *replicaHost) PutEpoch(ctx context.Context, _ wire.EpochKey, _ uint32, body io.Reader) (delta.Pos, error) {
	d := delta.NewDecoder(body)
	h, err := d.Header()
	if err != nil {
		return delta.Pos{}, err
	}
	rcv, err := r.store.Begin(h)
	if err != nil {
		return delta.Pos{}, err
	}
	return rcv.Stream(ctx, d)
}

// Beat implements session.Replica.
func (r *replicaHost) Beat(context.Context, wire.Beat) error { return nil }

// serveReplica is the replica's process: the store in dir, offered over TLS. It
// puts its address into a file and serves until ctx ends.
func serveReplica(ctx context.Context, dir string) (err error) {
	me, err := openHost(dir, "replica")
	if err != nil {
		return err
	}
	other, err := openHost(dir, "primary")
	if err != nil {
		return err
	}
	if err := me.trust(other, "127.0.0.1:1"); err != nil {
		return err
	}
	r := &replicaHost{from: other.id.Host(), gen: delta.Generation{1}}
	if r.store, err = makeStore(filepath.Join(dir, "store")); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.store.Close()) }()
	srv, err := peer.NewServer(peer.ServerConfig{
		Identity: me.id, Store: me.known, Service: r, Ownership: r, Receiving: func() bool { return true },
	})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	applied := make(chan error, 1)
	go func() { applied <- r.store.Run(ctx) }()
	if err := writeAddress(dir, l); err != nil {
		return err
	}
	err = srv.Serve(ctx, l)
	if aerr := <-applied; !errors.Is(aerr, context.Canceled) {
		err = errors.Join(err, aerr)
	}
	return err
}

// makeStore makes a replica store whose image equals the primary's: both are
// all zero.
func makeStore(dir string) (*points.Store, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	vm, err := delta.ParseVM(string(planeVM))
	if err != nil {
		return nil, err
	}
	d := &points.Dir{Path: dir}
	cfg := points.Config{VM: vm}
	if err := d.Configure(&cfg); err != nil {
		return nil, err
	}
	s, err := points.Create(cfg, []delta.Disk{{Name: string(planeDisk), Size: shipSize}})
	if err != nil {
		return nil, err
	}
	return s, s.SeedAssume(string(planeDisk))
}

// writeAddress tells the parent where l listens.
func writeAddress(dir string, l net.Listener) error {
	path := filepath.Join(dir, "address")
	if err := os.WriteFile(path+".new", []byte(l.Addr().String()), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// readAddress waits for what writeAddress tells.
func readAddress(ctx context.Context, dir string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	path := filepath.Join(dir, "address")
	for {
		if p, err := os.ReadFile(path); err == nil {
			return strings.TrimSpace(string(p)), os.Remove(path)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("the other process does not listen: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
