package config

import (
	"errors"
	"net"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Validate checks a Config that was not made by Parse. It lists every
// complaint.
func (c Config) Validate() error {
	p := &parser{}
	c.complaints(p.complain)
	var all []error
	for _, e := range p.errs {
		all = append(all, e)
	}
	return errors.Join(all...)
}

// complaints calls say for each thing that is wrong, by its key in the file.
func (c Config) complaints(say func(key, format string, args ...any)) {
	directory := func(key, dir string) {
		switch {
		case !path.IsAbs(dir) || strings.ContainsRune(dir, 0):
			say(key, "%.64q is not an absolute directory", dir)
		case path.Clean(dir) != dir:
			say(key, "write it as %s", path.Clean(dir))
		case dir == "/":
			say(key, "the root directory cannot be used")
		}
	}
	directory("state_dir", c.StateDir)
	directory("run_dir", c.RunDir)
	if c.StateDir == c.RunDir {
		say("run_dir", "must not be state_dir: what lies in it ends with the boot")
	}
	c.complainRoots(say, directory)
	address := func(key, a string) {
		if a != "" && !isAddress(a) {
			say(key, "%.64q is not of the form host:port or :port", a)
		}
	}
	address("listen", c.Listen)
	address("advertise", c.Advertise)
	if c.Receiving && c.Listen == "" {
		say("receiving", "needs listen: replicas arrive over it")
	}
	if c.LibvirtSocket != "" && !path.IsAbs(c.LibvirtSocket) {
		say("libvirt_socket", "%.64q is not an absolute path", c.LibvirtSocket)
	}
	if len(c.HostName) > 255 || strings.ContainsFunc(c.HostName, func(r rune) bool { return !unicode.IsPrint(r) }) {
		say("host_name", "is longer than 255 bytes or not printable text")
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		say("log_format", "%.32q is not text or json", c.LogFormat)
	}
	if c.OnSilentPeer != Start && c.OnSilentPeer != Hold {
		say("on_silent_peer", "%.32q is not start or hold", string(c.OnSilentPeer))
	}
	if c.SilentPeerAfter < time.Second || c.SilentPeerAfter > time.Hour {
		say("silent_peer_after", "%v is not between 1s and 1h", c.SilentPeerAfter)
	}
	t := c.TLS
	if any := t.Cert != "" || t.Key != "" || t.CA != ""; any && (t.Cert == "" || t.Key == "" || t.CA == "") {
		say("tls", "cert, key and ca belong together; leave all three out to let the host make its own")
	}
	for key, file := range map[string]string{"tls.cert": t.Cert, "tls.key": t.Key, "tls.ca": t.CA} {
		if file != "" && !path.IsAbs(file) {
			say(key, "%.64q is not an absolute path", file)
		}
	}
	c.complainAccess(say)
	c.Domain.complaints(say)
	c.complainTests(say)
	c.complainPolicies(say)
	c.complainNumbers(say)
}

func (c Config) complainRoots(say func(string, string, ...any), directory func(string, string)) {
	if c.Receiving && len(c.StorageRoots) == 0 {
		say("storage_roots", "a receiving host needs at least one")
	}
	seen := map[string]bool{}
	for _, r := range c.StorageRoots {
		directory("storage_roots", r)
		if seen[r] {
			say("storage_roots", "%s is named twice", r)
		}
		seen[r] = true
		if r == c.StateDir || r == c.RunDir {
			say("storage_roots", "%s must be apart from state_dir and run_dir", r)
		}
	}
}

func (c Config) complainNumbers(say func(string, string, ...any)) {
	between := func(key string, v, lo, hi int64) {
		if v < lo || v > hi {
			say(key, "%d is not between %d and %d", v, lo, hi)
		}
	}
	const day = 24 * time.Hour
	switch w := c.StatisticsWindow; {
	case w < time.Hour || w > 7*day || w < day && day%w != 0 || w > day && w%day != 0:
		say("statistics.window", "%v: between 1h and 24h it must divide a day, beyond that be whole days up to 168h", w)
	case c.StatisticsStart < 0 || c.StatisticsStart >= day:
		say("statistics.start", "%v is not a time of day", c.StatisticsStart)
	}
	l := c.Limits
	between("shipping_slots", int64(c.ShippingSlots), 1, 64)
	between("limits.connections", int64(l.Connections), 8, 65536)
	between("limits.connections_per_peer", int64(l.ConnectionsPer), 2, 4096)
	between("limits.unauthenticated", int64(l.Unauthenticated), 4, 4096)
	between("limits.max_vms", int64(l.MaxVMs), 1, 10000)
	between("limits.max_points", int64(l.MaxPoints), 1, 500)
	between("limits.capture_memory", l.CaptureMemory, 4<<20, 1<<40)
	between("limits.dirty_page_cache", l.DirtyPageCache, 1<<20, 1<<40)
	between("limits.free_space_reserve", l.FreeSpaceReserve, 0, 1<<50)
	between("limits.backlog", l.Backlog, 1<<20, 1<<50)
	if l.HandshakeTimeout < time.Second || l.HandshakeTimeout > time.Minute {
		say("limits.handshake_timeout", "%v is not between 1s and 1m", l.HandshakeTimeout)
	}
	if l.Unauthenticated >= l.Connections {
		say("limits.unauthenticated", "must be smaller than limits.connections")
	}
}

// isAddress accepts host:port and :port with a numeric port.
func isAddress(a string) bool {
	host, port, err := net.SplitHostPort(a)
	if err != nil || strings.ContainsFunc(host, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }) {
		return false
	}
	n, err := strconv.Atoi(port)
	return err == nil && n >= 1 && n <= 65535
}

// maxGroups bounds a list of [access].
const maxGroups = 64

func (c Config) complainAccess(say func(string, string, ...any)) {
	seen := map[string]bool{}
	for _, l := range []struct {
		key    string
		groups []string
	}{{"access.operators", c.Access.Operators}, {"access.monitors", c.Access.Monitors}} {
		if len(l.groups) > maxGroups {
			say(l.key, "%d groups; at most %d", len(l.groups), maxGroups)
		}
		for _, g := range l.groups {
			switch {
			case g == "" || len(g) > 255 || strings.ContainsFunc(g, func(r rune) bool { return !unicode.IsPrint(r) || unicode.IsSpace(r) || r == ':' || r == ',' }):
				say(l.key, "%.64q is not a group's name or number", g)
			case seen[g]:
				say(l.key, "%s is named twice", g)
			}
			seen[g] = true
		}
	}
}
