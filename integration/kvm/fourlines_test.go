package kvm_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/integration/campaign"
	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/oracle"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/status"
)

// Sizes of the kill test: the load stays in the disk's first part, so that
// whoever copies the disk as a whole is seen.
const (
	killDisk  = 64 << 20
	killHot   = 8 << 20
	killLines = 4
	// killWorkers keep two requests in flight on each connection.
	killWorkers = 2 * killLines
)

// fourLines is one disk over several connections. The oracle's load uses it.
type fourLines struct {
	ctx      context.Context
	free     chan *dataplanetest.Line
	answered atomic.Int64
	lost     atomic.Int64 // requests whose connection broke
}

func (f *fourLines) use(do func(c *nbd.Client) error) error {
	l := <-f.free
	defer func() { f.free <- l }()
	err := l.Once(f.ctx, do)
	switch {
	case dataplanetest.Lost(err):
		f.lost.Add(1)
	case err == nil:
		f.answered.Add(1)
	}
	return err
}

func (f *fourLines) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.use(func(c *nbd.Client) error { n, err = c.ReadAt(p, off); return err })
	return n, err
}

func (f *fourLines) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.use(func(c *nbd.Client) error { n, err = c.WriteAt(p, off); return err })
	return n, err
}

func (f *fourLines) ZeroAt(off, n int64, punch bool) error {
	return f.use(func(c *nbd.Client) error { return c.ZeroAt(off, n, punch) })
}

func (f *fourLines) Sync() error {
	return f.use(func(c *nbd.Client) error { return c.Sync() })
}

// siege is a protected VM whose disk is written over four connections while
// processes are killed.
type siege struct {
	*world
	d       guest.Domain
	disk    *fourLines
	history *oracle.History
	cold    []byte // the part nobody writes
	rng     *rand.Rand
	rounds  *campaign.File[killRound]
	seed    uint64
	ops     int      // of the last round
	env     []string // of daemons that are started again
	spare   string   // another VM, protected or not
}

// killRound is one round in the campaign's file: the first victim, and then
// always the replica's replicad, so that what it holds can be judged.
type killRound struct {
	Seed       uint64 `json:"seed"`
	Victim     string `json:"victim"`
	Operations int    `json:"operations"`
}

// killsPerRound: see killRound.
const killsPerRound = 2

// killTotals counts a campaign.
func killTotals(rounds []killRound) (kills map[string]int, all, ops int) {
	kills = map[string]int{}
	for _, r := range rounds {
		kills[r.Victim]++
		kills["replica's replicad"]++
		ops += r.Operations
	}
	return kills, killsPerRound * len(rounds), ops
}

// The three processes are killed at random moments while a client writes and
// verifies over four connections. No request is answered with an error, what
// was read was right, after each kill the next state the replica holds is a
// legal cut, and nothing is copied whole. KVMREPLICA_KILLS=N makes it N rounds
// of two kills ("make kill"), counted over all runs that share the file
// KVMREPLICA_CAMPAIGN.
func TestKillsUnderFourConnectionsLeaveLegalCuts(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	seed := seeded(t)
	c, err := campaign.Open[killRound](os.Getenv("KVMREPLICA_CAMPAIGN"))
	w.must(err)
	s := &siege{world: w, rng: rand.New(rand.NewPCG(seed, 4)), rounds: c, seed: seed}
	s.prepare()
	began := time.Now()
	var order []int
	for i := range rounds(t, 6) {
		if len(order) == 0 {
			order = s.rng.Perm(3) // each of them in every three rounds
		}
		s.kill(i, order[0])
		order = order[1:]
	}
	s.final()
	kills, all, ops := killTotals(c.Entries)
	t.Logf("%v; %d of the requests lost their connection, none failed; the whole campaign: %d kills %v, %d operations over %d connections",
		time.Since(began).Round(time.Second), s.disk.lost.Load(), all, kills, ops, killLines)
}

