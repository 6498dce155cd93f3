package isolate

import (
	"testing"

	"github.com/vishvananda/netlink"
)

func TestInterfacesStackedOnABridgeAreFound(t *testing.T) {
	attrs := func(name string, index, parent, ns int) netlink.LinkAttrs {
		return netlink.LinkAttrs{Name: name, Index: index, ParentIndex: parent, NetNsID: ns}
	}
	bridge := &netlink.Bridge{LinkAttrs: attrs("krt0", 5, 0, -1)}
	links := []netlink.Link{
		bridge,
		&netlink.Vlan{LinkAttrs: attrs("krt0.7", 6, 5, -1)},
		&netlink.Vlan{LinkAttrs: attrs("lan.7", 7, 2, -1)},
		&netlink.Veth{LinkAttrs: attrs("veth0", 8, 5, 1)}, // its peer is 5 in another namespace
	}
	got := upon(bridge, links)
	if len(got) != 1 || got[0] != "krt0.7 (vlan) is stacked on krt0" {
		t.Errorf("found %q", got)
	}
}
