package replicad

import (
	"context"
	"fmt"
	"time"

	"kvmreplica/internal/version"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/peer"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// service is what paired hosts may ask: the VMs' part comes from the manager.
type service struct {
	*vm.Manager
	d *Daemon
}

var _ wire.Service = (*service)(nil)

// Hello exchanges versions and clocks.
func (s *service) Hello(_ context.Context, r wire.HelloRequest) (wire.HelloReply, error) {
	if r.Min > wire.ProtocolMax || r.Max < wire.ProtocolMin {
		return wire.HelloReply{}, &wire.Error{Kind: wire.KindVersion, Text: fmt.Sprintf("this host speaks protocols %d to %d, the caller %d to %d", wire.ProtocolMin, wire.ProtocolMax, r.Min, r.Max), Hint: "upgrade the older host"}
	}
	return wire.HelloReply{
		Protocol: min(r.Max, wire.ProtocolMax), Host: s.d.id.Host(), Name: s.d.name,
		Version: version.String(), Now: time.Now(), Receiving: s.d.conf().Receiving,
	}, nil
}

// owners answers from memory whose VM is whose.
type owners struct{ vms *vm.Manager }

// Relation returns the relationship of a VM.
func (o owners) Relation(id wire.VMID) (peer.Relation, bool) {
	v, ok := o.vms.Find(id)
	if !ok {
		return peer.Relation{}, false
	}
	return peer.Relation{Peer: v.Peer(), Receives: v.Receives()}, true
}

// Usage sums what a host's VMs hold here.
func (o owners) Usage(host wire.HostID, except wire.VMID) peer.Usage {
	n, b := o.vms.Count(host, except)
	return peer.Usage{VMs: n, Bytes: b}
}

// dial returns the service of a paired host; the connection is made by calls.
func (d *Daemon) dial(host wire.HostID) (wire.Service, error) { return d.client(host) }

func (d *Daemon) client(host wire.HostID) (*peer.Client, error) {
	if _, ok := d.peers.Get(host); !ok {
		return nil, &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("host %s is not paired with this one", host), Hint: "replicactl peer invite on one host, peer join on the other"}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if c, ok := d.clients[host]; ok {
		return c, nil
	}
	b := &peer.Bandwidth{}
	b.Set(d.conf().RateAt(time.Now()))
	c, err := peer.NewClient(peer.ClientConfig{Identity: d.id, Store: d.peers, Host: host, Bandwidth: b})
	if err != nil {
		return nil, err
	}
	d.clients[host], d.bands[host] = c, b
	return c, nil
}

func (d *Daemon) closeClients() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for h, c := range d.clients {
		if err := c.Close(); err != nil {
			d.log.Warn("close the connection", "peer", string(h), "err", err)
		}
	}
	clear(d.clients)
	clear(d.bands)
}

// dropClient forgets a removed host's connection.
func (d *Daemon) dropClient(h wire.HostID) error {
	d.mu.Lock()
	c := d.clients[h]
	delete(d.clients, h)
	delete(d.bands, h)
	d.mu.Unlock()
	if c == nil {
		return nil
	}
	return c.Close()
}

// grant is the authorisation entry of a paired host.
func (d *Daemon) grant(host wire.HostID) (vm.Grant, error) {
	r, ok := d.peers.Get(host)
	if !ok {
		return vm.Grant{}, &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("host %s is not paired with this one", host), Hint: "replicactl peer list"}
	}
	a := r.Allow
	root := a.StorageRoot
	if root == "" && len(d.conf().StorageRoots) > 0 {
		root = d.conf().StorageRoots[0]
	}
	return vm.Grant{Name: r.Name, MaySend: a.MaySend && d.conf().Receiving, Deaf: !d.conf().Receiving, Root: root, MaxVMs: a.MaxVMs, MaxDisks: a.MaxDisks, MaxBytes: a.MaxBytes}, nil
}

// movePeer records another address of a paired host, once that host has answered
// there; by force also if not.
func (d *Daemon) movePeer(ctx context.Context, a api.Action, emit func(api.Event)) error {
	rec, err := d.peers.Find(a.Peer)
	if err != nil {
		return err
	}
	addr, err := peer.Address(a.To, defaultPort)
	if err != nil {
		return err
	}
	c, err := d.client(rec.Host)
	if err != nil {
		return err
	}
	there := false
	for _, k := range c.Test(ctx, peer.TestInfo{Version: version.String(), Address: addr}) {
		emit(api.Event{Check: &k})
		there = there || k.Name == "identity" && k.Result == wire.OK
	}
	if !there && !a.Force {
		return &wire.Error{
			Kind: wire.KindRefused, Text: fmt.Sprintf("%s does not answer at %s; it is still looked for at %s", rec.Name, addr, rec.Address),
			Hint: "see the checks above; with --force the address is recorded all the same",
		}
	}
	if err := d.peers.SetAddress(rec.Host, addr); err != nil {
		return err
	}
	d.log.Info("a peer has another address", "peer", rec.Name, "was", rec.Address, "is", addr, "answers", there)
	emit(api.Event{Note: fmt.Sprintf("%s is looked for at %s", rec.Name, addr)})
	return nil
}
