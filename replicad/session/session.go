package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// Source is the primary's data plane; *dataplane.Client is one.
type Source interface {
	Status(ctx context.Context) (dataplane.Status, error)
	Freeze(ctx context.Context, r dataplane.FreezeRequest) (dataplane.Epoch, error)
	Attach(ctx context.Context, epoch uint64, blobs []delta.Blob) error
	Frames(ctx context.Context, epoch uint64, from uint32) (io.ReadCloser, error)
	Ack(ctx context.Context, pos delta.Pos) error
	Abandon(ctx context.Context, epoch uint64) error
	SeedFrames(ctx context.Context, r dataplane.SeedRequest) (io.ReadCloser, error)
	Ranges(ctx context.Context, r dataplane.RangesRequest) (dataplane.RangesReply, error)
	Compare(ctx context.Context, r dataplane.CompareRequest) (dataplane.CompareReply, error)
	EndCompare(ctx context.Context, r dataplane.CompareEnd) (dataplane.CompareResult, error)
	Mark(ctx context.Context, r dataplane.MarkRequest) error
}

var _ Source = (*dataplane.Client)(nil)

// Replica is what a session asks of the peer; every wire.Service is one.
type Replica interface {
	Handshake(ctx context.Context, r wire.HandshakeRequest) (wire.HandshakeReply, error)
	PutSeed(ctx context.Context, r wire.SeedRequest, body io.Reader) (wire.SeedReply, error)
	EpochProgress(ctx context.Context, k wire.EpochKey) (uint32, error)
	PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error)
	Beat(ctx context.Context, r wire.Beat) error
	Digests(ctx context.Context, r wire.DigestRequest) (wire.DigestReply, error)
}

var _ Replica = wire.Service(nil)

// DefaultScrubRate of the background digest pass, bytes per second.
const DefaultScrubRate = 64 << 20

// Config is what a Session needs. VM, Source and Replica are required; the
// zero value of everything else is useful.
type Config struct {
	VM      wire.VMID
	Name    string
	Source  Source
	Replica Replica
	// Interval between cuts; 0 = back to back.
	Interval time.Duration
	// AppEvery is the interval of application-consistent cuts, 0 = none: for
	// them Quiesce freezes the guest's file systems and returns what thaws them,
	// which is called as soon as the cut is made and says whether they were
	// frozen until then. A nil function says that there is nothing to freeze.
	AppEvery time.Duration
	Quiesce  func(ctx context.Context) (thaw func() (held bool, err error), err error)
	// Complete fills in what only the lineage record knows (Ancestors, Before,
	// Between, Diverged, Running, which disks are joining); nil leaves a first generation whose guest
	// runs. It is called before every handshake.
	Complete func(r *wire.HandshakeRequest)
	// Describe returns the digest of the VM's description, which is bound into
	// every position; nil = none.
	Describe func() delta.Digest
	// Firmware returns the firmware state when it differs from what the replica
	// committed last, else nil; it is called after each freeze.
	Firmware func(ctx context.Context) ([]delta.Blob, error)
	// FirmwareCommitted is told that the replica committed what Firmware
	// returned last.
	FirmwareCommitted func()
	// OnJoined is told that the replica has all of the disks which Complete calls
	// joining, again and again until it does not call them that any more. It must
	// return soon and not wait for the session.
	OnJoined func(disks []wire.DiskName)
	// Union marks what a VerifyUnion decision names; nil marks everything.
	Union func(ctx context.Context, d lineage.Decision) error
	// Limit wraps bulk bodies (bandwidth); nil = unlimited.
	Limit func(ctx context.Context, r io.Reader) io.Reader
	// ScrubRate bounds the background digest pass in bytes per second;
	// 0 = DefaultScrubRate.
	ScrubRate int64
	// Verified says that the seed was verified before; Scrub is where an
	// interrupted pass goes on. Both come from an earlier Status.
	// Pass bounds it, Mismatched is what it found so far.
	Verified   bool
	Scrub      Cursor
	Pass       Pass
	Mismatched int64
	// LastCut is the time of the last cut the replica holds, from an earlier
	// Status; it only feeds the display until the next one.
	LastCut time.Time
	// Holes permits SEEK_DATA when seeding into a base known to be all zero.
	Holes bool
	// Paused starts in the pause.
	Paused bool
	// Slots are shared with the other sessions to the same peer; nil = unlimited.
	Slots *Slots
	// OnChange is told of every new Status, in order, never concurrently. It
	// must return soon and not wait for the session.
	OnChange func(Status)
	Log      *slog.Logger
	// Rand decides jitter only; nil = a random seed.
	Rand *rand.Rand
}

