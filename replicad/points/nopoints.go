package points

import (
	"errors"
	"fmt"
	"io/fs"
)

// A policy without points needs no undo: apply then costs no more than writing
// the images. As soon as somebody pins or views a state, undo is written again.

// idle reports that no undo is wanted; s.mu is held.
func (s *Store) idle() bool {
	if len(s.policy.Grid) > 0 || len(s.pins) > 0 {
		return false
	}
	for _, g := range s.segs {
		if s.kept(g.start.pos) {
			return false
		}
	}
	return true
}

// endUndo removes all undo when none is wanted. It is durable that there is
// none before the files go: one that came back would be taken for whole.
func (s *Store) endUndo() (bool, error) {
	s.mu.Lock()
	gs := s.segs
	busy := !s.idle() || len(gs) == 0 || s.must > s.sup.applied.ordinal
	for _, g := range gs {
		busy = busy || g.refs > 0
	}
	sup := s.sup.clone()
	if !busy {
		for _, g := range gs { // from here on nobody may begin to view these points
			g.leaving = true
		}
	}
	s.mu.Unlock()
	if busy {
		return false, nil
	}
	err := s.dropUndo(sup, gs)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		for _, g := range gs {
			g.leaving = false
		}
		return false, err
	}
	s.segs = nil
	s.floor = max(s.floor, s.sup.applied.ordinal)
	return true, nil
}

func (s *Store) dropUndo(sup *super, gs []*segment) error {
	sup.undoLo, sup.undoEnd, sup.chain = 0, 0, [32]byte{}
	sup.flags |= superNoUndo
	if err := s.putSuper(sup); err != nil {
		return err
	}
	for _, g := range gs {
		if err := s.cfg.FS.Remove(g.name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove undo: %w", err)
		}
	}
	if err := s.cfg.FS.SyncDir(undoDir); err != nil {
		return &syncError{what: "undo directory", err: err}
	}
	for _, g := range gs {
		_ = g.file.Close() // removed above, nothing was written
	}
	return nil
}

// beginUndo makes durable that undo is written again, before anything relies on
// the new segment.
func (s *Store) beginUndo() error {
	if s.sup.flags&superNoUndo == 0 {
		return nil
	}
	sup := s.sup.clone()
	sup.flags &^= superNoUndo
	return s.putSuper(sup)
}

// recoverNoUndo removes what endUndo did not get to. Without undo nobody knows
// whether a batch is half applied: all that is committed is, before a point.
func (s *Store) recoverNoUndo() error {
	if s.sup.flags&superNoUndo != 0 && !s.cfg.ReadOnly {
		if err := s.removeAll(undoDir); err != nil {
			return err
		}
	}
	s.must = max(s.must, s.committed.ordinal)
	return nil
}
