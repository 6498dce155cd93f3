package testcopy

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
	"unicode"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// Options are a person's choices for a test copy.
type Options struct {
	Point string // as points are named; empty = the newest committed state
	// Network puts every card into a network of this host ("bridge:NAME" for a
	// bridge); Isolated into isolated ones whatever the configuration says.
	Network  string
	Isolated bool
	Name     string // empty = made of the VM's
	Quota    int64  // bytes; 0 = the configured one
	Request  string
	Purpose  string // "" = "test"

	taken *points.Point
}

// Plan is what Start would do, and whether it can.
type Plan struct {
	Copy   Copy
	Checks []wire.Check
}

// Failed returns the first check that forbids the start.
func (p Plan) Failed() *wire.Check {
	for i := range p.Checks {
		if p.Checks[i].Result == wire.Failed {
			return &p.Checks[i]
		}
	}
	return nil
}

func (p *Plan) add(name string, r wire.Result, remedy, format string, a ...any) {
	p.Checks = append(p.Checks, wire.Check{Name: name, Result: r, Remedy: remedy, Detail: fmt.Sprintf(format, a...)})
}

const (
	networkPrefix = "kvmreplica-test-"
	bridgePrefix  = "krt"
	maxName       = 128
	minQuota      = 1 << 20
)

// point is the state that was taken, or the one that a person means now.
func (o Options) point(s Subject) (points.Point, error) {
	if o.taken != nil {
		return *o.taken, nil
	}
	return s.ChoosePoint(o.Point)
}

// Take opens the state that a person means, so that Prepare and Start mean the
// same one and it is there until the copy has pinned it. Start does it by itself
// for options that did not. The caller calls release.
func (o *Options) Take(s Subject) (release func(), err error) {
	if o.taken != nil {
		return func() {}, nil
	}
	if _, _, err := s.TestSource(delta.Pos{}); err != nil { // is there a replica at all
		return nil, err
	}
	p, view, err := s.TakePoint(o.Point)
	if err != nil {
		return nil, err
	}
	o.taken = &p
	return func() { _ = view.Close() }, nil // closing a view cannot fail
}

// Prepare checks everything that can be checked without changing anything.
func (m *Manager) Prepare(ctx context.Context, s Subject, o Options) (Plan, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	if _, _, err := s.TestSource(delta.Pos{}); err != nil { // is there a replica at all
		return Plan{}, err
	}
	point, err := o.point(s)
	if err != nil {
		return Plan{}, err
	}
	spec, policy, err := s.TestSource(point.Pos)
	if err != nil {
		return Plan{}, err
	}
	if o.Network != "" && o.Isolated {
		return Plan{}, &wire.Error{Kind: wire.KindInvalid, Text: "a test copy is either isolated or in a network of this host", Hint: "leave one of --network and --isolated out"}
	}
	p := Plan{Copy: Copy{
		ID: newID(), VM: s.ID(), Of: s.Name(), UUID: newUUID(), At: point.Pos, Ordinal: point.Ordinal, Cut: point.Cut, Quota: o.Quota,
		Boot: m.deps.BootID, Request: o.Request, Purpose: o.Purpose, Started: m.deps.Now().UTC().Truncate(time.Millisecond), Phase: Starting,
	}}
	c := &p.Copy
	if c.Purpose == "" {
		c.Purpose = "test"
	}
	if c.Quota == 0 {
		c.Quota = m.deps.Quota
	}
	if c.Quota < minQuota {
		return Plan{}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("a quota of %d bytes", c.Quota), Hint: "give the copy at least 1 MiB to write"}
	}
	for _, d := range spec.Disks {
		if d.Device != "cdrom" {
			c.Disks = append(c.Disks, d.Target)
		}
	}
	for _, h := range spec.Hardware {
		if h.Name == "devices" {
			for _, k := range h.Kids {
				c.Serial = c.Serial || k.Name == "serial"
			}
		}
	}
	p.add("Recovery point", wire.OK, "", "%s", pointText(*c, m.deps.Now()))
	if err := m.nameIt(ctx, &p, o.Name); err != nil {
		return p, err
	}
	m.plugIn(ctx, &p, spec, o)
	if _, err := libvirt.Render(spec, m.policy(*c, policy)); err != nil {
		p.add("Description", wire.Failed, "replicactl vm status "+c.Of, "%v", err)
	}
	m.checkRoom(&p)
	return p, nil
}

