package cbt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// tellTimeout bounds Config.TellPeer.
const tellTimeout = 10 * time.Second

func markerName(vm string) string { return "cbt-distrust-" + vm }

// WriteDistrust leaves the marker "verify everything" for a VM in a second
// place, without a Group: for tools that hand the image to somebody else.
func WriteDistrust(fsys fsx.FS, vm, reason string) error {
	if !validID(vm, maxID) {
		return fmt.Errorf("distrust marker: invalid VM id %.80q", vm)
	}
	return fsx.WriteAtomic(fsys, markerName(vm), []byte(clip(reason)+"\n"))
}

// readDistrust returns the marker's reason; "" means that there is none. A
// marker that cannot be read is a marker.
func readDistrust(fsys fsx.FS, vm string) string {
	if fsys == nil {
		return ""
	}
	b, err := fsx.ReadFile(fsys, markerName(vm), 4096)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ""
	case err != nil:
		return "distrust marker cannot be read: " + err.Error()
	case len(b) == 0:
		return "distrust marker"
	}
	return "distrust marker: " + clip(string(b))
}

func removeDistrust(fsys fsx.FS, vm string) error {
	if fsys == nil {
		return nil
	}
	err := fsys.Remove(markerName(vm))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = fsys.SyncDir(".")
	}
	return err
}

// clip makes s fit the superblock's reason, in printable bytes.
func clip(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c < 0x20 {
			b[i] = ' '
		}
	}
	return string(b[:min(len(b), maxReason)])
}

// distrust makes "verify everything" durable in the first place that takes it,
// and then excuses the maps given from recording intents. healMu makes this
// one step as seen by heal.
func (g *Group) distrust(reason string, maps ...*intentMap) error {
	g.healMu.Lock()
	defer g.healMu.Unlock()
	g.sickMu.Lock()
	already := g.sick.degraded
	g.sickMu.Unlock()
	if !already {
		if err := g.tellSomebody(reason); err != nil {
			return err
		}
	}
	for _, m := range maps {
		m.void.Store(true)
	}
	return nil
}

