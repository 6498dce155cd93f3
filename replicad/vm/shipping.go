package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/zeebo/blake3"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// startPlane makes sure that the VM's data plane runs and serves.
func (v *VM) startPlane(ctx context.Context) error {
	v.machine.Lock()
	defer v.machine.Unlock()
	v.mu.Lock()
	have := v.ship != nil
	v.mu.Unlock()
	if have {
		return nil
	}
	cfg := v.planeConfig()
	c, err := dataplane.Ensure(ctx, cfg)
	if err != nil {
		return fmt.Errorf("start the data plane: %w", err)
	}
	v.mu.Lock()
	v.ship = &shipping{plane: c, cfg: cfg}
	v.mu.Unlock()
	if err := v.followPlane(ctx, c); err != nil {
		v.log.Warn("compare the disks' sizes with the record", "err", err)
	}
	return nil
}

// stopPlane drains and ends the data plane, so that nothing holds the images.
func (v *VM) stopPlane(ctx context.Context) error {
	v.stopShipping()
	v.machine.Lock()
	defer v.machine.Unlock()
	v.mu.Lock()
	s := v.ship
	v.ship = nil
	v.mu.Unlock()
	cfg := v.planeConfig()
	if s != nil {
		cfg = s.cfg
		s.plane.Close()
	}
	if err := dataplane.Stop(ctx, cfg); err != nil {
		return fmt.Errorf("stop the data plane: %w", err)
	}
	return nil
}

// startShipping runs a session to the peer.
func (v *VM) startShipping() {
	r := v.record()
	slots := v.mgr.slotsTo(r.Peer)
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ship == nil || v.ship.sess != nil || v.facts.hands.off {
		return
	}
	r = v.rec // whoever changes a setting from here on finds the session
	ctx, cancel := context.WithCancel(context.Background())
	pass, differs := r.bounds()
	sess := session.New(session.Config{
		VM: r.VM, Name: r.Name, Source: v.ship.plane, Replica: &courier{v: v},
		Interval: r.Interval, AppEvery: r.AppEvery, Quiesce: v.quiesce, Complete: v.complete, Describe: v.describe, Union: v.union,
		Firmware: v.firmware, FirmwareCommitted: v.firmwareCommitted,
		Limit: v.limit(), Slots: slots,
		Verified: r.Verified && !r.Pass.open(), Scrub: r.Scrub, Pass: pass, Mismatched: differs,
		LastCut: r.LastCut, Holes: true,
		Paused:   v.waits(),
		OnChange: v.sessionChanged, OnJoined: v.joined,
		Log: v.log,
	})
	s := v.ship
	s.sess, s.cancel, s.done = sess, cancel, make(chan struct{})
	go func() {
		defer close(s.done)
		if err := sess.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
			v.log.Error("session ended", "err", err)
		}
	}()
}

// complete adds what only the record knows to this host's half of a handshake.
func (v *VM) complete(r *wire.HandshakeRequest) {
	l := v.record().Lineage
	r.Ancestors, r.Before, r.Diverged = l.Ancestors, l.Before, l.Diverged != nil
	_, r.Between, _ = v.middle()
	r.Running = v.guestRuns()
	rec := v.record()
	for i := range r.Disks {
		d, _ := rec.disk(r.Disks[i].Name)
		r.Disks[i].Joining = d.State == joining
	}
}

// describe is the digest of the description that goes with a position.
func (v *VM) describe() delta.Digest { return blake3.Sum256(v.record().Spec) }

// union marks what may differ on a released old primary. The plan that
// released it has marked its changes already, when they were known.
func (v *VM) union(ctx context.Context, _ lineage.Decision) error {
	if v.record().UnionMarked {
		return nil
	}
	c, err := v.plane()
	if err != nil {
		return err
	}
	return c.Mark(ctx, dataplane.MarkRequest{Reason: "the old primary's changes are not known"})
}

// stopShipping ends the session and waits for it.
func (v *VM) stopShipping() {
	v.machine.Lock()
	defer v.machine.Unlock()
	v.mu.Lock()
	s := v.ship
	if s == nil || s.sess == nil {
		v.mu.Unlock()
		return
	}
	cancel, done := s.cancel, s.done
	v.mu.Unlock()
	cancel()
	<-done
	v.mu.Lock()
	s.sess, s.cancel, s.done = nil, nil, nil
	v.mu.Unlock()
}

// sessionChanged keeps what must survive a restart. Where the replica stands
// and when it was cut is for display only and not worth a sync per epoch; the
// end of a session is.
func (v *VM) sessionChanged(s session.Status) {
	v.measure(s)
	r := v.record()
	_, passed := r.Pass.progress(s, v.deps.Now())
	scrubbed := passed || s.Verified != r.Verified || s.Scrub.Disk != r.Scrub.Disk || s.Scrub.Offset-r.Scrub.Offset >= scrubKept
	moved := !s.Committed.IsZero() && (s.Committed != r.Acked || s.LastCut.After(r.LastCut))
	late := s.LastCut.Sub(r.LastCut) >= ackKept || s.Phase == session.Idle
	if !scrubbed && !(moved && late) {
		return
	}
	err := v.update(func(r *Record) error {
		if moved {
			r.Acked, r.LastCut = s.Committed, s.LastCut
		}
		if r.Pass.open() && r.Pass.Request != s.Pass.ID {
			return nil // said before the session heard of the pass
		}
		r.Verified, r.Scrub = s.Verified, s.Scrub
		r.Pass, _ = r.Pass.progress(s, v.deps.Now())
		return nil
	})
	if err != nil {
		v.log.Error("keep the session's progress", "err", err)
	}
}