func (s *siege) prepare() {
	s.t.Helper()
	w := s.world
	s.d = w.smallGuest("siege", 60, killDisk)
	image := make([]byte, killDisk)
	s.cold = image[killHot:]
	_, _ = rand.NewChaCha8([32]byte{1}).Read(s.cold)
	w.must(os.WriteFile(w.Lab.Host("A").Path(s.d.Disks[0].File), image, 0o644))
	w.must(w.Define(w.step(), "A", s.d))
	w.ctl("A", "vm", "enable", s.d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.replicating("A", s.d.Name)

	self, err := os.Executable()
	w.must(err)
	const socket = "/var/lib/libvirt/images/siege.sock"
	_, err = w.Lab.Host("A").StartDaemon(self, nil, []string{forwardVar + "=" + socket + ",/run/replicad/vm/" + s.d.UUID + "/nbd.sock"})
	w.must(err)
	outside := w.Lab.Host("A").Path(socket)
	w.eventually("the forwarder listens", func() bool { _, err := os.Stat(outside); return err == nil })
	s.disk = &fourLines{ctx: s.t.Context(), free: make(chan *dataplanetest.Line, killWorkers)}
	for range killLines {
		l := &dataplanetest.Line{Socket: outside, Export: "vda"}
		s.t.Cleanup(l.Close)
		for range killWorkers / killLines {
			s.disk.free <- l
		}
	}
	s.history = oracle.NewHistory(60, oracle.Images{image[:killHot]})
}

// write starts the load; stop ends it and fails the test if a request failed.
func (s *siege) write(seed uint64) (stop func()) {
	l := &oracle.Load{
		History: s.history, Disks: []oracle.Disk{s.disk}, Hot: 5, Torn: true,
		// A lost connection is what is being tested: the request may have been
		// executed, in part or not at all. An answer with an error ends it.
		Stop: func(err error) bool { return !dataplanetest.Lost(err) },
	}
	end := make(chan struct{})
	errs := make([]error, killWorkers)
	var wg sync.WaitGroup
	for i := range killWorkers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			for errs[i] == nil {
				select {
				case <-end:
					return
				case <-time.After(2 * time.Millisecond): // so that a verdict stays cheap
				}
				if err := l.Step(r, uint32(i)); err != nil && (errors.Is(err, oracle.ErrRead) || l.Stop(err)) {
					errs[i] = err
				}
			}
		})
	}
	stop = sync.OnceFunc(func() {
		close(end)
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			s.t.Errorf("the client met an error: %v", err)
		}
	})
	s.t.Cleanup(stop)
	return stop
}

// progress waits until n more requests were answered.
func (s *siege) progress(n int64) {
	s.t.Helper()
	want := s.disk.answered.Load() + n
	s.must(waitFor(s.step(), func() bool { return s.disk.answered.Load() >= want }))
}

func (s *siege) kill(i, which int) {
	s.t.Helper()
	victim := [...]string{"data plane", "primary's replicad", "replica's replicad"}[which]
	s.round(i, victim, func() {
		switch which {
		case 0:
			s.killPlane("A", s.d)
		case 1:
			s.killDaemon("A")
		default:
			s.killDaemon("B")
		}
	})
	s.must(s.rounds.Add(killRound{s.seed, victim, s.ops}))
}

// round lets harm be done under load, and judges what it left.
func (s *siege) round(i int, what string, harm func()) {
	s.t.Helper()
	stop := s.write(s.seed + uint64(i))
	defer stop()
	s.progress(20 + s.rng.Int64N(300))
	var begun time.Time
	w, err := s.history.During(what, uint64(i), func() error {
		harm()
		begun = time.Now()
		s.progress(20 + s.rng.Int64N(100))
		v, err := s.WaitStatus(s.step(), "A", s.d.Name, "replicating again", func(v status.VM) bool {
			return v.State == status.Replicating && v.LastCommit.After(begun)
		})
		s.must(err)
		if v.Disks[0].Suspect > 0 || v.Stats.LargestBytes > killHot+1<<20 {
			s.t.Fatalf("round %d (%s): %d bytes are suspect, the largest epoch has %d; only %d were written to: %+v",
				i, what, v.Disks[0].Suspect, v.Stats.LargestBytes, killHot, v)
		}
		s.must(s.Daemon("B").Kill())
		return nil
	})
	s.must(err)
	s.legal(i, what, w)
	s.must(s.StartDaemon(s.step(), "B", s.env...))
	stop()
	s.visible(i, what)
}

// legal judges what a replica that died holds.
func (s *siege) legal(i int, victim string, w oracle.Window) {
	s.t.Helper()
	const out = "/var/lib/libvirt/images/copy"
	dir := s.Lab.Host("B").Path(out)
	s.must(os.MkdirAll(dir, 0o755))
	text, err := s.fsck("B", "recover", s.d.Name, "--read-only-copy", out)
	if err != nil {
		s.t.Fatalf("round %d (%s): %v\n%s", i, victim, err, text)
	}
	got, err := os.ReadFile(filepath.Join(dir, "vda.raw"))
	s.must(err)
	s.must(os.RemoveAll(dir))
	if !bytes.Equal(got[killHot:], s.cold) {
		s.t.Fatalf("round %d (%s): the replica's part that nobody writes has changed", i, victim)
	}
	if err := oracle.CheckCut(s.history, oracle.Images{got[:killHot]}, w); err != nil {
		s.t.Fatalf("round %d (%s): the replica's state is no legal cut: %v", i, victim, err)
	}
}

// visible judges the primary while nothing is under way, and begins the next
// history from there.
func (s *siege) visible(i int, victim string) {
	s.t.Helper()
	got := make([]byte, killHot)
	_, err := s.disk.ReadAt(got, 0)
	s.must(err)
	if err := oracle.CheckVisible(s.history, oracle.Images{got}); err != nil {
		s.t.Fatalf("round %d (%s): the client reads what it did not write: %v", i, victim, err)
	}
	s.ops = len(s.history.Ops())
	s.history = s.history.Restart(oracle.Images{got})
}

// final waits until both sides are the same.
func (s *siege) final() {
	s.t.Helper()
	s.replicating("A", s.d.Name)
	s.ctl("A", "vm", "sync", s.d.Name)
	s.same(s.Lab.Host("A").Path(s.d.Disks[0].File), s.onReplica(s.d, "vda"))
}
