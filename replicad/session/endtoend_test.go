package session_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

const mib = 1 << 20

// patience is for loaded machines and the race detector; nothing waits this
// long when all is well.
const patience = 2 * time.Minute

// pair is a primary with a guest, and a replica, joined by a line.
type pair struct {
	t     *testing.T
	cfg   dataplane.Config
	plane *dt.Run
	guest *dt.Guest
	rep   *replica
	line  *line
	sess  *session.Session
	stop  func()
}

func newPair(t *testing.T, seed uint64, sizes ...int64) *pair {
	t.Helper()
	p := &pair{t: t, cfg: dt.Config(t, sizes...)}
	p.plane = dt.Serve(t, p.cfg)
	p.plane.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	p.guest = dt.Boot(t, p.cfg, seed)
	var disks []delta.Disk
	for i, d := range p.cfg.Disks {
		disks = append(disks, delta.Disk{Name: string(d.Name), Size: sizes[i]})
	}
	p.rep = newReplica(t, dt.Generation(1), disks...)
	p.line = &line{Replica: p.rep}
	return p
}

// run starts a session; it ends with the test or with p.stop.
func (p *pair) run(change func(*session.Config)) {
	p.t.Helper()
	c := session.Config{
		VM: dt.ID, Name: "test", Source: p.plane, Replica: p.line, Verified: true,
		Rand: rand.New(rand.NewPCG(1, 2)), ScrubRate: 1 << 40,
	}
	if change != nil {
		change(&c)
	}
	p.sess = session.New(c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := p.sess.Run(ctx); !errors.Is(err, context.Canceled) {
			p.t.Errorf("session: %v", err)
		}
	}()
	p.stop = sync.OnceFunc(func() { cancel(); <-done })
	p.t.Cleanup(p.stop)
}

// final ships the rest and compares both sides bit for bit.
func (p *pair) final() delta.Pos {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	pos, err := p.sess.SyncFinal(ctx)
	if err != nil {
		p.t.Fatalf("final: %v (%+v)", err, p.sess.Status())
	}
	for name, want := range p.guest.Snapshot() {
		dt.SameContent(p.t, "replica's "+string(name), p.rep.content(string(name)), want)
	}
	return pos
}

// until waits for a status.
func (p *pair) until(what string, ok func(session.Status) bool) session.Status {
	p.t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if s := p.sess.Status(); ok(s) {
			return s
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			p.t.Fatalf("never %s: %+v", what, p.sess.Status())
		}
	}
}

func TestTheReplicaHoldsWhatTheGuestWroteFromSeedToFinal(t *testing.T) {
	p := newPair(t, 1, 24*mib, 6*mib+512)
	p.guest.Scribble(100)
	p.run(func(c *session.Config) { c.Interval, c.Holes, c.Verified = 50*time.Millisecond, true, false })
	p.until("protected", func(s session.Status) bool {
		p.guest.Scribble(1)
		return s.Protected
	})
	p.until("verified after 5 cycles", func(s session.Status) bool {
		p.guest.Scribble(3)
		return s.Verified && s.Stats.Cycles > 5
	})
	p.final()
	s := p.sess.Status()
	if s.Stats.Errors != 0 || s.Mismatched != 0 || len(s.Conditions) != 0 {
		t.Fatalf("status: %+v", s)
	}
	t.Logf("cycles %d (%d empty), %d raw, %d sent, latency %v avg %v max, RPO %v median %v max",
		s.Stats.Cycles, s.Stats.Empty, s.Stats.RawBytes, s.Stats.SentBytes, s.Stats.AverageLatency, s.Stats.LargestLatency, s.Stats.RPOMedian, s.Stats.RPOMax)
	p.guest.Check()
}

