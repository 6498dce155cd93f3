package points

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// Points lists the recovery points, oldest first. Those with Damage set cannot
// be read. The newest committed state need not be among them; it can be viewed
// all the same.
func (s *Store) Points() []Point {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sup.role != roleReplica {
		return nil
	}
	var out []Point
	for i, g := range s.segs {
		if g.start.ordinal == 0 || g.leaving {
			continue // its header is not readable, or it is just being thinned out
		}
		p := Point{
			Pos: g.start.pos, Ordinal: g.start.ordinal, At: g.start.at, Cut: g.start.cut, Disks: s.sup.present(g.sizes), Config: g.start.config,
			App: g.start.app, Bytes: g.bytes.Load(), Pinned: s.kept(g.start.pos), Owners: slices.Clone(s.keep[g.start.pos]), Damage: s.readable(i),
		}
		out = append(out, p)
	}
	return out
}

// Status is a snapshot.
func (s *Store) Status() Status {
	free := s.freeSpace()
	points := len(s.Points())
	now := s.cfg.Now()
	idle := s.recv.TryLock() // else a chunk is being written: do not wait for it
	if idle {
		defer s.recv.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		State: s.state(), VM: s.sup.vm, Disks: s.disks(), Absent: s.sup.absent(s.latest()), Committed: s.committed.pos, Applied: s.sup.applied.pos, Cut: s.committed.cut,
		Backlog: len(s.epochs), Points: points, Free: free, Seeded: map[string]int64{},
		Quota: s.limits.UndoBytes, Reserve: s.limits.Reserve, Sacrificed: s.sacrificed, Forecast: s.forecast(free, now),
		Damage: append([]error(nil), s.damage...),
	}
	st.Spool, st.BacklogAge = s.backlog(now)
	for _, d := range s.sup.disks {
		st.Seeded[d.name] = d.cursor
	}
	for _, g := range s.segs {
		st.Undo += g.bytes.Load()
		if g.damage != nil {
			st.Damage = append(st.Damage, g.damage)
		}
	}
	st.Damage = append(st.Damage, s.undoBad...)
	for _, n := range s.pins {
		st.Views += n
	}
	if p := s.partial; p != nil && !idle {
		st.Partial = &Partial{Generation: p.head.Generation, Epoch: p.head.Epoch, Nonce: p.head.Nonce}
	} else if p != nil {
		st.Partial = &Partial{Generation: p.head.Generation, Epoch: p.head.Epoch, Nonce: p.head.Nonce, Chunks: p.tally.Len(), Bytes: p.end}
	}
	switch s.sup.role {
	case rolePromoted:
		st.Seal = s.sup.sealRecord()
	case roleRolling:
		st.Rolling = s.sup.sealRecord()
	}
	if s.sup.flags&superVerify != 0 {
		st.VerifyAll = "the replica's content was given up to be compared"
	}
	return st
}

// state is the published state; s.mu is held.
func (s *Store) state() State {
	switch {
	case s.sup.role == rolePromoted:
		return Promoted
	case s.sup.role == roleRolling:
		return Rolling
	case s.sup.flags&superSuspect != 0:
		return Suspect
	case len(s.damage) > 0:
		return Damaged
	case s.committed.pos.IsZero():
		return Seeding
	}
	return Replica
}

// pinsName holds the pinned positions.
const (
	pinsName    = "pins.json"
	pinsVersion = 1
)

type pinned struct {
	Version int         `json:"version"`
	Points  []delta.Pos `json:"points"` // by a person
	Held    []held      `json:"held,omitempty"`
}

// held is a point that the program itself pinned, for each of By.
type held struct {
	Point delta.Pos `json:"point"`
	By    []string  `json:"by"`
}

// person is the owner of a person's pins.
const person = ""

// maxOwner bounds an owner's name.
const maxOwner = 64

// Pin keeps a point from being thinned or dropped, durably, for a person. A
// committed state that is no point yet is ErrNoPoint: view it, and it becomes one.
func (s *Store) Pin(pos delta.Pos) error { return s.pin(pos, person, true) }

// Unpin lets go of it; whoever else holds it still does.
func (s *Store) Unpin(pos delta.Pos) error { return s.pin(pos, person, false) }

// Hold is Pin for an owner that is no person, such as a test copy.
func (s *Store) Hold(pos delta.Pos, owner string) error { return s.pin(pos, owner, true) }

// Release takes the owner's Hold back; twice is harmless.
func (s *Store) Release(pos delta.Pos, owner string) error { return s.pin(pos, owner, false) }

