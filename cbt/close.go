package cbt

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvmreplica/internal/block"
)

// Close stops cleanly: it refuses further writes, waits for those in flight,
// syncs the images and records the exact dirty set. After an error nothing is
// lost: the next Open finds the set in shared memory or the marked regions.
// An open epoch is abandoned. The devices stay open. A second call does
// nothing.
func (g *Group) Close(ctx context.Context) error {
	g.stopWriters()
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	if g.finished {
		return nil
	}
	g.finished = true
	sealed := g.meta.current().state == stateSealed
	if g.openEp != nil {
		if g.openEp.end(ErrEpochEnded) {
			g.abandoned.Add(1)
		}
		g.mergeBack(g.openEp)
	}
	var err error
	if !sealed {
		err = g.closeClean(ctx)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("close tracker: %w", err), g.drop())
	}
	if !sealed && g.meta.current().state != stateClean {
		return g.drop() // shared memory stays: it may be better than the map
	}
	g.dropShare()
	return g.drop()
}

// stopWriters refuses writes from now on and frees those that are held.
func (g *Group) stopWriters() {
	g.gate.Lock()
	g.refuse = block.ErrClosed
	disks := g.disks
	g.gate.Unlock()
	g.stopOnce.Do(func() { close(g.stop) })
	for _, d := range disks {
		d.st.Load().intent.shut()
	}
	g.cutMu.Lock()
	g.closed = true
	g.cutMu.Unlock()
}

// closeClean makes the exact set durable, unless something forbids to call it
// exact.
func (g *Group) closeClean(ctx context.Context) error {
	for parity := range 2 {
		if err := g.flight.wait(ctx, parity); err != nil {
			return fmt.Errorf("wait for writes: %w", err)
		}
	}
	if err := g.syncAll(); err != nil {
		return err
	}
	if err := g.heal(); err != nil {
		return err
	}
	g.sickMu.Lock()
	unsound := g.sick.unsynced || g.sick.keep || g.sick.degraded
	g.sickMu.Unlock()
	if unsound {
		return nil
	}
	ref, err := g.writeExact(g.meta.current().set)
	if err != nil {
		return fmt.Errorf("write exact set: %w", err)
	}
	idents, err := g.identities(ctx)
	if err != nil {
		return err
	}
	acked := g.acked
	return g.meta.commit(true, func(s *super) {
		s.state, s.exact, s.base = stateClean, ref, acked
		idents(s)
	})
}

func (g *Group) syncAll() error {
	for _, d := range g.all() {
		if err := d.dev.Sync(); err != nil {
			g.syncFailed(d, err)
			return fmt.Errorf("sync %s: %w", d.name, err)
		}
	}
	return nil
}

// identities reads every disk's identity once no later write could carry the
// same modification time, and returns what records it.
func (g *Group) identities(ctx context.Context) (func(*super), error) {
	found := map[id16]block.Identity{}
	for _, d := range g.all() {
		if d.ident == nil {
			continue
		}
		id, err := d.settledIdentity(ctx)
		if err != nil {
			return nil, fmt.Errorf("identity of %s: %w", d.name, err)
		}
		found[d.id] = id
	}
	return func(s *super) {
		for k, v := range found {
			e := s.disk(k)
			e.ident, e.hasID = v, true
		}
	}, nil
}

func (d *Disk) settledIdentity(ctx context.Context) (block.Identity, error) {
	first, err := d.ident()
	if err != nil {
		return first, err
	}
	if age := time.Since(time.Unix(0, first.MtimeNS)); age < mtimeTick && age > -time.Hour {
		t := time.NewTimer(min(mtimeTick-age, time.Second))
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return first, ctx.Err()
		}
	}
	second, err := d.ident()
	if err != nil {
		return second, err
	}
	if first != second {
		return second, errors.New("image changes although nobody writes through us")
	}
	return second, nil
}

