package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"kvmreplica/internal/block"
	"kvmreplica/internal/count"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// Offer makes or refreshes a replica relationship.
func (m *Manager) Offer(ctx context.Context, o wire.Offer) (wire.OfferReply, error) {
	p, ok := wire.PeerFrom(ctx)
	if !ok {
		return wire.OfferReply{}, &wire.Error{Kind: wire.KindRefused, Text: "an offer needs an authenticated host"}
	}
	if err := checkOffer(o); err != nil {
		return wire.OfferReply{}, err
	}
	if v, ok := m.get(o.VM); ok {
		if v.record().Orphan != nil {
			return wire.OfferReply{}, v.orphaned("a copy of " + o.Name + " is kept here already")
		}
		if v.record().Peer != p.Host {
			return wire.OfferReply{}, &wire.Error{Kind: wire.KindConflict, Text: "VM " + o.Name + " is replicated here by another host", Hint: "replicactl vm list on the replica host"}
		}
		return v.refreshOffer(ctx, o)
	}
	if o.Try {
		return wire.OfferReply{}, notFound(o.VM)
	}
	g, err := m.deps.Grant(p.Host)
	if err != nil {
		return wire.OfferReply{}, err
	}
	if err := m.admit(ctx, p, g, o); err != nil {
		return wire.OfferReply{}, err
	}
	return m.accept(ctx, p, g, o)
}

// admit checks authorisation, names and room before anything is made.
func (m *Manager) admit(ctx context.Context, p wire.Peer, g Grant, o wire.Offer) error {
	vms, used := m.Count(p.Host, o.VM)
	var need int64
	for _, d := range o.Disks {
		need += d.Size
	}
	refuse := func(format string, a ...any) error {
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf(format, a...), Hint: "on the replica host: replicactl peer allow " + p.Name + " --may-send …"}
	}
	switch {
	case !g.MaySend:
		return refuse("this host does not accept replicas from %s", p.Name)
	case g.Root == "":
		return refuse("no storage root is set for %s", p.Name)
	case g.MaxVMs > 0 && vms >= g.MaxVMs:
		return refuse("%s may send %s and sends as many already", p.Name, count.Of(g.MaxVMs, "VM"))
	case g.MaxDisks > 0 && len(o.Disks) > g.MaxDisks:
		return refuse("%s may send %s a VM, this one has %d", p.Name, count.Of(g.MaxDisks, "disk"), len(o.Disks))
	case g.MaxBytes > 0 && used+need > g.MaxBytes:
		return refuse("%s may send %d bytes of disks, with this VM it would be %d", p.Name, g.MaxBytes, used+need)
	}
	if id, err := m.deps.Hyper.LookupName(ctx, o.Name); err == nil && id != string(o.VM) {
		return &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("the replica host has another domain called %q", o.Name), Hint: "rename one of them"}
	}
	if _, _, err := m.deps.Hyper.DomainState(ctx, string(o.VM)); err == nil {
		return &wire.Error{Kind: wire.KindConflict, Text: "a domain with this UUID exists on the replica host already", Hint: "undefine it there, or use its images: they are never overwritten"}
	} else if !errors.Is(err, libvirt.ErrNotFound) {
		return fmt.Errorf("ask libvirt on the replica host: %w", err)
	}
	return nil
}

// accept makes the record, the images, the store and the domain.
func (m *Manager) accept(ctx context.Context, p wire.Peer, g Grant, o wire.Offer) (wire.OfferReply, error) {
	r := Record{
		VM: o.VM, Name: o.Name, Lineage: lineage.New(o.VM, delta.Generation{}), Peer: p.Host, Interval: o.Interval,
		Spec: o.Spec, Created: m.deps.Now(), OnSilent: silentOf(o), Existing: o.Existing, Retention: o.Retention, AppEvery: o.AppEvery,
		Shutdown: o.Shutdown,
	}
	for _, d := range o.Disks {
		r.Disks = append(r.Disks, Disk{Name: d.Name, Size: d.Size, Kind: "raw", Path: filepath.Join(imageDir(g.Root, o.VM), string(d.Name)+".raw")})
	}
	if err := r.foreignImages(); err != nil {
		return wire.OfferReply{}, err
	}
	if r.Existing {
		if err := r.checkGiven(); err != nil {
			return wire.OfferReply{}, err
		}
	}
	v, err := m.add(r)
	if err != nil {
		return wire.OfferReply{}, err
	}
	unlock, err := v.lock("take the VM up")
	if err != nil {
		return wire.OfferReply{}, err
	}
	defer unlock()
	undo := func(err error) (wire.OfferReply, error) {
		return wire.OfferReply{}, errors.Join(err, v.stopKeeping(), v.deleteImages(), m.remove(v))
	}
	fill := v.createStore
	if r.Existing {
		fill = v.takeGiven
	}
	if err := fill(); err != nil {
		return undo(err)
	}
	v.publishGate()
	dropped, err := v.defineReplica(ctx)
	if err != nil {
		return undo(fmt.Errorf("define the VM on the replica host: %w", err))
	}
	if err := v.startKeeping(ctx); err != nil {
		return undo(err)
	}
	v.log.Info("replica made", "peer", string(p.Host), "request", o.Request)
	return wire.OfferReply{State: "created", Dropped: dropped}, nil
}

// foreignImages refuses files that lie where a new replica's images would be:
// a copy that was kept when its relationship ended, or something else.
func (r *Record) foreignImages() error {
	for _, d := range r.Disks {
		_, err := os.Lstat(d.Path)
		if err == nil {
			return &wire.Error{
				Kind: wire.KindConflict, Text: fmt.Sprintf("%s exists on the replica host; it is never overwritten", d.Path),
				Hint: "move it away, or delete it",
			}
		}
		if !absent(err) {
			return fmt.Errorf("look for old images: %w", err)
		}
	}
	return nil
}

