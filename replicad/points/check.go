package points

import (
	"context"
	"errors"
	"fmt"
)

// Check reads everything the store wrote (spools were read at open) and
// verifies it: undo indexes, every saved granule, firmware state. report is
// called for each damage; a damaged segment's points are refused from then on.
// The images carry no checksums of their own and are not read. The error is
// for what could not be read.
func (s *Store) Check(ctx context.Context, report func(error)) error {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.mu.Lock()
	segs := append([]*segment(nil), s.segs...)
	marks := []mark{s.committed, s.sup.applied}
	epochs := append([]*epoch(nil), s.epochs...)
	for _, e := range epochs {
		e.refs++
	}
	bad := append(append([]error(nil), s.damage...), s.undoBad...)
	s.mu.Unlock()
	defer s.unref(epochs)
	for _, err := range bad {
		report(err)
	}
	for _, g := range segs {
		marks = append(marks, g.start)
		err := g.check(ctx)
		if errors.Is(err, ErrDamaged) {
			s.markDamaged(g, err)
			report(err)
		} else if err != nil {
			return fmt.Errorf("check: %w", err)
		}
	}
	for _, m := range marks {
		if err := s.checkBlobs(epochs, m); errors.Is(err, ErrDamaged) {
			report(err)
		} else if err != nil {
			return fmt.Errorf("check: %w", err)
		}
	}
	return nil
}

// markDamaged refuses what needs g from now on. Readers of damage hold one of
// the two locks.
func (s *Store) markDamaged(g *segment, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.damage = err
}

func (s *Store) checkBlobs(epochs []*epoch, m mark) error {
	if !m.nvram.IsZero() {
		if _, err := s.blob(epochs, m.nvram); err != nil {
			return err
		}
	}
	if !m.tpm.IsZero() {
		if _, err := s.blob(epochs, m.tpm); err != nil {
			return err
		}
	}
	return nil
}

// check reads every saved granule of a segment.
func (g *segment) check(ctx context.Context) error {
	entries, err := g.entries() // reports older damage
	if err != nil {
		return err
	}
	var b [granule]byte
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := g.read(e, b[:]); err != nil {
			return err
		}
	}
	return nil
}
