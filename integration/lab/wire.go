package lab

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// The switch is a bridge in the wire's network namespace; each host has a port
// there, whose other end is the host's eth0.
const (
	bridgeName = "br0"
	hostLink   = "eth0"
)

func portName(host string) string { return "port" + host }

// inNet calls fn with a netlink handle in the network namespace of h.
func (h *Host) inNet(fn func(*netlink.Handle) error) error {
	ns, err := netns.GetFromPid(h.Pid())
	if err != nil {
		return fmt.Errorf("host %s is not running: %w", h.name, err)
	}
	defer ns.Close()
	nl, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer nl.Close()
	return fn(nl)
}

// connect wires a fresh process 1 to the switch, or makes the switch.
func (h *Host) connect() error {
	if h.isWire() {
		return h.inNet(func(nl *netlink.Handle) error {
			br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}
			if err := nl.LinkAdd(br); err != nil {
				return err
			}
			return nl.LinkSetUp(br)
		})
	}
	if err := h.lab.wire.inNet(h.addPort); err != nil {
		return err
	}
	return h.inNet(func(nl *netlink.Handle) error {
		if err := linkUp(nl, "lo"); err != nil {
			return err
		}
		eth, err := nl.LinkByName(hostLink)
		if err != nil {
			return err
		}
		// The same address in every life, so that the other host's
		// neighbour table stays right over a restart.
		mac := net.HardwareAddr{0x02, 0x4b, 0x52, 0, 0, byte(h.index)}
		if err := nl.LinkSetHardwareAddr(eth, mac); err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(h.IP() + "/24")
		if err != nil {
			return err
		}
		if err := nl.AddrAdd(eth, addr); err != nil {
			return err
		}
		return nl.LinkSetUp(eth)
	})
}

// addPort makes the host's port on the switch; one left by an earlier life of
// the host goes first (the kernel removes it a moment after the crash).
func (h *Host) addPort(nl *netlink.Handle) error {
	if old, err := nl.LinkByName(portName(h.name)); err == nil {
		if err := nl.LinkDel(old); err != nil && !isGone(err) {
			return err
		}
	}
	br, err := nl.LinkByName(bridgeName)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = portName(h.name)
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: hostLink, PeerNamespace: netlink.NsPid(h.Pid()),
	}
	if err := nl.LinkAdd(veth); err != nil {
		return err
	}
	if err := nl.LinkSetMaster(veth, br); err != nil {
		return err
	}
	return nl.LinkSetUp(veth)
}

func isGone(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}

func linkUp(nl *netlink.Handle, name string) error {
	l, err := nl.LinkByName(name)
	if err != nil {
		return err
	}
	return nl.LinkSetUp(l)
}

// Link plugs the host's network cable in (up) or pulls it at the switch: the
// host sees no carrier, the other host sees nothing at all.
func (h *Host) Link(up bool) error {
	return h.lab.wire.inNet(func(nl *netlink.Handle) error {
		port, err := nl.LinkByName(portName(h.name))
		if err != nil {
			return err
		}
		if up {
			return nl.LinkSetUp(port)
		}
		return nl.LinkSetDown(port)
	})
}

// Silence makes the switch drop everything to and from the host while its
// cable stays plugged in, as a dead switch or a firewall would.
func (h *Host) Silence(on bool) error {
	return h.lab.wire.inNet(func(nl *netlink.Handle) error {
		port, err := nl.LinkByName(portName(h.name))
		if err != nil {
			return err
		}
		if on {
			return nl.LinkSetNoMaster(port)
		}
		br, err := nl.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		return nl.LinkSetMaster(port, br)
	})
}
