// Package replicad is the daemon: it builds the graph of everything a host
// needs - identity and peers, libvirt, the VMs, the local control interface -
// and runs it.
//
// It guarantees that a stop leaves running guests their disks (the data planes
// are processes of their own), that nothing listens before its state is
// loaded, and that Run returns only when everything it started has ended.
//
// Callers open it once per state directory and call Run.
package replicad

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kvmreplica/internal/fsx"
	"kvmreplica/internal/listen"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/peer"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/stats"
	"kvmreplica/replicad/testcopy"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// Daemon is one host's replicad.
type Daemon struct {
	cfg   config.Config // at the start; see conf
	log   *slog.Logger
	lock  *os.File
	id    *peer.Identity
	peers *peer.Store
	pair  *peer.Pairing
	hyper *lazyHost
	qemu  *qemuUser
	vms   *vm.Manager
	tests *testcopy.Manager
	name  string

	file      string         // see ReloadFrom
	level     *slog.LevelVar // see ReloadFrom
	reloading sync.Mutex

	unprotected unprotected
	live        atomic.Pointer[config.Config] // see conf; nil before the first reload

	mu      sync.Mutex
	clients map[wire.HostID]*peer.Client    // guarded by mu
	bands   map[wire.HostID]*peer.Bandwidth // guarded by mu
	seen    map[wire.HostID]time.Time       // guarded by mu; last answer of a peer
	heard   map[wire.VMID]heardTests        // guarded by mu; see testsThere
	silent  map[wire.HostID]time.Time       // guarded by mu; see testsThere
}

const (
	startLibvirt  = 30 * time.Second
	renewEvery    = 24 * time.Hour
	paceEvery     = time.Minute
	stopWithin    = 30 * time.Second
	controlSocket = "control.sock"
)

// Open loads the state and claims it; a second daemon on the same directory is
// refused. Nothing listens yet. libvirt need not answer.
func Open(cfg config.Config, log *slog.Logger) (*Daemon, error) {
	for _, dir := range []string{cfg.StateDir, cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("make the daemon's directory: %w", err)
		}
	}
	lock, err := claim(filepath.Join(cfg.StateDir, "lock"))
	if err != nil {
		return nil, err
	}
	d := &Daemon{
		cfg: cfg, log: log, lock: lock, name: cfg.HostName, clients: map[wire.HostID]*peer.Client{}, bands: map[wire.HostID]*peer.Bandwidth{}, seen: map[wire.HostID]time.Time{},
		heard: map[wire.VMID]heardTests{}, silent: map[wire.HostID]time.Time{},
	}
	if d.name == "" {
		if d.name, err = os.Hostname(); err != nil {
			return nil, errors.Join(err, lock.Close())
		}
	}
	if err := d.load(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return d, nil
}

// claim takes the state directory's lock.
func claim(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("claim the state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another replicad uses %s (systemctl status replicad): %w", filepath.Dir(path), err), f.Close())
	}
	return f, nil
}

func (d *Daemon) load() error {
	state, err := fsx.OS(d.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("open the state directory: %w", err)
	}
	now := time.Now()
	if d.id, err = d.identity(state, now); err != nil {
		return err
	}
	if err := state.MkdirAll("peers"); err != nil {
		return err
	}
	if d.peers, err = peer.OpenStore(fsx.Sub(state, "peers")); err != nil {
		return err
	}
	d.pair = peer.NewPairing(d.id, d.peers, d.log, nil)
	if d.qemu, err = openQEMUUser(state, d.cfg.QEMUUser, d.log); err != nil {
		return err
	}
	if err := d.unprotected.open(state); err != nil {
		d.log.Warn("since when domains are not protected counts anew", "err", err)
	}
	d.hyper = &lazyHost{
		opt:   libvirt.Options{Socket: d.cfg.LibvirtSocket},
		learn: func(i libvirt.HostInfo) { d.qemu.learn(i.QEMUOwner(d.cfg.DomainType)) },
		known: func() bool { uid, _ := d.qemu.owner(); return uid != nil },
	}
	deps, err := d.deps()
	if err != nil {
		return err
	}
	if d.vms, err = vm.Open(state, deps); err != nil {
		return err
	}
	tests, err := d.testDeps(deps)
	if err != nil {
		return err
	}
	d.tests, err = testcopy.Open(state, tests)
	return err
}

func (d *Daemon) identity(state fsx.FS, now time.Time) (*peer.Identity, error) {
	if t := d.cfg.TLS; t.Cert != "" {
		var pems [3][]byte
		for i, p := range []string{t.Cert, t.Key, t.CA} {
			b, err := os.ReadFile(p)
			if err != nil {
				return nil, fmt.Errorf("read the configured certificate: %w", err)
			}
			pems[i] = b
		}
		return peer.LoadIdentity(pems[0], pems[1], pems[2], d.name, now)
	}
	if err := state.MkdirAll("identity"); err != nil {
		return nil, err
	}
	return peer.OpenIdentity(fsx.Sub(state, "identity"), d.name, now)
}

