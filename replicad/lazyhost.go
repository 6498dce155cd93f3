package replicad

import (
	"context"
	"errors"
	"sync"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/vm"
)

// lazyHost is libvirt as the VMs see it: connected at the first call that
// succeeds, so that the daemon starts although libvirtd is down.
type lazyHost struct {
	opt   libvirt.Options
	learn func(libvirt.HostInfo) // called with what the host says of itself
	known func() bool            // it was learnt before: a host that does not say it now is of use

	mu sync.Mutex
	h  *libvirt.Host // guarded by mu
}

var _ vm.Hypervisor = (*lazyHost)(nil)

func (l *lazyHost) host(ctx context.Context) (*libvirt.Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.h != nil {
		return l.h, nil
	}
	h, err := libvirt.Dial(ctx, l.opt)
	if err != nil {
		return nil, err
	}
	if _, err := l.learnt(h.Info(ctx)); err != nil && !l.known() {
		return nil, errors.Join(err, h.Close())
	}
	l.h = h
	return h, nil
}

func (l *lazyHost) learnt(i libvirt.HostInfo, err error) (libvirt.HostInfo, error) {
	if err == nil {
		l.learn(i)
	}
	return i, err
}

func with1[T any](ctx context.Context, l *lazyHost, f func(*libvirt.Host) (T, error)) (T, error) {
	h, err := l.host(ctx)
	if err != nil {
		var zero T
		return zero, err
	}
	return f(h)
}

func with0(ctx context.Context, l *lazyHost, f func(*libvirt.Host) error) error {
	h, err := l.host(ctx)
	if err != nil {
		return err
	}
	return f(h)
}

func (l *lazyHost) List(ctx context.Context) ([]libvirt.Summary, error) {
	return with1(ctx, l, func(h *libvirt.Host) ([]libvirt.Summary, error) { return h.List(ctx) })
}

func (l *lazyHost) LookupName(ctx context.Context, name string) (string, error) {
	return with1(ctx, l, func(h *libvirt.Host) (string, error) { return h.LookupName(ctx, name) })
}

func (l *lazyHost) Domain(ctx context.Context, uuid string) (libvirt.Domain, error) {
	return with1(ctx, l, func(h *libvirt.Host) (libvirt.Domain, error) { return h.Domain(ctx, uuid) })
}

func (l *lazyHost) DomainState(ctx context.Context, uuid string) (s libvirt.State, r libvirt.Reason, err error) {
	err = with0(ctx, l, func(h *libvirt.Host) error { s, r, err = h.DomainState(ctx, uuid); return err })
	return s, r, err
}

func (l *lazyHost) XML(ctx context.Context, uuid string, k libvirt.XMLKind) ([]byte, error) {
	return with1(ctx, l, func(h *libvirt.Host) ([]byte, error) { return h.XML(ctx, uuid, k) })
}

func (l *lazyHost) Define(ctx context.Context, doc []byte) (string, error) {
	return with1(ctx, l, func(h *libvirt.Host) (string, error) { return h.Define(ctx, doc) })
}

func (l *lazyHost) Undefine(ctx context.Context, uuid string, o libvirt.UndefineOptions) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.Undefine(ctx, uuid, o) })
}

func (l *lazyHost) Start(ctx context.Context, uuid string, o libvirt.StartOptions) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.Start(ctx, uuid, o) })
}

func (l *lazyHost) Shutdown(ctx context.Context, uuid string, o libvirt.ShutdownOptions) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.Shutdown(ctx, uuid, o) })
}

func (l *lazyHost) Destroy(ctx context.Context, uuid string, graceful bool) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.Destroy(ctx, uuid, graceful) })
}

func (l *lazyHost) SetAutostart(ctx context.Context, uuid string, on bool) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.SetAutostart(ctx, uuid, on) })
}

func (l *lazyHost) ResumeIOError(ctx context.Context, uuid string) (int, error) {
	return with1(ctx, l, func(h *libvirt.Host) (int, error) { return h.ResumeIOError(ctx, uuid) })
}

func (l *lazyHost) Quiesce(ctx context.Context, uuid string, holdFor time.Duration) (n int, thaw func() (bool, error), err error) {
	err = with0(ctx, l, func(h *libvirt.Host) error { n, thaw, err = h.Quiesce(ctx, uuid, holdFor); return err })
	return n, thaw, err
}

func (l *lazyHost) Thaw(ctx context.Context, uuid string) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.Thaw(ctx, uuid) })
}

func (l *lazyHost) HasSaved(ctx context.Context, uuid string) (bool, error) {
	return with1(ctx, l, func(h *libvirt.Host) (bool, error) { return h.HasSaved(ctx, uuid) })
}

func (l *lazyHost) Firmware(ctx context.Context, uuid, stateDir string) (libvirt.FirmwareState, error) {
	return with1(ctx, l, func(h *libvirt.Host) (libvirt.FirmwareState, error) { return h.Firmware(ctx, uuid, stateDir) })
}

func (l *lazyHost) Info(ctx context.Context) (libvirt.HostInfo, error) {
	return with1(ctx, l, func(h *libvirt.Host) (libvirt.HostInfo, error) { return l.learnt(h.Info(ctx)) })
}

func (l *lazyHost) Graph(ctx context.Context, uuid string, e map[string]libvirt.NBDSource) (map[string]libvirt.DiskGraph, error) {
	return with1(ctx, l, func(h *libvirt.Host) (map[string]libvirt.DiskGraph, error) { return h.Graph(ctx, uuid, e) })
}

func (l *lazyHost) InsertDisks(ctx context.Context, uuid string, reqs []libvirt.InsertRequest) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.InsertDisks(ctx, uuid, reqs) })
}

func (l *lazyHost) ResizeDisk(ctx context.Context, uuid, target string, src libvirt.NBDSource, size int64) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.ResizeDisk(ctx, uuid, target, src, size) })
}

func (l *lazyHost) RemoveDisks(ctx context.Context, uuid string, reqs []libvirt.InsertRequest) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.RemoveDisks(ctx, uuid, reqs) })
}

func (l *lazyHost) Resume(ctx context.Context, uuid string) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.Resume(ctx, uuid) })
}

func (l *lazyHost) AgentPing(ctx context.Context, uuid string) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.AgentPing(ctx, uuid) })
}

func (l *lazyHost) GuestInfo(ctx context.Context, uuid string) (map[string]string, error) {
	return with1(ctx, l, func(h *libvirt.Host) (map[string]string, error) { return h.GuestInfo(ctx, uuid) })
}

func (l *lazyHost) CreateIsolated(ctx context.Context, name, bridge string) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.CreateIsolated(ctx, name, bridge) })
}

func (l *lazyHost) DestroyNetwork(ctx context.Context, name string) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.DestroyNetwork(ctx, name) })
}

func (l *lazyHost) Networks(ctx context.Context) ([]string, error) {
	return with1(ctx, l, func(h *libvirt.Host) ([]string, error) { return h.Networks(ctx) })
}

func (l *lazyHost) Network(ctx context.Context, name string) (libvirt.Network, error) {
	return with1(ctx, l, func(h *libvirt.Host) (libvirt.Network, error) { return h.Network(ctx, name) })
}

func (l *lazyHost) Reserve(ctx context.Context, network string, r libvirt.Reservation) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.Reserve(ctx, network, r) })
}

func (l *lazyHost) Unreserve(ctx context.Context, network string, r libvirt.Reservation) error {
	return with0(ctx, l, func(h *libvirt.Host) error { return h.Unreserve(ctx, network, r) })
}