func (s *Store) pin(pos delta.Pos, owner string, on bool) error {
	if len(owner) > maxOwner {
		return fmt.Errorf("pin %v: %w: an owner of %d bytes", pos, ErrState, len(owner))
	}
	s.maint.Lock()
	defer s.maint.Unlock()
	s.mu.Lock()
	err := s.receiving()
	owners := slices.DeleteFunc(slices.Clone(s.keep[pos]), func(o string) bool { return o == owner })
	if on {
		owners = append(owners, owner)
	}
	found := !on
	all := pinned{Version: pinsVersion, Points: []delta.Pos{}}
	for _, g := range s.segs {
		p := g.start.pos
		found = found || p == pos && !g.leaving
		if p == pos {
			all.add(p, owners)
		} else {
			all.add(p, s.keep[p])
		}
	}
	s.mu.Unlock()
	if err == nil && !found {
		err = ErrNoPoint
	}
	if err == nil {
		err = fsx.WriteJSON(s.cfg.FS, pinsName, all)
	}
	if err != nil {
		return fmt.Errorf("pin %v: %w", pos, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keep[pos] = owners; len(owners) == 0 {
		delete(s.keep, pos)
	}
	s.signal()
	return nil
}

func (a *pinned) add(p delta.Pos, owners []string) {
	var by []string
	for _, o := range owners {
		if o == person {
			a.Points = append(a.Points, p)
		} else {
			by = append(by, o)
		}
	}
	if len(by) > 0 {
		a.Held = append(a.Held, held{Point: p, By: by})
	}
}

// kept says whether anybody pinned a point; s.mu is held.
func (s *Store) kept(pos delta.Pos) bool { return len(s.keep[pos]) > 0 }

// loadPins reads which points must be kept. When that cannot be known, every
// point there is counts as pinned: a person lets go of what is not wanted.
func (s *Store) loadPins() error {
	var all pinned
	err := fsx.ReadJSON(s.cfg.FS, pinsName, 1<<20, &all)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && all.Version != pinsVersion {
		return fmt.Errorf("%s has version %d, this program knows %d", pinsName, all.Version, pinsVersion)
	}
	if err != nil {
		s.undoBad = append(s.undoBad, &DamageError{File: pinsName, Text: err.Error() + "; every recovery point there is now counts as pinned: unpin those that need not stay, which writes the list anew"})
		for _, g := range s.segs {
			s.keep[g.start.pos] = []string{person}
		}
	}
	for _, p := range all.Points {
		s.keep[p] = append(s.keep[p], person)
	}
	for _, h := range all.Held {
		s.keep[h.Point] = append(s.keep[h.Point], h.By...)
	}
	return nil
}

// Discard ends the state suspect: the caller says that what was changed from
// outside counts for nothing. All points end, the applied position stays the
// replica's claim, and Status.VerifyAll is set until Verified.
func (s *Store) Discard() error {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.mu.Lock()
	err := s.usable()
	if err == nil && s.sup.flags&superSuspect == 0 {
		err = fmt.Errorf("%w: the replica is not suspect", ErrState)
	}
	sup := s.sup.clone()
	gs := s.segs
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("discard: %w", err)
	}
	sup.flags = sup.flags&^superSuspect | superVerify
	if err := s.identify(sup); err != nil {
		return fmt.Errorf("discard: %w", err)
	}
	for _, g := range gs { // first: points over images that somebody changed
		if err := s.cfg.FS.Remove(g.name()); err != nil {
			return fmt.Errorf("discard: remove point: %w", err)
		}
	}
	if err := s.cfg.FS.SyncDir(undoDir); err != nil {
		return s.fail(&syncError{what: "undo directory", err: err})
	}
	if err := s.putSuper(sup); err != nil {
		return err
	}
	s.mu.Lock()
	s.segs, s.lost, s.must = nil, sup.role == roleReplica, s.committed.ordinal
	s.floor = max(s.floor, s.committed.ordinal)
	s.mu.Unlock()
	for _, g := range gs {
		_ = g.file.Close() // removed above, nothing was written
	}
	return nil
}

// DropDamaged gives up committed epochs that cannot be read and goes back to
// the last good position; Status.VerifyAll is set until Verified.
func (s *Store) DropDamaged() error {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	s.mu.Lock()
	err := s.usable()
	sup := s.sup.clone()
	bad := s.stranded
	half := s.must > s.committed.ordinal
	s.mu.Unlock()
	switch {
	case err != nil:
	case len(s.damage) == 0:
		err = fmt.Errorf("%w: nothing is damaged", ErrState)
	case half:
		err = fmt.Errorf("%w: the images are half way to a lost epoch: the replica must be seeded again", ErrDamaged)
	}
	if err != nil {
		return fmt.Errorf("drop damaged epochs: %w", err)
	}
	sup.flags |= superVerify
	if err := s.putSuper(sup); err != nil {
		return err
	}
	for _, sl := range bad {
		if err := s.invalidate(sl); err != nil {
			return s.fail(err)
		}
	}
	s.mu.Lock()
	s.stranded, s.damage = nil, nil
	s.mu.Unlock()
	return s.ensureSegment()
}

// Verified ends VerifyAll after the content was compared and mended.
func (s *Store) Verified() error {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.mu.Lock()
	err := s.usable()
	sup := s.sup.clone()
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("verified: %w", err)
	}
	sup.flags &^= superVerify
	return s.putSuper(sup)
}

// Ordinal is the number of the newest commit, 0 while seeding. Numbers of
// recovery points are of the same kind.
func (s *Store) Ordinal() uint64 { return s.committedOrdinal() }
