package session_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// clockwork is a source and a replica without data: only times and positions.
// Its network calls take as long as it is told.
type clockwork struct {
	mu     sync.Mutex
	epoch  uint64
	at     delta.Pos // replica's
	acked  delta.Pos
	frozen *dataplane.Epoch
	cuts   []time.Time
	beats  int

	empty func(n int) bool          // of the n-th cut
	took  func(n int) time.Duration // of the n-th transfer
	fail  func(at time.Time) bool   // the line is down
	ships int
}

func newClockwork() *clockwork {
	at := delta.Pos{Generation: dt.Generation(1), Epoch: 1, Digest: delta.Digest{1}}
	return &clockwork{epoch: 1, at: at, acked: at}
}

func (c *clockwork) Status(context.Context) (dataplane.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return dataplane.Status{
		Tracker: true, Instance: "1", Generation: dt.Generation(1), Acked: c.acked, Highest: c.epoch, Frozen: c.frozen,
		Disks: []dataplane.DiskStatus{{Name: "vda", Size: mib}},
	}, nil
}

func (c *clockwork) Freeze(_ context.Context, r dataplane.FreezeRequest) (dataplane.Epoch, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(c.cuts)
	c.cuts = append(c.cuts, time.Now())
	if c.empty != nil && c.empty(n) {
		return dataplane.Epoch{Empty: true, Parent: r.Parent}, nil
	}
	c.epoch++
	c.frozen = &dataplane.Epoch{Generation: dt.Generation(1), Epoch: c.epoch, Nonce: c.epoch, Parent: r.Parent, Cut: time.Now(), Bytes: 4096}
	return *c.frozen, nil
}

func (c *clockwork) Ack(_ context.Context, p delta.Pos) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acked, c.frozen = p, nil
	return nil
}

func (c *clockwork) Abandon(context.Context, uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frozen = nil
	return nil
}

func (c *clockwork) Frames(context.Context, uint64, uint32) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(make([]byte, 100))), nil
}

var errNotHere = errors.New("not in this test")

func (c *clockwork) Attach(context.Context, uint64, []delta.Blob) error { return errNotHere }
func (c *clockwork) SeedFrames(context.Context, dataplane.SeedRequest) (io.ReadCloser, error) {
	return nil, errNotHere
}

func (c *clockwork) Ranges(context.Context, dataplane.RangesRequest) (dataplane.RangesReply, error) {
	return dataplane.RangesReply{}, errNotHere
}

func (c *clockwork) Compare(context.Context, dataplane.CompareRequest) (dataplane.CompareReply, error) {
	return dataplane.CompareReply{}, errNotHere
}

func (c *clockwork) EndCompare(context.Context, dataplane.CompareEnd) (dataplane.CompareResult, error) {
	return dataplane.CompareResult{}, errNotHere
}
func (c *clockwork) Mark(context.Context, dataplane.MarkRequest) error { return errNotHere }

func (c *clockwork) down() error {
	if c.fail != nil && c.fail(time.Now()) {
		return errCut
	}
	return nil
}

func (c *clockwork) Handshake(context.Context, wire.HandshakeRequest) (wire.HandshakeReply, error) {
	if err := c.down(); err != nil {
		return wire.HandshakeReply{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return wire.HandshakeReply{Role: "replica", Generation: dt.Generation(1), Committed: c.at}, nil
}

func (c *clockwork) PutSeed(context.Context, wire.SeedRequest, io.Reader) (wire.SeedReply, error) {
	return wire.SeedReply{}, errNotHere
}

func (c *clockwork) EpochProgress(context.Context, wire.EpochKey) (uint32, error) { return 0, c.down() }

func (c *clockwork) PutEpoch(ctx context.Context, k wire.EpochKey, _ uint32, body io.Reader) (delta.Pos, error) {
	if err := c.down(); err != nil {
		return delta.Pos{}, err
	}
	_, _ = io.Copy(io.Discard, body)
	c.mu.Lock()
	n := c.ships
	c.ships++
	c.mu.Unlock()
	if c.took != nil {
		select {
		case <-time.After(c.took(n)):
		case <-ctx.Done():
			return delta.Pos{}, ctx.Err()
		}
	}
	if err := c.down(); err != nil {
		return delta.Pos{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = delta.Pos{Generation: k.Generation, Epoch: k.Epoch, Digest: delta.Digest{byte(k.Epoch)}}
	return c.at, nil
}

func (c *clockwork) Beat(context.Context, wire.Beat) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.beats++
	return c.down()
}

func (c *clockwork) Digests(context.Context, wire.DigestRequest) (wire.DigestReply, error) {
	return wire.DigestReply{}, errNotHere
}

// live runs a session for d of pretended time and returns its last status.
func live(t *testing.T, c *clockwork, interval, d time.Duration, during func(*session.Session)) session.Status {
	t.Helper()
	s := session.New(session.Config{
		VM: dt.ID, Source: c, Replica: c, Interval: interval, Verified: true, Rand: rand.New(rand.NewPCG(1, 1)),
	})
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	end := time.Now().Add(d - time.Millisecond)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if during != nil {
		during(s)
	}
	var st session.Status
	select {
	case <-time.After(time.Until(end)):
		st = s.Status()
	case err := <-done:
		t.Fatalf("session ended: %v", err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	return st
}

func TestADayOfCyclesKeepsTheInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClockwork()
		c.empty = func(n int) bool { return n%3 == 2 }
		c.took = func(n int) time.Duration { return time.Duration(n%20) * time.Second }
		st := live(t, c, 30*time.Second, 24*time.Hour, nil)
		if n := int64(2880); st.Stats.Cycles != n || st.Stats.Empty != n/3 || st.Stats.CyclesMissed != 0 || st.Stats.Errors != 0 {
			t.Fatalf("%+v", st.Stats)
		}
		for i := 1; i < len(c.cuts); i++ {
			if d := c.cuts[i].Sub(c.cuts[i-1]); d != 30*time.Second {
				t.Fatalf("cut %d came %v after the last", i, d)
			}
		}
		if st.Stats.AverageLatency < 5*time.Second || st.Stats.LargestLatency != 19*time.Second || st.Stats.RPOMax != 49*time.Second {
			t.Fatalf("%+v", st.Stats)
		}
	})
}

func TestLateCyclesCoalesceAndAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClockwork()
		c.took = func(int) time.Duration { return 95 * time.Second }
		st := live(t, c, 30*time.Second, time.Hour, nil)
		// Each transfer overruns three cuts; the next begins at once.
		if st.Stats.Cycles != 37 || st.Stats.CyclesMissed != 37*3 {
			t.Fatalf("%+v", st.Stats)
		}
	})
}

