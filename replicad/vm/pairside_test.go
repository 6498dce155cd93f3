package vm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/libvirt/libvirttest"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

var (
	errDead    = errors.New("this host is dead")
	errLink    = errors.New("the link is cut")
	errCrashed = errors.New("the daemon crashed here")
)

// side is one host: its directories and hypervisor outlive its manager.
type side struct {
	stops atomic.Bool // the host goes down
	t     testing.TB
	w     *pair
	name  string
	host  wire.HostID
	dir   string
	root  string
	hyper *guestHost
	other *side

	mu      sync.Mutex
	mgr     *Manager          // guarded by mu; nil = down
	fs      *mortalFS         // guarded by mu
	stop    func()            // guarded by mu
	crashAt string            // guarded by mu
	passed  []string          // guarded by mu; failpoints of plans seen
	atPoint map[string]func() // guarded by mu; called once at a failpoint
	grant   Grant             // guarded by mu
	silent  atomic.Bool       // its link is cut
	full    bool              // it takes no second VM; set before start
	patient bool              // it waits long for a silent peer; set before start
	fence   string            // its fencing command; set before start
	now     func() time.Time  // its clock; nil = ours; set before start

	// forge changes what this side asks in a handshake (the reply is nil then),
	// and what it is answered; nil = nothing.
	forge atomic.Pointer[forgery]
}

// mortalFS fails for ever once its daemon died, and a given number of writes
// when told so.
type mortalFS struct {
	fsx.FS
	dead *atomic.Bool
	// refuse is asked before each replacement of a file; nil = all is well.
	refuse *atomic.Pointer[func(name string) error]
	// keepFiles lets every removal fail.
	keepFiles atomic.Bool
	// unreadable is the name of a file that cannot be opened; "" = none.
	unreadable atomic.Value
}

func (f *mortalFS) Open(name string, flag int) (fsx.File, error) {
	if f.dead.Load() {
		return nil, errDead
	}
	if n, _ := f.unreadable.Load().(string); n != "" && filepath.Base(name) == n {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EIO}
	}
	return f.FS.Open(name, flag)
}

func (f *mortalFS) Rename(old, name string) error {
	if f.dead.Load() {
		return errDead
	}
	if r := f.refuse.Load(); r != nil {
		if err := (*r)(name); err != nil {
			return err
		}
	}
	return f.FS.Rename(old, name)
}

func (f *mortalFS) Remove(name string) error {
	if f.dead.Load() {
		return errDead
	}
	if f.keepFiles.Load() {
		return errors.New("input/output error")
	}
	return f.FS.Remove(name)
}

// guestHost is a hypervisor whose guest really uses the export: it keeps a
// counter on its disk and knows the highest value that was answered.
type guestHost struct {
	*libvirttest.Fake
	s *side

	shutdown func(libvirt.ShutdownOptions) // told of each; set before

	mu   sync.Mutex
	disk *nbd.Client // guarded by mu; the running guest's
	// alive is asked by the other host's guest when it starts, without mu: both
	// may be starting.
	alive atomic.Bool
}

func (g *guestHost) Start(ctx context.Context, id string, o libvirt.StartOptions) error {
	if err := g.s.hook(); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.disk != nil {
		return &libvirt.Error{Op: "Start", Kind: libvirt.KindState, Msg: "running"}
	}
	c, err := nbd.Dial(ctx, "unix", g.s.socket(), nbd.ClientOptions{Export: "vda"})
	if err != nil {
		return fmt.Errorf("qemu: %w", err)
	}
	if err := g.Fake.Start(ctx, id, o); err != nil {
		return errors.Join(err, c.Close())
	}
	g.disk = c
	g.alive.Store(true)
	g.s.w.booted(g.s, c)
	return nil
}

func (g *guestHost) Shutdown(ctx context.Context, id string, o libvirt.ShutdownOptions) error {
	if g.shutdown != nil {
		g.shutdown(o)
	}
	if err := g.Fake.Shutdown(ctx, id, o); err != nil {
		return err
	}
	g.halt()
	return nil
}

