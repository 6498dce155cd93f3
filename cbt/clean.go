package cbt

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvmreplica/internal/block"
)

// clearBatch bounds how long the range list of a disk stands still.
const clearBatch = 4096

// CleanStep forgets regions that are proven clean: it syncs the images, makes
// the acknowledged position durable as the base, and then clears what is idle
// and covered by both. It also mends what failed before. Call it every 30
// seconds with the current time; no epoch and no guest waits for it.
func (g *Group) CleanStep(ctx context.Context, now time.Time) error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	if err := g.running(); err != nil {
		return err
	}
	healErr := g.heal()
	acked, limit := g.clearable(now)
	work := map[*Disk][]uint64{}
	for _, d := range g.all() {
		if c := d.candidates(limit); len(c) > 0 {
			work[d] = c
		}
	}
	for _, d := range g.all() {
		if len(work[d]) == 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return errors.Join(healErr, err)
		}
		if err := d.dev.Sync(); err != nil {
			g.syncFailed(d, err)
			return errors.Join(healErr, fmt.Errorf("clean step: sync %s: %w", d.name, err))
		}
	}
	if g.meta.current().base != acked {
		if err := g.meta.commit(false, func(s *super) { s.base = acked }); err != nil {
			return errors.Join(healErr, fmt.Errorf("clean step: base: %w", err))
		}
	}
	for d, regions := range work {
		if err := g.clearRegions(d, regions, limit); err != nil {
			return errors.Join(healErr, fmt.Errorf("clean step: disk %s: %w", d.name, err))
		}
	}
	return healErr
}

// clearable returns the acknowledged position and the highest epoch whose
// writes are both acknowledged and old enough. 0 means none.
func (g *Group) clearable(now time.Time) (Position, uint64) {
	g.cutMu.Lock()
	acked := g.acked
	g.cutMu.Unlock()
	g.gate.RLock()
	current := g.epoch
	g.gate.RUnlock()
	g.history = append(g.history, coolMark{now, current - 1})
	limit, idle := current-1, max(g.cfg.Idle, 0)
	if idle > 0 {
		limit = 0
		for len(g.history) > 1 && now.Sub(g.history[1].at) >= idle {
			g.history = g.history[1:]
		}
		if h := g.history[0]; now.Sub(h.at) >= idle {
			limit = h.epoch
		}
	} else {
		g.history = g.history[len(g.history)-1:]
	}
	keep := uint64(max(g.cfg.IdleEpochs, 0))
	limit = min(limit, current-min(current, keep+1))
	if acked.Generation != g.Generation() {
		return acked, 0
	}
	return acked, min(limit, acked.Epoch)
}

// candidates lists marked regions without a dirty granule whose last writer is
// epoch limit or earlier.
func (d *Disk) candidates(limit uint64) (regions []uint64) {
	st := d.st.Load()
	if limit == 0 || d.unsynced.Load() || st.intent.void.Load() {
		return nil
	}
	for w := range st.intent.durable {
		for v := st.intent.durable[w].Load(); v != 0; {
			r, _ := lowestRun(v)
			v = without(v, r, 1)
			if r += uint64(w) * 64; st.clean(r, limit) {
				regions = append(regions, r)
			}
		}
	}
	return regions
}

func (st *diskState) clean(r, limit uint64) bool {
	lo, hi := r*granulesPerRegion, min((r+1)*granulesPerRegion, st.granules)
	return uint64(st.lastTag[r].Load()) <= limit && !st.fine[0].any(lo, hi, nil) && !st.fine[1].any(lo, hi, nil)
}

// clearRegions clears what is still clean. The marks vanish from memory first,
// while no write can start; losing the page writes is harmless.
func (g *Group) clearRegions(d *Disk, regions []uint64, limit uint64) error {
	st := d.st.Load()
	m := st.intent
	if !m.acquire(true) {
		return block.ErrClosed
	}
	defer m.release()
	if m.void.Load() || m.broken {
		return nil
	}
	clear(m.pages)
	for len(regions) > 0 {
		n := min(len(regions), clearBatch)
		d.dropMarks(st, regions[:n], limit)
		regions = regions[n:]
	}
	if err := m.writePages(); err != nil {
		// The file may hold old or torn pages: marked either way. Get a new one.
		return errors.Join(err, g.rebuildMap(d, m))
	}
	return nil
}

