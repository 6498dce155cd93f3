package sim

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/lineage"
)

// scene is one step of the story that the sweeps disturb.
type scene struct {
	name string
	play func(w *World) error
}

// story is a life: initial copy, epochs, a planned failover, epochs the other
// way, an unplanned failover, and the way back by comparison.
func story() []scene {
	write := func(n uint64, ops int) func(w *World) error {
		return func(w *World) error {
			r := rand.New(rand.NewPCG(n, 5))
			for _, h := range w.hosts {
				for range ops {
					if h.guest != nil {
						if err := h.guest.step(r); err != nil {
							return err
						}
					}
				}
			}
			return nil
		}
	}
	cycle := func(w *World) error { return opCycle(w, rand.New(rand.NewPCG(1, 6))) }
	apply := func(w *World) error { return opApply(w, rand.New(rand.NewPCG(1, 6))) }
	return []scene{
		{"writes before the initial copy", write(1, 4)},
		{"initial copy and first epoch", cycle},
		{"writes", write(2, 4)},
		{"second epoch", cycle},
		{"apply", apply},
		{"writes again", write(3, 3)},
		{"third epoch", cycle},
		{"clean step", func(w *World) error { return opClean(w, nil) }},
		{"planned failover", func(w *World) error { return w.told(w.hosts[0].planned("planned-1")) }},
		{"writes on B", write(4, 3)},
		{"epoch to A", cycle},
		{"unplanned failover", func(w *World) error {
			w.hosts[1].stopGuest()
			if w.hosts[0].rec.Lineage.State != lineage.Replica {
				return nil
			}
			return w.told(w.hosts[0].unplanned("unplanned-1"))
		}},
		{"writes on A", write(5, 3)},
		{"the way back", func(w *World) error { return w.told(w.hosts[0].reverse("reverse-1")) }},
		{"epoch after it", cycle},
	}
}

// tell plays the story in a world of its own; between is called after each
// scene.
func tell(seed uint64, between func(w *World, scene int) error, first func(w *World)) (_ *World, err error) {
	dir, err := os.MkdirTemp("/dev/shm", "kvmsim")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	w := newWorld(seed, Options{Capture: 8 << 20, Distance: time.Second, Verified: true, FinalSteps: 60, Small: true, Shared: seed == 2}, dir)
	defer w.close()
	w.verbose = os.Getenv("TRACE") != ""
	defer func() {
		if err != nil && w.verbose {
			err = fmt.Errorf("%w\n%s", err, strings.Join(w.trace, "\n"))
		}
	}()
	first(w)
	if err := w.enable(w.hosts[0], w.hosts[1]); err != nil {
		return w, errors.Join(errEnable, err)
	}
	for i, s := range story() {
		w.note("%s", s.name)
		w.now = w.now.Add(2 * time.Second)
		if err := errors.Join(s.play(w), w.finish()); err != nil {
			return w, fmt.Errorf("%s: %w", s.name, err)
		}
		if i > 0 {
			_ = opStart(w, nil) // whoever stopped begins again
		}
		if err := w.check(); err != nil {
			return w, fmt.Errorf("%s: %w", s.name, err)
		}
		if err := between(w, i); err != nil {
			return w, fmt.Errorf("after %s: %w", s.name, err)
		}
	}
	if err := w.settle(); err != nil {
		return w, err
	}
	for _, h := range w.hosts {
		if err := h.look(); err != nil {
			return w, err
		}
	}
	return w, nil
}

var errEnable = errors.New("enable")

func quiet(*World, int) error { return nil }

// full says whether every case is played, or a part that is quick.
func full() bool { return os.Getenv("KVMREPLICA_SIM") == "full" }

