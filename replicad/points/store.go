package points

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// Store is the replica store of one VM. Its methods are safe for concurrent use.
//
// Lock order: maint, recv, grow, mu, segment.mu. maint serialises what changes
// images, superblock and undo; recv what changes the partial epoch. Both are
// held across I/O on purpose: each is the only activity of its kind. grow is
// held for reading while an image is read by a view, so that it is not
// replaced or opened meanwhile. mu is never held across I/O.
type Store struct {
	cfg    Config
	policy Policy
	limits Limits
	log    *slog.Logger

	maint  sync.Mutex
	file   fsx.File // superblock; guarded by maint
	reader *chunkReader
	seeded map[int]int64 // written, not yet durable seed cursors; guarded by maint
	unsync int64         // seed bytes since the last durable cursor

	grow  sync.RWMutex   // held by readers of bases, and while one is replaced
	bases []block.Device // nil for a disk that is absent; changed with grow and mu

	recv    sync.Mutex
	dec     *delta.ChunkDecoder
	token   uint64 // of the newest Receive
	partial *epoch
	buf     []byte

	mu          sync.Mutex
	sup         *super // what is durable
	committed   mark
	asked       []string // disks of the epoch that began last
	epochs      []*epoch // committed and not applied, oldest first
	free        []*slot
	stranded    []*slot // hold epochs behind a damaged one
	reuse       *slot   // was partial: must be used next
	nextSlot    uint32
	segs        []*segment // oldest first; the last is open unless it is closed
	nextSegment uint64
	must        uint64 // apply reaches this ordinal before it makes a point
	floor       uint64 // states below have lost their undo
	rolling     uint64 // the state that is being rolled back to
	lost        bool   // no undo until the backlog is applied
	pins        map[uint64]int
	keep        map[delta.Pos][]string // durable pins, by owner
	damage      []error                // committed epochs that cannot be read
	undoBad     []error                // damage of undo files without a segment to hold it
	sacrificed  int                    // points given up for want of room
	failed      error
	closed      bool

	wake chan struct{} // something to do for Run
	done chan struct{} // closed and replaced when something was applied
}

