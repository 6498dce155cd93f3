package cbt

import (
	"errors"
	"fmt"

	"kvmreplica/internal/fsx"
)

// Handing the tracker on: everything a successor needs lies in the shared
// memory of this boot and in files already; it maps the one and reads the
// others, and nobody writes anything. So a hand-over costs no sync, and taking
// it back costs nothing at all.

// Handed is what a successor of a Group must find. It is a check, not a copy:
// where shared memory or files say something else, nothing is taken over.
type Handed struct {
	Set     [16]byte     `json:"set"`
	Session [16]byte     `json:"session"`
	Seq     uint64       `json:"seq"`   // of the superblock in force
	Epoch   uint64       `json:"epoch"` // new writes are tagged with
	Slot    int          `json:"slot"`  // of the active bitmaps
	Acked   Position     `json:"acked"`
	Disks   []HandedDisk `json:"disks"`
}

// HandedDisk is one disk of a Handed.
type HandedDisk struct {
	Name    string   `json:"name"`
	Size    int64    `json:"size"`
	Map     [16]byte `json:"map"`     // its intent map's file
	Dirty   int64    `json:"dirty"`   // granules
	Suspect int64    `json:"suspect"` // granules
	Marked  int64    `json:"marked"`  // regions
}

// ErrUnsound: the tracker is not in a state that another process can take over
// exactly.
var ErrUnsound = errors.New("tracker cannot be handed on now")

// HandOver brings the group to rest for a successor: an open epoch is
// abandoned and, until back was called, writes are refused and every other
// method that changes something waits. No write may be in flight. ErrUnsound
// says why nothing was done. A process whose successor took over must not call
// back, nor anything else.
func (g *Group) HandOver() (h Handed, back func(), err error) {
	g.cleanMu.Lock()
	g.cutMu.Lock()
	var held []*intentMap
	undo := func() {
		for _, m := range held {
			m.release()
		}
		g.cutMu.Unlock()
		g.cleanMu.Unlock()
	}
	defer func() {
		if err != nil {
			undo()
		}
	}()
	if err := g.handable(); err != nil {
		return h, nil, err
	}
	for _, d := range g.all() {
		m := d.st.Load().intent
		if !m.acquire(false) {
			return h, nil, fmt.Errorf("%w: an intent of %s is being recorded", ErrUnsound, d.name)
		}
		held = append(held, m)
		if m.void.Load() || m.broken {
			return h, nil, fmt.Errorf("%w: intents of %s are not recorded", ErrUnsound, d.name)
		}
	}
	if g.openEp != nil {
		if g.openEp.end(ErrEpochEnded) {
			g.abandoned.Add(1)
		}
		g.mergeBack(g.openEp)
	}
	g.gate.Lock()
	before := g.refuse
	if g.flight.n[0].Load()+g.flight.n[1].Load() != 0 {
		g.gate.Unlock()
		return h, nil, fmt.Errorf("%w: writes are in flight", ErrUnsound)
	}
	g.refuse = errHanded
	g.cutSeq++ // comparisons under way end here
	h = g.handed()
	g.gate.Unlock()
	return h, func() {
		g.gate.Lock()
		g.refuse = before
		g.gate.Unlock()
		undo()
	}, nil
}

var errHanded = errors.New("the tracker is being handed on")

// handable says what speaks against a hand-over. cleanMu and cutMu held.
func (g *Group) handable() error {
	vm := g.share.Load()
	g.sickMu.Lock()
	sick := g.sick
	g.sickMu.Unlock()
	switch {
	case g.closed || g.finished:
		return fmt.Errorf("%w: it is closed", ErrUnsound)
	case g.meta.current().state != stateInUse:
		return fmt.Errorf("%w: its state is %v", ErrUnsound, g.meta.current().state)
	case g.meta.uncertain():
		return fmt.Errorf("%w: its superblock could not be written", ErrUnsound)
	case sick.degraded || sick.held || sick.keep || sick.unsynced:
		return fmt.Errorf("%w: %s", ErrUnsound, sick.reason)
	case vm == nil || vm.isVoid():
		return fmt.Errorf("%w: there is no exact copy in shared memory", ErrUnsound)
	}
	g.gate.RLock()
	defer g.gate.RUnlock()
	if g.refuse != nil {
		return fmt.Errorf("%w: %w", ErrUnsound, g.refuse)
	}
	return nil
}

// handed describes the group at rest. Gate held.
func (g *Group) handed() Handed {
	sb := g.meta.current()
	h := Handed{Set: sb.set, Session: sb.session, Seq: sb.seq, Epoch: g.epoch, Slot: g.slot, Acked: g.acked}
	for _, d := range g.disks {
		st := d.st.Load()
		h.Disks = append(h.Disks, HandedDisk{
			Name: d.name, Size: st.size, Map: st.intent.id,
			Dirty: st.fine[g.slot].count.Load(), Suspect: st.suspect.count.Load(), Marked: st.intent.marked.Load(),
		})
	}
	return h
}

