package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// NetworkTo is where a network card is plugged in on this host.
type NetworkTo struct {
	Network libvirt.PolicyNetwork
	// IP is reserved for the card in that network when the VM fails over here;
	// empty = none.
	IP string
}

// networkOf is where a card goes: as configured, else to what has the name that
// the primary's network has.
func (d *Deps) networkOf(vm string, n libvirt.SpecNIC) (to NetworkTo, configured bool) {
	if d.Networks != nil {
		if to, ok := d.Networks(vm, n); ok {
			return to, true
		}
	}
	if b, ok := strings.CutPrefix(n.Network, "bridge:"); ok {
		return NetworkTo{Network: libvirt.PolicyNetwork{Bridge: b}}, false
	}
	if n.Network == "user" {
		return NetworkTo{Network: libvirt.PolicyNetwork{User: true}}, false
	}
	return NetworkTo{Network: libvirt.PolicyNetwork{Network: n.Network}}, false
}

// plugIn puts every card of a description into a network of this host.
func (v *VM) plugIn(s libvirt.Spec, p *libvirt.Policy) {
	p.NICs = map[string]libvirt.PolicyNIC{}
	for _, n := range s.NICs {
		to, _ := v.deps.networkOf(s.Name, n)
		p.NICs[n.MAC] = libvirt.PolicyNIC{Network: &to.Network}
	}
}

// pluggedElsewhere reports that a rendered domain's card is not where the
// configuration puts it by now. Cards without an entry are left where they are.
func (v *VM) pluggedElsewhere(d libvirt.Domain) bool {
	r := v.record()
	s, err := libvirt.ParseSpec(r.Spec)
	if err != nil || r.Native {
		return false
	}
	for _, n := range s.NICs {
		to, configured := v.deps.networkOf(s.Name, n)
		for _, have := range d.NICs {
			if configured && strings.EqualFold(have.MAC, n.MAC) && have.Network != to.Network.Network+to.Network.Bridge {
				return true
			}
		}
	}
	return false
}

// checkNetworks says where the VM's cards would be plugged in here. One that
// has no network keeps the guest from starting: that is a failure when it is
// about to start, and a warning before.
func (m *Manager) checkNetworks(ctx context.Context, c *checklist, s libvirt.Spec, starting bool) {
	bad := wire.Warning
	if starting {
		bad = wire.Failed
	}
	for i, n := range s.NICs {
		to, configured := m.deps.networkOf(s.Name, n)
		title := fmt.Sprintf("Network card %d", i+1)
		here, err := m.reachable(ctx, to)
		what := fmt.Sprintf("%s (%s on the primary) is in %s on %s", n.MAC, n.Network, here, m.deps.HostName)
		if !configured {
			what += ", by its name"
		}
		if to.IP != "" {
			what += ", with " + to.IP
		}
		if err == nil {
			c.add(title, wire.OK, "", "%s", what)
			continue
		}
		c.add(title, bad, fmt.Sprintf("on %s: virsh net-start %s; or map it in /etc/replicad/replicad.toml: [[network]] from = %q, to = a network of that host", m.deps.HostName, here, n.Network),
			"%s: %v", what, err)
	}
}

// reachable names the network on this host, and says why it cannot be used.
func (m *Manager) reachable(ctx context.Context, to NetworkTo) (string, error) {
	switch n := to.Network; {
	case n.User:
		return "QEMU's user network", nil
	case n.Bridge != "":
		if _, err := os.Stat(filepath.Join("/sys/class/net", filepath.Base(n.Bridge), "bridge")); err != nil {
			return "bridge " + n.Bridge, errors.New("there is no such bridge")
		}
		return "bridge " + n.Bridge, nil
	default:
		net, err := m.deps.Hyper.Network(ctx, n.Network)
		switch {
		case errors.Is(err, libvirt.ErrNotFound):
			err = errors.New("there is no such network")
		case err == nil && !net.Active:
			err = errors.New("it is not active")
		case err == nil && to.IP != "" && !net.DHCP:
			err = fmt.Errorf("it hands out no addresses, so that %s cannot be reserved", to.IP)
		}
		return n.Network, err
	}
}

// reserveAddresses gives the VM's cards the addresses that the configuration
// names. The guest starts without, too: what failed is said.
func (v *VM) reserveAddresses(ctx context.Context) string {
	r := v.record()
	s, err := libvirt.ParseSpec(r.Spec)
	if err != nil {
		return ""
	}
	var out []string
	for _, n := range s.NICs {
		to, _ := v.deps.networkOf(s.Name, n)
		if to.IP == "" || to.Network.Network == "" {
			continue
		}
		err := v.deps.Hyper.Reserve(ctx, to.Network.Network, libvirt.Reservation{MAC: n.MAC, Name: r.Name, IP: to.IP})
		if err != nil {
			v.log.Error("reserve the guest's address", "network", to.Network.Network, "ip", to.IP, "err", err)
			out = append(out, fmt.Sprintf("%s could NOT be reserved: %v", to.IP, err))
			continue
		}
		out = append(out, fmt.Sprintf("%s is reserved in %s", to.IP, to.Network.Network))
	}
	return strings.Join(out, "; ")
}

// genID is the generation id of a guest that runs in a generation: another one
// after every failover, the same when a step is repeated, and that of before
// when a failover is cancelled. Only guests that have such a device see it.
func genID(g delta.Generation) string {
	b := g
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	s := b.String()
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
