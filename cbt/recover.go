package cbt

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"kvmreplica/internal/block"
)

// recovery is Open at work: it looks at everything, decides, and only then
// writes. Doing it again after a crash at any point gives the same set.
type recovery struct {
	g      *Group
	sb     *super // as found; becomes what is written
	rep    *OpenReport
	doubts []string // any of them: verify everything
	// fresh are the disks that nobody tracked so far: all of them is dirty, and
	// none of it suspect, because the replica has nothing to compare with.
	fresh map[*Disk]bool
}

// Open continues a tracker. On success writes may begin at once: everything
// that a crash from now on needs is durable.
func Open(cfg Config) (*Group, *OpenReport, error) {
	if err := cfg.validate(); err != nil {
		return nil, nil, err
	}
	cfg = cfg.withDefaults()
	sb, alarms, err := readSuper(cfg.FS)
	if err != nil {
		return nil, nil, fmt.Errorf("open tracker: %w", err)
	}
	r := &recovery{sb: sb.clone(), fresh: map[*Disk]bool{}, rep: &OpenReport{
		Alarms: alarms, SuspectBytes: map[string]int64{}, DirtyBytes: map[string]int64{},
	}}
	g, err := build(cfg, sb, func(g *Group) error {
		r.g = g
		return r.run()
	})
	if err != nil {
		return nil, nil, fmt.Errorf("open tracker: %w", err)
	}
	if err := r.grow(); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open tracker: %w", err), g.drop())
	}
	for _, d := range g.disks {
		st := d.st.Load()
		r.rep.SuspectBytes[d.name] = st.suspect.bytes(st.size)
		r.rep.DirtyBytes[d.name] = st.fine[g.slot].bytes(st.size)
	}
	if r.rep.Source != SourceExact && r.rep.Source != SourceSealed {
		cfg.Log.Warn("tracker opened after an unclean stop", "source", r.rep.Source, "reason", r.rep.Reason)
	}
	return g, r.rep, nil
}

// grow takes up what disks have become longer by while nobody tracked them: the
// tracker was opened with their old sizes, and a crash before a new one is
// durable finds the same again.
func (r *recovery) grow() error {
	if r.g.openedSealed {
		return nil
	}
	for _, d := range r.g.disks {
		old, n := d.Size(), d.dev.Size()
		if n == old {
			continue
		}
		if err := r.g.Resize(d.name, n); err != nil {
			return err
		}
		r.rep.Alarms = append(r.rep.Alarms, fmt.Sprintf("disk %s has grown from %d to %d bytes; what is new is dirty", d.name, old, n))
	}
	return nil
}

func (r *recovery) run() error {
	if r.sb.vm != r.g.cfg.VMID {
		return fmt.Errorf("%w: it was made for VM %s", ErrMismatch, r.sb.vm)
	}
	if err := r.attach(); err != nil {
		return err
	}
	if r.sb.state == stateVerifyAll {
		r.doubts = append(r.doubts, r.sb.reason)
	}
	if m := readDistrust(r.g.cfg.SecondFS, r.g.cfg.VMID); m != "" {
		r.doubts = append(r.doubts, m)
	}
	switch {
	case r.sb.state == stateSealed:
		return r.sealed() // no doubt makes a handed-over VM writable
	case len(r.doubts) > 0:
		return r.all()
	case r.sb.state == stateClean:
		return r.exact()
	default:
		return r.unclean()
	}
}

