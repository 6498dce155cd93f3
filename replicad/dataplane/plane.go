package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/cbt"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/listen"
	"kvmreplica/nbd"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// cleanEvery is how often regions are cleared.
const cleanEvery = 30 * time.Second

// Plane is one data plane: images, tracker, exports and the held epoch.
//
// Lock order: exportMu, epochMu; neither is held while a guest's request runs.
type Plane struct {
	cfg      Config
	vm       delta.VM
	log      *slog.Logger
	instance string
	started  time.Time
	images   []*image

	asideMu sync.Mutex
	aside   []*image // guarded by asideMu; of disks that only the store has: OverlayConfig

	choices *choiceStore
	over    *flattening // nil unless Config.Overlay is set
	server  *nbd.Server
	parts   Parts

	group atomic.Pointer[cbt.Group]
	// halfMade is the generation whose tracker could not be made; no export has
	// been open since. Guarded by epochMu.
	halfMade delta.Generation

	lost   atomic.Pointer[string] // why an existing tracker cannot be read
	report atomic.Pointer[cbt.OpenReport]
	held   atomic.Pointer[frozen]

	// exportMu serialises what opens and closes exports and the tracker.
	exportMu sync.Mutex
	exported map[wire.DiskName]bool // guarded by exportMu

	// epochMu serialises freeze, ack and abandon.
	epochMu sync.Mutex

	// lateMu is held while lateFile is replaced.
	lateMu    sync.Mutex
	lateSaved *lateRecord // guarded by lateMu; nil = not known

	window windows

	// For an upgrade: the locked pid file (nil without a keeper), one attempt at
	// a time, whether a successor has everything, and what is told of it.
	pid       *pidFile
	upgradeMu sync.Mutex
	left      atomic.Bool
	moved     chan struct{} // closed when left
	calls     *calls
	state     fsx.FS
	crash     func(point string)

	stopOnce sync.Once
	stopped  chan struct{} // closed by stop
}

// newPlane prepares a data plane without touching an image or the tracker.
func newPlane(cfg Config, parts Parts, log *slog.Logger) (*Plane, error) {
	if err := cfg.Validate(); err != nil {
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: err.Error()}
	}
	vm, err := delta.ParseVM(string(cfg.VM))
	if err != nil {
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: err.Error()}
	}
	state, err := parts.state(cfg)
	if err != nil {
		return nil, err
	}
	p := &Plane{
		cfg: cfg, vm: vm, log: log, parts: parts, started: parts.now(), instance: fmt.Sprintf("%d-%x", os.Getpid(), nonce()),
		exported: map[wire.DiskName]bool{}, stopped: make(chan struct{}), moved: make(chan struct{}),
		server: nbd.NewServer(nbd.Options{Log: log.With("part", "nbd")}), calls: newCalls(), state: state,
	}
	p.crash = newCrash(cfg, log)
	p.choices, err = openChoices(state)
	return p, err
}

// Open locks the images, opens the tracker if there is one and prepares the
// exports that were open before. Nothing is served yet.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Plane, error) {
	return OpenOn(ctx, cfg, Parts{}, log)
}

// OpenOn is Open on storage and a clock of the caller's.
func OpenOn(ctx context.Context, cfg Config, parts Parts, log *slog.Logger) (_ *Plane, err error) {
	p, err := newPlane(cfg, parts, log)
	if err != nil {
		return nil, err
	}
	if err := p.state.MkdirAll(trackerDir); err != nil {
		return nil, fmt.Errorf("make the tracker's directory: %w", err)
	}
	if p.images, err = openImages(ctx, cfg, parts, p.choices.get().QemuLock); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.closeOverlay(), closeImages(p.images), closeImages(p.aside))
		}
	}()
	if err := p.openOverlay(); err != nil {
		return nil, err
	}
	if err := p.openTracker(); err != nil {
		return nil, err
	}
	p.recallLate()
	return p, p.restoreExports()
}

// Serve accepts guests and control calls until ctx ends or stop is called,
// drains and closes everything. The listeners are closed; descriptors they were
// made from stay open.
func (p *Plane) Serve(ctx context.Context, guests, control net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	fail := make(chan error, 3)
	wg.Go(func() {
		if err := p.server.Serve(ctx, guests); err != nil && !errors.Is(err, nbd.ErrServerClosed) && ctx.Err() == nil {
			fail <- fmt.Errorf("serve guests: %w", err)
		}
	})
	h := &http.Server{
		Handler: p.gated(p.routes()), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelWarn),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	wg.Go(func() {
		if err := h.Serve(listen.Patient(control, p.log)); !errors.Is(err, http.ErrServerClosed) {
			fail <- fmt.Errorf("serve control: %w", err)
		}
	})
	wg.Go(func() { p.cleaner(ctx) })
	if p.over != nil {
		wg.Go(func() { p.over.run(ctx) })
	}
	for _, i := range p.images {
		if i.upstream != nil {
			wg.Go(func() { p.distrust(ctx, i) })
			wg.Go(func() { p.remark(ctx, i) })
		}
	}
	p.log.Info("serving", "instance", p.instance, "tracker", p.group.Load() != nil)
	var err error
	select {
	case <-ctx.Done():
	case <-p.stopped:
	case <-p.moved:
	case err = <-fail:
	}
	p.upgradeMu.Lock() // an attempt under way ends first
	defer p.upgradeMu.Unlock()
	if p.left.Load() {
		err = errHandedOver
	} else {
		err = errors.Join(err, p.drain())
	}
	// The call that asked for the end gets its answer before the socket goes.
	bye, done := context.WithTimeout(context.Background(), lastReply)
	defer done()
	if herr := h.Shutdown(bye); herr != nil {
		_ = h.Close()
	}
	cancel()
	wg.Wait()
	return err
}