func (d *Daemon) deps() (vm.Deps, error) {
	deps := vm.Deps{
		Host: d.id.Host(), HostName: d.name, StateDir: d.cfg.StateDir, RunDir: d.cfg.RunDir,
		Hyper: d.hyper, QEMUOwner: d.qemu.owner, Dial: d.dial, Grant: d.grant, Fence: d.cfg.Fence, HostStops: hostStops, SilentAfter: d.cfg.SilentPeerAfter,
		Limiter:      func() vm.Limiter { return &peer.Bandwidth{} },
		CaptureBytes: d.cfg.Limits.CaptureMemory, DirtyBytes: d.cfg.Limits.DirtyPageCache, AnyClient: d.cfg.AnyClient, MaxVMs: d.cfg.Limits.MaxVMs, Store: points.Limits{BacklogBytes: d.cfg.Limits.Backlog, Reserve: d.cfg.Limits.FreeSpaceReserve}, MaxPoints: d.cfg.Limits.MaxPoints, ShippingSlots: d.cfg.ShippingSlots, Statistics: stats.Schedule{Start: d.cfg.StatisticsStart, Length: d.cfg.StatisticsWindow},
		LibvirtState: d.cfg.LibvirtState, Kernels: map[string]libvirt.PolicyKernel{}, DomainType: d.cfg.DomainType,
		Emulator: d.cfg.Emulator, Networks: d.network, ConsoleDir: d.cfg.ConsoleDir, Now: time.Now, Log: d.log, Failpoint: crashAt(os.Getenv(crashEnv), d.log),
	}
	for label, k := range d.cfg.Kernels {
		deps.Kernels[label] = libvirt.PolicyKernel{Kernel: k.Kernel, Initrd: k.Initrd}
	}
	return deps, nil
}

// crashEnv names the point of a plan, KIND/STEP/begun or KIND/STEP/acted, at
// which the daemon kills itself. For tests of exactly that.
const crashEnv = "REPLICAD_CRASH_AT"

func crashAt(want string, log *slog.Logger) func(string) {
	if want == "" {
		return nil
	}
	return func(point string) {
		if point == want {
			log.Error("crashing, as the environment asks", "point", point)
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {} // the signal is on its way
		}
	}
}

// Run serves until ctx ends.
func (d *Daemon) Run(ctx context.Context) error {
	defer d.lock.Close()
	control, err := d.listenControl()
	if err != nil {
		return err
	}
	local := api.NewServer(d, d.roleOf, d.log)
	g, ctx := errgroup.WithContext(ctx)
	if err := d.startPeers(ctx, g); err != nil {
		return errors.Join(err, control.Close())
	}
	g.Go(func() error { return local.Serve(listen.Patient(control, d.log)) })
	g.Go(func() error {
		<-ctx.Done()
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer cancel()
		return local.Shutdown(sctx)
	})
	// Test copies read from the VMs' stores: these are closed after them.
	vms, endVMs := context.WithCancel(context.WithoutCancel(ctx))
	defer endVMs()
	g.Go(func() error { return d.vms.Run(vms) })
	g.Go(func() error { defer endVMs(); return d.tests.Run(ctx) })
	g.Go(func() error { d.keepTime(ctx); return nil })
	g.Go(func() error { d.watchPolicies(ctx); return nil })
	d.log.Info("replicad runs", "host", string(d.id.Host()), "name", d.name, "listen", d.cfg.Listen, "receiving", d.cfg.Receiving)
	notifyReady()
	err = g.Wait()
	d.closeClients()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (d *Daemon) startPeers(ctx context.Context, g *errgroup.Group) error {
	if d.cfg.Listen == "" {
		return nil
	}
	srv, err := peer.NewServer(peer.ServerConfig{
		Identity: d.id, Store: d.peers, Service: &service{Manager: d.vms, d: d}, Ownership: owners{d.vms},
		Pairing: d.pair, Receiving: func() bool { return d.conf().Receiving },
		Limits: peer.Limits{
			Conns: d.cfg.Limits.Connections, PerPeer: d.cfg.Limits.ConnectionsPer,
			PreAuth: d.cfg.Limits.Unauthenticated, Handshake: d.cfg.Limits.HandshakeTimeout,
		},
		Log: d.log,
	})
	if err != nil {
		return err
	}
	l, err := d.listenPeers(ctx)
	if err != nil {
		return fmt.Errorf("listen for peers: %w (is another replicad running, or the address wrong? see listen in the configuration)", err)
	}
	g.Go(func() error { return srv.Serve(ctx, listen.Patient(l, d.log)) })
	return nil
}

// listenPeers listens on an address that the host may not have yet: guests must
// not wait at boot for a network that does not come up.
func (d *Daemon) listenPeers(ctx context.Context) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			// Without it the listen below says what is wrong.
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
		})
	}}
	l, err := lc.Listen(ctx, "tcp", d.cfg.Listen)
	if err != nil {
		return nil, err
	}
	ip := l.Addr().(*net.TCPAddr).IP //nolint:forcetypeassert // it is a TCP listener
	if probe, err := net.ListenUDP("udp", &net.UDPAddr{IP: ip}); err == nil {
		_ = probe.Close()
	} else {
		d.log.Warn("peers cannot reach this host until it has the address it listens on", "listen", d.cfg.Listen, "err", err)
	}
	return l, nil
}

func (d *Daemon) listenControl() (net.Listener, error) {
	path := filepath.Join(d.cfg.RunDir, controlSocket)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("open the control socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("open the control socket: %w", err)
	}
	if err := d.openSocket(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// keepTime renews certificates and follows the bandwidth schedule.
func (d *Daemon) keepTime(ctx context.Context) {
	pace := time.NewTicker(paceEvery)
	defer pace.Stop()
	renew := time.NewTicker(renewEvery)
	defer renew.Stop()
	for {
		d.setBandwidth(time.Now())
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		case <-renew.C:
			if _, err := d.id.Renew(time.Now()); err != nil {
				d.log.Error("renew the host certificate", "err", err)
			}
		}
	}
}

func (d *Daemon) setBandwidth(now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.bands {
		b.Set(d.conf().RateAt(now))
	}
}