// attach matches the configured disks with the recorded ones and reads their
// maps. A disk nobody tracked so far is wholly dirty; one that is gone loses
// its record, so that it would be wholly dirty if it came back.
func (r *recovery) attach() error {
	cfg := r.g.cfg
	old := r.sb.disks
	r.sb.disks = nil
	if !slices.ContainsFunc(old, func(e superDisk) bool {
		return slices.ContainsFunc(cfg.Disks, func(dc DiskConfig) bool { return dc.Name == e.name })
	}) {
		return fmt.Errorf("%w: none of its disks is configured", ErrMismatch)
	}
	old = slices.Clone(old)
	for _, dc := range cfg.Disks {
		at := slices.IndexFunc(old, func(e superDisk) bool { return e.name == dc.Name })
		if at < 0 {
			r.rep.Alarms = append(r.rep.Alarms, "disk "+dc.Name+" was not tracked before; all of it is dirty")
			if err := r.g.addNew(r.sb, dc, DirtyAll); err != nil {
				return err
			}
			r.fresh[r.g.byName[dc.Name]] = true
			continue
		}
		e := old[at]
		old = slices.Delete(old, at, at+1)
		r.judge(&e, dc)
		r.sb.disks = append(r.sb.disks, e)
		r.readMap(&e, dc)
	}
	for _, e := range old {
		r.rep.Alarms = append(r.rep.Alarms, "disk "+e.name+" is no longer there; its record is dropped")
	}
	return nil
}

// judge compares a disk with what is known of it.
func (r *recovery) judge(e *superDisk, dc DiskConfig) {
	doubt := func(format string, a ...any) {
		r.doubts = append(r.doubts, "disk "+e.name+": "+fmt.Sprintf(format, a...))
	}
	grown := dc.Device.Size() > e.size && r.sb.state != stateSealed // see grow
	if n := dc.Device.Size(); n != e.size && !grown {
		doubt("size changed from %d to %d bytes while nobody tracked it", e.size, n)
		e.size = n
	}
	if dc.Identity == nil {
		return
	}
	id, err := dc.Identity()
	if err != nil {
		doubt("identity cannot be read: %v", err)
		e.hasID = false
		return
	}
	old, had := e.ident, e.hasID
	e.ident, e.hasID = id, true
	if grown {
		old.Size = max(old.Size, id.Size)
	}
	quiet := r.sb.state == stateClean || r.sb.state == stateSealed
	if !quiet {
		// A guest's write to the last sector may have grown the file up to it.
		old.Size, id.Size = (old.Size+511)&^511, (id.Size+511)&^511
	}
	moved := r.sb.boot != r.g.cfg.BootID && old.Renumbered(id)
	if moved {
		old.Device = id.Device
	}
	switch {
	case !had:
		doubt("no identity was recorded")
	case !old.SameImage(id):
		doubt("another image: was device %d inode %d, %d bytes; is device %d inode %d, %d bytes", old.Device, old.Inode, old.Size, id.Device, id.Inode, id.Size)
	case quiet && old.MtimeNS != id.MtimeNS:
		doubt("image was written to while nobody tracked it")
	case quiet && (moved || old.CtimeNS != id.CtimeNS || id.Kind == block.KindBlockDevice && r.sb.boot != r.g.cfg.BootID):
		r.rep.Soft = append(r.rep.Soft, e.name)
	}
}

// readMap loads a disk's map; what cannot be read is taken as marked.
func (r *recovery) readMap(e *superDisk, dc DiskConfig) {
	geo := geometry(e.size)
	mr := mapRead{words: make([]uint64, geo.words()), seqs: make([]uint64, geo.pages)}
	f, err := openMapFile(r.g.cfg.FS, e.mapID)
	if err != nil {
		setAll(mr.words, geo.regions)
		mr.alarms = []string{err.Error()}
	} else {
		mr = loadMap(f, e.mapID, geo)
	}
	r.g.append(newDisk(r.g, *e, dc, newIntentMap(geo, e.mapID, f, mr.words, mr.seqs)))
	for _, a := range mr.alarms {
		r.rep.Alarms = append(r.rep.Alarms, "intent map of "+e.name+": "+a)
	}
}

// all takes everything as dirty. The maps are written anew with every region
// marked before the state becomes in-use, so that nothing is forgotten by a
// crash in between.
func (r *recovery) all() error {
	r.rep.Source, r.rep.Reason = SourceAll, strings.Join(r.doubts, "; ")
	for _, d := range r.g.disks {
		m := d.st.Load().intent
		setAll(m.next, m.geo.regions)
	}
	if err := r.live(r.sb.base); err != nil {
		return err
	}
	if err := removeDistrust(r.g.cfg.SecondFS, r.g.cfg.VMID); err != nil {
		return fmt.Errorf("remove distrust marker: %w", err)
	}
	return nil
}

