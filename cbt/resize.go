package cbt

import (
	"errors"
	"fmt"
	"math"

	"kvmreplica/internal/block"
)

// Resize tells the tracker a disk's new size. To grow, enlarge the device
// first; to shrink, call Resize first. What is new, and the granule at the
// seam, becomes dirty; the marks are durable before the new size is shown. No
// epoch may be open. Writes to the disk wait meanwhile.
func (g *Group) Resize(name string, size int64) error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	d, err := g.changeable(name)
	if err != nil {
		return fmt.Errorf("resize %s: %w", name, err)
	}
	if size < 0 || size > maxDiskSize || size > d.dev.Size() {
		return fmt.Errorf("resize %s to %d bytes: the device has %d: %w", name, size, d.dev.Size(), block.ErrRange)
	}
	lock := d.ranges.lock(0, math.MaxUint64)
	defer d.ranges.unlock(lock)
	old := d.st.Load()
	if size == old.size {
		return nil
	}
	if !old.intent.acquire(true) {
		return block.ErrClosed
	}
	defer old.intent.release()
	if old.intent.void.Load() || old.intent.broken {
		return fmt.Errorf("resize %s: %w", name, errBusy)
	}
	st, err := g.resized(d, old, size)
	if err != nil {
		if vm := g.share.Load(); vm != nil {
			vm.setVoid() // a shared file that nobody keeps up may be there
		}
		return fmt.Errorf("resize %s: %w", name, err)
	}
	g.gate.Lock()
	d.st.Store(st)
	g.cutSeq++
	g.gate.Unlock()
	old.intent.shut()
	_ = old.intent.file.Close() // its name no longer counts
	if old.shm != nil {
		_ = old.shm.f.Close() // replaced by a file of the same name
	}
	_ = g.cfg.FS.Remove(mapName(old.intent.id))
	return nil
}

// changeable returns a disk that may be resized or removed now. cutMu held.
func (g *Group) changeable(name string) (*Disk, error) {
	if err := g.settled(); err != nil {
		return nil, err
	}
	if err := g.running(); err != nil {
		return nil, err
	}
	d := g.Disk(name)
	if d == nil {
		return nil, fmt.Errorf("%w: no such disk", ErrMismatch)
	}
	return d, nil
}

// resized makes the state for a new size, durably. Nothing is in flight.
func (g *Group) resized(d *Disk, old *diskState, size int64) (*diskState, error) {
	e := *g.meta.current().disk(d.id)
	e.size = size
	dc := DiskConfig{Name: d.name, Device: d.dev, Identity: d.ident}
	if err := e.identify(dc); err != nil {
		return nil, err
	}
	geo := geometry(size)
	words := make([]uint64, geo.words())
	copy(words, old.intent.next)
	trimWords(words, geo.regions)
	granules := uint64(size+GranuleSize-1) >> granuleShift
	seam := uint64(min(size, old.size)) >> granuleShift
	if size < old.size && granules > 0 {
		seam = min(seam, granules-1) // no cut may be empty that has a new size
	}
	rlo, rhi := regionSpan(seam, granules)
	for r := rlo; r < rhi; r++ {
		words[r/64] |= 1 << (r % 64)
	}
	id, err := newID()
	if err != nil {
		return nil, err
	}
	st := &diskState{size: size, granules: granules}
	// From here until the superblock names the new map a kill finds a shared
	// file of the wrong size: it then uses the marks.
	if old.shm != nil {
		h := g.header(g.meta.current())
		h.disk, h.size = d.id, size
		if st.shm, err = openSharedDisk(g.cfg.SharedDir, h, granules, true); err != nil {
			return nil, err
		}
	}
	f, err := createMap(g.cfg.FS, id, geo, words)
	if err != nil {
		return nil, err
	}
	e.mapID = id
	seqs := make([]uint64, geo.pages)
	for p := range seqs {
		seqs[p] = 1
	}
	m := newIntentMap(geo, id, f, words, seqs)
	m.flush = old.intent.flush
	st.intent = m
	if err := g.moveBits(old, st, seam); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err := g.meta.commit(true, func(s *super) { *s.disk(d.id) = e }); err != nil {
		old.intent.broken = true // either map may be the recorded one
		return nil, errors.Join(err, f.Close())
	}
	return st, nil
}

