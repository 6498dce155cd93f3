package points

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kvmreplica/internal/block"
	"kvmreplica/internal/count"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// rolledName keeps, after PromoteAt, which granules were rolled back.
const rolledName = "rolled-back"

// Promote durably ends the replica role at the committed position, which must
// be applied (ApplyAll), before the first guest write to the images. The
// partial epoch, all points and all views end. Repeating it is harmless. Close
// the store before somebody else opens the images.
func (s *Store) Promote(g delta.Generation, forced bool) (Seal, error) {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	seal, err := s.promote(g, forced)
	if err != nil {
		return Seal{}, fmt.Errorf("promote: %w", err)
	}
	return seal, nil
}

func (s *Store) promote(g delta.Generation, forced bool) (Seal, error) {
	s.mu.Lock()
	done, err := s.promotable(g)
	behind := len(s.epochs)
	s.mu.Unlock()
	if err != nil || done != nil {
		return deref(done), err
	}
	if behind > 0 {
		return Seal{}, fmt.Errorf("%w: not applied yet: %s", ErrState, count.Of(behind, "epoch"))
	}
	return s.sealAt(s.sup.applied, g, forced)
}

func deref(p *Seal) Seal {
	if p == nil {
		return Seal{}
	}
	return *p
}

// promotable checks the role; a promotion to g that was made already is
// returned; s.mu is held.
func (s *Store) promotable(g delta.Generation) (*Seal, error) {
	if err := s.usable(); err != nil {
		return nil, err
	}
	switch {
	case g.IsZero():
		return nil, fmt.Errorf("%w: no generation", ErrState)
	case s.sup.role == rolePromoted && s.sup.gen == g:
		return s.sup.sealRecord(), nil
	case s.sup.role == rolePromoted:
		return nil, fmt.Errorf("%w (to generation %v)", ErrPromoted, s.sup.gen)
	case s.sup.flags&superSuspect != 0:
		return nil, ErrSuspect
	case len(s.damage) > 0:
		return nil, fmt.Errorf("%w: %w", ErrDamaged, s.damage[0])
	case s.committed.pos.IsZero():
		return nil, ErrSeeding
	case g == s.committed.pos.Generation:
		return nil, fmt.Errorf("%w: generation %v is the replicated one", ErrState, g)
	}
	return nil, nil
}

func (s *super) sealRecord() *Seal {
	return &Seal{At: s.seal, Ended: s.ended, Generation: s.gen, Forced: s.flags&superForced != 0, Time: s.sealed, Points: int(s.points)}
}

// sealAt writes the record of the promotion and drops what it ended.
func (s *Store) sealAt(at mark, g delta.Generation, forced bool) (Seal, error) {
	sup := s.sup.clone()
	sup.role, sup.gen, sup.seal, sup.sealed = rolePromoted, g, at.pos, s.cfg.Now().UTC()
	if s.sup.role == roleRolling {
		sup.applied = at
		for i := range sup.disks {
			sup.disks[i].size = sizeOf(s.segs[s.segmentAt(at)].sizes, i)
		}
	} else {
		sup.ended, sup.points = s.committed.pos, uint32(len(s.segs))
	}
	if forced {
		sup.flags |= superForced
	}
	if err := s.putSuper(sup); err != nil {
		return Seal{}, err
	}
	s.log.Info("replica promoted", "at", at.pos, "generation", g, "points_ended", sup.points)
	s.mu.Lock()
	gs := s.segs
	s.segs = nil
	s.token++
	s.committed = at
	s.asked = nil
	var free []*segment
	for _, x := range gs {
		x.dead = true
		if x.refs == 0 {
			free = append(free, x)
		}
	}
	s.mu.Unlock()
	s.dropPartial()
	for _, x := range free {
		s.removeSegment(x)
	}
	return *sup.sealRecord(), nil
}

// PromoteAt rolls the images back to an older point and promotes there. What
// was committed after the point is given up. It is durable that it has begun
// before the first byte is written; after a crash it must be called again with
// the same arguments. A later ChangedSince(pos) still lists what was rolled
// back: the old primary needs it.
func (s *Store) PromoteAt(ctx context.Context, pos delta.Pos, g delta.Generation) (Seal, error) {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	seal, err := s.promoteAt(ctx, pos, g)
	if err != nil {
		return Seal{}, fmt.Errorf("promote at %v: %w", pos, err)
	}
	return seal, nil
}

func (s *Store) promoteAt(ctx context.Context, pos delta.Pos, g delta.Generation) (Seal, error) {
	s.mu.Lock()
	done, err := s.promotable(g)
	role, applied := s.sup.role, s.sup.applied.pos
	behind := len(s.epochs)
	committed := s.committed.pos
	s.mu.Unlock()
	switch {
	case err != nil:
		return Seal{}, err
	case done != nil && done.At != pos:
		return Seal{}, fmt.Errorf("%w (at %v)", ErrPromoted, done.At)
	case done != nil:
		return *done, nil
	case role == roleRolling && (s.sup.seal != pos || s.sup.gen != g):
		return Seal{}, fmt.Errorf("%w: rolling back to %v for generation %v", ErrState, s.sup.seal, s.sup.gen)
	case role != roleRolling && pos == committed && pos == applied && behind == 0:
		return s.sealAt(s.sup.applied, g, true)
	case s.lost:
		return Seal{}, fmt.Errorf("%w: undo is lost", ErrDamaged)
	}
	at, err := s.point(pos)
	if err != nil {
		return Seal{}, err
	}
	if role != roleRolling {
		if err := s.startRolling(at, pos, g); err != nil {
			return Seal{}, err
		}
	}
	if err := s.rollBack(ctx, at, nil); err != nil {
		return Seal{}, s.fail(err)
	}
	return s.sealAt(s.segs[at].start, g, true)
}