// pointText says which point a copy runs on.
func pointText(c Copy, now time.Time) string {
	s := fmt.Sprintf("%v, cut %s (%s old)", c.At, c.Cut.UTC().Format(time.DateTime), now.Sub(c.Cut).Round(time.Second))
	if c.Ordinal > 0 {
		s = fmt.Sprintf("number %d, ", c.Ordinal) + s
	}
	return s
}

// nameIt finds a name that no domain has.
func (m *Manager) nameIt(ctx context.Context, p *Plan, wanted string) error {
	if wanted != "" {
		if !goodName(wanted) {
			return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("%.48q cannot be a domain's name", wanted), Hint: "use letters, digits, blanks, dots and dashes; at most 128 bytes"}
		}
		p.Copy.Name = wanted
		free, err := m.free(ctx, wanted)
		if err == nil && !free {
			p.add("Name", wire.Failed, "choose another one: --name", "a domain is called %q already", wanted)
		}
		return err
	}
	base := strings.ReplaceAll(m.deps.Name, "%s", p.Copy.Of)
	for i := 1; i <= 10*m.deps.Max; i++ {
		name := base
		if i > 1 {
			name = fmt.Sprintf("%s-%d", base, i)
		}
		free, err := m.free(ctx, name)
		if err != nil {
			return err
		}
		if free {
			p.Copy.Name = name
			p.add("Name", wire.OK, "", "%s", name)
			return nil
		}
	}
	p.add("Name", wire.Failed, "choose one: --name", "%q and all that follow it are taken", base)
	return nil
}

func (m *Manager) free(ctx context.Context, name string) (bool, error) {
	for _, c := range m.all() {
		if c.record().Name == name {
			return false, nil
		}
	}
	_, err := m.deps.Hyper.LookupName(ctx, name)
	if gone(err) {
		return true, nil
	}
	return false, err
}

