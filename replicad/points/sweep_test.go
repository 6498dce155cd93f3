package points_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// recheck opens what a crash left and holds it against p's copies: everything
// promised before and after the backlog is applied, and that replication goes
// on. p is not changed.
func (p *primary) recheck(h *blocktest.Host) error {
	s, err := points.Open(p.config(h))
	if errors.Is(err, fs.ErrNotExist) && p.created == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if err := p.judge(h, s); err != nil {
		return errors.Join(err, s.Close())
	}
	return s.Close()
}

func (p *primary) judge(h *blocktest.Host, s *points.Store) error {
	if p.promoted {
		return p.judgePromoted(h, s)
	}
	if err := p.sound(s); err != nil {
		return err
	}
	if s.Committed().IsZero() {
		for d, cursor := range s.Status().Seeded {
			if cursor < p.seeded[d] {
				return fmt.Errorf("disk %s is seeded up to %d, was told %d", d, cursor, p.seeded[d])
			}
		}
		return nil
	}
	if err := settle(s); err != nil {
		return fmt.Errorf("apply: %w", err)
	}
	if err := p.basesAre(h, s.Committed()); err != nil {
		return err
	}
	if err := p.sound(s); err != nil {
		return fmt.Errorf("after apply: %w", err)
	}
	q := p.copy()
	q.adopt(s.Committed())
	if err := q.epochs(s, 2, 16*time.Second, true); err != nil {
		return fmt.Errorf("next epoch: %w", err)
	}
	if err := q.sound(s); err != nil {
		return fmt.Errorf("after the next epochs: %w", err)
	}
	return nil
}

// adopt continues from a committed cut, as a primary that asked does.
func (p *primary) adopt(pos delta.Pos) {
	p.parent, p.acked = pos, pos
	p.content, p.disks = nil, slices.Clone(p.set(pos))
	for _, b := range p.cuts[pos] {
		p.content = append(p.content, append([]byte(nil), b...))
	}
}

func (p *primary) judgePromoted(h *blocktest.Host, s *points.Store) error {
	st := s.Status()
	if st.State == points.Promoted {
		return p.basesAre(h, st.Seal.At)
	}
	if p.sealed {
		return fmt.Errorf("state %s after the promotion was acknowledged", st.State)
	}
	if st.State == points.Rolling {
		seal, err := s.PromoteAt(context.Background(), p.target, delta.Generation{8})
		if err != nil {
			return err
		}
		return p.basesAre(h, seal.At)
	}
	return p.sound(s)
}

// seedAll seeds in two durable steps and remembers what was told.
func (p *primary) seedAll(s *points.Store) error {
	p.seeded = map[string]int64{}
	if err := p.seed(s); err != nil {
		return err
	}
	for _, d := range p.disks {
		p.seeded[d.Name] = d.Size
	}
	return nil
}

type run struct {
	p *primary
	h *blocktest.Host
	s *points.Store
}

func (r *run) start(h *blocktest.Host) error {
	*r.p = *newPrimary(42)
	s, err := points.Create(r.p.config(h), r.p.disks)
	if err != nil {
		return err
	}
	r.h, r.s = h, s
	r.p.created++
	return r.p.seedAll(s)
}

// F18: a crash at every step while disks shrink and grow: every point that is
// left has its own size and content.
func TestNoCrashWhileDisksAreResizedHarmsAPoint(t *testing.T) {
	p := &primary{}
	scenario := func(h *blocktest.Host) error {
		*p = *newPrimary(43)
		p.room = sizeA + 8*4096
		s, err := points.Create(p.config(h), p.disks)
		if err != nil {
			return err
		}
		p.created++
		defer func() { _ = s.Close() }()
		if err := p.seedAll(s); err != nil {
			return err
		}
		if err := p.epochs(s, 2, 20*time.Second, true); err != nil {
			return err
		}
		for _, size := range []int64{3*4096 + 512, sizeB + 4096} {
			if err := p.resizeTo(s, size); err != nil {
				return err
			}
			if err := p.epochs(s, 1, 20*time.Second, true); err != nil {
				return err
			}
		}
		return nil
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 8, Random: 4}, scenario, p.recheck)
}

