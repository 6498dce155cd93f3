package points

import (
	"context"
	"fmt"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// Pace is told of bytes written in the background and may wait; its error ends
// the work.
type Pace func(ctx context.Context, n int64) error

// BeginPromote makes it durable that the images will be taken to pos for
// generation g, and what that changes: from then on PromoteUnder must follow,
// and of all states only pos can be viewed. At the committed position it does
// nothing. Repeating it is harmless.
func (s *Store) BeginPromote(pos delta.Pos, g delta.Generation) error {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	if _, _, err := s.beginPromote(pos, g); err != nil {
		return fmt.Errorf("promote at %v: %w", pos, err)
	}
	return nil
}

// beginPromote returns the seal of a promotion that was made already, else the
// segment that begins at pos, -1 for the committed state.
func (s *Store) beginPromote(pos delta.Pos, g delta.Generation) (*Seal, int, error) {
	s.mu.Lock()
	done, err := s.promotable(g)
	role := s.sup.role
	latest := role != roleRolling && pos == s.committed.pos
	s.mu.Unlock()
	switch {
	case err != nil:
		return nil, 0, err
	case done != nil && done.At != pos:
		return nil, 0, fmt.Errorf("%w (at %v)", ErrPromoted, done.At)
	case done != nil:
		return done, 0, nil
	case role == roleRolling && (s.sup.seal != pos || s.sup.gen != g):
		return nil, 0, fmt.Errorf("%w: rolling back to %v for generation %v", ErrState, s.sup.seal, s.sup.gen)
	case latest:
		return nil, -1, nil
	case s.lost:
		return nil, 0, fmt.Errorf("%w: undo is lost", ErrDamaged)
	}
	at, err := s.point(pos)
	if err == nil && role != roleRolling {
		err = s.startRolling(at, pos, g)
	}
	return nil, at, err
}

// PromoteUnder promotes at pos while a guest reads View(pos): the images are
// taken to that state, then handOver is called, after which nobody may use the
// view, and then the promotion is made durable. The guest's writes go elsewhere
// until PromoteUnder has returned. It may be interrupted and repeated.
func (s *Store) PromoteUnder(ctx context.Context, pos delta.Pos, g delta.Generation, pace Pace, handOver func() error) (Seal, error) {
	if pos == s.Committed() && s.Status().State == Replica {
		if err := s.ApplyAll(ctx); err != nil {
			return Seal{}, fmt.Errorf("promote at %v: %w", pos, err)
		}
	}
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	seal, err := s.promoteUnder(ctx, pos, g, pace, handOver)
	if err != nil {
		return Seal{}, fmt.Errorf("promote at %v: %w", pos, err)
	}
	return seal, nil
}

func (s *Store) promoteUnder(ctx context.Context, pos delta.Pos, g delta.Generation, pace Pace, handOver func() error) (Seal, error) {
	done, at, err := s.beginPromote(pos, g)
	if err != nil || done != nil {
		return deref(done), err
	}
	start := s.sup.applied
	if at >= 0 {
		if err := s.rollBack(ctx, at, pace); err != nil {
			return Seal{}, s.fail(err)
		}
		start = s.segs[at].start
	} else if start.pos != pos {
		return Seal{}, fmt.Errorf("%w: not everything is applied", ErrState)
	}
	if err := handOver(); err != nil {
		return Seal{}, err
	}
	return s.sealAt(start, g, true)
}

// RolledBack lists per disk what a promotion at pos rolled back, or is rolling
// back, without opening the store: its images may be somebody else's.
func RolledBack(dir fsx.FS, pos delta.Pos) (map[string][]block.Range, error) {
	sup, _, err := readSuper(dir)
	if err != nil {
		return nil, fmt.Errorf("changes since %v: %w", pos, err)
	}
	s := &Store{cfg: Config{FS: dir}, sup: sup}
	if sup.seal != pos || sup.role != roleRolling && sup.role != rolePromoted {
		return nil, fmt.Errorf("changes since %v: %w: the store was not promoted there", pos, ErrState)
	}
	out, err := s.readRolled(pos)
	if err != nil {
		return nil, fmt.Errorf("changes since %v: %w", pos, err)
	}
	return out, nil
}