// Session ships one VM. Make it with New, then Run it once.
type Session struct {
	cfg  Config
	log  *slog.Logger
	kick chan struct{} // capacity 1: cmds is not empty

	mu      sync.Mutex
	cmds    []Event        // guarded by mu
	status  Status         // guarded by mu
	waiters []chan outcome // guarded by mu; SyncFinal callers
	prog    Progress       // guarded by mu; valid while an operation transfers
	began   time.Time      // guarded by mu; of prog
	begun   int64          // guarded by mu; prog.Done at began

	// Owned by Run's goroutine.
	m       *Machine
	results chan Event // capacity 1: one operation
	cancel  context.CancelFunc

	// slot gives back what Slots lent; owned by the operation, between
	// operations by Run's goroutine. queued: the operation waits for one.
	slot   func()
	queued atomic.Bool
}

type outcome struct {
	pos delta.Pos
	err error
}

// New returns a session; nothing runs yet.
func New(cfg Config) *Session {
	if cfg.ScrubRate <= 0 {
		cfg.ScrubRate = DefaultScrubRate
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	return &Session{
		cfg: cfg, log: cfg.Log, kick: make(chan struct{}, 1),
		results: make(chan Event, 1), status: Status{Phase: Idle, Paused: cfg.Paused},
	}
}

// Run ships until ctx ends; every failure is retried inside. A frozen epoch
// stays with the data plane, and the next session continues it.
func (s *Session) Run(ctx context.Context) error {
	s.m = NewMachine(MachineConfig{
		Interval: s.cfg.Interval, AppEvery: s.cfg.AppEvery, ScrubRate: s.cfg.ScrubRate, Verified: s.cfg.Verified,
		Scrub: s.cfg.Scrub, Pass: s.cfg.Pass, Mismatched: s.cfg.Mismatched, Holes: s.cfg.Holes, LastCut: s.cfg.LastCut, Rand: s.cfg.Rand.Float64,
	}, time.Now())
	timer := time.NewTimer(0)
	defer timer.Stop()
	defer s.finish(ctx)
	if s.cfg.Paused {
		s.step(ctx, EvPause{})
	}
	s.step(ctx, EvStart{})
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		s.arm(timer)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case ev := <-s.results:
			s.cancel()
			s.step(ctx, ev)
		case <-s.kick:
			for _, ev := range s.take() {
				s.step(ctx, ev)
			}
		case <-timer.C:
			s.step(ctx, EvWake{})
		case <-tick.C:
			if s.m.Busy() {
				s.publish()
			}
		}
	}
}

// arm sets the timer to the machine's next wake.
func (s *Session) arm(t *time.Timer) {
	at, ok := s.m.Wake()
	if !ok {
		t.Stop()
		return
	}
	t.Reset(max(0, time.Until(at)))
}

// finish ends the outstanding operation and tells those who wait.
func (s *Session) finish(ctx context.Context) {
	if s.m.Busy() {
		s.cancel()
		<-s.results
	}
	if s.slot != nil {
		s.slot()
	}
	s.settle(outcome{err: fmt.Errorf("the session of %s has ended: %w", s.cfg.Name, ctx.Err())})
	s.mu.Lock()
	s.status.Phase, s.status.Progress = Idle, nil
	st := s.status
	s.mu.Unlock()
	if s.cfg.OnChange != nil {
		s.cfg.OnChange(st)
	}
}

// step runs the machine and starts what it asks for.
func (s *Session) step(ctx context.Context, ev Event) {
	if f, ok := ev.(EvFailed); ok && f.Class != ClassCancelled {
		s.log.Debug("operation failed", "class", f.Class, "err", f.Text)
	}
	before := s.m.Status()
	for _, a := range s.m.Step(time.Now(), ev) {
		switch a := a.(type) {
		case DoCancel:
			s.cancel()
		case FinalDone:
			s.settle(outcome{pos: a.Pos})
		case FinalFailed:
			s.settle(outcome{err: stopError(a.Stop)})
		case Committed:
			if s.cfg.FirmwareCommitted != nil {
				s.cfg.FirmwareCommitted()
			}
		case Joined:
			if s.cfg.OnJoined != nil {
				s.cfg.OnJoined(a.Disks)
			}
		default:
			s.begin(ctx, a)
		}
	}
	s.yield()
	switch ev.(type) {
	case EvFinal, EvTrigger:
		if s.queued.Load() {
			s.cancel() // it is urgent now and takes another place in the queue
		}
	}
	s.logChange(before, s.m.Status())
	s.publish()
}

// stopError is a stop as an error for the caller of SyncFinal.
func stopError(d lineage.Decision) error {
	kind := wire.KindRefused
	if d.Diverged {
		kind = wire.KindDiverged
	}
	return &wire.Error{Kind: kind, Text: d.Reason, Hint: d.Hint}
}