// life is the scripted life of a replica: first epoch, points, a view held
// over an apply, a resumed partial, thinning, a merge, close and open.
func life(p *primary) func(h *blocktest.Host) error {
	return func(h *blocktest.Host) error {
		r := &run{p: p}
		if err := r.start(h); err != nil {
			return err
		}
		s := r.s
		defer func() {
			if s != nil {
				_ = s.Close()
			}
		}()
		if err := p.epochs(s, 1, time.Second, false); err != nil {
			return err
		}
		if err := p.epochs(s, 1, 16*time.Second, true); err != nil {
			return err
		}
		v, err := s.View(s.Committed())
		if err != nil {
			return err
		}
		if err := p.epochs(s, 3, 2*time.Second, false); err != nil {
			return err
		}
		if err := errors.Join(settle(s), p.same(v), v.Close()); err != nil {
			return err
		}
		b := p.cut(p.touch(6))
		hd, err := delta.ParseHeader(b.Header)
		if err != nil {
			return err
		}
		rc, err := s.Begin(hd)
		if err != nil {
			return err
		}
		if err := rc.Chunk(b.Chunks[0]); err != nil {
			return err
		}
		if err := s.Close(); err != nil {
			return err
		}
		cfg := p.config(h)
		cfg.Policy.Grid = []points.Row{{Every: 0, For: time.Minute}, {Every: time.Minute, For: time.Hour}}
		if s, err = points.Open(cfg); err != nil {
			return err
		}
		if err := p.send(s, b); err != nil {
			return err
		}
		return p.epochs(s, 2, 50*time.Second, true)
	}
}

func TestSweepReceiveCommitApplyPoints(t *testing.T) {
	p := &primary{}
	every := 1
	if testing.Short() {
		every = 5
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 16, Random: 6, Every: every}, life(p), p.recheck)
}

func TestSweepRecoveryItselfCrashing(t *testing.T) {
	p := &primary{}
	every, survivors := 19, 3
	if testing.Short() {
		every, survivors = 97, 1
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: survivors, Random: survivors, Every: every, Recover: func(h *blocktest.Host) error {
		s, err := points.Open(p.config(h))
		if errors.Is(err, fs.ErrNotExist) && p.created == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		return errors.Join(settle(s), s.Close())
	}}, life(p), p.recheck)
}

// TestSweepPointAndCloseWithRecoveryCrashing covers making a point, an orderly
// close and an open densely, where the sweep above only samples.
func TestSweepPointAndCloseWithRecoveryCrashing(t *testing.T) {
	p := &primary{}
	every, survivors := 2, 2
	if testing.Short() {
		every, survivors = 9, 1
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: survivors, Random: survivors, Every: every, Recover: func(h *blocktest.Host) error {
		s, err := points.Open(p.config(h))
		if err != nil {
			return err
		}
		return errors.Join(settle(s), s.Close())
	}}, func(h *blocktest.Host) error {
		r := &run{p: p}
		err := h.Setup(func() error {
			if err := r.start(h); err != nil {
				return err
			}
			if err := p.epochs(r.s, 2, 20*time.Second, true); err != nil {
				return err
			}
			if err := p.epochs(r.s, 1, 20*time.Second, false); err != nil {
				return err
			}
			return r.s.ApplyAll(context.Background())
		})
		if err != nil {
			return err
		}
		return errors.Join(settle(r.s), r.s.Close())
	}, p.recheck)
}

// promotion is the end of a replica's life, at the newest state or a point.
func promotion(p *primary, older bool) func(h *blocktest.Host) error {
	return func(h *blocktest.Host) error {
		r := &run{p: p}
		err := h.Setup(func() error {
			if err := r.start(h); err != nil {
				return err
			}
			return p.epochs(r.s, 3, 20*time.Second, true)
		})
		if err != nil {
			return err
		}
		defer func() { _ = r.s.Close() }()
		if err := p.epochs(r.s, 1, time.Second, false); err != nil {
			return err
		}
		if older {
			p.promoted, p.target = true, r.s.Points()[1].Pos
			_, err = r.s.PromoteAt(context.Background(), p.target, delta.Generation{8})
		} else {
			if err := r.s.ApplyAll(context.Background()); err != nil {
				return err
			}
			p.promoted = true
			_, err = r.s.Promote(delta.Generation{8}, true)
		}
		p.sealed = err == nil
		return err
	}
}

func TestSweepPromotion(t *testing.T) {
	for _, older := range []bool{false, true} {
		p := &primary{}
		blocktest.SweepWith(t, blocktest.Options{MaxAll: 64, Random: 12}, promotion(p, older), p.recheck)
	}
}

func TestFailSweepReceiveCommitApplyPoints(t *testing.T) {
	p := &primary{}
	every := 2
	if testing.Short() {
		every = 31
	}
	blocktest.FailSweepWith(t, blocktest.Options{Every: every}, life(p), p.recheck)
}

