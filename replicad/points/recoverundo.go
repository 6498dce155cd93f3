package points

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kvmreplica/internal/fsx"
)

// recoverUndo rebuilds the list of segments and the index of the open one,
// before anything is applied. Damage makes the points before it unreadable;
// damage of the open segment means that undo is lost up to the next point.
func (s *Store) recoverUndo(clean bool) error {
	if s.sup.flags&superNoUndo != 0 {
		return s.recoverNoUndo()
	}
	if err := s.openSegments(); err != nil {
		return err
	}
	if err := s.dropUnborn(); err != nil {
		return err
	}
	s.findGaps()
	applied := s.sup.applied.ordinal
	s.nextSegment = max(1, s.sup.undoLo+1)
	if len(s.segs) == 0 {
		if s.sup.undoLo != 0 {
			s.undoLost(&DamageError{File: undoDir, Text: "the open undo segment is missing"})
			return nil
		}
		return s.recoverNoUndo()
	}
	g := s.segs[len(s.segs)-1]
	s.nextSegment = max(s.nextSegment, g.hi+1)
	if g.closed && g.damage == nil && g.hi >= s.sup.undoLo {
		// The cut may have come while it was being closed.
		if _, err := g.entries(); errors.Is(err, ErrDamaged) {
			return s.recoverOpen(g, clean)
		} else if err != nil {
			return err
		}
	}
	switch {
	case g.damage != nil:
		s.undoLost(nil)
		return nil
	case g.hi < s.sup.undoLo:
		s.undoLost(&DamageError{File: undoDir, Text: "the open undo segment is missing"})
		return nil
	case g.closed && g.stop != applied:
		s.undoLost(&DamageError{File: g.name(), Text: fmt.Sprintf("ends at commit %d, the images are at %d", g.stop, applied)})
		return nil
	case g.closed:
		if clean || s.cfg.ReadOnly {
			return nil
		}
		return rewrite(g.file, 0, g.bytes.Load())
	}
	return s.recoverOpen(g, clean)
}

// dropUnborn forgets the newest segment if the cut came while it was created:
// no header, and nothing behind it, which would have come after the header was
// durable.
func (s *Store) dropUnborn() error {
	if len(s.segs) == 0 {
		return nil
	}
	g := s.segs[len(s.segs)-1]
	if g.damage == nil || g.start.ordinal != 0 || g.lo <= s.sup.undoLo {
		return nil
	}
	b := make([]byte, undoBlock)
	if err := g.readBlock(b, undoBlock); err == nil && !allZero(b) {
		return nil
	} else if err != nil && !errors.Is(err, ErrDamaged) {
		return err
	}
	s.segs = s.segs[:len(s.segs)-1]
	return s.discardFiles([]*segment{g})
}

// recoverOpen reads the open segment.
func (s *Store) recoverOpen(g *segment, clean bool) error {
	known := s.sup.undoLo == g.lo
	whole := !known
	durable := int64(undoBlock)
	if known {
		durable = s.sup.undoEnd
	}
	var must uint64
	err := g.scan(func(end int64, chain [32]byte, target uint64) {
		if known && end == s.sup.undoEnd && chain == s.sup.chain {
			whole = true
		}
		if end > durable {
			must = max(must, target)
		}
	})
	if err != nil {
		return err
	}
	if !whole || g.start.ordinal > s.sup.applied.ordinal {
		g.damage = &DamageError{File: g.name(), Text: "tables do not reach what the superblock recorded"}
		s.undoLost(nil)
		return nil
	}
	s.must = must
	g.bytes.Store(g.end)
	if must > s.committed.ordinal {
		s.damage = append(s.damage, &DamageError{File: spoolDir, Text: fmt.Sprintf("a batch up to commit %d is half applied, only %d are here", must, s.committed.ordinal)})
	}
	if clean || s.cfg.ReadOnly {
		return nil
	}
	if err := g.file.Truncate(g.end); err != nil { // there may be a footer that never counted
		return fmt.Errorf("cut undo: %w", err)
	}
	if _, err := g.file.WriteAt(g.header(), 0); err != nil {
		return noSpace("write undo header again", err)
	}
	return rewrite(g.file, durable, g.end)
}

// undoLost remembers that the images cannot be taken back below what is
// committed: until the backlog is applied there is no undo.
func (s *Store) undoLost(why error) {
	s.lost = true
	if why != nil {
		s.undoBad = append(s.undoBad, why)
	}
	s.floor = max(s.floor, s.sup.applied.ordinal)
	s.must = max(s.must, s.committed.ordinal)
	s.log.Error("undo is damaged: recovery points are lost", "err", why)
}

// openSegments opens every undo file. Files covered by a merged one are the
// remains of thinning; an unfinished merged one is of no use.
func (s *Store) openSegments() error {
	names, err := s.cfg.FS.List(undoDir)
	if err != nil {
		return fmt.Errorf("list undo: %w", err)
	}
	var all []*segment
	for _, name := range names {
		if strings.HasSuffix(name, fsx.TempSuffix) {
			if !s.cfg.ReadOnly {
				if err := s.cfg.FS.Remove(undoDir + "/" + name); err != nil {
					return fmt.Errorf("remove: %w", err)
				}
			}
			continue
		}
		lo, hi, ok := parseSegmentName(name)
		if !ok {
			continue
		}
		g, err := openSegment(s.cfg.FS, lo, hi, s.sup.store)
		if err != nil {
			return errors.Join(err, closeSegments(all))
		}
		all = append(all, g)
	}
	slices.SortFunc(all, func(a, b *segment) int { return cmp.Or(cmp.Compare(a.lo, b.lo), cmp.Compare(b.hi, a.hi)) })
	for i := 0; i < len(all); {
		g, n := all[i], i+1
		for n < len(all) && all[n].hi <= g.hi {
			n++
		}
		drop := all[i+1 : n]
		if len(drop) > 0 && (g.damage != nil || !g.closed) {
			drop, n = all[i:i+1], i+1
		} else {
			s.segs = append(s.segs, g)
		}
		if err := s.discardFiles(drop); err != nil {
			return errors.Join(err, closeSegments(all[n:]))
		}
		i = n
	}
	return nil
}

func closeSegments(gs []*segment) error {
	var err error
	for _, g := range gs {
		err = errors.Join(err, g.file.Close())
	}
	return err
}

func (s *Store) discardFiles(gs []*segment) error {
	for _, g := range gs {
		if err := g.file.Close(); err != nil {
			return fmt.Errorf("close undo: %w", err)
		}
		if s.cfg.ReadOnly {
			continue
		}
		if err := s.cfg.FS.Remove(g.name()); err != nil {
			return fmt.Errorf("remove undo: %w", err)
		}
	}
	return nil
}

// findGaps marks segments that do not join the next one.
func (s *Store) findGaps() {
	for i, g := range s.segs {
		if i == len(s.segs)-1 || g.damage != nil {
			continue
		}
		next := s.segs[i+1]
		switch {
		case !g.closed:
			g.damage = &DamageError{File: g.name(), Text: "footer is not readable"}
		case next.lo != g.hi+1:
			g.damage = &DamageError{File: segmentName(g.hi+1, next.lo-1), Text: "segment is missing"}
		case next.damage == nil && next.start.ordinal != g.stop:
			g.damage = &DamageError{File: g.name(), Text: "does not join the next segment"}
		}
	}
}