func (g *guestHost) Destroy(ctx context.Context, id string, graceful bool) error {
	g.halt()
	return g.Fake.Destroy(ctx, id, graceful)
}

// ResizeDisk is what QEMU does: it connects again and sees the size.
func (g *guestHost) ResizeDisk(ctx context.Context, id, target string, src libvirt.NBDSource, size int64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	_ = g.disk.Close()
	c, err := nbd.Dial(ctx, "unix", g.s.socket(), nbd.ClientOptions{Export: target})
	if err != nil {
		return err
	}
	if g.disk = c; c.Size() != size {
		return fmt.Errorf("the export has %d bytes, not %d", c.Size(), size)
	}
	return g.Fake.ResizeDisk(ctx, id, target, src, size)
}

// halt is the end of the QEMU process.
func (g *guestHost) halt() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.disk != nil {
		_ = g.disk.Close()
		g.disk = nil
		g.alive.Store(false)
	}
}

func (g *guestHost) runs() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.disk != nil
}

// write stores the next value of the counter, durably.
func (g *guestHost) write() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.disk == nil {
		return errors.New("no guest runs")
	}
	n := g.s.w.counter.Load() + 1
	var b [512]byte
	binary.LittleEndian.PutUint64(b[:], n)
	if _, err := g.disk.ReadAt(make([]byte, 512), 0); err != nil { // as QEMU does
		c, err := nbd.Dial(context.Background(), "unix", g.s.socket(), nbd.ClientOptions{Export: "vda"})
		if err != nil {
			return err
		}
		_ = g.disk.Close()
		g.disk = c
	}
	for _, off := range []int64{0, int64(n%64) << 12} {
		if _, err := g.disk.WriteAt(b[:], off); err != nil {
			return err
		}
	}
	if err := g.disk.Sync(); err != nil {
		return err
	}
	g.s.w.counter.Store(n)
	return nil
}

func (s *side) socket() string { return filepath.Join(s.dir, "run", "vm", string(testVM), "nbd.sock") }

