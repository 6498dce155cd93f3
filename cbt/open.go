package cbt

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

func newID() (id id16, err error) {
	_, err = rand.Read(id[:])
	return id, err
}

func (s *super) disk(id id16) *superDisk {
	for i := range s.disks {
		if s.disks[i].id == id {
			return &s.disks[i]
		}
	}
	return &superDisk{}
}

// Create starts tracking a new generation in cfg.FS. An earlier tracker there
// stays in force until the new one is durable.
func Create(cfg Config, start Start) (*Group, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	if start.Generation == ([16]byte{}) {
		return nil, errors.New("create tracker: no generation given")
	}
	sb := &super{
		vm: cfg.VMID, peer: cfg.PeerID, boot: cfg.BootID, writer: cfg.Writer,
		generation: start.Generation, base: start.Base, parent: start.Parent, highest: start.Highest, state: stateInUse,
	}
	var oldSet *id16
	if old, _, err := readSuper(cfg.FS); err == nil {
		oldSet = &old.set
		sb.seq = old.seq // ErrCorrupt and ErrNoTracker: begin at zero
		if old.generation == start.Generation && !start.Again {
			return nil, fmt.Errorf("create tracker: generation %x exists already: %w", start.Generation[:4], ErrPosition)
		}
	}
	var err error
	if sb.set, err = newID(); err != nil {
		return nil, err
	}
	g, err := build(cfg, sb, func(g *Group) error {
		for _, dc := range cfg.Disks {
			if err := g.addNew(sb, dc, start.Dirty); err != nil {
				return err
			}
		}
		return g.goLive(sb, start.Base)
	})
	if err != nil {
		return nil, fmt.Errorf("create tracker: %w", err)
	}
	if oldSet != nil && cfg.SharedDir != "" {
		removeShared(cfg.SharedDir, *oldSet)
	}
	if err := removeDistrust(cfg.SecondFS, cfg.VMID); err != nil {
		return nil, errors.Join(fmt.Errorf("create tracker: remove old distrust marker: %w", err), g.drop())
	}
	return g, nil
}

// build makes a Group and lets fill complete it; after an error nothing stays
// open.
func build(cfg Config, sb *super, fill func(*Group) error) (*Group, error) {
	g := &Group{
		cfg: cfg, meta: newMetaStore(cfg.FS, sb), byName: map[string]*Disk{},
		epoch: sb.highest + 1, store: newCaptureStore(cfg.CaptureBytes, cfg.SpillDir), stop: make(chan struct{}),
	}
	defer g.show()
	if err := fill(g); err != nil {
		return nil, errors.Join(err, g.drop())
	}
	return g, nil
}

// addNew gives a disk that was never tracked its map; sb gets its entry.
func (g *Group) addNew(sb *super, dc DiskConfig, dirty Dirty) error {
	e := superDisk{name: dc.Name, size: dc.Device.Size(), granule: granuleShift, region: regionShift}
	var err error
	if e.id, err = newID(); err != nil {
		return err
	}
	if err := e.identify(dc); err != nil {
		return err
	}
	geo := geometry(e.size)
	words := make([]uint64, geo.words())
	if dirty != DirtyNone {
		setAll(words, geo.regions)
	}
	return g.newMap(sb, e, dc, geo, words)
}

// newMap writes a map file for a disk and appends the disk.
func (g *Group) newMap(sb *super, e superDisk, dc DiskConfig, geo mapGeometry, words []uint64) error {
	id, err := newID()
	if err != nil {
		return err
	}
	f, err := createMap(g.cfg.FS, id, geo, words)
	if err != nil {
		return fmt.Errorf("disk %s: %w", e.name, err)
	}
	e.mapID = id
	if old := sb.disk(e.id); old.name != "" {
		*old = e
	} else {
		sb.disks = append(sb.disks, e)
	}
	seqs := make([]uint64, geo.pages)
	for p := range seqs {
		seqs[p] = 1
	}
	g.append(newDisk(g, e, dc, newIntentMap(geo, id, f, words, seqs)))
	return nil
}

func (g *Group) append(d *Disk) {
	g.disks = append(g.disks, d)
	g.byName[d.name] = d
}

func newDisk(g *Group, e superDisk, dc DiskConfig, m *intentMap) *Disk {
	d := &Disk{g: g, name: e.name, id: e.id, dev: dc.Device, ident: dc.Identity}
	d.try, _ = dc.Device.(block.TryWriter)
	d.tryR, _ = dc.Device.(block.TryReader)
	m.flush = func(m *intentMap, spans []span) error { return g.flushIntent(d, m, spans) }
	st := &diskState{size: e.size, granules: uint64(e.size+GranuleSize-1) >> granuleShift, intent: m}
	st.lastTag = newTags(st, g.epoch)
	d.st.Store(st)
	return d
}

// newTags says of every marked region that epoch wrote to it.
func newTags(st *diskState, epoch uint64) []atomic.Uint32 {
	m := st.intent
	st.lastTag = make([]atomic.Uint32, m.geo.regions)
	for w := range m.next {
		lo := min(uint64(w)*64, m.geo.regions)
		st.touched(span{lo, min(lo+64, m.geo.regions)}, m.next[w], epoch)
	}
	return st.lastTag
}