// point finds the segment that starts at pos and checks that it can be read.
func (s *Store) point(pos delta.Pos) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, g := range s.segs {
		if g.start.pos == pos {
			return i, s.readable(i) // its own damage is one
		}
	}
	return 0, ErrNoPoint
}

// segmentAt finds the segment that starts at m, which is there.
func (s *Store) segmentAt(m mark) int {
	return slices.IndexFunc(s.segs, func(g *segment) bool { return g.start.pos == m.pos })
}

// startRolling makes the intention durable, and before it the list of what
// differs: the spool and the undo it comes from will be gone.
func (s *Store) startRolling(at int, pos delta.Pos, g delta.Generation) error {
	changed, err := s.changedFrom(at)
	if err != nil {
		return err
	}
	if err := fsx.WriteAtomic(s.cfg.FS, rolledName, encodeRolled(s.sup.store, pos, changed)); err != nil {
		return noSpace("record what is rolled back", err)
	}
	sup := s.sup.clone()
	sup.role, sup.gen, sup.seal, sup.ended, sup.points = roleRolling, g, pos, s.committed.pos, uint32(len(s.segs))
	s.mu.Lock()
	s.rolling = s.segs[at].start.ordinal
	s.mu.Unlock()
	return s.putSuper(sup)
}

// rollBack writes the saved granules of every segment from at on into the
// images, the oldest value of each. It may be repeated. pace, if any, is told
// of every granule written and may wait.
func (s *Store) rollBack(ctx context.Context, at int, pace Pace) error {
	done := map[undoKey]bool{}
	var buf [granule]byte
	for _, g := range s.segs[at:] {
		entries, err := g.entries()
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				return err
			}
			if done[e.key] {
				continue
			}
			done[e.key] = true
			if err := g.read(e, buf[:]); err != nil {
				return err
			}
			off := e.key.granule() * granule
			if off >= sizeOf(s.segs[at].sizes, e.key.disk()) {
				continue // an older point's
			}
			dev, err := s.base(e.key.disk())
			if err != nil {
				return err
			}
			if _, err := dev.WriteAt(buf[:min(granule, dev.Size()-off)], off); err != nil {
				return noSpace("roll back", err)
			}
			if pace != nil {
				if err := pace(ctx, granule); err != nil {
					return err
				}
			}
		}
	}
	return s.syncBases()
}

// ChangedSince lists per disk the ranges that differ, or may differ, between a
// point and the committed position: everything in undo and in spools after it.
// After PromoteAt(pos) it lists what was rolled back.
func (s *Store) ChangedSince(pos delta.Pos) (map[string][]block.Range, error) {
	s.maint.Lock()
	defer s.maint.Unlock()
	out, err := s.changedSince(pos)
	if err != nil {
		return nil, fmt.Errorf("changes since %v: %w", pos, err)
	}
	return out, nil
}

func (s *Store) changedSince(pos delta.Pos) (map[string][]block.Range, error) {
	s.mu.Lock()
	role, seal := s.sup.role, s.sup.seal
	s.mu.Unlock()
	if role == rolePromoted || role == roleRolling {
		if pos != seal {
			return nil, ErrPromoted
		}
		return s.readRolled(pos)
	}
	at, err := s.point(pos)
	if errors.Is(err, ErrNoPoint) && pos == s.Committed() {
		return map[string][]block.Range{}, nil
	}
	if err != nil {
		return nil, err
	}
	keys, err := s.changedFrom(at)
	if err != nil {
		return nil, err
	}
	return s.ranges(keys), nil
}

// changedFrom lists the granules in undo from segment at on, and in spools.
func (s *Store) changedFrom(at int) ([]undoKey, error) {
	seen := map[undoKey]bool{}
	for _, g := range s.segs[at:] {
		entries, err := g.entries()
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			seen[e.key] = true
		}
	}
	s.mu.Lock()
	epochs := slices.Clone(s.epochs)
	for _, e := range epochs {
		e.refs++
	}
	s.mu.Unlock()
	defer s.unref(epochs)
	for _, e := range epochs {
		for disk, ix := range e.index {
			for _, x := range ix {
				for g := x.off / granule; g*granule < x.end(); g++ {
					seen[keyOf(disk, g)] = true
				}
			}
		}
	}
	keys := make([]undoKey, 0, len(seen))
	for k := range seen {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys, nil
}

// ranges turns sorted keys into ranges by disk name.
func (s *Store) ranges(keys []undoKey) map[string][]block.Range {
	out := map[string][]block.Range{}
	for _, k := range keys {
		d := s.sup.disks[k.disk()]
		off := k.granule() * granule
		if off >= d.size {
			continue // the disk was longer, or is only going to be
		}
		r := block.Range{Off: off, Len: min(granule, d.size-off)}
		rs := out[d.name]
		if n := len(rs); n > 0 && rs[n-1].End() == r.Off {
			rs[n-1].Len += r.Len
		} else {
			rs = append(rs, r)
		}
		out[d.name] = rs
	}
	return out
}

func (s *Store) readRolled(pos delta.Pos) (map[string][]block.Range, error) {
	b, err := fsx.ReadFile(s.cfg.FS, rolledName, 1<<32)
	if errors.Is(err, fs.ErrNotExist) && s.sup.ended == s.sup.seal {
		return map[string][]block.Range{}, nil // nothing was rolled back
	}
	if err != nil {
		return nil, err
	}
	keys, ok := decodeRolled(b, s.sup.store, pos)
	if !ok {
		return nil, &DamageError{File: rolledName, Text: "is not readable; compare everything"}
	}
	return s.ranges(keys), nil
}