// cases runs n cases on two goroutines and reports the first failures.
func cases(t *testing.T, what string, n int, run func(i int) error) {
	t.Helper()
	began := time.Now()
	var next, bad atomic.Int64
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || bad.Load() > 5 {
					return
				}
				if err := run(i); err != nil {
					bad.Add(1)
					t.Errorf("case %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("SWEEP %s: %d cases, %d violations, %v", what, n, bad.Load(), time.Since(began).Round(time.Second))
}

// measure plays the story undisturbed and reports what it did.
func measure(t *testing.T) (bytes, calls int, points, ops [2]int) {
	t.Helper()
	_, err := tell(1, func(w *World, scene int) error {
		bytes, calls = int(w.link.bytes), w.link.calls
		for i, h := range w.hosts {
			ops[i], points[i] = h.m.Power.Counts()
		}
		return nil
	}, func(*World) {})
	if err != nil {
		t.Fatal(err)
	}
	return bytes, calls, points, ops
}

// The link breaks at every byte of every body of the story.
func TestSweepALinkCutAtEveryByteLosesNothing(t *testing.T) {
	total, _, _, _ := measure(t)
	step := 1
	if !full() {
		step = 1 + total/40
	}
	cases(t, fmt.Sprintf("link cut at every byte (of %d, every %d)", total, step), (total+step-1)/step, func(i int) error {
		_, err := tell(1, quiet, func(w *World) { w.link.cutAt = int64(1 + i*step) })
		return err
	})
}

// Every call is lost, its answer is lost, or it arrives twice.
func TestSweepALostOrDoubledCallLosesNothing(t *testing.T) {
	_, calls, _, _ := measure(t)
	step := 1
	if !full() {
		step = 5
	}
	n := (calls + step - 1) / step
	cases(t, fmt.Sprintf("lost call, lost answer, doubled call (of %d, every %d)", calls, step), 3*n, func(i int) error {
		at := 1 + i/3*step
		_, err := tell(1, quiet, func(w *World) {
			switch i % 3 {
			case 0:
				w.link.loseCall = at
			case 1:
				w.link.loseReply = at
			default:
				w.link.twice = at
			}
		})
		return err
	})
}

// Either host stops at every persistence operation of the story: its processes
// die, or it loses power with every old, every new, or a random choice of what
// was not synced.
func TestSweepACrashAtEveryPersistenceOperationLosesNothing(t *testing.T) {
	_, _, points, _ := measure(t)
	step := 1
	if !full() {
		step = 60
	}
	type crash struct{ host, point, how int }
	var all []crash
	for h, n := range points {
		for p := 1; p <= n; p += step {
			for how := range 5 {
				if full() || (p/step+how)%3 == 0 {
					all = append(all, crash{h, p, how})
				}
			}
		}
	}
	cases(t, fmt.Sprintf("crash at every persistence operation (of %d on A and %d on B, every %d)", points[0], points[1], step), len(all), func(i int) error {
		c := all[i]
		_, err := tell(1+uint64(c.point%2), quiet, func(w *World) {
			// 0 keeps the oldest, 1 the newest of what was not synced.
			w.hosts[c.host].armCrash(c.how == 4, c.point, []uint64{0, 1, uint64(8*c.point + 2), uint64(8*c.point + 3), 1}[c.how])
		})
		if errors.Is(err, errEnable) {
			return nil // nothing was protected yet
		}
		if err != nil {
			return fmt.Errorf("%+v: %w", c, err)
		}
		return nil
	})
}

// Every call of the file system or a disk fails once, or from then on until
// the story ends, with every errno.
func TestSweepAFailingCallLosesNothing(t *testing.T) {
	_, _, _, ops := measure(t)
	step := 1
	if !full() {
		step = 200
	}
	type fault struct {
		host, op, times int
		errno           error
	}
	var all []fault
	for h, n := range ops {
		for o := 0; o < n; o += step {
			for i, errno := range []error{syscall.EIO, syscall.ENOSPC, syscall.EDQUOT} {
				for j, times := range []int{1, 1 << 30} {
					if full() || (o/step+i+j)%3 == 0 {
						all = append(all, fault{h, o, times, errno})
					}
				}
			}
		}
	}
	cases(t, fmt.Sprintf("failing call (of %d on A and %d on B, every %d)", ops[0], ops[1], step), len(all), func(i int) error {
		f := all[i]
		_, err := tell(1, quiet, func(w *World) { w.hosts[f.host].failIO(f.errno, f.op, f.times) })
		if errors.Is(err, errEnable) {
			return nil // nothing was protected yet
		}
		if err != nil {
			return fmt.Errorf("%+v: %w", f, err)
		}
		return nil
	})
}

// Every message that was ever sent arrives again in every later state.
func TestSweepAMessageReplayedInEveryStateChangesNothing(t *testing.T) {
	sent := make([]int, len(story())) // messages sent up to the end of a scene
	_, err := tell(1, func(w *World, scene int) error { sent[scene] = len(w.link.kept); return nil }, func(w *World) { w.link.record = true })
	if err != nil {
		t.Fatal(err)
	}
	type pair struct{ message, scene int }
	var all []pair
	for s, n := range sent {
		for m := range n {
			if full() || (m+s)%7 == 0 {
				all = append(all, pair{m, s})
			}
		}
	}
	cases(t, "message replayed in every later state", len(all), func(i int) error {
		p := all[i]
		kind := ""
		_, err := tell(1, func(w *World, scene int) error {
			if scene != p.scene || p.message >= len(w.link.kept) {
				return nil
			}
			w.link.record = false
			kind = w.link.kept[p.message].kind
			if err := w.replay(p.message); err != nil {
				return err
			}
			return w.check()
		}, func(w *World) { w.link.record = true })
		if err != nil {
			return fmt.Errorf("%s after %q: %w", kind, story()[p.scene].name, err)
		}
		return nil
	})
}

// Every sync of a name in the tracker's directory fails once. After the one that
// makes a new tracker's superblock last, what looks like a tracker is there, and
// the plan that made it has to get through all the same.
func TestATrackerWhoseNameWasNotSyncedIsMadeAgain(t *testing.T) {
	for host := range 2 {
		for n := 0; ; n++ {
			seen := 0
			_, err := tell(1, quiet, func(w *World) {
				w.hosts[host].m.Power.SetHook(func(op fsxtest.Op) error {
					if op.Kind != fsxtest.SyncDir || op.Path != "plane/tracker" {
						return nil
					}
					if seen++; seen == n+1 {
						return syscall.EIO
					}
					return nil
				})
			})
			if err != nil && !errors.Is(err, errEnable) {
				t.Errorf("host %d, sync %d: %v", host, n, err)
			}
			if seen <= n {
				t.Logf("host %d: %d syncs", host, n)
				if n < 3 {
					t.Error("too few to show anything")
				}
				break
			}
		}
	}
}
