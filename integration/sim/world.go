package sim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"kvmreplica/integration/oracle"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// Options of a run; they follow from the seed, too.
type Options struct {
	Shared          bool  // boot-scoped memory: a kill costs nothing
	Torn            bool  // a cut may leave garbage in one sector
	DropOnSyncError bool  // after a failed sync reads show the old content
	Capture         int64 // copy-before-write memory
	Interval        time.Duration
	Distance        time.Duration // between points
	Verified        bool          // no background scrub
	FinalSteps      int           // operations a planned failover may take
	Small           bool          // the guest writes little, for sweeps
}

// World is two hosts, the VM, and all that the oracle knows.
type World struct {
	seed  uint64
	dir   string
	opt   Options
	hosts [2]*host
	link  link
	now   time.Time

	roles   *oracle.Roles
	points  *oracle.Points
	cuts    map[cutName]oracle.Images
	states  map[delta.Pos]oracle.Images
	highest map[delta.Generation]uint64
	guests  uint64
	made    map[delta.Generation]bool // promotions that were noted
	forced  bool                      // an operator forced a promotion: two guests may run
	gens    uint64

	restless     int // operations the guest makes in the middle of reads
	restlessRand *rand.Rand
	busy         bool
	crashStep    string

	mu       sync.Mutex
	broken   error
	coverage map[string]int
	trace    []string
	verbose  bool
}

// newWorld makes the hosts; nothing is protected yet.
func newWorld(seed uint64, opt Options, dir string) *World {
	w := &World{
		seed: seed, dir: dir, opt: opt, now: time.Unix(1_800_000_000, 0).UTC(),
		roles: oracle.NewRoles(), points: oracle.NewPoints(),
		cuts: map[cutName]oracle.Images{}, states: map[delta.Pos]oracle.Images{}, highest: map[delta.Generation]uint64{},
		coverage: map[string]int{}, made: map[delta.Generation]bool{},
	}
	w.link.cut = -1
	w.hosts = [2]*host{newHost(w, "A"), newHost(w, "B")}
	return w
}

// close ends everything.
func (w *World) close() {
	for _, h := range w.hosts {
		h.m.Power.Cut()
		h.bury()
	}
}

// generation is the next one: random in the product, a count here.
func (w *World) generation() (g delta.Generation) {
	w.gens++
	binary.BigEndian.PutUint64(g[:], w.gens)
	binary.BigEndian.PutUint64(g[8:], w.seed)
	return g
}

func (w *World) count(what string) {
	w.mu.Lock()
	w.coverage[what]++
	w.mu.Unlock()
}

func (w *World) note(format string, a ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.verbose {
		w.trace = append(w.trace, fmt.Sprintf(format, a...))
	}
}

// fail keeps the first violation.
func (w *World) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken == nil && err != nil {
		w.broken = err
	}
	return err
}

func (w *World) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.broken
}

// committed notes a commit of the replica h.
func (w *World) committed(h *host, now, before delta.Pos, k wire.EpochKey) {
	w.count("epoch committed")
	images := w.cuts[cutName{k.Generation, k.Epoch, k.Nonce}]
	switch {
	case images == nil:
		_ = w.fail(fmt.Errorf("%w: %s committed %v, which nobody froze", oracle.ErrViolation, h.name, now))
		return
	case w.states[now] != nil:
		_ = w.fail(oracle.CheckEqual(images, w.states[now]))
	}
	w.states[now] = images
	_ = w.fail(w.points.Keep(name(now).String()+"/"+name(now).Digest, images))
	if err := h.acks.Committed(name(now), name(before)); err != nil && !before.IsZero() {
		_ = w.fail(err)
	}
}

// acked notes that the primary h took an acknowledgement.
func (w *World) acked(h *host, pos delta.Pos) {
	w.count("epoch acknowledged")
	if err := h.other().acks.Acked(name(pos)); err != nil && w.states[pos] == nil {
		_ = w.fail(err) // else the copy was made anew since, by order
	}
	h.frozen = nil
}

// checkAcks: nothing that was acknowledged may be missing here.
func (h *host) checkAcks() {
	if st := h.store.Status(); st.State == points.Replica {
		if t := h.tried; t != nil && t.key.Generation == st.Committed.Generation && t.key.Epoch == st.Committed.Epoch && h.w.states[st.Committed] == nil {
			h.w.committed(h, st.Committed, t.before, t.key)
		}
		_ = h.w.fail(h.acks.Check(name(st.Committed)))
	}
}

// promoted notes a new generation, once.
func (w *World) promoted(h *host, v *planVars, forced bool) {
	if w.made[v.Generation] {
		return
	}
	w.made[v.Generation] = true
	if !forced && h.rec.Lineage.Diverged == nil && oracle.CheckEqual(h.other().content(), w.states[v.At]) == nil {
		// What was written later was lost in a power cut, or changed nothing.
		w.roles.NothingSince(v.At.Generation.String(), v.At.Epoch)
	}
	w.roles.Created(h.name, v.Generation.String(), v.At.Generation.String(), v.At.Epoch, forced)
	if err := h.acks.Check(name(v.At)); err != nil {
		_ = w.fail(fmt.Errorf("promotion: %w", err))
	}
	if forced {
		w.forced = true
	}
}