func TestALineCutAtManyOffsetsAndLostAnswersLoseNothing(t *testing.T) {
	p := newPair(t, 2, 16*mib)
	p.guest.Write("vda", random(1, 10*mib), 0)
	rng := rand.New(rand.NewPCG(3, 4))
	var mu sync.Mutex
	p.line.cut = func(n int) int64 {
		mu.Lock()
		defer mu.Unlock()
		if n%3 == 2 {
			return -1
		}
		return 1 + rng.Int64N(1<<(8+rng.IntN(15)))
	}
	p.line.loseReply = func(n int) bool { return n%4 == 1 || n%6 == 2 }
	p.run(nil)
	for range 2 {
		want := p.sess.Status().Stats.Cycles + 2
		p.until("further", func(s session.Status) bool {
			p.guest.Scribble(2)
			return s.Stats.Cycles >= want
		})
	}
	p.final()
	if s := p.sess.Status(); s.Stats.Errors < 5 || s.Stop != nil {
		t.Fatalf("the line was too good: %+v", s.Stats)
	}
}

func TestTwentyCutsCostLittleMoreThanOneTransfer(t *testing.T) {
	if testing.Short() {
		t.Skip("ships 420 MiB")
	}
	const changed = 210 * mib
	carried := func(cuts int) (int64, session.Stats) {
		p := newPair(t, 5, 220*mib)
		p.guest.Scribble(20)
		p.run(nil)
		p.until("protected", func(s session.Status) bool { return s.Protected })
		p.sess.Pause()
		p.until("paused", func(s session.Status) bool { return s.Phase == session.PausedPhase })
		for off := int64(0); off < changed; off += mib {
			p.guest.Write("vda", random(uint64(off), mib), off)
		}
		p.line.mu.Lock()
		p.line.bytes, p.line.n = 0, 0
		p.line.cut = func(n int) int64 {
			if n < cuts {
				return 9*mib + 300*1024 + int64(n)*54321
			}
			return -1
		}
		p.line.mu.Unlock()
		p.sess.Resume()
		p.until("shipped", func(s session.Status) bool { return s.Stats.RawBytes >= changed })
		p.stop()
		return p.line.carried(0), p.sess.Status().Stats
	}
	plain, _ := carried(0)
	cut, stats := carried(20)
	t.Logf("undisturbed %d bytes, with %d cuts %d bytes: %.3f", plain, stats.Errors, cut, float64(cut)/float64(plain))
	if stats.Errors < 20 {
		t.Fatalf("only %d cuts", stats.Errors)
	}
	// A cut loses the chunk that was on its way, never one that was verified.
	if float64(cut) > 1.1*float64(plain) {
		t.Fatalf("%d bytes instead of %d", cut, plain)
	}
}

func random(seed uint64, n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), 99}).Read(p)
	return p
}

func TestAReplicaThatRestartsAgainAndAgainKeepsUp(t *testing.T) {
	p := newPair(t, 6, 16*mib)
	p.guest.Scribble(100)
	p.line.cut = func(n int) int64 {
		if n%2 == 0 {
			return int64(n+1) * 50_000
		}
		return -1
	}
	p.line.after = func(n int) {
		if n%3 != 2 {
			p.rep.restart()
		}
	}
	p.run(nil)
	p.until("6 cycles", func(s session.Status) bool {
		p.guest.Scribble(2)
		return s.Stats.Cycles > 6
	})
	p.final()
}

func TestADataPlaneRestartAbandonsTheEpochAndGoesOn(t *testing.T) {
	p := newPair(t, 7, 16*mib)
	p.guest.Scribble(50)
	client := dataplane.NewClient(p.cfg.ControlSocket())
	t.Cleanup(client.Close)
	p.run(func(c *session.Config) { c.Source = client })
	for range 3 {
		want := p.sess.Status().Stats.Cycles + 2
		p.until("further", func(s session.Status) bool {
			p.guest.Scribble(2)
			return s.Stats.Cycles >= want
		})
		p.guest.Disconnect()
		p.plane.Stop()
		p.plane = dt.Serve(t, p.cfg)
	}
	p.guest.Scribble(20)
	p.final()
}