// sealed opens a handed-over tracker: readable, writes refused, nothing
// durable changes.
func (r *recovery) sealed() error {
	r.rep.Source, r.rep.Reason = SourceSealed, strings.Join(r.doubts, "; ")
	r.g.openedSealed, r.g.sealDoubts = true, r.doubts
	r.g.acked = r.sb.base
	r.g.refuse = ErrSealed
	for _, d := range r.g.disks {
		if err := d.st.Load().makeBitmaps(nil); err != nil {
			return err
		}
	}
	// The seal may be in the page cache only; people act on what we report.
	return r.g.meta.commit(true, func(*super) {})
}

// exact continues after a clean stop.
func (r *recovery) exact() error {
	if err := r.g.newSession(r.sb, r.sb.base); err != nil {
		return err
	}
	g := r.g
	// The record is of the disks there were, in their order.
	was := g.meta.current()
	now := make([]*Disk, len(was.disks))
	for i := range was.disks {
		if at := slices.IndexFunc(g.disks, func(d *Disk) bool { return d.id == was.disks[i].id }); at >= 0 {
			now[i] = g.disks[at]
		}
	}
	err := readExact(g.cfg.FS, was, func(i int, s span) {
		if now[i] != nil {
			r.addExact(now[i], s)
		}
	})
	if err != nil {
		r.rep.Source, r.rep.Reason = SourceRegions, "clean stop, but its record cannot be used: "+err.Error()
		return r.finish(true, r.sb.base)
	}
	r.rep.Source = SourceExact
	return r.finish(false, r.sb.base)
}

// addExact adds a run of dirty granules; a region that is not marked although
// it must be is an alarm, and is marked.
func (r *recovery) addExact(d *Disk, s span) {
	st := d.st.Load()
	lo, hi := regionSpan(s.lo, s.hi)
	if !st.intent.has(lo, hi) {
		r.rep.Alarms = append(r.rep.Alarms, fmt.Sprintf("intent map of %s: dirty but not marked at region %d", d.name, lo))
		st.intent.include([]span{{lo, hi}})
		if st.shm != nil {
			_ = st.shm.back(r.g.share.Load(), s.lo, s.hi) // void or backed; both are safe to touch
		}
	}
	st.fine[0].set(s.lo, s.hi)
}

// unclean continues after a kill or a power loss.
func (r *recovery) unclean() error {
	acked, err := r.shared()
	if err == nil {
		r.rep.Source, r.rep.Reason = SourceShared, "the process was killed"
		return r.finish(false, acked)
	}
	r.g.dropShare()
	r.rep.Source, r.rep.Reason = SourceRegions, "no clean stop; no exact copy in memory: "+err.Error()
	return r.live(r.sb.base)
}

// live begins a new session with what the maps say.
func (r *recovery) live(acked Position) error {
	if err := r.g.newSession(r.sb, acked); err != nil {
		return err
	}
	return r.finish(true, acked)
}

// finish writes what has to be written, and starts. fill takes the bitmaps
// from the maps.
func (r *recovery) finish(fill bool, acked Position) error {
	g := r.g
	for _, d := range g.disks {
		if fill {
			d.fillFromMap()
		}
		if r.fresh[d] { // before the superblock names the disk
			st := d.st.Load()
			st.fine[0].set(0, st.granules)
			st.suspect.reset()
		}
		if err := r.renewMap(d); err != nil {
			return fmt.Errorf("disk %s: %w", d.name, err)
		}
	}
	g.acked = acked
	r.sb.state, r.sb.reason, r.sb.exact = stateInUse, "", exactRef{}
	r.sb.writer, r.sb.peer = g.cfg.Writer, g.cfg.PeerID
	if err := g.meta.commit(true, func(s *super) { *s = *r.sb }); err != nil {
		return err
	}
	sweep(g.cfg.FS, g.meta.current())
	g.sweepShared()
	return nil
}