func (d *Disk) dropMarks(st *diskState, regions []uint64, limit uint64) {
	d.ranges.mu.Lock()
	defer d.ranges.mu.Unlock()
	if d.unsynced.Load() {
		return
	}
	for _, r := range regions {
		lo, hi := r*granulesPerRegion, (r+1)*granulesPerRegion
		if d.ranges.conflict(len(d.ranges.entries), lo, hi) || !st.clean(r, limit) {
			continue
		}
		st.intent.dropDurable(r)
		st.intent.next[r/64] &^= 1 << (r % 64)
		st.intent.pages[r/64/pageWords] = true
	}
}

// Adopt takes a position as the acknowledged one after a handshake: one the
// replica committed although the ack was lost, or an older one down to the
// base. Nothing becomes clean; for an older one every marked region becomes
// dirty. ErrPosition means that the tracker cannot serve it: Rebase.
func (g *Group) Adopt(pos Position) error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	if err := g.settled(); err != nil {
		return err
	}
	sb := g.meta.current()
	if pos == g.acked {
		return nil
	}
	older, err := judgePosition(sb, g.acked, pos)
	if err != nil {
		return err
	}
	if older {
		for _, d := range g.all() {
			g.markMapped(d)
		}
	}
	g.stirred()
	if vm := g.share.Load(); vm != nil {
		vm.setAcked(pos)
	}
	g.acked = pos
	g.show()
	return nil
}

// judgePosition decides whether the tracker covers pos, and whether it lies
// before acked.
func judgePosition(sb *super, acked, pos Position) (older bool, err error) {
	bad := func(why string) (bool, error) {
		return false, fmt.Errorf("%w: %v (%s; base %v, acked %v, highest %d)", ErrPosition, pos, why, sb.base, acked, sb.highest)
	}
	if pos == sb.base && sb.floor == 0 {
		return true, nil
	}
	switch {
	case sb.floor > 0 && (pos.Generation != sb.generation || pos.Epoch < sb.floor):
		_, err := bad(fmt.Sprintf("before epoch %d", sb.floor))
		return false, fmt.Errorf("%w: %w", err, ErrLostBase)
	case pos.Generation != sb.generation:
		return bad("other generation")
	case pos.Epoch > sb.highest:
		return bad("newer than anything frozen here")
	case acked.Generation == sb.generation && pos.Epoch == acked.Epoch:
		return bad("same epoch, other content")
	case sb.base.Generation == sb.generation && pos.Epoch <= sb.base.Epoch:
		return bad("before the base, or other content")
	}
	return acked.Generation == sb.generation && pos.Epoch < acked.Epoch, nil
}

// Rebase starts over from a position of the replica's that the tracker does
// not cover: everything becomes dirty, durably, and pos the base.
func (g *Group) Rebase(pos Position, reason string) error {
	g.cleanMu.Lock()
	defer g.cleanMu.Unlock()
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	if err := g.settled(); err != nil {
		return err
	}
	if err := g.markAll(reason); err != nil {
		return err
	}
	if err := g.meta.commit(true, func(s *super) { s.base = pos }); err != nil {
		return fmt.Errorf("rebase: %w", err)
	}
	if vm := g.share.Load(); vm != nil {
		vm.setAcked(pos)
	}
	g.acked = pos
	g.show()
	return nil
}

// settled merges a lost epoch back and reports an open one. cutMu held.
func (g *Group) settled() error {
	if g.closed {
		return block.ErrClosed
	}
	if g.openEp == nil {
		return nil
	}
	if !g.openEp.lost() {
		return ErrEpochOpen
	}
	g.mergeBack(g.openEp)
	return nil
}