// uncertain reports that a commit failed since the last good one: the file may
// hold more than current says.
func (m *metaStore) uncertain() bool {
	m.metaMu.Lock()
	defer m.metaMu.Unlock()
	return m.seq != m.cur.Load().seq
}

// CheckReadable reads a tracker as TakeOver would and changes nothing: whether
// this version understands it. ErrNoTracker means that there is none.
func CheckReadable(fsys fsx.FS) error {
	sb, alarms, err := readSuper(fsys)
	if err != nil {
		return err
	}
	if len(alarms) > 0 {
		return fmt.Errorf("%w: %s", ErrUnsound, alarms[0])
	}
	for i := range sb.disks {
		if e := &sb.disks[i]; e.granule != granuleShift || e.region != regionShift {
			return fmt.Errorf("disk %s: %w", e.name, ErrFeature)
		}
	}
	return nil
}

// TakeOver continues a tracker that another process of this boot handed over
// and still has. It writes nothing to disk or shared memory, so the other one
// may go on if this process ends before anybody wrote through the Group.
func TakeOver(cfg Config, h Handed) (*Group, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	sb, alarms, err := readSuper(cfg.FS)
	if err == nil && len(alarms) > 0 {
		err = fmt.Errorf("%w: %s", ErrUnsound, alarms[0])
	}
	if err == nil && (sb.vm != cfg.VMID || sb.state != stateInUse || sb.set != h.Set || sb.session != h.Session ||
		sb.seq != h.Seq || sb.boot != cfg.BootID || sb.highest+1 != h.Epoch || len(sb.disks) != len(cfg.Disks)) {
		err = fmt.Errorf("%w: the superblock found is not the one in force", ErrUnsound)
	}
	if err == nil && (cfg.SharedDir == "" || h.Slot < 0 || h.Slot >= suspectSlot || len(h.Disks) != len(cfg.Disks)) {
		err = fmt.Errorf("%w: what was handed over is not of these disks", ErrUnsound)
	}
	if err != nil {
		return nil, fmt.Errorf("take tracker over: %w", err)
	}
	r := &recovery{sb: sb, rep: &OpenReport{}}
	g, err := build(cfg, sb, func(g *Group) error {
		r.g = g
		return r.takeOver(h)
	})
	if err != nil {
		return nil, fmt.Errorf("take tracker over: %w", err)
	}
	return g, nil
}

func (r *recovery) takeOver(h Handed) error {
	g := r.g
	head := g.header(r.sb)
	vm, acked, err := openSharedVM(g.cfg.SharedDir, head)
	if err != nil {
		return err
	}
	g.share.Store(vm)
	g.slot, g.acked = h.Slot, acked
	if acked != h.Acked {
		return fmt.Errorf("%w: shared memory says %v, the predecessor %v", ErrUnsound, acked, h.Acked)
	}
	for i, dc := range g.cfg.Disks {
		if r.sb.disks[i].name != dc.Name || h.Disks[i].Name != dc.Name {
			return fmt.Errorf("%w: disk %s is not where it was", ErrUnsound, dc.Name)
		}
		if err := r.takeDisk(dc, &r.sb.disks[i], head, h.Disks[i]); err != nil {
			return fmt.Errorf("disk %s: %w", dc.Name, err)
		}
	}
	return nil
}

func (r *recovery) takeDisk(dc DiskConfig, e *superDisk, head sharedHeader, h HandedDisk) error {
	if n := dc.Device.Size(); n != e.size || n != h.Size || e.mapID != h.Map {
		return fmt.Errorf("%w: %d bytes, recorded %d, handed over %d", ErrUnsound, n, e.size, h.Size)
	}
	r.readMap(e, dc)
	if len(r.rep.Alarms) > 0 {
		return fmt.Errorf("%w: %s", ErrUnsound, r.rep.Alarms[0])
	}
	d := r.g.disks[len(r.g.disks)-1]
	if err := r.mapShared(d, head); err != nil {
		return err
	}
	st := d.st.Load()
	got := HandedDisk{
		Name: d.name, Size: st.size, Map: st.intent.id,
		Dirty: st.fine[r.g.slot].count.Load(), Suspect: st.suspect.count.Load(), Marked: st.intent.marked.Load(),
	}
	if got != h || st.fine[r.g.slot^1].count.Load() != 0 {
		return fmt.Errorf("%w: found %+v, handed over %+v", ErrUnsound, got, h)
	}
	return r.markedAll(d)
}
