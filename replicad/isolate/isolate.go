// Package isolate proves that a bridge leads nowhere: that nothing is plugged
// into it but the taps of one guest, and that the host itself neither has an
// address on it nor forwards for it.
//
// It guarantees that a proof is what the kernel says now, asked over netlink
// and read from its tables, and that what cannot be read counts as not proven.
// It changes nothing and needs no privilege.
//
// Callers must name every bridge a guest's network cards are plugged into, and
// ask again while the guest runs: somebody may plug something in later.
package isolate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// Bridge is what is to be proven: a bridge, and the taps that may be in it.
type Bridge struct {
	Name string
	Taps []string
}

// LeakError says what leads out of a bridge.
type LeakError struct {
	Bridge string
	What   []string
}

// Error names every leak.
func (e *LeakError) Error() string {
	return fmt.Sprintf("bridge %s is not isolated: %s", e.Bridge, strings.Join(e.What, "; "))
}

// Prove returns nil when every bridge leads nowhere, a *LeakError (wrapped)
// when one does, and any other error when that could not be found out.
func Prove(bridges []Bridge) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("prove isolation: list the host's interfaces: %w", err)
	}
	var errs []error
	for _, b := range bridges {
		if err := prove(b, links); err != nil {
			errs = append(errs, fmt.Errorf("prove isolation: %w", err))
		}
	}
	return errors.Join(errs...)
}

func prove(b Bridge, links []netlink.Link) error {
	i := slices.IndexFunc(links, func(l netlink.Link) bool { return l.Attrs().Name == b.Name })
	if i < 0 {
		return fmt.Errorf("there is no bridge %s", b.Name)
	}
	l := links[i]
	if l.Type() != "bridge" {
		return fmt.Errorf("%s is a %s, not a bridge", b.Name, l.Type())
	}
	var leaks []string
	if m := l.Attrs().MasterIndex; m != 0 {
		leaks = append(leaks, "it is itself a port of "+nameOf(links, m))
	}
	leaks = append(leaks, upon(l, links)...)
	found := map[string]bool{}
	for _, p := range links {
		a := p.Attrs()
		if a.MasterIndex != l.Attrs().Index {
			continue
		}
		found[a.Name] = true
		switch {
		case !slices.Contains(b.Taps, a.Name):
			leaks = append(leaks, fmt.Sprintf("%s (%s) is plugged into it", a.Name, p.Type()))
			continue
		case p.Type() != "tuntap" && p.Type() != "tun":
			leaks = append(leaks, fmt.Sprintf("%s is a %s, not a guest's tap", a.Name, p.Type()))
		}
		leaks = append(leaks, upon(p, links)...)
		more, err := diverted(p)
		if err != nil {
			return err
		}
		leaks = append(leaks, more...)
	}
	for _, t := range b.Taps {
		if !found[t] {
			leaks = append(leaks, "the guest's "+t+" is plugged in elsewhere")
		}
	}
	more, err := hostPath(l)
	if err != nil {
		return err
	}
	if leaks = append(leaks, more...); len(leaks) > 0 {
		return &LeakError{Bridge: b.Name, What: leaks}
	}
	return nil
}

// upon finds interfaces that are stacked on one: VLANs, macvlans and the like
// see its traffic.
func upon(l netlink.Link, links []netlink.Link) []string {
	var out []string
	for _, o := range links {
		a := o.Attrs()
		if a.ParentIndex == l.Attrs().Index && a.NetNsID < 0 && a.Index != l.Attrs().Index {
			out = append(out, fmt.Sprintf("%s (%s) is stacked on %s", a.Name, o.Type(), l.Attrs().Name))
		}
	}
	return out
}

func nameOf(links []netlink.Link, index int) string {
	for _, l := range links {
		if l.Attrs().Index == index {
			return l.Attrs().Name
		}
	}
	return fmt.Sprintf("interface %d", index)
}

// hostPath finds ways from the bridge into the host, where packets could be
// answered or forwarded.
func hostPath(l netlink.Link) ([]string, error) {
	name := l.Attrs().Name
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", name, err)
	}
	var out []string
	for _, a := range addrs {
		out = append(out, "the host has the address "+a.IPNet.String()+" on it")
	}
	routes, err := netlink.RouteList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list the routes of %s: %w", name, err)
	}
	for _, r := range routes {
		if r.Dst != nil && (r.Dst.IP.IsMulticast() || r.Dst.IP.IsLinkLocalUnicast()) {
			continue // what every interface that knows IPv6 has
		}
		out = append(out, fmt.Sprintf("the host routes %v over it", r.Dst))
	}
	// A guest's router advertisements would give the host an address.
	v6, err := sysctl("ipv6", name, "disable_ipv6")
	if err != nil {
		return nil, err
	}
	if v6 == "0" {
		out = append(out, "the host speaks IPv6 on it and would take an address from the guest")
	}
	arp, err := sysctl("ipv4", name, "proxy_arp")
	if err != nil {
		return nil, err
	}
	if arp == "1" {
		out = append(out, "the host answers ARP for others on it (proxy_arp)")
	}
	more, err := diverted(l)
	return append(out, more...), err
}

// sysctl reads a setting of an interface; "" when the kernel has no such thing.
func sysctl(family, link, name string) (string, error) {
	if strings.ContainsAny(link, "/\x00") {
		return "", fmt.Errorf("read %s: odd interface name %q", name, link)
	}
	b, err := os.ReadFile(filepath.Join("/proc/sys/net", family, "conf", link, name))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read %s of %s: %w", name, link, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// diverted finds programs and filters that may copy or redirect packets.
func diverted(l netlink.Link) ([]string, error) {
	name := l.Attrs().Name
	var out []string
	if x := l.Attrs().Xdp; x != nil && x.Attached {
		out = append(out, "an XDP program is attached to "+name)
	}
	qs, err := netlink.QdiscList(l)
	if err != nil {
		return nil, fmt.Errorf("list the queueing disciplines of %s: %w", name, err)
	}
	for _, q := range qs {
		if t := q.Type(); t == "ingress" || t == "clsact" {
			out = append(out, "packets of "+name+" pass filters ("+t+") that may redirect them")
		}
	}
	return out, nil
}
