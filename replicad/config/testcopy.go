package config

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"
)

// Tests is how test copies are made.
type Tests struct {
	// Name of a copy; %s stands for the VM's.
	Name string
	// Quota bounds what a copy may write, in bytes.
	Quota int64
	// Max bounds the copies of this host.
	Max int
}

// NetworkMap says where network cards of replicas are plugged in here, for real
// and in tests. The first entry that fits a card counts.
type NetworkMap struct {
	// VM, MAC and From choose the cards: by the VM's name, by the card's address,
	// by the network's name on the primary; empty fits all.
	VM, MAC, From string
	// To is the network here, "bridge:NAME" for a bridge; empty = as on the primary.
	To string
	// Test is the network of test copies; empty = an isolated one of their own.
	Test string
	// IP and TestIP are reserved for the card in To and Test.
	IP, TestIP string
}

// DrillPlan is a drill that is due by itself.
type DrillPlan struct {
	VM      string
	Every   time.Duration
	At      time.Duration // since midnight, local time; -1 = any time
	Point   string
	Network string
	Proof   string
	Timeout time.Duration
}

type fileTests struct {
	Name  *string `toml:"name"`
	Quota *string `toml:"quota"`
	Max   *int    `toml:"max_copies"`
}

type fileNetwork struct {
	VM     string `toml:"vm"`
	MAC    string `toml:"mac"`
	From   string `toml:"from"`
	To     string `toml:"to"`
	Test   string `toml:"test"`
	IP     string `toml:"ip"`
	TestIP string `toml:"test_ip"`
}

type fileDrill struct {
	VM      string `toml:"vm"`
	Every   string `toml:"every"`
	At      string `toml:"at"`
	Point   string `toml:"point"`
	Network string `toml:"network"`
	Proof   string `toml:"proof"`
	Timeout string `toml:"timeout"`
}

func (p *parser) tests(c *Config, f file) {
	take(&c.Tests.Name, f.Test.Name)
	take(&c.Tests.Max, f.Test.Max)
	p.size("test.quota", &c.Tests.Quota, f.Test.Quota)
	for _, n := range f.Network {
		c.Networks = append(c.Networks, NetworkMap(n))
	}
	for i, d := range f.Drill {
		c.Drills = append(c.Drills, p.drill(i, d))
	}
}

func (p *parser) drill(i int, f fileDrill) DrillPlan {
	key := func(name string) string { return fmt.Sprintf("drill.%d.%s", i+1, name) }
	d := DrillPlan{VM: f.VM, Point: f.Point, Network: f.Network, Proof: f.Proof, At: -1, Every: defaultDrillEvery, Timeout: defaultDrillTimeout}
	if f.Every != "" {
		p.duration(key("every"), &d.Every, &f.Every)
	}
	if f.Timeout != "" {
		p.duration(key("timeout"), &d.Timeout, &f.Timeout)
	}
	if f.At != "" {
		at, ok := clock(f.At, 0)
		if !ok || at >= 24*time.Hour {
			p.complain(key("at"), "%.32q is not a time of day such as \"03:00\"", f.At)
		}
		d.At = at
	}
	return d
}

const (
	defaultDrillEvery   = 7 * 24 * time.Hour
	defaultDrillTimeout = 10 * time.Minute
	minDrillEvery       = time.Minute
	minTestQuota        = 1 << 20
)