// moveBits fills the bitmaps of st from old; everything from seam on is dirty.
func (g *Group) moveBits(old, st *diskState, seam uint64) error {
	st.lastTag = newTags(st, g.epoch)
	if err := st.makeBitmaps(g.share.Load()); err != nil {
		return err
	}
	for s := range old.fine[g.slot].runs() {
		st.fine[g.slot].set(s.lo, min(s.hi, st.granules))
	}
	for s := range old.suspect.runs() {
		st.suspect.set(s.lo, min(s.hi, st.granules))
	}
	st.fine[g.slot].set(seam, st.granules)
	return nil
}

// AddDisk begins to track another disk, all of it dirty. No epoch may be open.
func (g *Group) AddDisk(dc DiskConfig) error {
	if err := dc.validate(); err != nil {
		return err
	}
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	if err := errors.Join(g.settled(), g.running()); err != nil {
		return fmt.Errorf("add disk %s: %w", dc.Name, err)
	}
	if g.Disk(dc.Name) != nil || len(g.all()) >= MaxDisks {
		return fmt.Errorf("add disk %s: it exists, or there are %d already", dc.Name, MaxDisks)
	}
	d, e, err := g.newcomer(dc)
	if err != nil {
		return fmt.Errorf("add disk %s: %w", dc.Name, err)
	}
	if err := g.meta.commit(true, func(s *super) { s.disks = append(s.disks, e) }); err != nil {
		return errors.Join(fmt.Errorf("add disk %s: %w", dc.Name, err), d.st.Load().intent.file.Close())
	}
	g.setDisks(append(append([]*Disk(nil), g.all()...), d))
	return nil
}

// newcomer makes a disk with everything marked.
func (g *Group) newcomer(dc DiskConfig) (*Disk, superDisk, error) {
	side := &Group{cfg: g.cfg, meta: g.meta, byName: map[string]*Disk{}, epoch: g.epoch}
	sb := g.meta.current().clone()
	sb.disks = nil
	if err := side.addNew(sb, dc, DirtyAll); err != nil {
		return nil, superDisk{}, err
	}
	d := side.disks[0]
	d.g = g
	st := d.st.Load()
	st.intent.flush = func(m *intentMap, spans []span) error { return g.flushIntent(d, m, spans) }
	if g.share.Load() != nil {
		h := g.header(g.meta.current())
		h.disk, h.size = d.id, st.size
		var err error
		if st.shm, err = openSharedDisk(g.cfg.SharedDir, h, st.granules, true); err != nil {
			return nil, superDisk{}, errors.Join(err, st.intent.file.Close())
		}
	}
	if err := st.makeBitmaps(g.share.Load()); err != nil {
		return nil, superDisk{}, errors.Join(err, st.intent.file.Close())
	}
	st.fine[g.slot].set(0, st.granules)
	return d, sb.disks[0], nil
}

// RemoveDisk stops tracking a disk; its further I/O is refused. No epoch may
// be open.
func (g *Group) RemoveDisk(name string) error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	d, err := g.changeable(name)
	if err != nil {
		return fmt.Errorf("remove disk %s: %w", name, err)
	}
	if len(g.all()) == 1 {
		return fmt.Errorf("remove disk %s: it is the only one", name)
	}
	d.shut.Store(true)
	lock := d.ranges.lock(0, math.MaxUint64) // held for ever
	_ = lock
	err = g.meta.commit(true, func(s *super) {
		var keep []superDisk
		for _, e := range s.disks {
			if e.id != d.id {
				keep = append(keep, e)
			}
		}
		s.disks = keep
	})
	if err != nil {
		d.ranges.unlock(lock)
		return fmt.Errorf("remove disk %s: it stays closed, call again: %w", name, err)
	}
	var keep []*Disk
	for _, o := range g.all() {
		if o != d {
			keep = append(keep, o)
		}
	}
	g.setDisks(keep)
	st := d.st.Load()
	st.intent.shut()
	_ = st.intent.file.Close() // its name no longer counts
	_ = g.cfg.FS.Remove(mapName(st.intent.id))
	if st.shm != nil {
		_ = st.shm.close(true)
	}
	return nil
}

// setDisks replaces the list of disks as one step.
func (g *Group) setDisks(disks []*Disk) {
	byName := map[string]*Disk{}
	for _, d := range disks {
		byName[d.name] = d
	}
	g.gate.Lock()
	g.disks, g.byName = disks, byName
	g.cutSeq++
	g.gate.Unlock()
}