// TestSweepBatchIsNotSplitAfterACrash: a half applied batch must be finished as
// a whole, also when the policy of the next process would rather make a point
// in the middle of it.
func TestSweepBatchIsNotSplitAfterACrash(t *testing.T) {
	p := &primary{}
	scenario := func(h *blocktest.Host) error {
		*p = *newPrimary(43)
		p.distance = time.Second
		var s *points.Store
		err := h.Setup(func() (err error) {
			if s, err = p.create(h); err != nil {
				return err
			}
			if err = errors.Join(p.epochs(s, 2, 2*time.Second, true), s.Close()); err != nil {
				return err
			}
			cfg := p.config(h)
			cfg.Policy.MinDistance = time.Hour
			if s, err = points.Open(cfg); err != nil {
				return err
			}
			if err = p.epochs(s, 1, 2*time.Second, true); err != nil {
				return err
			}
			return p.epochs(s, 3, 2*time.Second, false)
		})
		p.created++
		if err != nil {
			return err
		}
		defer func() { _ = s.Close() }()
		return settle(s)
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 64, Random: 16}, scenario, p.recheck)
}

// TestSyncFailsThenProcessDiesThenPowerFails: what the next process finds after
// a failed sync may be in memory only. Whatever it answers, a power cut after
// that must not take it back.
func TestSyncFailsThenProcessDiesThenPowerFails(t *testing.T) {
	p := &primary{}
	syncs := 0
	h := blocktest.NewHost()
	h.Power.SetTrace(func(op fsxtest.Op) {
		if op.Kind == fsxtest.Sync {
			syncs++
		}
	})
	must(t, life(p)(h))
	step := 1
	if testing.Short() {
		step = 3
	}
	for n := 1; n <= syncs; n += step {
		for _, apply := range []bool{false, true} {
			failedSync(t, p, n, apply)
		}
	}
}

// failedSync lets the n-th sync fail, the process die, another one open the
// store (and apply), and then cuts the power.
func failedSync(t *testing.T, p *primary, n int, apply bool) {
	t.Helper()
	h := blocktest.NewHost()
	seen, hit := 0, ""
	h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind != fsxtest.Sync {
			return nil
		}
		if seen++; seen == n {
			hit = op.String()
			return syscall.EIO
		}
		return nil
	})
	_ = life(p)(h)
	h.Power.SetHook(nil)
	next := h.Kill(fsxtest.Newest)
	told := p.copy()
	s, err := points.Open(p.config(next))
	if errors.Is(err, fs.ErrNotExist) && p.created == 0 {
		return
	}
	must(t, err)
	if apply {
		must(t, settle(s))
	}
	if c := s.Committed(); !c.IsZero() {
		told.acked = c
	}
	listed := s.Points()
	next.Power.Cut()
	for seed := range uint64(4) {
		choose := fsxtest.Random(seed)
		if seed == 0 {
			choose = fsxtest.Oldest
		}
		last := next.Cut(choose)
		if err := told.copy().recheck(last); err != nil {
			t.Fatalf("failed %s, apply %v, cut %d: %v", hit, apply, seed, err)
		}
		s, err := points.Open(p.config(last))
		must(t, err)
		for _, pt := range listed {
			if err := told.exact(s, pt.Pos); err != nil && !errors.Is(err, points.ErrNoPoint) {
				t.Fatalf("failed %s, apply %v, cut %d: point %v: %v", hit, apply, seed, pt.Pos, err)
			}
		}
		must(t, s.Close())
	}
}

// A store is removed in front of a new one: a crash anywhere in that leaves a
// whole store or none, and removing it again works.
func TestSweepRemovalLeavesAWholeStoreOrNone(t *testing.T) {
	for crash, gone := 1, 0; ; crash++ {
		p, h, s := started(t, 31)
		must(t, p.send(s, p.cut(p.touch(4))))
		must(t, s.Close())
		_, at := h.Power.Counts()
		h.Power.CrashAt(at + crash)
		err := points.Remove(h.FS)
		if err == nil {
			if gone == 0 || crash < 4 {
				t.Fatalf("%d crashes, %d left no store", crash, gone)
			}
			return
		}
		for _, survivors := range []fsxtest.Chooser{fsxtest.Oldest, fsxtest.Newest, fsxtest.Random(uint64(crash))} {
			after := h.Cut(survivors)
			again, err := points.Open(p.config(after))
			switch {
			case errors.Is(err, fs.ErrNotExist):
				gone++
			case err != nil:
				t.Fatalf("crash %d: half a store: %v", crash, err)
			default:
				must(t, again.Close())
			}
			must(t, points.Remove(after.FS))
			if _, err := points.Create(p.config(after), p.disks); err != nil {
				t.Fatalf("crash %d: a new store: %v", crash, err)
			}
		}
	}
}