func (g *Group) tellSomebody(reason string) error {
	err := g.meta.commit(true, func(s *super) { s.state, s.reason = stateVerifyAll, clip(reason) })
	if err != nil && g.cfg.SecondFS != nil {
		if merr := WriteDistrust(g.cfg.SecondFS, g.cfg.VMID, reason); merr != nil {
			err = errors.Join(err, merr)
		} else {
			err = nil
		}
	}
	if err != nil && g.cfg.TellPeer != nil {
		ctx, cancel := context.WithTimeout(context.Background(), tellTimeout)
		defer cancel()
		if perr := g.cfg.TellPeer(ctx, reason); perr != nil {
			err = errors.Join(err, fmt.Errorf("tell the peer: %w", perr))
		} else {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("make %q durable: %w", "verify everything", err)
	}
	g.note(func(s *sickness) { s.degraded = true }, "verify everything after a crash: "+reason)
	return nil
}

// flushIntent makes marks durable, or makes sure that they do not matter. The
// leader of the disk's map calls it; it returns only when data may be written.
func (g *Group) flushIntent(d *Disk, m *intentMap, spans []span) error {
	st := d.st.Load()
	if st.shm != nil {
		for _, s := range spans {
			err := st.shm.back(g.share.Load(), s.lo*granulesPerRegion, min(s.hi*granulesPerRegion, st.granules))
			if errors.Is(err, errSharedVoid) {
				g.note(nil, err.Error())
			} else if err != nil {
				return fmt.Errorf("reserve shared memory: %w", err)
			}
		}
	}
	g.gate.RLock()
	for _, s := range spans {
		st.touched(s, ^uint64(0), g.epoch) // marked ahead counts as written now
	}
	g.gate.RUnlock()
	if m.void.Load() {
		m.include(spans)
		return nil
	}
	err := m.record(spans)
	if err == nil {
		return nil
	}
	return g.intentLost(d, m, err)
}

// intentLost deals with a map that could not be written: a new map file, else
// "verify everything", else the writes wait.
func (g *Group) intentLost(d *Disk, m *intentMap, cause error) error {
	g.cfg.Log.Error("intent map cannot be written", "disk", d.name, "error", cause)
	reason := fmt.Sprintf("intent map of %s: %v", d.name, cause)
	for {
		err := g.rebuildMap(d, m)
		if err == nil {
			break
		}
		if !g.cfg.HoldOnFailure {
			derr := g.distrust(reason, m)
			if derr == nil {
				break
			}
			err = errors.Join(err, derr)
		}
		g.note(func(s *sickness) { s.held = true }, "first-touch writes are held: "+reason)
		g.cfg.Log.Error("writes are held", "disk", d.name, "error", err)
		retry := time.NewTimer(g.cfg.RetryEvery)
		select {
		case <-retry.C:
		case <-g.stop:
			retry.Stop()
			return block.ErrClosed
		}
	}
	g.note(func(s *sickness) { s.held = false }, "")
	return nil
}

// rebuildMap writes all of m.next to a new map file and puts it in force.
// Leader only. After an error the durable superblock may name either file;
// the old one must not be relied on.
func (g *Group) rebuildMap(d *Disk, m *intentMap) error {
	id, err := newID()
	if err != nil {
		return err
	}
	f, err := createMap(g.cfg.FS, id, m.geo, m.next)
	if err != nil {
		return err
	}
	err = g.meta.commit(true, func(s *super) { s.disk(d.id).mapID = id })
	if err != nil {
		m.broken = true
		return errors.Join(err, f.Close())
	}
	m.broken = false
	old, oldID := m.file, m.id
	m.id, m.file = id, f
	m.void.Store(false)
	for p := range m.seqs {
		m.seqs[p] = 1
	}
	if old != nil {
		_ = old.Close()                     // given up
		_ = g.cfg.FS.Remove(mapName(oldID)) // swept at the next start otherwise
	}
	return nil
}

// heal gives every disk a working map again and then takes "verify everything"
// back. cleanMu held.
func (g *Group) heal() error {
	g.sickMu.Lock()
	sick := g.sick
	g.sickMu.Unlock()
	if !sick.degraded {
		return nil
	}
	for _, d := range g.all() {
		m := d.st.Load().intent
		if !m.acquire(false) {
			return fmt.Errorf("heal: disk %s: %w", d.name, errBusy)
		}
		var err error
		if m.void.Load() {
			err = g.rebuildMap(d, m)
		}
		m.release()
		if err != nil {
			return fmt.Errorf("heal: disk %s: new intent map: %w", d.name, err)
		}
	}
	g.healMu.Lock()
	defer g.healMu.Unlock()
	for _, d := range g.all() {
		if d.st.Load().intent.void.Load() {
			return fmt.Errorf("heal: disk %s: %w", d.name, errBusy)
		}
	}
	if sick.keep {
		return nil
	}
	g.note(func(s *sickness) { s.degraded = false }, "")
	err := g.meta.commit(true, func(s *super) { s.state, s.reason = stateInUse, "" })
	if err == nil {
		err = removeDistrust(g.cfg.SecondFS, g.cfg.VMID)
	}
	if err != nil {
		return fmt.Errorf("heal: %w", err)
	}
	g.note(func(s *sickness) { s.reasons = nil }, "")
	g.cfg.Log.Info("change tracking healed")
	return nil
}

var errBusy = errors.New("busy, will be tried again")

// Distrust makes "verify everything" durable without changing what is tracked
// now: the next start takes everything as dirty. For a release of the image to
// others while this process lives.
func (g *Group) Distrust(reason string) error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.healMu.Lock()
	defer g.healMu.Unlock()
	if err := g.tellSomebody(reason); err != nil {
		return err
	}
	g.note(func(s *sickness) { s.keep = true }, "")
	return nil
}

// MarkAll takes every granule of every disk as dirty, durably: first "verify
// everything" is made durable, then all bits are set, then the maps catch up.
// After an error the bits are set in memory, but a crash could forget it: call
// it again.
func (g *Group) MarkAll(reason string) error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	return g.markAll(reason)
}

