package points_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// scarceLife is a life without points, then with few, a pin, a quota and a
// file system that fills up.
func scarceLife(p *primary) func(h *blocktest.Host) error {
	return func(h *blocktest.Host) error {
		r := &run{p: p}
		if err := r.start(h); err != nil {
			return err
		}
		if err := r.s.Close(); err != nil {
			return err
		}
		free := int64(1 << 30)
		cfg := p.config(h)
		cfg.Policy.Grid = []points.Row{}
		cfg.Limits.Reserve, cfg.Free = 1<<20, func() (int64, error) { return free, nil }
		s, err := points.Open(cfg)
		if err != nil {
			return err
		}
		defer func() { _ = s.Close() }()
		if err := p.epochs(s, 2, 20*time.Second, true); err != nil {
			return err
		}
		v, err := s.View(s.Committed()) // undo begins, and ends with it
		if err != nil {
			return err
		}
		if err := errors.Join(p.epochs(s, 1, 20*time.Second, true), p.same(v), v.Close()); err != nil {
			return err
		}
		if err := p.epochs(s, 1, 20*time.Second, true); err != nil {
			return err
		}
		s.SetPolicy(points.Policy{MinDistance: 15 * time.Second}, 0)
		if err := settle(s); err != nil {
			return err
		}
		p.app = true
		if err := p.epochs(s, 2, 20*time.Second, true); err != nil {
			return err
		}
		p.app = false
		pin := s.Points()[0].Pos
		if err := s.Pin(pin); err != nil {
			return err
		}
		p.pinned = pin
		free = 900 << 10 // below the reserve: all but the pinned and the newest go
		if err := p.epochs(s, 2, 20*time.Second, true); err != nil {
			return err
		}
		free = 1 << 30
		p.pinned = delta.Pos{}
		return errors.Join(s.Unpin(pin), p.epochs(s, 1, 20*time.Second, true))
	}
}

func TestSweepRetentionPinsAndSacrifice(t *testing.T) {
	p := &primary{}
	every := 11
	if fsxtest.Full() {
		every = 1
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 8, Random: 4, Every: every}, scarceLife(p), p.recheck)
}

func TestPointsAreGivenUpOldestFirstNeverTheNewestOrAPinnedOne(t *testing.T) {
	p, h, s := started(t, 91)
	must(t, s.Close())
	free := int64(1 << 30)
	cfg := p.config(h)
	cfg.Limits.Reserve, cfg.Free = 1<<20, func() (int64, error) { return free, nil }
	s, err := points.Open(cfg)
	must(t, err)
	must(t, p.epochs(s, 5, 20*time.Second, true))
	had := s.Points()
	must(t, s.Pin(had[1].Pos))
	// The newest committed state is the base of every point: it stays
	// acknowledged while a point can still be given up.
	free = 200 << 10
	must(t, p.epochs(s, 1, 20*time.Second, false))
	must(t, settle(s))
	ps := s.Points()
	if len(ps) != 2 || ps[0].Pos != had[1].Pos || ps[1].Pos != s.Committed() {
		t.Fatalf("%d points stay: %v", len(ps), ps)
	}
	if got := s.Status().Sacrificed; got != len(had)-1 {
		t.Errorf("%d points are counted as given up", got)
	}
	must(t, p.sound(s))
	// With nothing left to give up, epochs are no longer acknowledged ...
	b := p.cut(p.touch(3))
	if err := p.send(s, b); !errors.Is(err, points.ErrNoSpace) {
		t.Fatalf("an epoch on a full replica: %v", err)
	}
	free = 2 << 20 // ... until there is room: nothing was lost
	must(t, p.send(s, b))
	must(t, settle(s))
	must(t, p.sound(s))
	must(t, s.Close())
}

func TestWithoutPointsNoUndoIsWritten(t *testing.T) {
	p, h, s := started(t, 92)
	must(t, s.Close())
	cfg := p.config(h)
	cfg.Policy.Grid = []points.Row{}
	s, err := points.Open(cfg)
	must(t, err)
	must(t, settle(s))
	h.Power.SetTrace(func(op fsxtest.Op) {
		if op.Kind == fsxtest.Write && strings.HasPrefix(op.Path, "undo/") {
			t.Errorf("undo is written: %v", op)
		}
	})
	must(t, p.epochs(s, 4, time.Hour, true))
	h.Power.SetTrace(nil)
	if st := s.Status(); st.Points != 0 || st.Undo != 0 {
		t.Errorf("%d points, %d bytes of undo", st.Points, st.Undo)
	}
	v, err := s.View(s.Committed())
	must(t, err)
	must(t, p.epochs(s, 3, time.Hour, true))
	must(t, p.same(v))
	must(t, v.Close())
	must(t, p.sound(s))
	s.SetPolicy(points.Policy{MinDistance: time.Second}, 0)
	must(t, p.epochs(s, 3, time.Minute, true))
	if n := len(s.Points()); n < 3 {
		t.Errorf("%d points after they were wanted again", n)
	}
	must(t, p.sound(s))
	must(t, s.Close())
}
