package points

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Open opens an existing store and repeats what a crash interrupted: the
// newest superblock record, the committed epochs and the open undo segment may
// be in the page cache only and are written again before anything relies on
// them.
func Open(cfg Config) (*Store, error) {
	s := newStore(cfg)
	if err := s.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open replica store: %w", err), s.release())
	}
	return s, nil
}

func (s *Store) open() error {
	sup, bad, err := readSuper(s.cfg.FS)
	if err != nil {
		return err
	}
	s.sup = sup
	if !s.cfg.VM.IsZero() && s.cfg.VM != sup.vm {
		return fmt.Errorf("%w: the store is of vm %v", ErrState, sup.vm)
	}
	if bad > 2 {
		s.log.Warn("superblock copies are damaged", "copies", bad)
	}
	flag := os.O_RDWR
	if s.cfg.ReadOnly {
		flag = os.O_RDONLY
	}
	if s.file, err = s.cfg.FS.Open(superName, flag); err != nil {
		return err
	}
	if err := s.settle(); err != nil {
		return err
	}
	if sup.role != rolePromoted { // they are somebody else's
		if err := s.openBases(false); err != nil {
			return err
		}
	}
	if err := s.makeReaders(); err != nil {
		return err
	}
	clean := sup.flags&superClean != 0
	suspect, err := s.changedOutside(clean)
	if err != nil {
		return err
	}
	s.committed = sup.applied
	if sup.role == roleSeeding || sup.role == roleReplica {
		if err := s.recoverSpool(clean); err != nil {
			return err
		}
	}
	if sup.role == roleReplica || sup.role == roleRolling {
		if err := s.recoverUndo(clean); err != nil {
			return err
		}
	}
	if i := s.segmentAt(mark{pos: sup.seal}); sup.role == roleRolling && i >= 0 {
		s.rolling = s.segs[i].start.ordinal
	}
	if err := s.loadPins(); err != nil {
		return err
	}
	return s.opened(suspect)
}

// settle makes durable what the last process may have left in the page cache.
func (s *Store) settle() error {
	if s.cfg.ReadOnly {
		return nil
	}
	if err := putSuper(s.file, s.sup); err != nil {
		return err
	}
	for _, dir := range []string{".", spoolDir, undoDir, fwDir} {
		if err := s.cfg.FS.SyncDir(dir); err != nil {
			return fmt.Errorf("sync directory: %w", err)
		}
	}
	return nil
}

func (s *Store) makeReaders() (err error) {
	if s.reader, err = newChunkReader(1); err != nil {
		return err
	}
	s.dec, err = newDecoder()
	return err
}

// changedOutside compares the images with what the store left.
func (s *Store) changedOutside(clean bool) (bool, error) {
	if s.cfg.Identity == nil || s.sup.role == rolePromoted {
		return false, nil
	}
	for _, d := range s.sup.disks {
		if d.file.IsZero() || d.size == 0 {
			continue
		}
		id, err := s.cfg.Identity(d.name)
		if err != nil {
			return false, fmt.Errorf("identity of disk %s: %w", d.name, err)
		}
		same := d.file == blockDigest([]byte(id.File)) || id.Numbered != "" && d.file == blockDigest([]byte(id.Numbered))
		if !same || (clean && d.identity != blockDigest([]byte(id.State))) {
			s.log.Error("replica image was changed from outside", "disk", d.name)
			return true, nil
		}
	}
	return false, nil
}

// opened records that the store is in use, and removes what nothing refers to.
func (s *Store) opened(suspect bool) error {
	if s.cfg.ReadOnly {
		if suspect {
			s.sup.flags |= superSuspect
		}
		return nil
	}
	sup := s.sup.clone()
	sup.flags &^= superClean
	if suspect {
		sup.flags |= superSuspect
	} else if sup.flags&superSuspect == 0 {
		if err := s.identify(sup); err != nil {
			return err
		}
	}
	if err := s.putSuper(sup); err != nil {
		return err
	}
	if err := s.sweep(); err != nil {
		return err
	}
	if suspect || sup.flags&superSuspect != 0 || len(s.damage) > 0 {
		return nil
	}
	return s.ensureSegment()
}

// sweep removes leftovers: files of an earlier store, of points that ended,
// of unfinished replacements.
func (s *Store) sweep() error {
	if s.sup.role == rolePromoted {
		if err := s.removeAll(spoolDir, undoDir); err != nil {
			return err
		}
	}
	return s.collectFirmware()
}

func (s *Store) removeAll(dirs ...string) error {
	for _, dir := range dirs {
		names, err := s.cfg.FS.List(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("list %s: %w", dir, err)
		}
		for _, n := range names {
			if err := s.cfg.FS.Remove(dir + "/" + n); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove: %w", err)
			}
		}
	}
	return nil
}