// hook is what libvirt's hook script decides.
func (s *side) hook() error {
	b, err := os.ReadFile(filepath.Join(s.dir, "state", "hook", string(testVM)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if strings.HasPrefix(string(b), "ask") {
		if _, err := os.Stat(filepath.Join(s.dir, "run", "hook", string(testVM))); err == nil {
			return nil
		}
	}
	return fmt.Errorf("hook: %s", b)
}

// start opens and runs a manager on what the side's directories hold.
func (s *side) start() {
	s.t.Helper()
	base, err := fsx.OS(filepath.Join(s.dir, "state"))
	if err != nil {
		s.t.Fatal(err)
	}
	mortal := &mortalFS{FS: base, dead: new(atomic.Bool), refuse: new(atomic.Pointer[func(string) error])}
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("VM_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("side", s.name)
	}
	deps := Deps{
		Host: s.host, HostName: s.name, StateDir: filepath.Join(s.dir, "state"), RunDir: filepath.Join(s.dir, "run"),
		Hyper: s.hyper, DomainType: "qemu", AnyClient: true, SilentAfter: 500 * time.Millisecond, Now: time.Now, Log: log,
		HostStops: func(context.Context) (bool, error) { return s.stops.Load(), nil },
		Dial:      func(h wire.HostID) (wire.Service, error) { return &link{from: s, to: s.other, me: mortal}, nil },
		Grant: func(wire.HostID) (Grant, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.grant, nil
		},
		Failpoint: func(p string) {
			s.mu.Lock()
			s.passed = append(s.passed, p)
			hit := p == s.crashAt
			if hit {
				s.crashAt = ""
			}
			meanwhile := s.atPoint[p]
			delete(s.atPoint, p)
			s.mu.Unlock()
			if meanwhile != nil {
				meanwhile()
			}
			if hit {
				mortal.dead.Store(true)
				runtime.Goexit()
			}
		},
	}
	if s.now != nil {
		deps.Now = s.now
	}
	if s.full {
		deps.MaxVMs = 1
	}
	if s.patient {
		deps.SilentAfter = time.Hour
	}
	deps.Fence = s.fence
	m, err := Open(mortal, deps)
	if err != nil {
		s.t.Fatalf("%s: %v", s.name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = m.Run(ctx) }() // a dead daemon's end is full of errors
	s.mu.Lock()
	s.mgr, s.fs = m, mortal
	s.stop = func() { cancel(); <-done }
	s.mu.Unlock()
}

// kill ends the daemon without a goodbye; the data plane goes on.
func (s *side) kill() {
	s.mu.Lock()
	stop, f := s.stop, s.fs
	s.mgr, s.stop = nil, nil
	s.mu.Unlock()
	if stop != nil {
		f.dead.Store(true)
		stop()
	}
}

// restart kills and starts the daemon.
func (s *side) restart() { s.kill(); s.start() }

// reboot is a loss of the whole host: guest, data plane, boot-scoped files.
func (s *side) reboot() {
	s.t.Helper()
	s.kill()
	s.hyper.halt()
	s.hyper.SetState(string(testVM), libvirt.StateOff, libvirt.ReasonNone)
	s.stopPlane()
	if err := os.RemoveAll(filepath.Join(s.dir, "run")); err != nil {
		s.t.Fatal(err)
	}
	s.start()
}

func (s *side) stopPlane() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	run := filepath.Join(s.dir, "run", "vm", string(testVM))
	if err := dataplane.Stop(ctx, dataplane.Config{VM: testVM, Name: "web", RunDir: run}); err != nil {
		s.t.Error(err)
	}
}

func (s *side) manager() *Manager {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mgr
}

// vm is the VM here; nil when it is not known.
func (s *side) vm() *VM {
	m := s.manager()
	if m == nil {
		return nil
	}
	v, _ := m.get(testVM)
	return v
}

// do runs an action of a person in a goroutine that may die with the daemon.
func (s *side) do(f func(ctx context.Context, m *Manager, v *VM) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	res := make(chan error, 1)
	go func() {
		err := errCrashed
		defer func() { res <- err }()
		err = f(ctx, s.manager(), s.vm())
	}()
	return <-res
}

// link is the way from one host to the other.
type link struct {
	from, to *side
	me       *mortalFS // the caller's life
}

var _ wire.Service = (*link)(nil)

// fault is what happens to one message.
type fault int

const (
	arrives fault = iota
	lostRequest
	lostReply
	twice
	hangs // until the caller gives up
)

func carry[R any](l *link, ctx context.Context, method string, f func(ctx context.Context, m *Manager) (R, error)) (R, error) {
	var zero R
	w := l.from.w
	what := w.fault(l.from.name + "/" + method)
	if what == hangs {
		if d, ok := ctx.Deadline(); ok {
			w.waited.Store(int64(time.Until(d)))
		}
		<-ctx.Done()
		return zero, ctx.Err()
	}
	if l.me.dead.Load() || l.from.silent.Load() || l.to.silent.Load() || what == lostRequest {
		return zero, errLink
	}
	w.arrived(method)
	m := l.to.manager()
	if m == nil {
		return zero, errLink
	}
	ctx = wire.WithPeer(ctx, wire.Peer{Host: l.from.host, Name: l.from.name})
	type answer struct {
		r   R
		err error
	}
	call := func() answer {
		res := make(chan answer, 1)
		go func() {
			a := answer{err: errLink}
			defer func() { res <- a }()
			r, err := f(ctx, m)
			a = answer{r, err}
		}()
		return <-res
	}
	a := call()
	if what == twice {
		a = call()
	}
	l.to.mu.Lock()
	dead := l.to.fs.dead.Load()
	l.to.mu.Unlock()
	if dead || l.me.dead.Load() || what == lostReply {
		return zero, errLink
	}
	return a.r, a.err
}

// counted adds what is read to n.
type counted struct {
	io.Reader
	n *atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n.Add(int64(n))
	return n, err
}

func none(err error) (struct{}, error) { return struct{}{}, err }

func (l *link) Hello(ctx context.Context, q wire.HelloRequest) (wire.HelloReply, error) {
	return carry(l, ctx, "Hello", func(context.Context, *Manager) (wire.HelloReply, error) {
		return wire.HelloReply{Protocol: 1, Host: l.to.host, Now: time.Now(), Receiving: true}, nil
	})
}

func (l *link) Check(ctx context.Context, q wire.CheckRequest) (wire.CheckReply, error) {
	return carry(l, ctx, "Check", func(ctx context.Context, m *Manager) (wire.CheckReply, error) { return m.Check(ctx, q) })
}

func (l *link) Offer(ctx context.Context, q wire.Offer) (wire.OfferReply, error) {
	return carry(l, ctx, "Offer", func(ctx context.Context, m *Manager) (wire.OfferReply, error) { return m.Offer(ctx, q) })
}

func (l *link) Withdraw(ctx context.Context, q wire.Withdraw) error {
	_, err := carry(l, ctx, "Withdraw", func(ctx context.Context, m *Manager) (struct{}, error) { return none(m.Withdraw(ctx, q)) })
	return err
}

func (l *link) Handshake(ctx context.Context, q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	forge := l.from.forge.Load()
	if forge != nil {
		(*forge)(&q, nil)
	}
	r, err := carry(l, ctx, "Handshake", func(ctx context.Context, m *Manager) (wire.HandshakeReply, error) { return m.Handshake(ctx, q) })
	if err == nil && forge != nil {
		(*forge)(&q, &r)
	}
	if err == nil {
		l.from.w.metRow(lineage.Decide(q, r).Row)
	}
	return r, err
}

func (l *link) PutSeed(ctx context.Context, q wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	return carry(l, ctx, "PutSeed", func(ctx context.Context, m *Manager) (wire.SeedReply, error) { return m.PutSeed(ctx, q, body) })
}

func (l *link) EpochProgress(ctx context.Context, k wire.EpochKey) (uint32, error) {
	return carry(l, ctx, "EpochProgress", func(ctx context.Context, m *Manager) (uint32, error) { return m.EpochProgress(ctx, k) })
}

func (l *link) PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (p position, err error) {
	return carry(l, ctx, "PutEpoch", func(ctx context.Context, m *Manager) (position, error) {
		p, err := m.PutEpoch(ctx, k, from, &counted{body, &l.from.w.carried})
		l.from.w.mu.Lock()
		told := l.from.w.committed
		l.from.w.mu.Unlock()
		if told != nil && err == nil {
			told()
		}
		return p, err
	})
}

func (l *link) Beat(ctx context.Context, b wire.Beat) error {
	_, err := carry(l, ctx, "Beat", func(ctx context.Context, m *Manager) (struct{}, error) { return none(m.Beat(ctx, b)) })
	return err
}

func (l *link) Digests(ctx context.Context, q wire.DigestRequest) (wire.DigestReply, error) {
	return carry(l, ctx, "Digests", func(ctx context.Context, m *Manager) (wire.DigestReply, error) { return m.Digests(ctx, q) })
}

func (l *link) Status(ctx context.Context, id wire.VMID) (wire.PeerVM, error) {
	return carry(l, ctx, "Status", func(ctx context.Context, m *Manager) (wire.PeerVM, error) { return m.Status(ctx, id) })
}

func (l *link) Points(ctx context.Context, id wire.VMID) (wire.PointsReply, error) {
	return carry(l, ctx, "Points", func(ctx context.Context, m *Manager) (wire.PointsReply, error) { return m.Points(ctx, id) })
}

func (l *link) Failover(ctx context.Context, q wire.FailoverRequest) (wire.FailoverReply, error) {
	return carry(l, ctx, "Failover-"+q.Step, func(ctx context.Context, m *Manager) (wire.FailoverReply, error) { return m.Failover(ctx, q) })
}
