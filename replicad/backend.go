package replicad

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/internal/version"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/peer"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

var _ api.Backend = (*Daemon)(nil)

// Host is the daemon's own state.
func (d *Daemon) Host(ctx context.Context) (status.Host, error) {
	h := status.Host{Name: d.name, ID: d.id.Host(), Version: version.String(), Listen: d.cfg.Listen, Receiving: d.conf().Receiving}
	if i, err := d.hyper.Info(ctx); err != nil {
		h.Libvirt = "not answering: " + err.Error()
	} else {
		h.Libvirt = fmt.Sprintf("libvirt %s, QEMU %s", i.Libvirt, i.QEMU)
	}
	h.NotProtected = d.unprotected.alarms(time.Now(), d.protects())
	slices.SortFunc(h.NotProtected, func(a, b status.NotProtected) int { return strings.Compare(a.Name, b.Name) })
	return h, nil
}

// VMs lists everything that replicates from or to this host.
func (d *Daemon) VMs(ctx context.Context) ([]status.VM, error) {
	out := []status.VM{}
	for _, v := range d.vms.All() {
		out = append(out, d.view(ctx, v))
	}
	for dir, err := range d.vms.Broken() {
		out = append(out, status.VM{Name: dir, ID: wire.VMID(dir), State: status.Error, Health: "critical", Reason: err.Error(), RPO: -1})
	}
	return out, nil
}

// VM is one of them.
func (d *Daemon) VM(ctx context.Context, name string) (status.VM, error) {
	v, err := d.vms.Lookup(name)
	if err != nil {
		return status.VM{}, err
	}
	return d.view(ctx, v), nil
}

// Statistics are a VM's measurements.
func (d *Daemon) Statistics(_ context.Context, name string) (api.Statistics, error) {
	v, err := d.vms.Lookup(name)
	if err != nil {
		return api.Statistics{}, err
	}
	return v.Statistics()
}

func (d *Daemon) peerName(h wire.HostID) string {
	if r, ok := d.peers.Get(h); ok {
		return r.Name
	}
	return string(h)
}

const helloWithin = 3 * time.Second

// Peers lists paired hosts and asks each for a sign of life.
func (d *Daemon) Peers(ctx context.Context) ([]status.Peer, error) {
	out := []status.Peer{}
	for _, r := range d.peers.Peers() {
		p := status.Peer{Host: r.Host, Name: r.Name, Address: r.Address, MaySend: r.Allow.MaySend, MayAsk: r.Allow.MayRequestReverse, Bandwidth: r.Allow.Bandwidth, Root: r.Allow.StorageRoot}
		hctx, cancel := context.WithTimeout(ctx, helloWithin)
		if c, err := d.client(r.Host); err == nil {
			_, err = c.Hello(hctx, d.hello())
			p.Reachable = err == nil
		}
		cancel()
		d.mu.Lock()
		if p.Reachable {
			d.seen[r.Host] = time.Now()
		}
		p.LastSeen = d.seen[r.Host]
		d.mu.Unlock()
		out = append(out, p)
	}
	return out, nil
}

// Invite prepares one pairing.
func (d *Daemon) Invite(_ context.Context, r api.InviteRequest) (api.InviteReply, error) {
	if d.cfg.Listen == "" {
		return api.InviteReply{}, &wire.Error{Kind: wire.KindRefused, Text: "this host does not listen for peers", Hint: "set listen in the configuration, or invite from the other host"}
	}
	inv, err := d.pair.Invite(peer.InviteOptions{TTL: r.TTL, Grant: d.authorisation(r.Rights)})
	if err != nil {
		return api.InviteReply{}, err
	}
	return api.InviteReply{Code: inv.Code, Expires: inv.Expires, Address: d.advertised()}, nil
}

// advertised is the address the other host should use.
func (d *Daemon) advertised() string {
	host, port, err := net.SplitHostPort(d.cfg.Listen)
	if d.conf().Advertise != "" {
		h, p, err := net.SplitHostPort(d.conf().Advertise)
		if err == nil && h != "" {
			return d.conf().Advertise
		}
		if err == nil {
			port = p
		}
	}
	if err != nil || host == "" || host == "0.0.0.0" || host == "::" {
		host = d.name
	}
	return net.JoinHostPort(host, port)
}

const defaultMaxVMs = 100

func (d *Daemon) authorisation(r api.Rights) peer.Authorisation {
	a := peer.Authorisation{
		MaySend: r.MaySend, StorageRoot: r.Root, MaxVMs: r.MaxVMs, MaxBytes: r.Limit, Bandwidth: r.Bandwidth, MayRequestReverse: r.MaySend,
	}
	if r.MayAsk != nil {
		a.MayRequestReverse = *r.MayAsk
	}
	if r.MaySend && a.StorageRoot == "" && len(d.conf().StorageRoots) > 0 {
		a.StorageRoot = d.conf().StorageRoots[0]
	}
	if r.MaySend && r.MaxVMs == 0 {
		a.MaxVMs = defaultMaxVMs
	}
	return a
}

