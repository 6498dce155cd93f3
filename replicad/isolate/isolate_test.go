package isolate_test

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"kvmreplica/replicad/isolate"
)

// inside runs f in a network namespace of its own, with its own view of
// /proc/sys/net, which follows the thread.
func inside(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	runtime.LockOSThread() // the thread is given up with the goroutine
	ns, err := netns.New()
	if err != nil {
		runtime.UnlockOSThread()
		t.Skipf("needs a network namespace: %v", err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	f(t)
}

func add(t *testing.T, l netlink.Link, master string) {
	t.Helper()
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatalf("add %s %s: %v", l.Type(), l.Attrs().Name, err)
	}
	if master != "" {
		plug(t, l.Attrs().Name, master)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
}

func plug(t *testing.T, port, bridge string) {
	t.Helper()
	p, err := netlink.LinkByName(port)
	if err != nil {
		t.Fatal(err)
	}
	b, err := netlink.LinkByName(bridge)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetMaster(p, b); err != nil {
		t.Fatal(err)
	}
}

func named(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

// isolated makes a bridge with one tap, as libvirt makes an isolated network.
func isolated(t *testing.T) isolate.Bridge {
	t.Helper()
	add(t, &netlink.Bridge{LinkAttrs: named("krt0")}, "")
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/krt0/disable_ipv6", []byte("1"), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	add(t, &netlink.Tuntap{LinkAttrs: named("tap0"), Mode: netlink.TUNTAP_MODE_TAP}, "krt0")
	return isolate.Bridge{Name: "krt0", Taps: []string{"tap0"}}
}

func TestAnIsolatedBridgeIsProvenAndEveryWayOutIsFound(t *testing.T) {
	for _, c := range []struct {
		name, want string
		leak       func(t *testing.T)
	}{
		{"nothing", "", func(*testing.T) {}},
		{"a veth is plugged in", "veth0 (veth) is plugged into it", func(t *testing.T) {
			add(t, &netlink.Veth{LinkAttrs: named("veth0"), PeerName: "veth1"}, "krt0")
		}},
		{"another guest's tap", "tap1 (tuntap) is plugged into it", func(t *testing.T) {
			add(t, &netlink.Tuntap{LinkAttrs: named("tap1"), Mode: netlink.TUNTAP_MODE_TAP}, "krt0")
		}},
		{"the host speaks IPv6 on it", "would take an address from the guest", func(t *testing.T) {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/krt0/disable_ipv6", []byte("0"), 0o644); err != nil {
				t.Skipf("this kernel has no IPv6: %v", err)
			}
		}},
		{"the host has an address", "the host has the address 10.9.9.1/24", func(t *testing.T) {
			l, err := netlink.LinkByName("krt0")
			if err != nil {
				t.Fatal(err)
			}
			a, err := netlink.ParseAddr("10.9.9.1/24")
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.AddrAdd(l, a); err != nil {
				t.Fatal(err)
			}
		}},
		{"the tap is elsewhere", "tap0 is plugged in elsewhere", func(t *testing.T) {
			add(t, &netlink.Bridge{LinkAttrs: named("lan")}, "")
			plug(t, "tap0", "lan")
		}},
		{"a filter on the tap", "may redirect", func(t *testing.T) {
			l, err := netlink.LinkByName("tap0")
			if err != nil {
				t.Fatal(err)
			}
			q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
			if err := netlink.QdiscAdd(q); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			inside(t, func(t *testing.T) {
				b := isolated(t)
				c.leak(t)
				err := isolate.Prove([]isolate.Bridge{b})
				if c.want == "" {
					if err != nil {
						t.Fatal(err)
					}
					return
				}
				var leak *isolate.LeakError
				if !errors.As(err, &leak) || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("got %v, want a leak with %q", err, c.want)
				}
			})
		})
	}
}

func TestWhatCannotBeFoundIsNotProven(t *testing.T) {
	inside(t, func(t *testing.T) {
		add(t, &netlink.Tuntap{LinkAttrs: named("tap0"), Mode: netlink.TUNTAP_MODE_TAP}, "")
		for name, want := range map[string]string{"absent": "there is no bridge", "tap0": "not a bridge"} {
			err := isolate.Prove([]isolate.Bridge{{Name: name}})
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", name, err, want)
			}
		}
	})
}