func TestSuspectRangesAreComparedNotCopied(t *testing.T) {
	p := newPair(t, 8, 32*mib)
	p.guest.Write("vda", random(1, 16*mib), 0)
	p.run(nil)
	p.until("protected", func(s session.Status) bool { return s.Protected })
	p.final()
	p.stop()
	p.guest.Disconnect()
	p.plane.Stop()
	// Somebody touched the image's time stamp while nobody tracked it.
	touch(t, p.cfg.Disks[0].Path)
	p.plane = dt.Serve(t, p.cfg)
	st, err := p.plane.Status(context.Background())
	if err != nil || st.Suspect < 32*mib {
		t.Fatalf("after a touch: %+v, %v", st, err)
	}
	p.guest.Write("vda", random(2, 100_000), 5*mib)
	p.line.carried(0)
	p.run(nil)
	p.until("protected", func(s session.Status) bool { return s.Protected && s.Verifying == "" && s.Phase == session.Waiting })
	p.final()
	sent := p.line.carried(0)
	if sent > mib {
		t.Fatalf("%d bytes were sent for 100 kB of changes", sent)
	}
	digests := p.rep.Hashed()
	if digests < 32*mib {
		t.Fatalf("only %d bytes were compared", digests)
	}
	t.Logf("compared %d MiB, sent %d KiB", digests/mib, sent/1024)
}

