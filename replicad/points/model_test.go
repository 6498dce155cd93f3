package points_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// TestRandomLivesAgreeWithTheModel plays random operations; the model is the
// kept copy of every cut.
func TestRandomLivesAgreeWithTheModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p, h := newPrimary(rapid.Uint64().Draw(rt, "seed")), blocktest.NewHost()
		s, err := p.create(h)
		check := func(err error) {
			if err != nil {
				rt.Fatal(err)
			}
		}
		check(err)
		cfg := p.config(h)
		views := map[*points.View]bool{}
		free := int64(1 << 30)
		policy := func(rt *rapid.T) points.Policy {
			out := points.Policy{
				MinDistance: time.Duration(rapid.IntRange(1, 60).Draw(rt, "distance")) * time.Second,
				Max:         rapid.IntRange(1, 12).Draw(rt, "max"),
				Grid:        []points.Row{{Every: 0, For: time.Minute}, {Every: 30 * time.Second, For: 4 * time.Minute}},
			}
			switch rapid.IntRange(0, 3).Draw(rt, "grid") {
			case 0:
				out.Grid = []points.Row{} // no points
			case 1:
				out.Grid = []points.Row{{Every: time.Minute, For: 3 * time.Minute}}
			}
			return out
		}
		reopen := func(kill bool) {
			for v := range views {
				check(v.Close())
				delete(views, v)
			}
			if kill {
				h = h.Kill(fsxtest.Newest)
			} else {
				check(s.Close())
			}
			cfg = p.config(h)
			cfg.Policy = policy(rt)
			cfg.Limits.Reserve, cfg.Free = 1<<20, func() (int64, error) { return free, nil }
			s, err = points.Open(cfg)
			check(err)
		}
		rt.Repeat(map[string]func(*rapid.T){
			"epoch": func(rt *rapid.T) {
				p.now = p.now.Add(time.Duration(rapid.IntRange(-3, 40).Draw(rt, "later")) * time.Second)
				p.app = rapid.IntRange(0, 3).Draw(rt, "frozen") == 0
				check(p.send(s, p.cut(p.touch(rapid.IntRange(0, 9).Draw(rt, "granules")))))
			},
			"resync epoch": func(rt *rapid.T) { // sends much that is equal
				p.touch(rapid.IntRange(0, 2).Draw(rt, "granules"))
				p.now, p.app = p.now.Add(time.Second), false
				var all [][]block.Range
				for _, d := range p.disks {
					all = append(all, []block.Range{{Off: 0, Len: d.Size}})
				}
				check(p.send(s, p.cut(all)))
			},
			"retention": func(rt *rapid.T) {
				s.SetPolicy(policy(rt), int64(rapid.IntRange(0, 3).Draw(rt, "quota"))*400<<10)
			},
			"room": func(rt *rapid.T) { free = int64(rapid.IntRange(512<<10, 2<<20).Draw(rt, "free")) },
			"lost epoch": func(rt *rapid.T) { // sent in part, abandoned, its content is sent later
				b := p.cut(make([][]block.Range, 2))
				hd, err := delta.ParseHeader(b.Header)
				check(err)
				_, err = s.Begin(hd)
				check(err)
			},
			"step": func(*rapid.T) { _, err := s.Step(context.Background()); check(err) },
			"view": func(*rapid.T) {
				if c := s.Committed(); !c.IsZero() && len(views) < 5 {
					v, err := s.View(c)
					check(err)
					views[v] = true
				}
			},
			"close view": func(*rapid.T) {
				for v := range views {
					check(v.Close())
					delete(views, v)
					return
				}
			},
			"pin": func(rt *rapid.T) {
				if pts := s.Points(); len(pts) > 0 {
					pt := pts[rapid.IntRange(0, len(pts)-1).Draw(rt, "point")]
					check(s.Pin(pt.Pos))
					p.pinned = pt.Pos
				}
			},
			"unpin": func(*rapid.T) {
				for _, pt := range s.Points() {
					if pt.Pinned && pt.Pos != p.pinned {
						check(s.Unpin(pt.Pos))
					}
				}
			},
			"reopen": func(*rapid.T) { reopen(false) },
			"kill":   func(*rapid.T) { reopen(true) },
			"": func(*rapid.T) {
				check(p.sound(s))
				for v := range views {
					check(p.same(v))
				}
			},
		})
		check(s.Close())
	})
}

// TestViewsAreExactWhileEverythingRuns lets receive, apply, thinning and
// readers run together; the race detector watches.
func TestViewsAreExactWhileEverythingRuns(t *testing.T) {
	p, h, s := started(t, 71)
	must(t, s.Close())
	cfg := p.config(h)
	var clock sync.Mutex
	now := p.now
	cfg.Now = func() time.Time {
		clock.Lock()
		defer clock.Unlock()
		now = now.Add(time.Second)
		return now
	}
	cfg.Policy = points.Policy{MinDistance: 3 * time.Second, Max: 6, Grid: []points.Row{{For: 30 * time.Second}, {Every: 10 * time.Second, For: time.Hour}}}
	s, err := points.Open(cfg)
	must(t, err)
	must(t, p.send(s, p.cut(p.touch(3))))

	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex // guards p's maps
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("run: %v", err)
		}
	})
	reads := make([]int, 3)
	for i := range reads {
		wg.Go(func() {
			for ctx.Err() == nil {
				pos := s.Committed()
				if pts := s.Points(); i > 0 && len(pts) > 0 {
					pos = pts[(reads[i]*7+i)%len(pts)].Pos
				}
				v, err := s.View(pos)
				if errors.Is(err, points.ErrNoPoint) {
					continue // dropped meanwhile
				}
				if err != nil {
					t.Errorf("view: %v", err)
					return
				}
				mu.Lock()
				known := p.cuts[pos] != nil
				q := &primary{disks: p.disks, cuts: map[delta.Pos][][]byte{pos: p.cuts[pos]}}
				mu.Unlock()
				for range 3 {
					if err := q.same(v); known && err != nil {
						t.Errorf("reader %d: %v", i, err)
						cancel()
					}
				}
				_ = v.Close()
				_ = s.Status()
				reads[i]++
			}
		})
	}
	for range 150 {
		mu.Lock()
		b := p.cut(p.touch(5))
		mu.Unlock()
		if err := p.send(s, b); err != nil {
			t.Error(err)
			break
		}
	}
	cancel()
	wg.Wait()
	for i, n := range reads {
		if n == 0 {
			t.Errorf("reader %d read nothing", i)
		}
	}
	must(t, settle(s))
	must(t, p.sound(s))
	must(t, s.Close())
}
