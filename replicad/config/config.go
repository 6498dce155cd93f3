// Package config reads replicad.toml: the schema, the defaults, and every
// complaint about it at once, with line numbers.
//
// It guarantees that a Config that Parse returned without an error is complete
// and consistent, that an unknown key is an error (a mistyped limit must not
// silently be no limit), and that reading it has no side effect: no directory
// is made, no name is looked up, no file but the given one is opened.
//
// Callers fill what is empty on purpose (HostName, LibvirtSocket) from the
// machine.
package config

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"
)

// DefaultPath is where the daemon looks for its configuration.
const DefaultPath = "/etc/replicad/replicad.toml"

// DefaultPort is the one port peers connect to.
const DefaultPort = 7878

// maxFile bounds the file that is read.
const maxFile = 1 << 20

// OnSilentPeer says what to do with a protected VM after an unclean boot when
// the peer does not answer.
type OnSilentPeer string

// The values of OnSilentPeer.
const (
	Start OnSilentPeer = "start" // start it, with a critical alarm
	Hold  OnSilentPeer = "hold"  // wait for the peer or the operator
)

// Config is everything replicad.toml can say.
type Config struct {
	StateDir string // metadata, keys, journals
	RunDir   string // sockets and boot-scoped files
	// HostName is what peers see; empty = the machine's host name.
	HostName string
	// Listen is the address for peers; empty = no inbound connections.
	Listen string
	// Advertise is the address peers are told, "host:port" or ":port"; empty =
	// the port of Listen at the address the connection comes from.
	Advertise string
	// Receiving lets paired hosts that may send keep replicas here.
	Receiving bool
	// StorageRoots are the directories replicas may live in; the first one is
	// the default.
	StorageRoots []string
	// LibvirtSocket is empty to look for virtqemud's and libvirtd's.
	LibvirtSocket string
	LogLevel      slog.Level
	LogFormat     string // "text" or "json"
	OnSilentPeer  OnSilentPeer
	// SilentPeerAfter is how long the peer may stay silent before OnSilentPeer counts.
	SilentPeerAfter time.Duration
	// ShippingSlots is the number of VMs that copy, compare or ship to one peer
	// at once.
	ShippingSlots int
	// AnyClient lets every process that may open the sockets of QEMU's user
	// write to a VM's exports, not only the VM's own QEMU.
	AnyClient bool
	// Statistics are the windows of what is measured: their first beginning on a
	// day, and their length.
	StatisticsStart, StatisticsWindow time.Duration

	TLS    TLS
	Access Access
	Limits Limits
	Domain
	// Bandwidth is the weekly schedule for what is sent to peers; the last
	// window that holds the present minute counts, outside of all there is no limit.
	Bandwidth []Window
	Tests     Tests
	Networks  []NetworkMap
	Drills    []DrillPlan
	// Policies say how domains are to be protected; the first that fits one counts.
	Policies []Policy
}

// TLS names certificate files made elsewhere. All empty = the host makes its own.
type TLS struct {
	Cert string // leaf and intermediates, PEM
	Key  string // private key, PEM
	CA   string // authorities, PEM
}

// Access names who besides root may use the control socket: groups of this host,
// by name or number.
type Access struct {
	Operators []string // may run failovers, tests and the day's work
	Monitors  []string // may look
}

// Any says whether anybody but root may.
func (a Access) Any() bool { return len(a.Operators)+len(a.Monitors) > 0 }

// Limits bound what the daemon holds and uses.
type Limits struct {
	Connections      int           // inbound peer connections
	ConnectionsPer   int           // of one paired host
	Unauthenticated  int           // that have not shown a certificate yet
	HandshakeTimeout time.Duration // for TLS and request header
	CaptureMemory    int64         // copy-before-write per VM
	DirtyPageCache   int64         // unwritten guest data per disk
	FreeSpaceReserve int64         // kept free where recovery points lie
	Backlog          int64         // unapplied epochs per VM on the replica
	MaxVMs           int           // protected and received VMs together
	MaxPoints        int           // recovery points per VM
}

// Window limits the rate during some hours of some days.
type Window struct {
	Days     []time.Weekday
	From, To time.Duration // since midnight, local time; To may be 24h
	Rate     int64         // bytes per second; 0 = no limit
}

// Default is the configuration of an empty file.
func Default() Config {
	return Config{
		StateDir: "/var/lib/replicad", RunDir: "/run/replicad", Listen: fmt.Sprintf(":%d", DefaultPort),
		StorageRoots: []string{"/var/lib/replicad/replicas"},
		LogLevel:     slog.LevelInfo, LogFormat: "text",
		Domain:       Domain{DomainType: "kvm"},
		Tests:        Tests{Name: "%s-test", Quota: 10 << 30, Max: 8},
		OnSilentPeer: Start, SilentPeerAfter: 120 * time.Second, ShippingSlots: 4,
		StatisticsStart: 9 * time.Hour, StatisticsWindow: 12 * time.Hour,
		Limits: Limits{
			Connections: 512, ConnectionsPer: 32, Unauthenticated: 64, HandshakeTimeout: 10 * time.Second,
			CaptureMemory: 256 << 20, DirtyPageCache: 64 << 20, FreeSpaceReserve: 10 << 30, Backlog: 64 << 30,
			MaxVMs: 1000, MaxPoints: 500,
		},
	}
}

// Load reads the file at path. A missing file is an error: a daemon that runs
// on defaults by mistake would not receive and not tell.
func Load(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return Config{}, fmt.Errorf("open configuration: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return Config{}, fmt.Errorf("read configuration %s: %w", path, err)
	}
	if len(data) > maxFile {
		return Config{}, fmt.Errorf("configuration %s is longer than %d bytes", path, maxFile)
	}
	c, err := Parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// RateAt is the bandwidth limit at a moment, in bytes per second; 0 = none.
func (c Config) RateAt(now time.Time) int64 {
	rate := int64(0)
	since := time.Duration(now.Hour())*time.Hour + time.Duration(now.Minute())*time.Minute
	for _, w := range c.Bandwidth {
		for _, d := range w.Days {
			if d == now.Weekday() && since >= w.From && since < w.To {
				rate = w.Rate
			}
		}
	}
	return rate
}
