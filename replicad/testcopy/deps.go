package testcopy

import (
	"context"
	"log/slog"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/isolate"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// Hypervisor is what a copy needs of libvirt; *libvirt.Host is one.
type Hypervisor interface {
	LookupName(ctx context.Context, name string) (uuid string, err error)
	Domain(ctx context.Context, uuid string) (libvirt.Domain, error)
	DomainState(ctx context.Context, uuid string) (libvirt.State, libvirt.Reason, error)
	Define(ctx context.Context, doc []byte) (uuid string, err error)
	Undefine(ctx context.Context, uuid string, o libvirt.UndefineOptions) error
	Start(ctx context.Context, uuid string, o libvirt.StartOptions) error
	Destroy(ctx context.Context, uuid string, graceful bool) error
	Resume(ctx context.Context, uuid string) error
	ResumeIOError(ctx context.Context, uuid string) (resumes int, err error)
	AgentPing(ctx context.Context, uuid string) error
	GuestInfo(ctx context.Context, uuid string) (map[string]string, error)
	CreateIsolated(ctx context.Context, name, bridge string) error
	DestroyNetwork(ctx context.Context, name string) error
	Networks(ctx context.Context) ([]string, error)
	Network(ctx context.Context, name string) (libvirt.Network, error)
	Reserve(ctx context.Context, network string, r libvirt.Reservation) error
	Unreserve(ctx context.Context, network string, r libvirt.Reservation) error
}

// Subject is a protected VM; *vm.VM is one.
type Subject interface {
	ID() wire.VMID
	Name() string
	HoldsReplica() bool
	TestSource(at delta.Pos) (libvirt.Spec, libvirt.Policy, error)
	ChoosePoint(text string) (points.Point, error)
	TakePoint(text string) (points.Point, *points.View, error)
	OpenView(pos delta.Pos) (*points.View, error)
	HoldPoint(ctx context.Context, pos delta.Pos, owner string) error
	ReleasePoint(pos delta.Pos, owner string) error
	PointFirmware(pos delta.Pos) (libvirt.FirmwareState, error)
}

// Mapping is where the configuration plugs a copy's NIC in.
type Mapping struct {
	// Network is a network of this host; nil = an isolated one of its own.
	Network *libvirt.PolicyNetwork
	// IP is reserved for the NIC in that network; empty = none.
	IP string
}

// Deps is what a Manager needs. Everything is required unless it says otherwise.
type Deps struct {
	StateDir string // durable; tests/ and drills/ below it
	RunDir   string // boot-scoped
	BootID   string // of this boot of the host
	Hyper    Hypervisor
	// Find returns a protected VM by id.
	Find func(id wire.VMID) (Subject, bool)
	// Named does so by name.
	Named func(name string) (Subject, bool)
	// Networks is the configured test network of a VM's NIC.
	Networks func(vm string, nic libvirt.SpecNIC) Mapping
	// Prove says whether bridges lead nowhere; nil = isolate.Prove.
	Prove func([]isolate.Bridge) error
	// Name makes a copy's name of the VM's: "%s" stands for it; empty = "%s-test".
	Name string
	// Quota bounds what a copy may write, in bytes, unless the caller says
	// otherwise; 0 = 10 GiB. Reserve stays free on the file system.
	Quota, Reserve int64
	// Max bounds the copies of this host; 0 = 8.
	Max int
	// LibvirtState is where libvirt keeps firmware state; empty = /var/lib/libvirt.
	LibvirtState string
	// QEMUOwner is who owns what QEMU opens; nil, or nil from it, = root.
	QEMUOwner func() (uid, gid *int)
	// Drills are due by themselves; may be empty.
	Drills []Schedule
	Now    func() time.Time
	// Failpoint is failover.Runner's; tests only.
	Failpoint func(point string)
	Log       *slog.Logger
}

// Deadlines and limits by name.
const (
	libvirtTimeout = 30 * time.Second
	startTimeout   = 2 * time.Minute
	watchEvery     = time.Second
	viewWithin     = 10 * time.Second // a store that is being opened again
	pinWithin      = 10 * time.Second
	drainWithin    = 5 * time.Second
	defaultQuota   = 10 << 30
	defaultMax     = 8
	defaultName    = "%s-test"
	maxEnded       = 200
)

func (d *Deps) prove(bs []isolate.Bridge) error {
	if d.Prove != nil {
		return d.Prove(bs)
	}
	return isolate.Prove(bs)
}