// lastReply is how long control calls under way may take at the end.
const lastReply = 2 * time.Second

func (p *Plane) stop() { p.stopOnce.Do(func() { close(p.stopped) }) }

// drain answers what the guest has asked, then closes tracker and images in
// the order that leaves a clean state.
func (p *Plane) drain() error {
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := p.server.Shutdown(ctx); err != nil {
		return err // requests still run: the tracker must not look clean
	}
	if f := p.held.Load(); f != nil {
		if err := p.abandon(f.info.Epoch); err != nil {
			p.log.Warn("the frozen epoch could not be given back", "err", err)
		}
	}
	var errs []error
	if g := p.group.Load(); g != nil {
		errs = append(errs, g.Close(ctx))
	}
	return errors.Join(append(errs, p.closeOverlay(), closeImages(p.images), closeImages(p.aside))...)
}

// cleaner runs the clean step.
func (p *Plane) cleaner(ctx context.Context) {
	t := time.NewTicker(cleanEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		leave, err := p.calls.enter(ctx)
		if err != nil || p.left.Load() {
			return
		}
		if p.group.Load() != nil {
			_, err = p.clean(ctx)
		}
		leave()
		if err != nil && ctx.Err() == nil {
			p.log.Warn("clean step failed, regions stay marked", "err", err)
		}
	}
}

// distrust marks everything whenever an upstream server was lost: it may have
// forgotten what the replica already has.
func (p *Plane) distrust(ctx context.Context, i *image) {
	for {
		var reason string
		select {
		case <-ctx.Done():
			return
		case reason = <-i.upstream.lost:
		}
		p.log.Warn("upstream lost", "disk", i.cfg.Name, "reason", reason)
		leave, err := p.calls.enter(ctx)
		if err != nil || p.left.Load() {
			return // no hand-over takes place while a loss is not marked
		}
		if g := p.group.Load(); g != nil {
			err = g.MarkAll(reason)
		}
		leave()
		if err != nil {
			p.log.Error("everything should be marked", "reason", reason, "err", err)
			continue // and no upgrade until it is
		}
		i.upstream.unmarked.Store(len(i.upstream.lost) > 0)
	}
}

// tracker returns the open tracker.
func (p *Plane) tracker() (*cbt.Group, error) {
	g := p.group.Load()
	if g == nil {
		return nil, &wire.Error{Kind: wire.KindUnavailable, Text: "there is no tracker yet", Hint: "replicactl vm enable " + p.cfg.Name}
	}
	return g, nil
}

// image finds a disk.
func (p *Plane) image(name wire.DiskName) (int, *image, error) {
	for i, img := range p.images {
		if img.cfg.Name == name {
			return i, img, nil
		}
	}
	return 0, nil, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("%s has no disk %q", p.cfg.Name, name)}
}

// bootID is the configured or the kernel's.
func (c Config) bootID() (string, error) {
	if c.BootID != "" {
		return c.BootID, nil
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// RunPlane is the verb "dataplane": it serves until ctx ends or it is told to
// shut down, and needs the two listening sockets as file descriptors 3 (NBD)
// and 4 (control), which it leaves open.
func RunPlane(ctx context.Context, configFile string) error {
	cfg, err := LoadConfig(configFile)
	if err != nil {
		return err
	}
	lock, err := lockPID(cfg.planePID())
	if err != nil {
		return fmt.Errorf("data plane of %s: %w", cfg.Name, err)
	}
	defer lock.release()
	guests, err := inherited(fdNBD, "NBD")
	if err != nil {
		return err
	}
	control, err := inherited(fdControl, "control")
	if err != nil {
		return err
	}
	p, err := Open(ctx, cfg, newLogger(cfg).With("part", "dataplane"))
	if err != nil {
		writeFailure(cfg, err)
		return fmt.Errorf("data plane of %s: %w", cfg.Name, err)
	}
	p.pid = lock
	return p.run(ctx, guests, control)
}

// run serves until the end and leaves a word when that was on purpose.
func (p *Plane) run(ctx context.Context, guests, control net.Listener) error {
	if err := os.Remove(p.cfg.failureFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := p.Serve(ctx, guests, control)
	if errors.Is(err, errHandedOver) {
		return nil // the keeper finds the successor by the pid file
	}
	if err != nil {
		return fmt.Errorf("data plane of %s: %w", p.cfg.Name, err)
	}
	return replaceFile(filepath.Clean(p.cfg.drainedFile()), []byte("drained\n"), 0o600)
}

// crashEnv names the point of an upgrade at which a process kills itself, or,
// with "/keeper" behind it, its keeper, or, with "@SOCKET", who listens there.
// For tests of exactly that.
const crashEnv = "REPLICAD_CRASH_AT"

func newCrash(cfg Config, log *slog.Logger) func(string) {
	want := os.Getenv(crashEnv)
	return func(point string) {
		socket, other := strings.CutPrefix(want, point+"@")
		victim, err := os.Getpid(), error(nil)
		switch {
		case want == point:
		case want == point+"/keeper":
			victim, err = runningPID(cfg.keeperPID())
		case other:
			victim, err = listenerPID(socket)
		default:
			return
		}
		if err != nil || victim == 0 {
			return
		}
		log.Error("crashing, as the environment asks", "point", point, "pid", victim)
		_ = unix.Kill(victim, unix.SIGKILL)
		if want == point {
			select {} // the signal is on its way
		}
	}
}

func invalid(format string, a ...any) error {
	return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf(format, a...)}
}