// Seal ends this side's time as primary in a planned failover: it requires
// that everything was replicated and acknowledged, syncs the images and makes
// the sealed state durable. From then on every write is refused. When Seal
// fails with writes refused (see Status), call it again, or Unseal.
func (g *Group) Seal(ctx context.Context) error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	if err := g.settled(); err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	if err := g.refuseWrites(); err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	if g.meta.current().state == stateSealed {
		return nil
	}
	idents, err := g.sealable(ctx)
	if err != nil {
		g.gate.Lock()
		g.refuse = nil // nothing durable was tried yet
		g.gate.Unlock()
		return fmt.Errorf("seal: %w", err)
	}
	acked := g.acked
	err = g.meta.commit(true, func(s *super) {
		s.state, s.base, s.exact = stateSealed, acked, exactRef{}
		idents(s)
	})
	if err != nil {
		g.sealing = true
		return fmt.Errorf("seal: the outcome is unknown, writes stay refused; seal again or unseal: %w", err)
	}
	g.sealing = false
	return nil
}

// refuseWrites closes the gate for good if nothing is dirty.
func (g *Group) refuseWrites() error {
	g.gate.Lock()
	defer g.gate.Unlock()
	if g.refuse != nil && !errors.Is(g.refuse, ErrSealed) {
		return g.refuse
	}
	if g.dirtyLocked() {
		return ErrDirty
	}
	g.refuse = ErrSealed
	return nil
}

func (g *Group) sealable(ctx context.Context) (func(*super), error) {
	if err := g.syncAll(); err != nil {
		return nil, err
	}
	if err := g.heal(); err != nil {
		return nil, err
	}
	g.sickMu.Lock()
	sick := g.sick
	g.sickMu.Unlock()
	if sick.unsynced || sick.keep || sick.degraded {
		return nil, fmt.Errorf("tracking is not sound: %s", sick.reason)
	}
	return g.identities(ctx)
}

// Unseal takes a sealed VM back. The caller has the peer's durable word that
// it did not and will not promote. If an image was touched meanwhile,
// everything is taken as dirty.
func (g *Group) Unseal() error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	g.gate.RLock()
	refuse := g.refuse
	g.gate.RUnlock()
	if !errors.Is(refuse, ErrSealed) {
		return fmt.Errorf("unseal: tracker is not sealed (%v)", refuse)
	}
	doubts := append([]string(nil), g.sealDoubts...)
	next := g.meta.current().clone()
	for _, d := range g.disks {
		doubts = append(doubts, d.sealedDoubts(next.disk(d.id))...)
	}
	if g.openedSealed {
		if err := g.newSession(next, g.acked); err != nil {
			return fmt.Errorf("unseal: %w", err)
		}
	}
	next.state, next.reason = stateInUse, ""
	if len(doubts) > 0 {
		next.state, next.reason = stateVerifyAll, clip(doubts[0])
	}
	if err := g.meta.commit(true, func(s *super) { *s = *next }); err != nil {
		return fmt.Errorf("unseal: %w", err)
	}
	g.openedSealed, g.sealing, g.sealDoubts = false, false, nil
	if len(doubts) > 0 {
		g.note(func(s *sickness) { s.degraded = true }, doubts[0])
	}
	g.gate.Lock()
	g.refuse = nil
	g.gate.Unlock()
	if len(doubts) > 0 {
		return g.markAll(doubts[0])
	}
	return nil
}

// sealedDoubts says what speaks against the image being untouched since e was
// recorded.
func (d *Disk) sealedDoubts(e *superDisk) []string {
	if n := d.dev.Size(); n != e.size {
		return []string{fmt.Sprintf("disk %s: size changed while sealed", d.name)}
	}
	if d.ident == nil {
		return nil
	}
	id, err := d.ident()
	switch {
	case err != nil:
		return []string{fmt.Sprintf("disk %s: identity cannot be read: %v", d.name, err)}
	case !e.hasID || !e.ident.SameImage(id) || e.ident.MtimeNS != id.MtimeNS:
		return []string{fmt.Sprintf("disk %s: image was changed while sealed", d.name)}
	}
	return nil
}
