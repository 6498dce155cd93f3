package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The kernel's interface, linux/nbd-netlink.h.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4

	attrIndex       = 1
	attrSize        = 2
	attrBlockSize   = 3
	attrTimeout     = 4
	attrServerFlags = 5
	attrClientFlags = 6
	attrSockets     = 7
	attrDeadConn    = 8

	sockItem = 1
	sockFD   = 1

	groupName = "nbd_mc_group"
)

// family finds nbd's generic netlink family.
func family() (*netlink.GenlFamily, error) {
	f, err := netlink.GenlFamilyGet("nbd")
	if err != nil {
		return nil, fmt.Errorf("generic netlink family nbd (is the module nbd loaded?): %w", err)
	}
	return f, nil
}

// call sends one command about a device.
func call(f *netlink.GenlFamily, cmd uint8, index uint32, attrs ...*nl.RtAttr) error {
	q := nl.NewNetlinkRequest(int(f.ID), unix.NLM_F_ACK)
	q.AddData(&nl.Genlmsg{Command: cmd, Version: uint8(f.Version)})
	q.AddData(nl.NewRtAttr(attrIndex, nl.Uint32Attr(index)))
	for _, a := range attrs {
		q.AddData(a)
	}
	_, err := q.Execute(unix.NETLINK_GENERIC, 0)
	return err
}

// sockets is the attribute that hands connections to the kernel, which keeps
// them when ours are closed.
func sockets(files []*os.File) *nl.RtAttr {
	list := nl.NewRtAttr(attrSockets|unix.NLA_F_NESTED, nil)
	for _, f := range files {
		item := list.AddRtAttr(sockItem|unix.NLA_F_NESTED, nil)
		item.AddRtAttr(sockFD, nl.Uint32Attr(uint32(f.Fd())))
	}
	return list
}

// requestSeconds is after how long the kernel sends a request anew that was on
// its way when its connection broke; it does not do so before, whatever other
// connections there are. The default is 30 seconds.
const requestSeconds = 5

// connect makes a device of connections to one export. deadSeconds is how long
// requests wait for a new connection when all are gone.
func connect(f *netlink.GenlFamily, index uint32, files []*os.File, x export, deadSeconds uint64) error {
	err := call(f, cmdConnect, index,
		nl.NewRtAttr(attrSize, nl.Uint64Attr(x.size)), nl.NewRtAttr(attrBlockSize, nl.Uint64Attr(512)),
		nl.NewRtAttr(attrTimeout, nl.Uint64Attr(requestSeconds)), nl.NewRtAttr(attrDeadConn, nl.Uint64Attr(deadSeconds)),
		nl.NewRtAttr(attrServerFlags, nl.Uint64Attr(uint64(x.flags))), nl.NewRtAttr(attrClientFlags, nl.Uint64Attr(0)),
		sockets(files))
	if err != nil {
		return fmt.Errorf("NBD_CMD_CONNECT: %w", err)
	}
	return nil
}

// reconfigure gives a device new connections in place of dead ones.
func reconfigure(f *netlink.GenlFamily, index uint32, files []*os.File) error {
	if err := call(f, cmdReconfigure, index, sockets(files)); err != nil {
		return fmt.Errorf("NBD_CMD_RECONFIGURE: %w", err)
	}
	return nil
}

func disconnect(f *netlink.GenlFamily, index uint32) error {
	if err := call(f, cmdDisconnect, index); err != nil {
		return fmt.Errorf("NBD_CMD_DISCONNECT: %w", err)
	}
	return nil
}

// watch calls dead for every lost connection of a device until it returns an
// error.
func watch(f *netlink.GenlFamily, index uint32, dead func() error) error {
	s, err := nl.Subscribe(unix.NETLINK_GENERIC)
	if err != nil {
		return err
	}
	defer s.Close()
	for _, g := range f.Groups {
		if g.Name != groupName {
			continue
		}
		if err := unix.SetsockoptInt(s.GetFd(), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(g.ID)); err != nil {
			return err
		}
		for {
			msgs, _, err := s.Receive()
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return err
			}
			for _, m := range msgs {
				if len(m.Data) < 4 || m.Data[0] != cmdLinkDead {
					continue
				}
				attrs, err := nl.ParseRouteAttr(m.Data[4:])
				if err != nil {
					return err
				}
				for _, a := range attrs {
					if a.Attr.Type == attrIndex && len(a.Value) >= 4 && nl.NativeEndian().Uint32(a.Value) == index {
						if err := dead(); err != nil {
							return err
						}
					}
				}
			}
		}
	}
	return errors.New("the kernel has no group " + groupName)
}