// logChange writes one line per change that a person may look for, not per cycle.
func (s *Session) logChange(a, b Status) {
	if a.Failures == 0 && b.Failures > 0 {
		s.log.Warn("replication interrupted", "err", b.LastError, "phase", a.Phase)
	}
	if a.Failures > 0 && b.Failures == 0 && b.Phase != Stopped {
		s.log.Info("replication goes on", "failures", a.Failures)
	}
	if a.Stop == nil && b.Stop != nil {
		s.log.Error("replication stops", "row", b.Stop.Row, "reason", b.Stop.Reason)
	}
	if a.Verifying == "" && b.Verifying != "" {
		s.log.Info("comparing by digest", "reason", b.Verifying, "suspect", b.Suspect)
	}
	if !a.Protected && b.Protected {
		s.log.Info("the replica is consistent", "position", b.Committed)
	}
	if !a.Verified && b.Verified {
		s.log.Info("everything was compared with the replica", "mismatched", b.Mismatched)
	}
}

// begin runs one operation in a goroutine of its own; its end arrives on results.
func (s *Session) begin(ctx context.Context, a Action) {
	ctx, s.cancel = context.WithCancel(ctx)
	s.track("", "", 0, 0)
	deadline := s.m.Deadline(time.Now(), a)
	s.queued.Store(s.mustQueue(a))
	go func() {
		defer func() {
			if p := recover(); p != nil {
				s.log.Error("bug: an operation panicked", "operation", fmt.Sprintf("%T", a), "panic", p)
				s.results <- EvFailed{Class: ClassSource, Text: fmt.Sprintf("internal error: %v", p)}
			}
		}()
		var ev Event
		err := s.admit(ctx, a, deadline)
		if err == nil {
			ev, err = s.operate(ctx, a)
		}
		if err != nil {
			ev = s.failed(ctx, ev, err)
		}
		s.results <- ev
	}()
}

func (s *Session) publish() {
	st := s.m.Status()
	s.mu.Lock()
	if s.prog.Phase != "" {
		p := s.prog
		p.ETA = -1
		if took := time.Since(s.began); took > 0 {
			p.Rate = int64(float64(p.Done-s.begun) / took.Seconds())
		}
		if p.Rate > 0 && p.Total >= p.Done {
			p.ETA = time.Duration(float64(p.Total-p.Done) / float64(p.Rate) * float64(time.Second))
		}
		st.Progress = &p
	}
	s.status = st
	s.mu.Unlock()
	if s.cfg.OnChange != nil {
		s.cfg.OnChange(st)
	}
}

// track starts a new progress display; an empty phase ends it.
func (s *Session) track(phase string, disk wire.DiskName, done, total int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if phase == "" || s.prog.Phase != phase {
		s.began, s.begun = time.Now(), done
	}
	s.prog = Progress{Phase: phase, Disk: disk, Done: done, Total: total}
}

// Status is the latest snapshot.
func (s *Session) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

func (s *Session) send(ev Event) {
	s.mu.Lock()
	s.cmds = append(s.cmds, ev)
	s.mu.Unlock()
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (s *Session) take() []Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	evs := s.cmds
	s.cmds = nil
	return evs
}

// Pause stops shipping; what is under way is interrupted, tracking goes on.
func (s *Session) Pause() { s.send(EvPause{}) }

// Resume takes Pause back; it also goes on after SyncFinal.
func (s *Session) Resume() { s.send(EvResume{}) }

// Retry ends a back-off or a stop with a new handshake.
func (s *Session) Retry() { s.send(EvRetry{}) }

// TriggerNow asks for a cut as soon as possible.
func (s *Session) TriggerNow() { s.send(EvTrigger{}) }

// SetAppEvery changes the interval of application-consistent cuts; the next one
// is made at once.
func (s *Session) SetAppEvery(d time.Duration) { s.send(EvAppEvery{d}) }

// SetInterval changes the interval, also of the cut that is waited for.
func (s *Session) SetInterval(d time.Duration) { s.send(EvInterval{d}) }

// SyncFinal ships until nothing is dirty and everything is acknowledged, and
// returns that position. The guest must be stopped. Failures are retried until
// ctx ends; a stop by the handshake table is returned at once. Afterwards the
// session is quiet until Resume. It ends a pause.
func (s *Session) SyncFinal(ctx context.Context) (delta.Pos, error) {
	done := make(chan outcome, 1)
	s.mu.Lock()
	s.waiters = append(s.waiters, done)
	s.mu.Unlock()
	s.send(EvFinal{})
	select {
	case o := <-done:
		return o.pos, o.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	for i, w := range s.waiters {
		if w == done {
			s.waiters = append(s.waiters[:i], s.waiters[i+1:]...)
			break
		}
	}
	none, last := len(s.waiters) == 0, s.status.LastError
	s.mu.Unlock()
	if none {
		s.send(EvFinalCancel{})
	}
	err := ctx.Err()
	if last != "" {
		err = errors.Join(err, errors.New(last))
	}
	return delta.Pos{}, fmt.Errorf("ship the last changes of %s: %w", s.cfg.Name, err)
}

func (s *Session) settle(o outcome) {
	s.mu.Lock()
	ws := s.waiters
	s.waiters = nil
	s.mu.Unlock()
	for _, w := range ws {
		w <- o
	}
}