func TestTheScrubFindsARottenReplicaAndMendsIt(t *testing.T) {
	p := newPair(t, 9, 24*mib)
	p.guest.Write("vda", random(1, 4*mib), 0)
	p.run(nil)
	p.until("protected", func(s session.Status) bool { return s.Protected })
	p.final()
	p.stop()
	s, err := p.rep.get()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.ApplyAll(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := p.rep.bases["vda"].WriteAt([]byte("rot"), 2*mib+5000); err != nil {
		t.Fatal(err)
	}
	p.run(func(c *session.Config) { c.Verified = false })
	got := p.until("verified", func(s session.Status) bool { return s.Verified })
	if got.Mismatched != delta.Granule {
		t.Fatalf("mismatched %d bytes, want one granule; %+v", got.Mismatched, got.Conditions)
	}
	p.final()
}

func TestAStoppedHandshakeIsAnErrorOfSyncFinal(t *testing.T) {
	p := newPair(t, 10, 8*mib)
	p.run(func(c *session.Config) {
		c.Complete = func(r *wire.HandshakeRequest) { r.Diverged = true }
	})
	p.until("stopped", func(s session.Status) bool { return s.Phase == session.Stopped && s.Stop.Diverged })
	_, err := p.sess.SyncFinal(context.Background())
	var e *wire.Error
	if !errors.As(err, &e) || e.Kind != wire.KindDiverged {
		t.Fatalf("final: %v", err)
	}
}

// touch gives a file a new modification time.
func touch(t *testing.T, path string) {
	t.Helper()
	at := time.Now().Add(time.Hour)
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
}

func TestASessionOutlivesKilledDataPlanes(t *testing.T) {
	cfg := dt.Config(t, 16*mib)
	client := dt.Ensure(t, &cfg)
	ctx := context.Background()
	if err := client.CreateTracker(ctx, dataplane.CreateRequest{Generation: dt.Generation(1)}); err != nil {
		t.Fatal(err)
	}
	if err := client.Export(ctx, dataplane.ExportRequest{On: true}); err != nil {
		t.Fatal(err)
	}
	rep := newReplica(t, dt.Generation(1), delta.Disk{Name: "vda", Size: 16 * mib})
	p := &pair{t: t, cfg: cfg, guest: dt.Boot(t, cfg, 11), rep: rep, line: &line{Replica: rep}}
	p.guest.Scribble(50)
	p.run(func(c *session.Config) { c.Source = client })
	for range 4 {
		want := p.sess.Status().Stats.Cycles + 3
		p.until("further", func(s session.Status) bool {
			p.guest.Scribble(2)
			return s.Stats.Cycles >= want
		})
		st, err := client.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		dt.Kill(t, st.PID)
		p.guest.Scribble(10) // reconnects and resends; an error reply fails the test
	}
	p.final()
	if st := p.sess.Status(); st.Stop != nil || st.Suspect != 0 {
		t.Fatalf("%+v", st)
	}
	p.guest.Check()
}

func TestFirmwareAloneMakesAnEpochAndIsCommittedWithIt(t *testing.T) {
	p := newPair(t, 12, 4*mib)
	var mu sync.Mutex
	state, sent, committed := "one", "", ""
	p.run(func(c *session.Config) {
		c.Interval = 10 * time.Millisecond
		c.Firmware = func(context.Context) ([]delta.Blob, error) {
			mu.Lock()
			defer mu.Unlock()
			if state == committed {
				return nil, nil
			}
			sent = state
			return []delta.Blob{{Kind: delta.BlobNVRAM, Data: []byte(sent)}}, nil
		}
		c.FirmwareCommitted = func() {
			mu.Lock()
			defer mu.Unlock()
			committed = sent
		}
	})
	holds := func(want string) {
		p.until("firmware "+want, func(session.Status) bool {
			s, err := p.rep.get()
			if err != nil {
				t.Fatal(err)
			}
			bs, err := s.Firmware(s.Committed())
			return err == nil && len(bs) == 1 && string(bs[0].Data) == want
		})
	}
	holds("one")
	mu.Lock()
	state = "two"
	mu.Unlock()
	holds("two")
	idle := func() int { // the commits once nothing is under way
		want := p.sess.Status().Stats.Empty + 3
		p.until("idle", func(s session.Status) bool { return s.Stats.Empty >= want })
		return int(p.rep.Commits())
	}
	if n, again := idle(), idle(); n != again {
		t.Fatalf("%d commits although nothing changed, %d before", again, n)
	}
}

func TestANewSessionContinuesTheEpochOfTheLast(t *testing.T) {
	p := newPair(t, 13, 32*mib)
	p.run(nil)
	p.until("protected", func(s session.Status) bool { return s.Protected })
	p.sess.Pause()
	p.until("paused", func(s session.Status) bool { return s.Phase == session.PausedPhase })
	p.guest.Write("vda", random(1, 20*mib), 0)
	want := p.guest.Snapshot()
	half := make(chan struct{})
	p.line.mu.Lock()
	p.line.bytes, p.line.n = 0, 0
	p.line.cut = func(n int) int64 {
		if n == 0 {
			return 10*mib + 1000
		}
		return -1
	}
	p.line.after = func(n int) {
		if n == 0 {
			close(half)
		}
	}
	p.line.mu.Unlock()
	p.sess.Resume()
	<-half
	p.stop() // the daemon ends
	st, err := p.plane.Status(context.Background())
	if err != nil || st.Frozen == nil {
		t.Fatalf("the epoch is not held: %+v, %v", st, err)
	}
	p.guest.Write("vda", random(2, mib), 15*mib) // not in that epoch
	p.run(func(c *session.Config) { c.Interval = time.Hour })
	s := p.until("committed", func(s session.Status) bool { return s.Stats.Cycles == 1 })
	if s.Committed.Epoch != st.Frozen.Epoch || s.Stats.Resumed != 1 {
		t.Fatalf("epoch %d was not continued: %+v", st.Frozen.Epoch, s)
	}
	dt.SameContent(t, "replica", p.rep.content("vda"), want["vda"])
	if sent := p.line.carried(0); sent > 22*mib {
		t.Fatalf("%d bytes for a 20 MiB epoch", sent)
	}
	p.final()
}

func TestAnEpochCostsOneSyncOfTheTracker(t *testing.T) {
	p := newPair(t, 14, 8*mib)
	p.guest.Write("vda", random(1, 4*mib), 0)
	p.run(func(c *session.Config) { c.Interval = time.Millisecond })
	p.until("protected", func(s session.Status) bool { return s.Protected })
	count := func() (syncs, epochs int64) {
		ctx := context.Background()
		c, err := p.plane.Counters(ctx)
		if err != nil {
			t.Fatal(err)
		}
		st, err := p.plane.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return c["super_syncs"] + c["intent_syncs.vda"], int64(st.Highest)
	}
	syncs, epochs := count()
	for i := range 30 {
		want := p.sess.Status().Stats.Cycles - p.sess.Status().Stats.Empty + 1
		p.guest.Write("vda", random(uint64(i), 4096), int64(i)*8192)
		p.until("shipped", func(s session.Status) bool { return s.Stats.Cycles-s.Stats.Empty >= want })
	}
	s, e := count()
	if e-epochs < 20 || s-syncs > e-epochs {
		t.Fatalf("%d syncs for %d epochs", s-syncs, e-epochs)
	}
	t.Logf("%d syncs for %d epochs", s-syncs, e-epochs)
}