func TestBackToBackDoesNotSpinOnAnIdleGuest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClockwork()
		c.empty = func(int) bool { return true }
		st := live(t, c, 0, time.Minute, nil)
		if st.Stats.Cycles < 290 || st.Stats.Cycles > 310 {
			t.Fatalf("%d cycles in a minute", st.Stats.Cycles)
		}
	})
}

func TestADeadLineIsTriedWithGrowingPausesAndMendsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClockwork()
		begin := time.Now()
		c.fail = func(at time.Time) bool { d := at.Sub(begin); return d > time.Hour && d < 9*time.Hour }
		st := live(t, c, 10*time.Second, 10*time.Hour, func(s *session.Session) {
			<-time.After(5 * time.Hour)
			if s := s.Status(); s.Phase != session.BackingOff && s.Phase != session.Connecting || len(s.Conditions) == 0 || s.Failures < 8 {
				t.Errorf("while the line is dead: %+v", s)
			}
			if s := s.Status(); s.RPO(time.Now()) < 4*time.Hour-time.Minute {
				t.Errorf("RPO is said to be %v", s.RPO(time.Now()))
			}
			<-time.After(4*time.Hour + time.Minute)
			if s := s.Status(); s.Failures != 0 || len(s.Conditions) != 0 || s.RPO(time.Now()) > 20*time.Second {
				t.Errorf("a minute after the line is back: %+v", s)
			}
		})
		// 8 hours with pauses of 15 to 30 s at most.
		if st.Stats.Errors < 900 || st.Stats.Errors > 2100 {
			t.Fatalf("%d errors in 8 hours", st.Stats.Errors)
		}
		if st.Stats.RPOMax < 8*time.Hour {
			t.Fatalf("largest RPO %v", st.Stats.RPOMax)
		}
	})
}

func TestAStalledTransferIsGivenUpAndTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClockwork()
		c.took = func(n int) time.Duration {
			if n == 2 {
				return 100 * time.Hour // the answer never comes
			}
			return time.Second
		}
		st := live(t, c, 10*time.Second, time.Hour, nil)
		if st.Stats.Errors != 1 || st.Stats.Cycles < 340 || st.Stats.LargestLatency < 3*time.Minute || st.Stats.LargestLatency > 4*time.Minute {
			t.Fatalf("%+v", st.Stats)
		}
	})
}

func TestTriggerPauseAndIntervalTakeEffectAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClockwork()
		live(t, c, time.Hour, 5*time.Hour, func(s *session.Session) {
			count := func() int { synctest.Wait(); c.mu.Lock(); defer c.mu.Unlock(); return len(c.cuts) }
			<-time.After(time.Minute)
			n := count()
			s.TriggerNow()
			if got := count(); got != n+1 {
				t.Errorf("%d cuts after a trigger, %d before", got, n)
			}
			s.SetInterval(10 * time.Second)
			<-time.After(time.Minute)
			if got := count(); got < n+6 {
				t.Errorf("%d cuts after a minute at 10 s, %d before", got, n)
			}
			s.Pause()
			n = count()
			<-time.After(time.Hour)
			if st := s.Status(); count() != n || !st.Paused || st.Phase != session.PausedPhase {
				t.Errorf("paused: %d cuts, were %d; %+v", count(), n, st)
			}
			s.Resume()
			if got := count(); got != n+1 {
				t.Errorf("%d cuts after resume, %d before", got, n)
			}
		})
	})
}
