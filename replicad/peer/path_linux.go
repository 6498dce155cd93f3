package peer

import (
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kvmreplica/replicad/wire"
)

// minMTU is what IPv6 demands of every link; below it something is wrong.
const minMTU = 1280

// path reports the route to the peer, its MTU and, of an open connection, what
// TCP learnt about the way.
func (t *test) path(raw net.Conn) {
	ip := remoteIP(raw, t.rec.Address)
	if ip == nil {
		t.add("path", wire.Unknown, "", "the address is a name that was not resolved")
		return
	}
	routes, err := netlink.RouteGet(ip)
	if err != nil || len(routes) == 0 {
		t.add("path", wire.Failed, "ip route get "+ip.String(), "no route to %s: %v", ip, err)
		return
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		t.add("path", wire.Unknown, "ip route get "+ip.String(), "interface %d: %s", routes[0].LinkIndex, err)
		return
	}
	name, mtu := link.Attrs().Name, link.Attrs().MTU
	if routes[0].MTU > 0 {
		mtu = min(mtu, routes[0].MTU)
	}
	pmtu := tcpPathMTU(raw)
	switch {
	case mtu < minMTU:
		t.add("path", wire.Warning, "ip link set "+name+" mtu 1500", "over %s, MTU %d is very small", name, mtu)
	case pmtu > 0 && pmtu < mtu && pmtu < 1400:
		t.add("path", wire.Warning, "set the same MTU along the way", "over %s with MTU %d, but only %d pass", name, mtu, pmtu)
	default:
		t.add("path", wire.OK, "", "over %s, MTU %d", name, mtu)
	}
}

func remoteIP(raw net.Conn, address string) net.IP {
	if raw != nil {
		if a, ok := raw.RemoteAddr().(*net.TCPAddr); ok {
			return a.IP
		}
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil
	}
	return net.ParseIP(host)
}

// tcpPathMTU is the path MTU the kernel has learnt; 0 when it cannot be told.
func tcpPathMTU(raw net.Conn) int {
	c, ok := raw.(*net.TCPConn)
	if !ok {
		return 0
	}
	sc, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	mtu := 0
	if err := sc.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			mtu = int(info.Pmtu)
		}
	}); err != nil {
		return 0
	}
	return mtu
}
