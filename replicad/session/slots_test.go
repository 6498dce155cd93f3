package session_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kvmreplica/replicad/session"
)

func TestAFreeSlotGoesToTheEarliestDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := session.NewSlots(1)
		first, err := s.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var order []int
		var wg sync.WaitGroup
		for i, in := range []time.Duration{30, 10, 20, -1} {
			wg.Go(func() {
				deadline := time.Now().Add(in * time.Second)
				if in < 0 {
					deadline = time.Time{}
				}
				release, err := s.Acquire(t.Context(), deadline)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				release()
				release() // only once
			})
		}
		gone, cancel := context.WithCancel(t.Context())
		wg.Go(func() {
			if _, err := s.Acquire(gone, time.Time{}); !errors.Is(err, context.Canceled) {
				t.Errorf("a cancelled wait: %v", err)
			}
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		first()
		wg.Wait()
		if len(order) != 4 || order[0] != 3 || order[1] != 1 || order[2] != 2 || order[3] != 0 {
			t.Fatalf("order %v", order)
		}
		if again, err := s.Acquire(t.Context(), time.Now()); err != nil {
			t.Fatal("the slot is lost")
		} else {
			again()
		}
	})
}

// Ten VMs with a long interval and slow transfers share two slots with one that
// must ship every ten seconds.
func TestAShortIntervalIsNotLateBehindManyLongOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slots := session.NewSlots(2)
		var mu sync.Mutex
		busy, most := 0, 0
		fleet := make([]*session.Session, 11)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range fleet {
			c, interval, takes := newClockwork(), 2*time.Minute, 20*time.Second
			if i == 0 {
				interval, takes = 10*time.Second, time.Second
			}
			c.took = func(int) time.Duration {
				mu.Lock()
				busy++
				most = max(most, busy)
				mu.Unlock()
				time.AfterFunc(takes-time.Millisecond, func() { mu.Lock(); busy--; mu.Unlock() })
				return takes
			}
			fleet[i] = session.New(session.Config{
				Source: c, Replica: c, Interval: interval, Verified: true, Slots: slots, Rand: rand.New(rand.NewPCG(1, uint64(i))),
			})
			wg.Go(func() { _ = fleet[i].Run(ctx) })
		}
		<-time.After(2 * time.Hour)
		for i, s := range fleet {
			st := s.Status()
			// A slot is busy for at most 20 s; nobody else may go first.
			if limit := 35 * time.Second; i == 0 && st.Stats.RPOMax > limit {
				t.Errorf("the VM with 10 s: an RPO of %v", st.Stats.RPOMax)
			}
			if i > 0 && (st.Stats.Cycles < 50 || st.Stats.RPOMax > 5*time.Minute) {
				t.Errorf("VM %d: %d cycles, RPO up to %v", i, st.Stats.Cycles, st.Stats.RPOMax)
			}
		}
		mu.Lock()
		if most != 2 {
			t.Errorf("%d transfers at once", most)
		}
		mu.Unlock()
		cancel()
		wg.Wait()
	})
}

func TestAFinalCutGoesBeforeAllOthersAndAPauseLeavesTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slots := session.NewSlots(1)
		hold, err := slots.Acquire(t.Context(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		start := func() (*session.Session, *clockwork) {
			c := newClockwork()
			n := 0
			c.empty = func(int) bool { n++; return n > 1 }
			s := session.New(session.Config{Source: c, Replica: c, Interval: time.Second, Verified: true, Slots: slots, Rand: rand.New(rand.NewPCG(1, 1))})
			wg.Go(func() { _ = s.Run(ctx) })
			return s, c
		}
		paused, pc := start()
		other, oc := start()
		last, lc := start()
		<-time.After(10 * time.Second) // all wait for the slot
		paused.Pause()
		done := make(chan error, 1)
		go func() { _, err := last.SyncFinal(ctx); done <- err }()
		synctest.Wait()
		hold()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Minute)
		was := paused.Status()
		cancel()
		wg.Wait()
		if len(pc.cuts) != 0 || was.Phase != session.PausedPhase {
			t.Errorf("the paused session made %d cuts: %+v", len(pc.cuts), was)
		}
		if len(oc.cuts) == 0 || !lc.cuts[0].Before(oc.cuts[0]) && !lc.cuts[0].Equal(oc.cuts[0]) || other.Status().Stats.Errors != 0 {
			t.Errorf("final cut %v, the other's %v", lc.cuts, oc.cuts)
		}
		if free, err := slots.Acquire(t.Context(), time.Now()); err != nil {
			t.Error(err)
		} else {
			free()
		}
	})
}