// refreshOffer follows edits of the description while this host is a replica.
func (v *VM) refreshOffer(ctx context.Context, o wire.Offer) (wire.OfferReply, error) {
	r := v.record()
	if r.Lineage.State != lineage.Replica {
		return wire.OfferReply{State: "exists"}, nil // the handshake says what is wrong
	}
	err := v.maySet(&r, o)
	if err == nil {
		err = v.mgr.roomFor(v, deltaDisks(o.Disks))
	}
	if err == nil {
		err = v.fits(o.Disks)
	}
	if err != nil || o.Try {
		return wire.OfferReply{State: "exists"}, err
	}
	was := r.wholeNames()
	if err := v.followSet(o); err != nil {
		return wire.OfferReply{}, fmt.Errorf("follow the VM's set of disks: %w", err)
	}
	r = v.record()
	if err := v.seedSizes(deltaDisks(o.Disks)); err != nil {
		return wire.OfferReply{}, err
	}
	if string(r.Spec) == string(o.Spec) && r.Name == o.Name && r.follows(o) && slices.Equal(was, r.wholeNames()) {
		return wire.OfferReply{State: "exists"}, nil
	}
	if err := v.update(func(r *Record) error {
		r.Spec, r.Name = o.Spec, o.Name
		r.follow(o)
		return nil
	}); err != nil {
		return wire.OfferReply{}, err
	}
	dropped, err := v.defineReplica(ctx)
	if err != nil {
		v.log.Warn("follow the primary's description", "err", err)
	}
	return wire.OfferReply{State: "exists", Dropped: dropped}, nil
}

// fits refuses sizes that this host's own volumes do not have: nobody here can
// enlarge them.
func (v *VM) fits(want []wire.Disk) error {
	r := v.record()
	for _, w := range want {
		d, _ := r.disk(w.Name)
		if d.Kind != diskBlock || w.Size <= d.Size {
			continue
		}
		f, err := block.OpenFile(d.Path, block.FileOptions{ReadOnly: true, NoLock: true})
		if err != nil {
			return fmt.Errorf("look at the volume of disk %s: %w", d.Name, err)
		}
		n := f.Size()
		if err := f.Close(); err != nil || n >= w.Size {
			continue
		}
		return &wire.Error{
			Kind: wire.KindRefused, Text: fmt.Sprintf("the replica's volume %s has %d bytes, disk %s would have %d", d.Path, n, d.Name, w.Size),
			Hint: "enlarge it there first: lvextend; then repeat the command",
		}
	}
	return nil
}

// seedSizes follows the disks' sizes before the first epoch; after it, each
// epoch carries them.
func (v *VM) seedSizes(disks []delta.Disk) error {
	s, err := v.store()
	if err != nil || s.Status().State != points.Seeding {
		return nil // what is wrong says the handshake
	}
	if err := s.SeedResize(disks); err != nil {
		return storeError(err)
	}
	return v.followStore()
}

func deltaDisks(disks []wire.Disk) (out []delta.Disk) {
	for _, d := range disks {
		out = append(out, delta.Disk{Name: string(d.Name), Size: d.Size})
	}
	return out
}

const maxSpec = 1 << 20

// checkOffer refuses what is malformed before anything is looked up.
func checkOffer(o wire.Offer) error {
	bad := func(format string, a ...any) error {
		return &wire.Error{Kind: wire.KindInvalid, Text: "offer: " + fmt.Sprintf(format, a...)}
	}
	if _, err := delta.ParseVM(string(o.VM)); err != nil || strings.ToLower(string(o.VM)) != string(o.VM) {
		return bad("%.64q is no VM id", o.VM)
	}
	if !goodName(o.Name) {
		return bad("the name is empty, too long or not printable")
	}
	if len(o.Disks) == 0 || len(o.Disks) > 64 {
		return bad("%d disks; 1 to 64 are possible", len(o.Disks))
	}
	if len(o.Spec) > maxSpec {
		return bad("the description has %d bytes", len(o.Spec))
	}
	if o.Interval < 0 || o.Interval > 24*time.Hour {
		return bad("interval %s", o.Interval)
	}
	if o.Generation.IsZero() {
		return bad("no generation")
	}
	if o.Shutdown < 0 || o.Shutdown > maxShutdown {
		return bad("shutdown time %s", o.Shutdown)
	}
	if o.OnSilent != "" && o.OnSilent != "hold" {
		return bad("on-silent-peer %.32q", o.OnSilent)
	}
	if _, err := points.ParsePolicy(o.Retention); err != nil {
		return bad("%v", err)
	}
	if o.AppEvery < 0 || o.AppEvery > maxAppEvery {
		return bad("application-consistent points every %s", o.AppEvery)
	}
	var ds []delta.Disk
	for _, d := range o.Disks {
		if d.Format != "raw" {
			return bad("disk %.64q: format %.64q; only raw travels", d.Name, d.Format)
		}
		ds = append(ds, delta.Disk{Name: string(d.Name), Size: d.Size})
	}
	if err := delta.ValidateDisks(ds); err != nil {
		return bad("%v", err)
	}
	return nil
}

func goodName(s string) bool {
	if s == "" || len(s) > 255 || !utf8.ValidString(s) || strings.ContainsAny(s, "/\x00") || s[0] == '-' || s[0] == '.' {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}