// Join pairs with the host that made the invitation.
func (d *Daemon) Join(ctx context.Context, r api.JoinRequest) (status.Peer, error) {
	addr, err := peer.Address(r.Address, defaultPort)
	if err != nil {
		return status.Peer{}, err
	}
	listen := d.conf().Advertise
	if listen == "" && d.cfg.Listen != "" {
		if _, port, err := net.SplitHostPort(d.cfg.Listen); err == nil {
			listen = ":" + port
		}
	}
	rec, err := peer.Join(ctx, d.id, d.peers, addr, r.Code, peer.JoinOptions{Listen: listen, Grant: d.authorisation(r.Rights)})
	if err != nil {
		return status.Peer{}, err
	}
	return status.Peer{Host: rec.Host, Name: rec.Name, Address: rec.Address, Reachable: true, MaySend: rec.Allow.MaySend, MayAsk: rec.Allow.MayRequestReverse, Bandwidth: rec.Allow.Bandwidth, Root: rec.Allow.StorageRoot}, nil
}

// Allow changes what a peer may do here.
func (d *Daemon) Allow(_ context.Context, r api.AllowRequest) error {
	rec, err := d.peers.Find(r.Peer)
	if err != nil {
		return err
	}
	return d.peers.Allow(rec.Host, d.authorisation(r.Rights))
}

// RemovePeer forgets a peer; VMs shared with it must be disabled first.
func (d *Daemon) RemovePeer(_ context.Context, name string) error {
	rec, err := d.peers.Find(name)
	if err != nil {
		return err
	}
	for _, v := range d.vms.All() {
		if v.Peer() == rec.Host && !v.Orphaned() {
			return &wire.Error{Kind: wire.KindConflict, Text: "VMs are still shared with " + rec.Name, Hint: "replicactl vm list; replicactl vm disable NAME"}
		}
	}
	return errors.Join(d.peers.Remove(rec.Host), d.dropClient(rec.Host))
}

// Doctor checks the host.
func (d *Daemon) Doctor(ctx context.Context) ([]wire.Check, error) {
	var out []wire.Check
	add := func(name string, r wire.Result, remedy, detail string) {
		out = append(out, wire.Check{Name: name, Result: r, Detail: detail, Remedy: remedy})
	}
	if i, err := d.hyper.Info(ctx); err != nil {
		add("libvirt", wire.Failed, "systemctl status libvirtd virtqemud", err.Error())
	} else {
		add("libvirt", wire.OK, "", fmt.Sprintf("%s, QEMU %s", i.Libvirt, i.QEMU))
	}
	if _, err := os.Stat(hookPath); err != nil {
		add("Start hook", wire.Failed, "install packaging/hooks/kvmreplica as "+hookPath+" and restart libvirtd", "a protected VM could be started by mistake")
	} else {
		add("Start hook", wire.OK, "", hookPath)
	}
	for _, e := range d.id.Expiries(time.Now()) {
		r := wire.Warning
		if e.Severity == "critical" {
			r = wire.Failed
		}
		add("The "+e.What, r, e.Hint, fmt.Sprintf("ends on %s, in %s", e.Ends.Format(time.DateOnly), count.Of(e.Days, "day")))
	}
	out = append(out, d.accessChecks()...)
	for dir, err := range d.vms.Broken() {
		add("State of "+dir, wire.Failed, "replicafsck check "+d.cfg.StateDir, err.Error())
	}
	return out, nil
}

const hookPath = "/etc/libvirt/hooks/qemu.d/kvmreplica"

// newRequest makes a correlation id.
func newRequest() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// Act runs one action; every event goes to emit.
func (d *Daemon) Act(ctx context.Context, a api.Action, emit func(api.Event)) error {
	request := newRequest()
	who := api.CallerOf(ctx).String()
	d.log.Info("action", "verb", string(a.Verb), "by", who, "vm", a.VM, "peer", a.Peer, "request", request, "dry_run", a.DryRun, "force", a.Force, "reason", a.Reason)
	step := func(e failover.Event) {
		s := e.Step
		emit(api.Event{Step: &s, Undo: e.Undo})
	}
	var err error
	switch a.Verb {
	case api.PeerTest:
		err = d.testPeer(ctx, a, emit)
	case api.PeerAddress:
		err = d.movePeer(ctx, a, emit)
	case api.Reload:
		err = d.reload(emit)
	case api.VMEnable:
		err = d.enable(ctx, a, request, step, emit)
		if v, missing := d.vms.Lookup(a.VM); missing == nil && !a.DryRun { // there is none before
			v.Asked(request, who, string(a.Verb), a.Reason)
		}
	case api.PolicyApply:
		err = d.applyPolicy(ctx, a, request, step, emit)
		if v, missing := d.vms.Lookup(a.VM); missing == nil && !a.DryRun {
			v.Asked(request, who, string(a.Verb), a.Reason)
		}
	case api.VMExport, api.VMImport:
		err = d.media(ctx, a, emit)
	default:
		var v *vm.VM
		if v, err = d.vms.Lookup(a.VM); err == nil {
			if !a.DryRun && api.Needs(a) > api.Monitor {
				v.Asked(request, who, string(a.Verb), a.Reason)
			}
			err = d.actOn(ctx, v, a, request, step, emit)
		}
	}
	err = d.explain(err, a.VM)
	if err != nil {
		d.log.Warn("action failed", "verb", string(a.Verb), "vm", a.VM, "request", request, "err", err)
	}
	return err
}

func (d *Daemon) testPeer(ctx context.Context, a api.Action, emit func(api.Event)) error {
	rec, err := d.peers.Find(a.Peer)
	if err != nil {
		return err
	}
	c, err := d.client(rec.Host)
	if err != nil {
		return err
	}
	for _, k := range c.Test(ctx, peer.TestInfo{Version: version.String()}) {
		emit(api.Event{Check: &k})
	}
	return nil
}