func (c Config) complainTests(say func(key, format string, args ...any)) {
	t := c.Tests
	if !strings.Contains(t.Name, "%s") || strings.Count(t.Name, "%") != 1 || t.Name == "%s" || strings.ContainsAny(t.Name, "/\\") || strings.ContainsFunc(t.Name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		say("test.name", "%.48q is no name with %%s for the VM's and something more", t.Name)
	}
	if t.Quota < minTestQuota {
		say("test.quota", "a copy needs at least 1MiB")
	}
	if t.Max < 1 || t.Max > 100 {
		say("test.max_copies", "%d is not between 1 and 100", t.Max)
	}
	for i, n := range c.Networks {
		n.complaints(func(name, format string, args ...any) { say(fmt.Sprintf("network.%d.%s", i+1, name), format, args...) })
	}
	for i, d := range c.Drills {
		key := func(name string) string { return fmt.Sprintf("drill.%d.%s", i+1, name) }
		if d.VM == "" {
			say(key("vm"), "is missing")
		}
		if d.Every < minDrillEvery || d.Every > 366*24*time.Hour {
			say(key("every"), "%v is not between 1m and a year", d.Every)
		}
		if d.Timeout < time.Second || d.Timeout > 24*time.Hour {
			say(key("timeout"), "%v is not between 1s and 24h", d.Timeout)
		}
	}
}

func (n NetworkMap) complaints(say func(name, format string, args ...any)) {
	for name, s := range map[string]string{"to": n.To, "test": n.Test} {
		if b, ok := strings.CutPrefix(s, "bridge:"); ok && (b == "" || len(b) > 15) || strings.ContainsAny(s, "/'\"<>") {
			say(name, "%.48q is neither a network's name nor bridge:NAME", s)
		}
	}
	for name, ip := range map[string]string{"ip": n.IP, "test_ip": n.TestIP} {
		if ip == "" {
			continue
		}
		network := map[string]string{"ip": n.To, "test_ip": n.Test}[name]
		switch _, err := netip.ParseAddr(ip); {
		case err != nil:
			say(name, "%.48q is no IP address", ip)
		case n.VM == "" && n.MAC == "":
			say(name, "an address belongs to one card: name vm or mac")
		case network == "" || strings.HasPrefix(network, "bridge:"):
			say(name, "only a libvirt network can hand out addresses: name it in %s", map[string]string{"ip": "to", "test_ip": "test"}[name])
		}
	}
}

// NetworkFor finds the entry for a card; ok is false when there is none.
func (c Config) NetworkFor(vm, mac, from string) (NetworkMap, bool) {
	for _, n := range c.Networks {
		if (n.VM == "" || n.VM == vm) && (n.MAC == "" || strings.EqualFold(n.MAC, mac)) && (n.From == "" || n.From == from) {
			return n, true
		}
	}
	return NetworkMap{}, false
}

func exampleTests(p func(string, ...any), t Tests) {
	p("")
	p("# Test copies of replicas (replicactl failover test).")
	p("[test]")
	p("# A copy's name; %%s stands for the VM's.")
	p("#name = %q", t.Name)
	p("# What a copy may write; when it is used up its guest stands still.")
	p("#quota = %q", FormatSize(t.Quota))
	p("#max_copies = %d", t.Max)
	p("")
	p("# Where network cards of replicas are plugged in on this host: vm (its name), mac")
	p("# and from (the network on the primary) choose them, the first entry that fits")
	p("# counts. A network is one of libvirt's or \"bridge:NAME\". Without an entry a")
	p("# replica's card goes into the network of the primary's name, and a test copy's")
	p("# into an isolated one. An ip is reserved in the network's DHCP server.")
	p("#[[network]]")
	p("#vm = \"\"")
	p("#mac = \"\"")
	p("#from = \"default\"")
	p("#to = \"default\"")
	p("#test = \"\"")
	p("#ip = \"\"")
	p("#test_ip = \"\"")
	p("")
	p("# Drills that are due by themselves: a test copy is made, its guest proven to")
	p("# work, the copy taken away, a report kept in state_dir/drills.")
	p("# proof: agent, console:TEXT, tcp:PORT or command:PROGRAM ARGUMENTS.")
	p("#[[drill]]")
	p("#vm = \"web\"")
	p("#every = \"168h\"")
	p("#at = \"03:00\"")
	p("#point = \"latest\"")
	p("#network = \"\"")
	p("#proof = \"agent\"")
	p("#timeout = \"10m\"")
}