func goodName(s string) bool {
	return s != "" && len(s) <= maxName && !strings.ContainsAny(s, "/\\") && !strings.ContainsAny(s[:1], ".- ") && !strings.HasSuffix(s, " ") &&
		!strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// plugIn decides where every card goes.
func (m *Manager) plugIn(ctx context.Context, p *Plan, spec libvirt.Spec, o Options) {
	isolated := map[string]int{}
	for i, n := range spec.NICs {
		nic := NIC{Origin: n.MAC, MAC: newMAC(), Logical: n.Network}
		to := Mapping{}
		switch {
		case o.Isolated:
		case o.Network != "":
			to.Network = parseNetwork(o.Network)
		case m.deps.Networks != nil:
			to = m.deps.Networks(p.Copy.Of, n)
		}
		name := fmt.Sprintf("Network card %d (%s)", i+1, n.Network)
		if to.Network == nil {
			k, ok := isolated[n.Network]
			if !ok {
				k = len(isolated)
				isolated[n.Network] = k
			}
			nic.Isolated = true
			nic.Network = fmt.Sprintf("%s%s-%d", networkPrefix, p.Copy.ID[:8], k)
			nic.Bridge = fmt.Sprintf("%s%s%x", bridgePrefix, p.Copy.ID[:8], k)
			p.add(name, wire.OK, "", "in an isolated network of its own; that is proven before the guest runs")
		} else {
			nic.Network, nic.HostBridge, nic.User, nic.IP = to.Network.Network, to.Network.Bridge, to.Network.User, to.IP
			m.checkNetwork(ctx, p, name, nic)
		}
		p.Copy.NICs = append(p.Copy.NICs, nic)
	}
	if len(spec.NICs) == 0 {
		p.add("Network", wire.OK, "", "the VM has no network card")
	}
}

func parseNetwork(s string) *libvirt.PolicyNetwork {
	if b, ok := strings.CutPrefix(s, "bridge:"); ok {
		return &libvirt.PolicyNetwork{Bridge: b}
	}
	return &libvirt.PolicyNetwork{Network: s}
}

// checkNetwork says clearly that a copy can be reached, and reach others.
func (m *Manager) checkNetwork(ctx context.Context, p *Plan, name string, nic NIC) {
	where := nic.Network
	if nic.HostBridge != "" {
		where = "bridge " + nic.HostBridge
	}
	if nic.User {
		where = "QEMU's user network"
	}
	if nic.Network != "" {
		n, err := m.deps.Hyper.Network(ctx, nic.Network)
		switch {
		case gone(err):
			p.add(name, wire.Failed, "virsh net-list --all; choose one with --network, or leave it out for an isolated one", "this host has no network %q", nic.Network)
			return
		case err != nil:
			p.add(name, wire.Failed, "systemctl status libvirtd virtnetworkd", "%v", err)
			return
		case !n.Active:
			p.add(name, wire.Failed, "virsh net-start "+nic.Network, "the network %q is not active", nic.Network)
			return
		case nic.IP != "" && !n.DHCP:
			p.add(name, wire.Failed, "give the network a DHCP range (virsh net-edit "+nic.Network+"), or leave the address out", "the network %q hands out no addresses, %s cannot be reserved", nic.Network, nic.IP)
			return
		}
	}
	p.add(name, wire.Warning, "leave --network out, or say --isolated, for a network that leads nowhere", "in %s: NOT isolated, the copy reaches whatever is reachable from there", where)
}

// checkRoom makes sure that the quota fits beside what must stay free.
func (m *Manager) checkRoom(p *Plan) {
	free, err := overlay.FreeBytes(m.deps.StateDir)
	switch {
	case err != nil:
		p.add("Space for writes", wire.Unknown, "", "%v", err)
	case free-m.deps.Reserve < p.Copy.Quota:
		p.add("Space for writes", wire.Failed, "free space there, or choose a smaller --quota", "%d bytes are free in %s and %d of them must stay so; the copy may write %d", free, m.deps.StateDir, m.deps.Reserve, p.Copy.Quota)
	default:
		p.add("Space for writes", wire.OK, "", "%d bytes", p.Copy.Quota)
	}
	if n := len(m.all()); n >= m.deps.Max {
		p.add("Number of copies", wire.Failed, "replicactl failover test-stop "+p.Copy.Of+" --all", "%d test copies exist on this host, that is the limit", n)
	}
}

// policy is the real VM's with everything replaced that must differ.
func (m *Manager) policy(c Copy, p libvirt.Policy) libvirt.Policy {
	p.Name, p.UUID, p.GenID, p.Metadata = c.Name, c.UUID, "", metadata(c)
	p.Disks = map[string]libvirt.PolicySource{}
	for _, d := range c.Disks {
		p.Disks[d] = libvirt.PolicySource{NBD: &libvirt.NBDSource{Socket: m.socket(c), Export: d, Reconnect: libvirt.ReconnectDelay}}
	}
	p.NewMACs, p.NICs = true, map[string]libvirt.PolicyNIC{}
	for _, n := range c.NICs {
		p.NICs[n.Origin] = libvirt.PolicyNIC{MAC: n.MAC, Network: &libvirt.PolicyNetwork{Network: n.Network, Bridge: n.HostBridge, User: n.User}}
	}
	p.ConsoleLog = m.console(c)
	return p
}

// metadata tells every tool what the domain is.
func metadata(c Copy) string {
	return fmt.Sprintf(`{"role":"test","copy":%q,"of":%q,"point":%q}`, c.ID, string(c.VM), c.At.String())
}

func newID() string { return hex.EncodeToString(random(8)) }

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// newUUID is a random one, as RFC 9562 has it.
func newUUID() string {
	b := random(16)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	s := hex.EncodeToString(b)
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// newMAC is one of QEMU's range.
func newMAC() string {
	b := random(3)
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", b[0], b[1], b[2])
}