// touched says of the regions of s whose bit is in v that epoch wrote to them.
func (st *diskState) touched(s span, v, epoch uint64) {
	for r := s.lo; r < s.hi; r++ {
		if v>>(r%64)&1 != 0 {
			st.lastTag[r].Store(uint32(epoch))
		}
	}
}

func setAll(words []uint64, n uint64) {
	for w := range words {
		words[w] = mask(uint64(w), 0, max(n, uint64(w)*64))
	}
}

// identify reads the disk's identity for its superblock entry.
func (e *superDisk) identify(dc DiskConfig) error {
	if dc.Identity == nil {
		return nil
	}
	id, err := dc.Identity()
	if err != nil {
		return fmt.Errorf("disk %s: read identity: %w", dc.Name, err)
	}
	e.ident, e.hasID = id, true
	return nil
}

// goLive starts a new session: bitmaps hold what the maps say, and the
// superblock says in-use, durably, before anybody can write.
func (g *Group) goLive(sb *super, acked Position) error {
	if err := g.newSession(sb, acked); err != nil {
		return err
	}
	for _, d := range g.disks {
		d.fillFromMap()
	}
	g.acked = acked
	if err := g.meta.commit(true, func(s *super) { *s = *sb.clone(); s.state, s.exact = stateInUse, exactRef{} }); err != nil {
		return err
	}
	sweep(g.cfg.FS, g.meta.current())
	return nil
}

// newSession makes empty bitmaps, in shared memory where there is some.
func (g *Group) newSession(sb *super, acked Position) error {
	var err error
	if sb.session, err = newID(); err != nil {
		return err
	}
	sb.boot = g.cfg.BootID
	if g.cfg.SharedDir != "" {
		if err := g.shareAll(sb, acked); err != nil {
			g.dropShare()
			g.note(nil, "no shared memory, a kill will cost a digest pass: "+err.Error())
			g.cfg.Log.Warn("no shared memory", "error", err)
		}
	}
	for _, d := range g.disks {
		if err := d.st.Load().makeBitmaps(g.share.Load()); err != nil {
			return fmt.Errorf("disk %s: %w", d.name, err)
		}
	}
	return nil
}

func (g *Group) header(sb *super) sharedHeader {
	return sharedHeader{set: sb.set, session: sb.session, boot: g.cfg.BootID}
}

func (g *Group) shareAll(sb *super, acked Position) (err error) {
	h := g.header(sb)
	for _, d := range g.disks {
		st := d.st.Load()
		dh := h
		dh.disk, dh.size = d.id, st.size
		if st.shm, err = openSharedDisk(g.cfg.SharedDir, dh, st.granules, true); err != nil {
			return err
		}
	}
	vm, err := createSharedVM(g.cfg.SharedDir, h, acked)
	if err == nil {
		g.share.Store(vm)
	}
	return err
}

// dropShare forgets shared memory that cannot be used.
func (g *Group) dropShare() {
	for _, d := range g.disks {
		if st := d.st.Load(); st.shm != nil {
			_ = st.shm.close(true) // tmpfs; what stays is refused by its session
			st.shm = nil
		}
	}
	if vm := g.share.Swap(nil); vm != nil {
		_ = vm.close(true)
	}
}

// makeBitmaps lays the bitmaps over shared memory or ordinary memory, and
// reserves what the marked regions need.
func (st *diskState) makeBitmaps(vm *sharedVM) error {
	var words [slots][]uint64
	if st.shm != nil {
		for i := range words {
			words[i] = st.shm.words(i)
		}
	}
	st.fine = [2]*bitmap{newBitmap(st.granules, words[0]), newBitmap(st.granules, words[1])}
	st.suspect = newBitmap(st.granules, words[suspectSlot])
	st.done = newBitmap(st.granules, nil)
	if st.shm == nil {
		return nil
	}
	for r := range st.marked() {
		if err := st.shm.back(vm, r.lo, r.hi); err != nil && !errors.Is(err, errSharedVoid) {
			return err
		}
	}
	return nil
}

// marked yields the granules of marked regions.
func (st *diskState) marked() func(yield func(span) bool) {
	return func(yield func(span) bool) {
		for w, v := range st.intent.next {
			for v != 0 {
				r, n := lowestRun(v)
				v = without(v, r, n)
				lo := (uint64(w)*64 + r) * granulesPerRegion
				if !yield(span{lo, min(lo+n*granulesPerRegion, st.granules)}) {
					return
				}
			}
		}
	}
}

// fillFromMap takes every granule of every marked region as dirty and suspect.
func (d *Disk) fillFromMap() {
	st := d.st.Load()
	for s := range st.marked() {
		st.fine[0].set(s.lo, s.hi)
		st.suspect.set(s.lo, s.hi)
	}
}

// drop releases everything without making anything durable, as a kill would.
func (g *Group) drop() error {
	var errs []error
	for _, d := range g.disks {
		st := d.st.Load()
		st.intent.shut()
		if st.intent.file != nil {
			errs = append(errs, st.intent.file.Close())
		}
		if st.shm != nil {
			errs = append(errs, st.shm.close(false))
		}
	}
	if vm := g.share.Load(); vm != nil {
		errs = append(errs, vm.close(false))
	}
	return errors.Join(append(errs, g.meta.close())...)
}

// openMapFile opens a disk's map for writing; absence is an error like any
// other: the caller takes everything as marked.
func openMapFile(fsys fsx.FS, id id16) (fsx.File, error) {
	return fsys.Open(mapName(id), os.O_RDWR)
}
