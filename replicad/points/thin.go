package points

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"kvmreplica/internal/fsx"
)

// thin drops or merges what the policy no longer keeps: one piece of work.
func (s *Store) thin(ctx context.Context) (bool, error) {
	if did, err := s.endUndo(); did || err != nil {
		return did, err
	}
	now, short := s.cfg.Now(), s.shortage()
	s.mu.Lock()
	drop, merge, given := s.chooseThin(now, short != "")
	// From here to the end of the work nobody may begin to view these points.
	if drop != nil && drop.refs > 0 {
		drop, merge = nil, nil // a read that outlives its view: next time
	}
	if drop != nil {
		s.segs = slices.Clone(s.segs[1:])
	}
	if len(merge) > 1 {
		for _, g := range merge[1:] {
			g.leaving = true
		}
	}
	s.mu.Unlock()
	switch {
	case drop != nil:
		if given {
			s.log.Warn("recovery point given up for want of room", "pos", drop.start.pos, "cut", drop.start.cut, "why", short)
		}
		s.log.Debug("point dropped", "pos", drop.start.pos)
		if err := s.letGo(drop); err != nil {
			return true, err
		}
		return true, s.collectFirmware()
	case len(merge) > 1:
		err := s.merge(ctx, merge)
		s.mu.Lock()
		for _, g := range merge {
			g.leaving = false // of no matter unless it failed
		}
		s.mu.Unlock()
		return true, err
	}
	return false, nil
}

// letGo removes the oldest segment, which nobody reads, durably. While it may
// come back the next one must not go: that would be a gap, which looks like
// damage. The store is opened again instead, and has one point more.
func (s *Store) letGo(g *segment) error {
	if err := errors.Join(g.file.Close(), s.cfg.FS.Remove(g.name())); err != nil {
		return &syncError{what: "undo directory", err: err}
	}
	err := s.cfg.FS.SyncDir(undoDir)
	if err != nil {
		return &syncError{what: "undo directory", err: err}
	}
	return nil
}

// plan finds the oldest segment to drop, or a run of segments to merge into
// one; s.mu is held. Damaged segments are dropped from the old end only.
func (s *Store) plan(keep []bool) (drop *segment, merge []*segment) {
	if len(s.segs) < 2 {
		return nil, nil
	}
	if !keep[0] {
		return s.segs[0], nil
	}
	for i := 0; i < len(s.segs)-1; i++ {
		n := i + 1
		for n < len(s.segs)-1 && !keep[n] && s.segs[n].damage == nil && s.segs[n].closed {
			n++
		}
		if n > i+1 && s.segs[i].damage == nil {
			return nil, s.segs[i:n:n]
		}
	}
	return nil, nil
}

// chooseThin asks the policy. When it wants nothing and room is short, one
// point is given up; s.mu is held.
func (s *Store) chooseThin(now time.Time, short bool) (drop *segment, merge []*segment, given bool) {
	cs := make([]Candidate, len(s.segs))
	for i, g := range s.segs {
		cs[i] = Candidate{At: g.start.at, App: g.start.app, Pinned: s.pins[g.start.ordinal] > 0 || s.kept(g.start.pos)}
	}
	keep := s.policy.Retain(cs, now)
	drop, merge = s.plan(keep)
	for drop == nil && len(merge) < 2 && short && sacrifice(cs, keep) {
		if drop, merge = s.plan(keep); drop != nil || len(merge) > 1 {
			s.sacrificed++
			given = true
		}
	}
	return drop, merge, given
}

// merge puts several closed segments into one that starts where the first
// does; where more than one saved a granule, the oldest value counts. The new
// file is in place before the old ones go.
func (s *Store) merge(ctx context.Context, gs []*segment) error {
	first, last := gs[0], gs[len(gs)-1]
	m := &segment{store: first.store, lo: first.lo, hi: last.hi, start: first.start, sizes: first.sizes, stop: last.stop, touch: map[undoKey]undoEntry{}, end: undoBlock}
	if err := s.writeMerged(ctx, m, gs); err != nil {
		if m.file != nil {
			err = errors.Join(err, m.file.Close())
			_ = s.cfg.FS.Remove(m.name() + fsx.TempSuffix) // else found at the next open
		}
		if errors.Is(err, ErrDamaged) {
			s.log.Error("undo is damaged: recovery points are lost", "err", err)
			return nil // it is not tried again, and stays listed as damaged
		}
		return fmt.Errorf("thin points: %w", err)
	}
	s.mu.Lock()
	at := slices.Index(s.segs, first)
	s.segs = slices.Concat(s.segs[:at:at], []*segment{m}, s.segs[at+len(gs):])
	var free []*segment
	for _, g := range gs {
		g.dead = true
		if g.refs == 0 {
			free = append(free, g)
		}
	}
	s.mu.Unlock()
	for _, g := range free {
		s.removeSegment(g)
	}
	return s.collectFirmware()
}

func (s *Store) writeMerged(ctx context.Context, m *segment, gs []*segment) (err error) {
	tmp := m.name() + fsx.TempSuffix
	if m.file, err = s.cfg.FS.Open(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC); err != nil {
		return noSpace("create", err)
	}
	head := m.header()
	copy(m.chain[:], head[undoBlock-40:])
	if _, err := m.file.WriteAt(head, 0); err != nil {
		return noSpace("write", err)
	}
	w := newUndoWriter(m, m.stop)
	for _, from := range gs {
		if err := copyUndo(ctx, w, from); errors.Is(err, ErrDamaged) {
			s.markDamaged(from, err)
			return err
		} else if err != nil {
			return err
		}
	}
	if err := w.done(); err != nil {
		return err
	}
	end, err := gs[len(gs)-1].readFooter()
	if err != nil {
		return err
	}
	if err := m.close(mark{pos: end.end, ordinal: end.ordinal}); err != nil {
		return err
	}
	m.closed = true
	if err := s.cfg.FS.Rename(tmp, m.name()); err != nil {
		return fmt.Errorf("put in place: %w", err)
	}
	if err := s.cfg.FS.SyncDir(undoDir); err != nil {
		return &syncError{what: "undo directory", err: err}
	}
	return nil
}

// copyUndo adds what from has saved and w has not.
func copyUndo(ctx context.Context, w *undoWriter, from *segment) error {
	entries, err := from.entries()
	if err != nil {
		return err
	}
	sortEntries(entries)
	var buf [granule]byte
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if w.saved(e.key) {
			continue
		}
		if err := from.read(e, buf[:]); err != nil {
			return err
		}
		if err := w.add(e.key, buf[:]); err != nil {
			return err
		}
	}
	w.seal()
	return nil
}
