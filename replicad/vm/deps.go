package vm

import (
	"context"
	"log/slog"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/stats"
	"kvmreplica/replicad/wire"
)

// Hypervisor is what a VM needs of libvirt; *libvirt.Host is one.
type Hypervisor interface {
	LookupName(ctx context.Context, name string) (uuid string, err error)
	Domain(ctx context.Context, uuid string) (libvirt.Domain, error)
	DomainState(ctx context.Context, uuid string) (libvirt.State, libvirt.Reason, error)
	XML(ctx context.Context, uuid string, k libvirt.XMLKind) ([]byte, error)
	Define(ctx context.Context, doc []byte) (uuid string, err error)
	Undefine(ctx context.Context, uuid string, o libvirt.UndefineOptions) error
	Start(ctx context.Context, uuid string, o libvirt.StartOptions) error
	Shutdown(ctx context.Context, uuid string, o libvirt.ShutdownOptions) error
	Destroy(ctx context.Context, uuid string, graceful bool) error
	SetAutostart(ctx context.Context, uuid string, on bool) error
	ResumeIOError(ctx context.Context, uuid string) (resumes int, err error)
	Quiesce(ctx context.Context, uuid string, holdFor time.Duration) (filesystems int, thaw func() (held bool, err error), err error)
	Thaw(ctx context.Context, uuid string) error
	HasSaved(ctx context.Context, uuid string) (bool, error)
	Firmware(ctx context.Context, uuid, stateDir string) (libvirt.FirmwareState, error)
	Info(ctx context.Context) (libvirt.HostInfo, error)
	Graph(ctx context.Context, uuid string, exports map[string]libvirt.NBDSource) (map[string]libvirt.DiskGraph, error)
	InsertDisks(ctx context.Context, uuid string, reqs []libvirt.InsertRequest) error
	ResizeDisk(ctx context.Context, uuid, target string, src libvirt.NBDSource, size int64) error
	RemoveDisks(ctx context.Context, uuid string, reqs []libvirt.InsertRequest) error
	Network(ctx context.Context, name string) (libvirt.Network, error)
	Reserve(ctx context.Context, network string, r libvirt.Reservation) error
}

// Grant is what an authorisation entry lets a peer do here.
type Grant struct {
	Name     string
	MaySend  bool
	Deaf     bool   // this host receives nothing from anybody
	Root     string // storage root for its replicas
	MaxVMs   int
	MaxDisks int
	MaxBytes int64
}

// Deps is what the manager of all VMs needs. Everything is required unless it
// says otherwise.
type Deps struct {
	Host     wire.HostID
	HostName string
	StateDir string // durable; vms/UUID below it
	RunDir   string // boot-scoped
	Hyper    Hypervisor
	// Dial returns the service of a paired host; calls may fail while it is away.
	Dial func(host wire.HostID) (wire.Service, error)
	// Grant returns the authorisation entry of a paired host.
	Grant func(host wire.HostID) (Grant, error)
	// Binary is the daemon's own program, for keepers; empty = the running one.
	Binary string
	// QEMUOwner is who owns sockets and images that QEMU opens; nil, or nil from
	// it, = root.
	QEMUOwner func() (uid, gid *int)
	// HostStops says whether this host is going down, so that a guest that ends
	// is one that ran; nil = never.
	HostStops func(ctx context.Context) (bool, error)
	// SilentAfter is how long a peer may be silent after a boot before the VM's
	// policy counts.
	SilentAfter time.Duration
	// CaptureBytes bounds the copy-before-write memory of each VM; 0 = default.
	CaptureBytes int64
	// AnyClient lets every process that may open the sockets write to a VM's
	// exports, not only its QEMU.
	AnyClient bool
	// DirtyBytes bounds the unwritten guest data per disk; 0 = default.
	DirtyBytes int64
	// MaxVMs bounds protected and received VMs together; 0 = unlimited.
	MaxVMs int
	// Store and MaxPoints bound each replica's store; zero = defaults.
	Store     points.Limits
	MaxPoints int
	// Statistics are the windows of every VM's measurements; zero = default.
	Statistics stats.Schedule
	// Fence is a command run before an unplanned failover; empty = none.
	Fence string
	// LibvirtState is where libvirt keeps firmware state; empty = /var/lib/libvirt.
	LibvirtState string
	// Limiter makes what bounds one VM's bulk bodies; nil = nothing does.
	Limiter func() Limiter
	// ShippingSlots bounds how many VMs read, compare and send to one peer at
	// once; 0 = unlimited.
	ShippingSlots int
	// Kernels are local files, by label, for guests that boot a kernel of their
	// host; the peer's paths are never used. Without the label such a guest is
	// refused.
	Kernels map[string]libvirt.PolicyKernel
	// Networks is the configured place of a replica's network card; nil, and
	// cards without an entry: the network of the primary's name.
	Networks func(vm string, nic libvirt.SpecNIC) (NetworkTo, bool)
	// DomainType is "kvm" or "qemu", for rendered domains.
	DomainType string
	// Emulator for rendered domains; empty = libvirt's default.
	Emulator string
	// ConsoleDir keeps file consoles of rendered domains; empty = none.
	ConsoleDir string
	Now        func() time.Time
	// Failpoint is failover.Runner's; tests only.
	Failpoint func(point string)
	Log       *slog.Logger
}

// Deadlines by name.
const (
	libvirtTimeout = 30 * time.Second
	swapTimeout    = 2 * time.Minute
	peerTimeout    = 10 * time.Second
	promoteTimeout = 10 * time.Minute
	finalTimeout   = 24 * time.Hour // the last changes of a planned failover; the person may cancel
	startTimeout   = 2 * time.Minute
	watchEvery     = 2 * time.Second
)

// planeStatus is the part of a data plane's client that views need.
type planeStatus interface {
	Status(ctx context.Context) (dataplane.Status, error)
}