func newStore(cfg Config) *Store {
	s := &Store{
		cfg: cfg, policy: cfg.Policy.withDefaults(), limits: cfg.Limits.withDefaults(), log: cfg.Log,
		pins: map[uint64]int{}, keep: map[delta.Pos][]string{}, seeded: map[int]int64{},
		nextSegment: 1, // 0 means none
		wake:        make(chan struct{}, 1), done: make(chan struct{}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.cfg.Now == nil {
		s.cfg.Now = time.Now
	}
	if s.cfg.Rand == nil {
		s.cfg.Rand = rand.Reader
	}
	if s.cfg.Sync == nil {
		s.cfg.Sync = fsx.File.Sync
	}
	return s
}

// Create makes an empty store in state seeding; images may hold anything.
// The position and size of nothing is known before the first epoch.
func Create(cfg Config, disks []delta.Disk) (*Store, error) {
	return create(cfg, disks, mark{}, roleSeeding)
}

// CreateAt makes a store around images that are exactly at pos (the old
// primary's after a planned failover), without copying. A promoted store in
// the same directory is replaced.
func CreateAt(cfg Config, pos delta.Pos, disks []delta.Disk) (*Store, error) {
	if pos.IsZero() || pos.Generation.IsZero() {
		return nil, fmt.Errorf("create replica store at %v: %w", pos, ErrState)
	}
	s := newStore(cfg)
	return create(cfg, disks, mark{pos: pos, ordinal: 1, at: s.cfg.Now()}, roleReplica)
}

func create(cfg Config, disks []delta.Disk, at mark, r role) (*Store, error) {
	if err := delta.ValidateDisks(disks); err != nil {
		return nil, fmt.Errorf("create replica store: %w", err)
	}
	if cfg.VM.IsZero() {
		return nil, fmt.Errorf("create replica store: no vm id: %w", ErrState)
	}
	s := newStore(cfg)
	sup := &super{role: r, vm: cfg.VM, seq: 1, applied: at}
	if err := s.replaceable(sup); err != nil {
		return nil, fmt.Errorf("create replica store: %w", err)
	}
	if _, err := io.ReadFull(s.cfg.Rand, sup.store[:]); err != nil {
		return nil, fmt.Errorf("create replica store: %w", err)
	}
	for _, d := range disks {
		sup.disks = append(sup.disks, superDiskInfo{name: d.Name, size: d.Size})
	}
	for _, dir := range []string{spoolDir, undoDir, fwDir} {
		if err := cfg.FS.MkdirAll(dir); err != nil {
			return nil, noSpace("create replica store", err)
		}
	}
	s.sup = sup
	if err := s.openBases(r == roleReplica); err != nil {
		return nil, errors.Join(err, s.closeBases())
	}
	if err := s.closeBases(); err != nil {
		return nil, err
	}
	if err := createSuper(cfg.FS, sup); err != nil {
		return nil, noSpace("create replica store", err)
	}
	return Open(cfg)
}

// Remove deletes the store in f, its superblock first: a crash leaves no store,
// never half of one.
func Remove(f fsx.FS) error {
	names, err := f.List(".")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove replica store: %w", err)
	}
	if err := f.Remove(superName); err == nil {
		err = f.SyncDir(".")
		if err != nil {
			return fmt.Errorf("remove replica store: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove replica store: %w", err)
	}
	dirs := []string{spoolDir, undoDir, fwDir}
	s := &Store{cfg: Config{FS: f}}
	if err := s.removeAll(dirs...); err != nil {
		return fmt.Errorf("remove replica store: %w", err)
	}
	for _, n := range names {
		if err := f.Remove(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove replica store: %w", err)
		}
	}
	return nil
}

// replaceable refuses to go over a store that is in use, and continues the
// numbers of the one it replaces.
func (s *Store) replaceable(sup *super) error {
	ok, err := superExists(s.cfg.FS)
	if err != nil || !ok {
		return err
	}
	old, _, err := readSuper(s.cfg.FS)
	if err != nil {
		return err
	}
	if old.role != rolePromoted {
		return fmt.Errorf("%w (vm %v); remove it first", ErrExists, old.vm)
	}
	sup.seq = old.seq + 1
	return s.removeAll(spoolDir, undoDir) // unreadable since the promotion
}

// openBases opens the image of every disk that is there; sync makes what is in
// them durable.
func (s *Store) openBases(sync bool) error {
	for _, d := range s.sup.disks {
		if d.size == 0 {
			s.bases = append(s.bases, nil)
			continue
		}
		dev, err := s.cfg.Bases(d.name, d.size)
		if err != nil {
			return fmt.Errorf("open image of disk %s: %w", d.name, err)
		}
		s.bases = append(s.bases, dev)
		if dev.Size() < d.size {
			return &DamageError{File: d.name, Text: fmt.Sprintf("image has %d bytes, the disk %d", dev.Size(), d.size)}
		}
		if sync {
			if err := dev.Sync(); err != nil {
				return fmt.Errorf("sync image of disk %s: %w", d.name, err)
			}
		}
	}
	return nil
}

func (s *Store) closeBases() error {
	var err error
	for _, b := range s.bases {
		if b != nil {
			err = errors.Join(err, b.Close())
		}
	}
	s.mu.Lock()
	s.bases = nil
	s.mu.Unlock()
	return err
}

// Close ends the store; what was committed and not applied stays in the spool.
// Views end. A store that had failed is left as it is.
func (s *Store) Close() error {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	failed := s.failed
	s.mu.Unlock()
	s.grow.Lock() // readers under way end
	defer s.grow.Unlock()
	var err error
	if failed == nil && !s.cfg.ReadOnly {
		err = s.closeClean()
	}
	return errors.Join(err, s.release())
}

// closeClean makes the images durable and records what they look like.
func (s *Store) closeClean() error {
	for i, b := range s.bases {
		if b == nil {
			continue
		}
		if err := b.Sync(); err != nil {
			return fmt.Errorf("sync image of disk %s: %w", s.sup.disks[i].name, err)
		}
	}
	sup := s.sup.clone()
	sup.flags |= superClean
	if err := s.identify(sup); err != nil {
		return err
	}
	return s.putSuper(sup)
}

// identify fills in what the images look like now.
func (s *Store) identify(sup *super) error {
	if s.cfg.Identity == nil || sup.role == rolePromoted {
		return nil
	}
	for i := range sup.disks {
		if sup.disks[i].size == 0 { // it has none, or one that only points are read from
			sup.disks[i].file, sup.disks[i].identity = delta.Digest{}, delta.Digest{}
			continue
		}
		id, err := s.cfg.Identity(sup.disks[i].name)
		if err != nil {
			return fmt.Errorf("identity of disk %s: %w", sup.disks[i].name, err)
		}
		sup.disks[i].file = blockDigest([]byte(id.File))
		sup.disks[i].identity = blockDigest([]byte(id.State))
	}
	return nil
}

// release closes every file.
func (s *Store) release() error {
	err := s.closeBases()
	for _, g := range s.segs {
		err = errors.Join(err, g.file.Close())
	}
	for _, e := range s.epochs {
		err = errors.Join(err, e.slot.file.Close())
	}
	if s.partial != nil {
		err = errors.Join(err, s.partial.slot.file.Close())
	}
	for _, f := range append(s.free, s.stranded...) {
		err = errors.Join(err, f.file.Close())
	}
	if s.reuse != nil {
		err = errors.Join(err, s.reuse.file.Close())
	}
	if s.file != nil {
		err = errors.Join(err, s.file.Close())
	}
	if s.dec != nil {
		s.dec.Close()
	}
	if s.reader != nil {
		s.reader.close()
	}
	return err
}

// putSuper makes sup the durable superblock. Its failure is final.
func (s *Store) putSuper(sup *super) error {
	if err := writeSuper(s.file, sup); err != nil {
		return s.fail(&syncError{what: "superblock", err: err})
	}
	s.mu.Lock()
	s.sup = sup
	s.mu.Unlock()
	return nil
}

// fail records a final error; others pass through. Run is woken to return it,
// whoever met it: its caller opens the store again.
func (s *Store) fail(err error) error {
	var sync *syncError
	if !errors.As(err, &sync) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = err
		s.log.Error("replica store failed, it must be opened again", "err", err)
		s.signal()
	}
	return fmt.Errorf("%w: %w", ErrFailed, err)
}

// usable says whether anything may be changed; s.mu is held.
func (s *Store) usable() error {
	switch {
	case s.closed:
		return fmt.Errorf("%w: the store is closed", ErrState)
	case s.failed != nil:
		return fmt.Errorf("%w: %w", ErrFailed, s.failed)
	case s.cfg.ReadOnly:
		return fmt.Errorf("%w: the store is open for reading", ErrState)
	}
	return nil
}

// receiving says whether the replica role may go on; s.mu is held.
func (s *Store) receiving() error {
	if err := s.usable(); err != nil {
		return err
	}
	switch {
	case s.sup.role == rolePromoted || s.sup.role == roleRolling:
		return ErrPromoted
	case s.sup.flags&superSuspect != 0:
		return ErrSuspect
	case len(s.damage) > 0:
		return fmt.Errorf("%w: %w", ErrDamaged, s.damage[0])
	}
	return nil
}

// signal wakes Run.
func (s *Store) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Disks are the disks as of the committed position.
func (s *Store) Disks() []delta.Disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.disks()
}

func (s *Store) disks() []delta.Disk { return s.sup.present(s.latest()) }

// latest are the sizes as of the committed position, by index; s.mu is held.
func (s *Store) latest() []int64 {
	if n := len(s.epochs); n > 0 {
		return s.epochs[n-1].sizes
	}
	return sizes(s.sup.diskList(), nil)
}

// Committed is the committed position, zero while seeding.
func (s *Store) Committed() delta.Pos {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.committed.pos
}

// diskIndex finds a disk by name, -1 if there is none.
func (s *Store) diskIndex(name string) int {
	return slices.IndexFunc(s.sup.disks, func(d superDiskInfo) bool { return d.name == name })
}
