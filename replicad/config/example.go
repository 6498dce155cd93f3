package config

import (
	"fmt"
	"strings"
)

// Example is a complete configuration with every default written out as a
// comment. packaging/replicad.toml is this text.
func Example() string {
	d := Default()
	l := d.Limits
	b := &strings.Builder{}
	p := printer(b)
	p("# KVM Replica daemon. What is commented out is the default; sizes and times")
	p("# need a unit. Check a change with: replicad --check --config %s", DefaultPath)
	p("# systemctl reload replicad takes over: bandwidth, network, policy, log_level, receiving,")
	p("# storage_roots, advertise, on_silent_peer, access. Everything else takes a restart.")
	p("")
	p("# Let paired hosts that were allowed to (replicactl peer allow) keep replicas here.")
	p("receiving = false")
	p("")
	p("# Directories replicas may live in; the first one is used unless a peer's entry names another.")
	p("#storage_roots = [%q]", d.StorageRoots[0])
	p("")
	p("# Name shown to peers; empty: the machine's host name.")
	p("#host_name = \"\"")
	p("")
	p("# Address for peers. Empty: nobody can connect to this host.")
	p("#listen = %q", d.Listen)
	p("# Address told to peers at pairing, \"host:port\". Empty: the address they see, with the port of listen.")
	p("#advertise = \"\"")
	p("")
	p("#state_dir = %q", d.StateDir)
	p("#run_dir = %q", d.RunDir)
	p("# Empty: virtqemud's or libvirtd's, whichever is there.")
	p("#libvirt_socket = \"\"")
	p("")
	p("# debug, info, warn, error; text or json.")
	p("#log_level = \"info\"")
	p("#log_format = %q", d.LogFormat)
	p("")
	p("# After an unclean boot, when the peer has been silent for so long:")
	p("# \"start\" protected VMs with a critical alarm, or \"hold\" them.")
	p("#on_silent_peer = %q", string(d.OnSilentPeer))
	p("#silent_peer_after = %q", d.SilentPeerAfter)
	p("")
	p("# VMs that copy, compare or ship to one peer at the same time. A free place goes to")
	p("# whoever has to be done first.")
	p("#shipping_slots = %d", d.ShippingSlots)
	p("")
	p("# A VM's exports take writes from its own QEMU only. true: from every process that")
	p("# may open the socket; for VMs that libvirt does not start.")
	p("#any_client = false")
	p("")
	p("# Groups of this host, by name or number, whose members may use replicactl besides")
	p("# root: operators run failovers, tests and the day's work, monitors may look.")
	p("#[access]")
	p("#operators = [\"kvm-operators\"]")
	p("#monitors = [\"kvm-monitors\"]")
	p("")
	p("# Certificates made elsewhere, PEM. Without this section the host makes its own.")
	p("#[tls]")
	p("#cert = \"/etc/replicad/host.crt\"")
	p("#key = \"/etc/replicad/host.key\"")
	p("#ca = \"/etc/replicad/ca.crt\"")
	p("")
	p("# Windows of replicactl stats: when the first of a day begins, and their length")
	p("# (1h to 24h dividing a day, or whole days up to 168h).")
	p("#[statistics]")
	p("#start = \"09:00\"")
	p("#window = %q", d.StatisticsWindow)
	p("")
	exampleDomain(p, d.Domain)
	exampleLimits(p, l)
	exampleTests(p, d.Tests)
	examplePolicies(p)
	return b.String()
}

func printer(b *strings.Builder) func(string, ...any) {
	return func(format string, args ...any) { fmt.Fprintf(b, format+"\n", args...) }
}

func exampleDomain(p func(string, ...any), d Domain) {
	p("# Local policy for the domains of replicas; a peer's description never decides these.")
	p("[domain]")
	p("# \"kvm\", or \"qemu\" for software emulation.")
	p("#type = %q", d.DomainType)
	p("# QEMU's path; empty: libvirt chooses.")
	p("#emulator = \"\"")
	p("# User QEMU runs as, who must be able to open sockets and images; empty: as\n# libvirt says.")
	p("#qemu_user = \"\"")
	p("# Directory for the serial output of replicas' guests; empty: none.")
	p("#console_dir = \"\"")
	p("# Where libvirt keeps firmware state; empty: /var/lib/libvirt.")
	p("#libvirt_state_dir = \"\"")
	p("# Program that must succeed before an unplanned failover. Its arguments are the")
	p("# VM's name, its UUID and the old primary's host id. Empty: none.")
	p("#fence = \"\"")
	p("# Files of this host, by label, for guests that boot a kernel of their host.")
	p("#[domain.kernels.example]")
	p("#kernel = \"/boot/vmlinuz\"")
	p("#initrd = \"/boot/initrd.img\"")
	p("")
}

func exampleLimits(p func(string, ...any), l Limits) {
	p("[limits]")
	p("# Connections of peers: all, of one host, and those that have not shown a certificate yet.")
	p("#connections = %d", l.Connections)
	p("#connections_per_peer = %d", l.ConnectionsPer)
	p("#unauthenticated = %d", l.Unauthenticated)
	p("#handshake_timeout = %q", l.HandshakeTimeout)
	p("# Memory for blocks saved before the guest overwrites them, per VM.")
	p("#capture_memory = %q", FormatSize(l.CaptureMemory))
	p("# Data of a disk the kernel may hold unwritten.")
	p("#dirty_page_cache = %q", FormatSize(l.DirtyPageCache))
	p("# Space kept free where recovery points lie; below it the oldest are given up.")
	p("#free_space_reserve = %q", FormatSize(l.FreeSpaceReserve))
	p("# Received but not yet applied changes, per VM.")
	p("#backlog = %q", FormatSize(l.Backlog))
	p("#max_vms = %d", l.MaxVMs)
	p("#max_points = %d", l.MaxPoints)
	p("")
	p("# Weekly schedule of the rate at which changes are sent. The last window that")
	p("# holds the present minute counts; outside of all windows there is no limit.")
	p("#[[bandwidth]]")
	p("#days = [\"workdays\"]")
	p("#from = \"08:00\"")
	p("#to = \"18:00\"")
	p("#rate = \"20MB/s\"")
}

// FormatSize writes n the way ParseSize reads it, in the largest binary unit
// that loses nothing.
func FormatSize(n int64) string {
	if n == 0 {
		return "0"
	}
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for i < len(units)-1 && n%1024 == 0 {
		n /= 1024
		i++
	}
	return fmt.Sprintf("%d%s", n, units[i])
}