// markAll is MarkAll with cleanMu held.
func (g *Group) markAll(reason string) error {
	if err := g.running(); err != nil {
		return err
	}
	derr := g.distrust(reason)
	for _, d := range g.all() {
		if err := g.markDisk(d, reason, derr == nil); err != nil {
			derr = errors.Join(derr, err)
		}
	}
	if derr != nil {
		return fmt.Errorf("mark everything (%s): %w", reason, derr)
	}
	if err := g.heal(); err != nil {
		g.cfg.Log.Warn("everything stays to be verified after a crash", "error", err)
	}
	return nil
}

// markDisk sets all bits of one disk. If "verify everything" covers it, heal
// writes the map later; else the map is written at once.
func (g *Group) markDisk(d *Disk, reason string, covered bool) error {
	st := d.st.Load()
	if st.granules == 0 {
		return nil
	}
	if st.shm != nil {
		if err := st.shm.back(g.share.Load(), 0, st.granules); err != nil && !errors.Is(err, errSharedVoid) {
			return err
		}
	}
	m := st.intent
	if !m.acquire(true) {
		return block.ErrClosed
	}
	defer m.release()
	m.include([]span{{0, st.intent.geo.regions}})
	var err error
	if covered {
		err = g.distrust(reason, m)
	} else {
		err = g.rebuildMap(d, m)
	}
	if err == nil {
		m.publish()
	}
	g.stirred()
	const step = 1 << 18 // granules per hold of the gate
	for lo := uint64(0); lo < st.granules; lo += step {
		g.gate.RLock()
		g.dirty(st, lo, min(lo+step, st.granules))
		g.gate.RUnlock()
	}
	g.note(nil, "everything marked: "+reason)
	return err
}

// dirty marks granules as changed and suspect. Gate held.
func (g *Group) dirty(st *diskState, lo, hi uint64) {
	st.suspect.set(lo, hi)
	st.fine[g.slot].set(lo, hi)
	rlo, rhi := regionSpan(lo, hi)
	for r := rlo; r < rhi; r++ {
		st.lastTag[r].Store(uint32(g.epoch))
	}
}

// stirred makes comparisons that are under way meaningless.
func (g *Group) stirred() {
	g.gate.Lock()
	g.cutSeq++
	g.gate.Unlock()
}

// markMapped takes every granule of every marked region of d as changed.
func (g *Group) markMapped(d *Disk) {
	g.stirred()
	g.gate.RLock()
	defer g.gate.RUnlock()
	st := d.st.Load()
	// Nobody can clear a mark while the range list stands still.
	d.ranges.mu.Lock()
	defer d.ranges.mu.Unlock()
	for w := range st.intent.durable {
		for v := st.intent.durable[w].Load(); v != 0; {
			r, n := lowestRun(v)
			v = without(v, r, n)
			lo := (uint64(w)*64 + r) * granulesPerRegion
			g.dirty(st, lo, min(lo+n*granulesPerRegion, st.granules))
		}
	}
}

// syncFailed deals with a failed image sync: what the page cache showed since
// the last good one may be gone, now or later.
func (g *Group) syncFailed(d *Disk, err error) {
	first := !d.unsynced.Swap(true)
	if vm := g.share.Load(); vm != nil {
		vm.setVoid()
	}
	g.markMapped(d)
	if e := g.frozen.Load(); e != nil {
		e.lose(fmt.Errorf("sync of %s failed: %w", d.name, err))
	}
	g.note(func(s *sickness) { s.unsynced = true }, fmt.Sprintf("sync of %s failed, nothing counts as clean until the disk was reopened: %v", d.name, err))
	if first {
		g.cfg.Log.Error("image sync failed", "disk", d.name, "error", err)
	}
}

// running reports why the group cannot be changed now.
func (g *Group) running() error {
	g.gate.RLock()
	defer g.gate.RUnlock()
	return g.refuse
}