// renewMap writes a disk's map to a new file, which the superblock will name.
// What was read may be in the page cache only, left by a process that was
// killed before its sync returned or whose sync failed: nobody may rely on it
// before it was written again.
func (r *recovery) renewMap(d *Disk) error {
	m := d.st.Load().intent
	id, err := newID()
	if err != nil {
		return err
	}
	f, err := createMap(r.g.cfg.FS, id, m.geo, m.next)
	if err != nil {
		return err
	}
	if m.file != nil {
		_ = m.file.Close() // read only so far
	}
	m.file, m.id = f, id
	for p := range m.seqs {
		m.seqs[p] = 1
	}
	m.publish()
	r.sb.disk(d.id).mapID = id
	return nil
}

// shared takes the exact set from this boot's memory: what was active and what
// was frozen. It fails when the least thing does not fit.
func (r *recovery) shared() (Position, error) {
	g := r.g
	if g.cfg.SharedDir == "" || r.sb.boot != g.cfg.BootID {
		return Position{}, errors.New("another boot of the host, or no shared directory")
	}
	h := g.header(r.sb)
	vm, acked, err := openSharedVM(g.cfg.SharedDir, h)
	if err != nil {
		return acked, err
	}
	g.share.Store(vm)
	for _, d := range g.disks {
		take := r.sharedDisk
		if r.fresh[d] {
			take = r.newShared
		}
		if err := take(d, h); err != nil {
			return acked, fmt.Errorf("disk %s: %w", d.name, err)
		}
	}
	return acked, nil
}

// newShared makes the shared memory of a disk that joins a session.
func (r *recovery) newShared(d *Disk, h sharedHeader) error {
	st := d.st.Load()
	h.disk, h.size = d.id, st.size
	var err error
	if st.shm, err = openSharedDisk(r.g.cfg.SharedDir, h, st.granules, true); err != nil {
		return err
	}
	if err := st.makeBitmaps(r.g.share.Load()); err != nil {
		return err
	}
	if r.g.share.Load().isVoid() {
		return errSharedVoid
	}
	return nil
}

func (r *recovery) sharedDisk(d *Disk, h sharedHeader) error {
	if err := r.mapShared(d, h); err != nil {
		return err
	}
	if r.g.share.Load().isVoid() {
		return errSharedVoid
	}
	st := d.st.Load()
	st.fine[0].merge(st.fine[1], true)
	return r.markedAll(d)
}

// mapShared lays a disk's bitmaps over what this boot's memory holds, and
// changes nothing there.
func (r *recovery) mapShared(d *Disk, h sharedHeader) error {
	st := d.st.Load()
	h.disk, h.size = d.id, st.size
	shm, err := openSharedDisk(r.g.cfg.SharedDir, h, st.granules, false)
	if err != nil {
		return err
	}
	st.shm = shm
	for slot := range slots {
		if err := shm.scan(slot, func(uint64, uint64) {}); err != nil {
			return err // notes what is backed, before anything is touched
		}
	}
	if err := st.makeBitmaps(r.g.share.Load()); err != nil {
		return err
	}
	// The words are there already; the summaries and counts are not.
	for slot, b := range []*bitmap{st.fine[0], st.fine[1], st.suspect} {
		err := shm.scan(slot, func(w, v uint64) {
			if w < uint64(len(b.words)) {
				b.adopt(w, v)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// markedAll checks that whatever is dirty is marked.
func (r *recovery) markedAll(d *Disk) error {
	st := d.st.Load()
	for s := range st.fine[r.g.slot].runs() {
		if lo, hi := regionSpan(s.lo, s.hi); !st.intent.has(lo, hi) {
			return fmt.Errorf("%w: dirty but not marked at region %d", errDamaged, lo)
		}
	}
	return nil
}