// contentIs compares a host's images with what the oracle saw at pos.
func (w *World) contentIs(h *host, pos delta.Pos, what string) error {
	want := w.states[pos]
	if want == nil {
		return fmt.Errorf("%w: %s: nobody has seen %v", oracle.ErrViolation, what, pos)
	}
	if err := oracle.CheckEqual(h.content(), want); err != nil {
		return fmt.Errorf("%s at %v: %w", what, pos, err)
	}
	return nil
}

// check looks at both hosts between two steps.
func (w *World) check() error {
	if err := w.failure(); err != nil {
		return err
	}
	if err := w.roles.Check(); err != nil {
		return err
	}
	serving := map[delta.Generation]string{}
	for _, h := range w.hosts {
		if !h.up || h.lost() {
			continue
		}
		l := h.rec.Lineage
		if l.MayServe() {
			if o := serving[l.Generation]; o != "" {
				return fmt.Errorf("%w: %s and %s both own generation %v", oracle.ErrViolation, o, h.name, l.Generation)
			}
			serving[l.Generation] = h.name
		}
		if err := w.superset(h); err != nil {
			return err
		}
	}
	if len(serving) > 1 && !w.forced {
		return fmt.Errorf("%w: both hosts serve and nobody forced it", oracle.ErrViolation)
	}
	return nil
}

// superset: wherever the primary differs from what the replica committed, the
// tracker knows (I1, I1d).
func (w *World) superset(p *host) error {
	r := p.other()
	if p.client == nil || !r.up || r.store == nil || r.lost() || p.rec.Lineage.State == lineage.Replica {
		return nil
	}
	st, err := p.client.Status(context.Background())
	if err != nil || !st.Tracker || st.TrackingLost != "" {
		return nil
	}
	c := r.store.Committed()
	own := c.Generation == st.Generation && c.Epoch <= st.Highest && c.Epoch >= st.Acked.Epoch
	if c.IsZero() || c != st.Acked && !(own && st.Acked.Generation == st.Generation) && !(own && st.Base == st.Acked) {
		return nil // they have not met since; the handshake decides
	}
	want := w.states[c]
	if want == nil {
		return nil
	}
	dirty, err := p.dirty()
	if err != nil {
		return nil
	}
	if st.Frozen != nil {
		for d, rs := range p.frozen[st.Frozen.Generation][st.Frozen.Epoch].dirty {
			dirty[d] = append(dirty[d], rs...)
		}
	}
	w.count("superset checked")
	err = oracle.CheckSuperset(p.content(), want, delta.Granule, func(disk int, off, n int64) bool {
		for _, x := range dirty[wire.DiskName(disks()[disk].name)] {
			if x.Off <= off && off < x.Off+x.Len {
				return true
			}
		}
		return false
	})
	if err != nil {
		return fmt.Errorf("MISSED on %s relative to %v (acked %v, base %v): %w", p.name, c, st.Acked, st.Base, err)
	}
	return nil
}

// look reads every recovery point of a replica and its committed state.
func (h *host) look() error {
	w := h.w
	if !h.up || h.lost() || h.store == nil {
		return nil
	}
	st := h.store.Status()
	if st.State != points.Replica {
		return nil
	}
	seen := map[delta.Pos]bool{st.Committed: true}
	for _, p := range h.store.Points() {
		if p.Damage != nil {
			return fmt.Errorf("%w: point %v of %s is damaged: %w", oracle.ErrViolation, p.Pos, h.name, p.Damage)
		}
		seen[p.Pos] = true
	}
	for pos := range seen {
		if pos.IsZero() {
			continue
		}
		images, err := h.view(pos)
		if errors.Is(err, points.ErrNoPoint) && pos == st.Committed && st.Committed != st.Applied {
			continue
		}
		if h.lost() {
			return nil
		}
		if err != nil {
			w.note("  %s view %v: %v", h.name, pos, err)
			continue // a fault that was injected; the end of the run looks again
		}
		w.count("point compared")
		if want := w.states[pos]; want == nil {
			return fmt.Errorf("%w: %s lists %v, which nobody froze", oracle.ErrViolation, h.name, pos)
		} else if err := oracle.CheckEqual(images, want); err != nil {
			return fmt.Errorf("%s at %v: %w", h.name, pos, err)
		}
	}
	return nil
}

// view reads a committed state.
func (h *host) view(pos delta.Pos) (oracle.Images, error) {
	v, err := h.store.View(pos)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	var out oracle.Images
	for _, d := range disks() {
		dev, err := v.Disk(d.name)
		if err != nil {
			return nil, err
		}
		b := make([]byte, d.size)
		if _, err := dev.ReadAt(b, 0); err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}