const (
	scrubKept = 1 << 30        // a restarted scrub repeats at most this much
	ackKept   = 30_000_000_000 // and the displayed position is at most 30 s behind
)

// courier is the peer as the session sees it: every handshake first refreshes
// the VM's description there.
type courier struct{ v *VM }

var _ session.Replica = (*courier)(nil)

func (c *courier) Handshake(ctx context.Context, r wire.HandshakeRequest) (wire.HandshakeReply, error) {
	p, err := c.v.peer()
	if err != nil {
		return wire.HandshakeReply{}, err
	}
	// Two hosts that both own the VM refuse each other's offers; the handshake
	// must still tell them so.
	offered := c.v.offer(ctx, p, "session")
	if offered != nil && !refusal(offered) {
		return wire.HandshakeReply{}, offered
	}
	reply, err := p.Handshake(ctx, r)
	if err != nil {
		return reply, errors.Join(err, offered)
	}
	if d := c.v.judge(r, reply); d.MayShip() && offered != nil {
		return reply, offered
	}
	return reply, nil
}

// refusal reports that the other host answered and said no.
func refusal(err error) bool {
	var w *wire.Error
	return errors.As(err, &w) && (w.Kind == wire.KindConflict || w.Kind == wire.KindRefused || w.Kind == wire.KindNotFound)
}

func (c *courier) PutSeed(ctx context.Context, r wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	p, err := c.v.peer()
	if err != nil {
		return wire.SeedReply{}, err
	}
	return p.PutSeed(ctx, r, body)
}

func (c *courier) EpochProgress(ctx context.Context, k wire.EpochKey) (uint32, error) {
	p, err := c.v.peer()
	if err != nil {
		return 0, err
	}
	return p.EpochProgress(ctx, k)
}

func (c *courier) PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error) {
	p, err := c.v.peer()
	if err != nil {
		return delta.Pos{}, err
	}
	return p.PutEpoch(ctx, k, from, body)
}

func (c *courier) Beat(ctx context.Context, r wire.Beat) error {
	p, err := c.v.peer()
	if err != nil {
		return err
	}
	return p.Beat(ctx, r)
}

func (c *courier) Digests(ctx context.Context, r wire.DigestRequest) (wire.DigestReply, error) {
	p, err := c.v.peer()
	if err != nil {
		return wire.DigestReply{}, err
	}
	return p.Digests(ctx, r)
}

// offer announces the VM with its present description.
func (v *VM) offer(ctx context.Context, p wire.Service, request string) error {
	v.refreshSpec(ctx)
	if _, err := p.Offer(ctx, v.offering(request)); err != nil {
		return fmt.Errorf("offer the VM to its replica host: %w", err)
	}
	return nil
}

// offering is the offer of the VM as the record has it.
func (v *VM) offering(request string) wire.Offer {
	r := v.record()
	return wire.Offer{
		VM: r.VM, Name: r.Name, Spec: r.Spec, Disks: r.wireDisks(), Interval: r.Interval,
		Retention: r.Retention, Points: v.retention().Count(), AppEvery: r.AppEvery,
		OnSilent: r.silentWord(), Shutdown: r.Shutdown,
		Generation: r.Lineage.Generation, Existing: r.Existing, Request: request,
	}
}

// refreshSpec follows edits of the domain. What cannot be read stays as it was:
// an old description is better than none.
func (v *VM) refreshSpec(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if err != nil {
		v.log.Warn("read the domain's description", "err", err)
		return
	}
	spec, err := v.specOf(doc)
	if err != nil {
		v.log.Warn("read the domain's description", "err", err)
		return
	}
	if string(spec) == string(v.record().Spec) {
		return
	}
	if err := v.update(func(r *Record) error { r.Spec = spec; return nil }); err != nil {
		v.log.Warn("keep the domain's description", "err", err)
	}
}

// firmware returns the guest's NVRAM and TPM state when it differs from what
// the replica committed last.
func (v *VM) firmware(ctx context.Context) ([]delta.Blob, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	st, err := v.deps.Hyper.Firmware(ctx, string(v.id), v.deps.LibvirtState)
	if err != nil {
		return nil, fmt.Errorf("read firmware state: %w", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.facts.sending = map[delta.BlobKind][32]byte{}
	var out []delta.Blob
	for _, b := range []delta.Blob{{Kind: delta.BlobNVRAM, Data: st.NVRAM}, {Kind: delta.BlobTPM, Data: st.TPM}} {
		if len(b.Data) > 0 && v.facts.firmware[b.Kind] != b.Digest() {
			out = append(out, b)
			v.facts.sending[b.Kind] = b.Digest()
		}
	}
	return out, nil
}

// firmwareCommitted remembers what need not be sent again; after a restart of
// the daemon it is sent once more, which is harmless.
func (v *VM) firmwareCommitted() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.facts.firmware == nil {
		v.facts.firmware = map[delta.BlobKind][32]byte{}
	}
	for k, d := range v.facts.sending {
		v.facts.firmware[k] = d
	}
}

// imageDir is where a replica's images of a VM lie below a storage root.
func imageDir(root string, id wire.VMID) string { return filepath.Join(root, string(id)) }
