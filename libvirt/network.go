package libvirt

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	lv "github.com/digitalocean/go-libvirt"
)

// Network is a virtual network of the host.
type Network struct {
	Name   string
	Bridge string
	// Forward is libvirt's mode: "" (isolated), "nat", "route", "open",
	// "bridge", …
	Forward string
	Active  bool
	// DHCP says that libvirt hands out addresses in it.
	DHCP bool
}

// maxBridge is what the kernel allows of an interface's name.
const maxBridge = 15

// CreateIsolated makes a network that leads nowhere: a bridge without uplink,
// without an address of the host and without DHCP. It is transient: it ends
// with DestroyNetwork or with the host. One of that name that is there already
// is fine.
func (h *Host) CreateIsolated(ctx context.Context, name, bridge string) error {
	if !word(64)(name) || !word(maxBridge)(bridge) {
		return &Error{Op: "create network " + name, Kind: KindInvalid, Msg: "the name of the network or of its bridge is too long or odd"}
	}
	doc := "<network><name>" + esc(name) + "</name><bridge name='" + esc(bridge) + "' stp='off' delay='0'/></network>"
	err := h.do(ctx, "create network "+name, func(l *lv.Libvirt) error {
		if n, err := l.NetworkLookupByName(name); err == nil {
			if active, err := l.NetworkIsActive(n); err != nil || active == 1 {
				return err
			}
		}
		_, err := l.NetworkCreateXML(doc)
		return err
	})
	return err
}

// DestroyNetwork ends a network; a transient one is gone then. One that is not
// there is no error.
func (h *Host) DestroyNetwork(ctx context.Context, name string) error {
	err := h.do(ctx, "end network "+name, func(l *lv.Libvirt) error {
		n, err := l.NetworkLookupByName(name)
		if err != nil {
			return err
		}
		return l.NetworkDestroy(n)
	})
	if errors.Is(err, ErrState) {
		return nil // it is off already
	}
	return ignoreNotFound(err)
}

// Networks lists the names of all networks, sorted.
func (h *Host) Networks(ctx context.Context) ([]string, error) {
	return call(ctx, h, "list networks", func(l *lv.Libvirt) ([]string, error) {
		ns, _, err := l.ConnectListAllNetworks(1, 0)
		if err != nil {
			return nil, err
		}
		var out []string
		for _, n := range ns {
			out = append(out, n.Name)
		}
		slices.Sort(out)
		return out, nil
	})
}

// Network reads one.
func (h *Host) Network(ctx context.Context, name string) (Network, error) {
	return call(ctx, h, "read network "+name, func(l *lv.Libvirt) (Network, error) {
		n, err := l.NetworkLookupByName(name)
		if err != nil {
			return Network{}, err
		}
		active, err := l.NetworkIsActive(n)
		if err != nil {
			return Network{}, err
		}
		doc, err := l.NetworkGetXMLDesc(n, 0)
		if err != nil {
			return Network{}, err
		}
		out, err := parseNetwork([]byte(doc))
		out.Active = active == 1
		return out, err
	})
}

type networkXML struct {
	Name    string `xml:"name"`
	Forward *struct {
		Mode string `xml:"mode,attr"`
	} `xml:"forward"`
	Bridge struct {
		Name string `xml:"name,attr"`
	} `xml:"bridge"`
	IPs []struct {
		DHCP *struct{} `xml:"dhcp"`
	} `xml:"ip"`
}

func parseNetwork(doc []byte) (Network, error) {
	var x networkXML
	if err := xml.Unmarshal(doc, &x); err != nil {
		return Network{}, fmt.Errorf("read the network's document: %w", err)
	}
	out := Network{Name: x.Name, Bridge: x.Bridge.Name}
	if x.Forward != nil {
		if out.Forward = x.Forward.Mode; out.Forward == "" {
			out.Forward = "nat" // libvirt's default
		}
	}
	for _, ip := range x.IPs {
		out.DHCP = out.DHCP || ip.DHCP != nil
	}
	return out, nil
}

// Reservation gives a NIC one address of a network's DHCP server.
type Reservation struct{ MAC, Name, IP string }

func (r Reservation) xml() (string, error) {
	ip, err := netip.ParseAddr(r.IP)
	if err != nil || ip.Zone() != "" {
		return "", &Error{Op: "reserve an address", Kind: KindInvalid, Msg: fmt.Sprintf("%.64q is no IP address", r.IP)}
	}
	if !validMAC(strings.ToLower(r.MAC)) {
		return "", &Error{Op: "reserve an address", Kind: KindInvalid, Msg: fmt.Sprintf("%.64q is no MAC address", r.MAC)}
	}
	name := ""
	if host := strings.Map(hostRune, r.Name); strings.Trim(host, "-") != "" {
		name = " name='" + esc(strings.Trim(host, "-")) + "'"
	}
	return "<host mac='" + esc(strings.ToLower(r.MAC)) + "'" + name + " ip='" + esc(r.IP) + "'/>", nil
}

// hostRune makes a host name of any name.
func hostRune(r rune) rune {
	if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
		return r
	}
	return '-'
}

// Reserve makes a network's DHCP server give a NIC this address, now and after
// a restart. Repeating it is fine; another entry of the same address or MAC is
// an error.
func (h *Host) Reserve(ctx context.Context, network string, r Reservation) error {
	host, err := r.xml()
	if err != nil {
		return err
	}
	return h.do(ctx, "reserve "+r.IP+" in network "+network, func(l *lv.Libvirt) error {
		n, err := l.NetworkLookupByName(network)
		if err != nil {
			return err
		}
		doc, err := l.NetworkGetXMLDesc(n, 0)
		if err != nil {
			return err
		}
		if reserved([]byte(doc), r) {
			return nil
		}
		return update(l, n, lv.NetworkUpdateCommandAddLast, host)
	})
}

// Unreserve takes Reserve back. What is not there is no error.
func (h *Host) Unreserve(ctx context.Context, network string, r Reservation) error {
	host, err := r.xml()
	if err != nil {
		return err
	}
	return ignoreNotFound(h.do(ctx, "give "+r.IP+" of network "+network+" back", func(l *lv.Libvirt) error {
		n, err := l.NetworkLookupByName(network)
		if err != nil {
			return err
		}
		doc, err := l.NetworkGetXMLDesc(n, 0)
		if err != nil || !reserved([]byte(doc), r) {
			return err
		}
		return update(l, n, lv.NetworkUpdateCommandDelete, host)
	}))
}

// update changes the running network and, where there is one, its definition.
func update(l *lv.Libvirt, n lv.Network, how lv.NetworkUpdateCommand, host string) error {
	flags := lv.NetworkUpdateAffectLive
	if p, err := l.NetworkIsPersistent(n); err != nil {
		return err
	} else if p == 1 {
		flags |= lv.NetworkUpdateAffectConfig
	}
	return l.NetworkUpdate(n, uint32(how), uint32(lv.NetworkSectionIPDhcpHost), -1, host, flags)
}

// reserved reports whether the network has exactly this entry.
func reserved(doc []byte, r Reservation) bool {
	var x struct {
		IPs []struct {
			Hosts []struct {
				MAC string `xml:"mac,attr"`
				IP  string `xml:"ip,attr"`
			} `xml:"dhcp>host"`
		} `xml:"ip"`
	}
	if xml.Unmarshal(doc, &x) != nil {
		return false
	}
	for _, ip := range x.IPs {
		for _, e := range ip.Hosts {
			if strings.EqualFold(e.MAC, r.MAC) && e.IP == r.IP {
				return true
			}
		}
	}
	return false
}
