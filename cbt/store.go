package cbt

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"kvmreplica/internal/fsx"
)

// errDamaged: bytes that fail their checksum, or are not what belongs there.
var errDamaged = errors.New("damaged")

// Names in the tracker's directory.
const (
	superName   = "super"
	mapPrefix   = "map-"
	exactPrefix = "exact-"
)

func mapName(id id16) string   { return mapPrefix + hex.EncodeToString(id[:]) }
func exactName(id id16) string { return exactPrefix + hex.EncodeToString(id[:]) }

// metaStore keeps the superblock: two slots in one file, written in turn;
// after any error the file is never trusted again and a new one is renamed
// into its place.
type metaStore struct {
	fs fsx.FS

	// cur is what the last successful commit wrote. It is not changed in place.
	cur   atomic.Pointer[super]
	syncs atomic.Uint64

	metaMu sync.Mutex
	// guarded by metaMu
	seq    uint64 // highest sequence number ever attempted
	file   fsx.File
	broken bool
	buf    []byte
}

// readSuper returns the newest valid superblock. Only freezes and bases are
// written to one slot alone. If a slot is damaged, it may have held one such
// update more: then one more epoch may have been frozen, and any acknowledged
// one may be the base that clears relied on.
func readSuper(fsys fsx.FS) (s *super, alarms []string, err error) {
	f, err := fsys.Open(superName, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, ErrNoTracker
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open superblock: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	b := make([]byte, superSize)
	var unread error // what cannot be read now may be read later: it is not lost
	for i, off := range []int64{superSlotA, superSlotB} {
		n, rerr := f.ReadAt(b, off)
		if n != superSize {
			if rerr == nil || rerr == io.EOF {
				rerr = fmt.Errorf("%w: superblock cut short", errDamaged)
			} else {
				unread = rerr
			}
			alarms = append(alarms, fmt.Sprintf("superblock %d: %v", i, rerr))
			continue
		}
		v, derr := decodeSuper(b)
		if errors.Is(derr, ErrFeature) {
			return nil, nil, derr
		}
		if derr != nil {
			alarms = append(alarms, fmt.Sprintf("superblock %d: %v", i, derr))
			continue
		}
		if s == nil || v.seq > s.seq {
			s = v
		}
	}
	if s == nil && unread != nil {
		return nil, alarms, fmt.Errorf("read superblock: %w", unread)
	}
	if s == nil {
		return nil, alarms, fmt.Errorf("%w (%s)", ErrCorrupt, strings.Join(alarms, "; "))
	}
	if len(alarms) > 0 && (s.state == stateInUse || s.state == stateVerifyAll) {
		s.floor = max(s.floor, s.highest)
		s.highest++
	}
	return s, alarms, nil
}

// newMetaStore continues after s; the next commit writes a new file when
// fresh, which also repairs a damaged slot.
func newMetaStore(fsys fsx.FS, s *super) *metaStore {
	m := &metaStore{fs: fsys, seq: s.seq, broken: true, buf: make([]byte, superSize)}
	m.cur.Store(s)
	return m
}

// commit makes the superblock as changed by mutate durable. both marks a
// change of state, which goes to both slots. After an error the durable state
// may be the old or the new one, and commit may be called again.
func (m *metaStore) commit(both bool, mutate func(*super)) error {
	m.metaMu.Lock()
	defer m.metaMu.Unlock()
	next := m.cur.Load().clone()
	mutate(next)
	if !m.broken {
		err := m.writeSlots(next, both)
		if err == nil {
			m.cur.Store(next)
			return nil
		}
		m.broken = true
	}
	if err := m.replace(next); err != nil {
		return fmt.Errorf("write superblock: %w", err)
	}
	m.broken = false
	m.cur.Store(next)
	return nil
}

// current is the superblock in force. The caller must not change it.
func (m *metaStore) current() *super { return m.cur.Load() }

// writeSlots writes the slot that is not the newest, then, with both, the
// other one. Each write is synced before the next: a power cut tears one slot
// at most.
func (m *metaStore) writeSlots(s *super, both bool) error {
	m.seq++
	s.seq = m.seq
	s.encode(m.buf)
	offs := [...]int64{superSlotA, superSlotB}
	first := m.seq % 2
	if err := m.writeSlot(offs[first]); err != nil || !both {
		return err
	}
	return m.writeSlot(offs[1-first])
}

func (m *metaStore) writeSlot(off int64) error {
	if _, err := m.file.WriteAt(m.buf, off); err != nil {
		return err
	}
	m.syncs.Add(1)
	return m.file.Sync()
}

// replace writes a new superblock file and renames it into place.
func (m *metaStore) replace(s *super) error {
	tmp := superName + fsx.TempSuffix
	f, err := m.fs.Open(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	old := m.file
	m.file = f
	if err := m.putInPlace(f, tmp, s); err != nil {
		m.file = nil
		if old != nil {
			_ = old.Close() // poisoned by an earlier error, nothing to learn
		}
		return errors.Join(err, f.Close())
	}
	if old != nil {
		_ = old.Close() // its name is gone, what it held does not count
	}
	return nil
}

func (m *metaStore) putInPlace(f fsx.File, tmp string, s *super) error {
	if err := f.Allocate(0, superSlotB+superSize); err != nil {
		return err
	}
	if err := m.writeSlots(s, true); err != nil {
		return err
	}
	if err := m.fs.Rename(tmp, superName); err != nil {
		return err
	}
	return m.fs.SyncDir(".")
}

func (m *metaStore) close() error {
	m.metaMu.Lock()
	defer m.metaMu.Unlock()
	if m.file == nil {
		return nil
	}
	f := m.file
	m.file, m.broken = nil, true
	return f.Close()
}

// createMap writes a new map file with the given bits and makes it durable. It
// takes effect when a superblock names it.
func createMap(fsys fsx.FS, id id16, geo mapGeometry, words []uint64) (fsx.File, error) {
	f, err := fsys.Open(mapName(id), os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, fmt.Errorf("create intent map: %w", err)
	}
	if err := fillMap(fsys, f, id, geo, words); err != nil {
		_ = f.Close()                // being given up
		_ = fsys.Remove(mapName(id)) // swept at the next start if this fails
		return nil, fmt.Errorf("create intent map: %w", err)
	}
	return f, nil
}

func fillMap(fsys fsx.FS, f fsx.File, id id16, geo mapGeometry, words []uint64) error {
	if err := f.Allocate(0, geo.fileSize()); err != nil {
		return err
	}
	b := make([]byte, pageSize)
	for p := range geo.pages {
		for c := range 2 {
			encodePage(b, id, c, p, 1, words[p*pageWords:])
			if _, err := f.WriteAt(b, geo.offset(c, p)); err != nil {
				return err
			}
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return fsys.SyncDir(".")
}

// sweep removes files of this directory no superblock names: remains of
// crashes. Failing is harmless.
func sweep(fsys fsx.FS, s *super) {
	keep := map[string]bool{superName: true}
	for i := range s.disks {
		keep[mapName(s.disks[i].mapID)] = true
	}
	if s.exact.id != (id16{}) {
		keep[exactName(s.exact.id)] = true
	}
	names, err := fsys.List(".")
	if err != nil {
		return
	}
	for _, n := range names {
		ours := strings.HasPrefix(n, mapPrefix) || strings.HasPrefix(n, exactPrefix) || n == superName+fsx.TempSuffix
		if ours && !keep[n] {
			_ = fsys.Remove(n)
		}
	}
}
