package config

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Policy says how the domains that it fits are to be protected. Nothing is
// protected by itself: policies are applied by a person. What is nil or empty
// is not the policy's to say.
type Policy struct {
	Name string
	// Match are patterns of names, Tags tags of a domain; one that fits is enough.
	// Exclude are patterns of names that it does not fit whatever those say.
	Match, Tags, Exclude []string
	To                   string // paired host
	Every, AppEvery      *time.Duration
	Points               string // recovery points the replica is asked to keep
	Bandwidth            *int64 // bytes per second, 0 = only the host's limits
	Shutdown             *time.Duration
	OnSilent             OnSilentPeer
	// InitialAt is when the initial copy begins, since midnight; nil = now.
	InitialAt *time.Duration
	// Alarm: a domain that it fits and that has not been protected for AlarmAfter
	// is an alarm.
	Alarm      bool
	AlarmAfter time.Duration
}

type filePolicy struct {
	Name       string   `toml:"name"`
	Match      []string `toml:"match"`
	Tags       []string `toml:"tags"`
	Exclude    []string `toml:"exclude"`
	To         string   `toml:"to"`
	Every      *string  `toml:"every"`
	AppEvery   *string  `toml:"app_every"`
	Points     string   `toml:"points"`
	Bandwidth  *string  `toml:"bandwidth"`
	Shutdown   *string  `toml:"shutdown_time"`
	OnSilent   string   `toml:"on_silent_peer"`
	Initial    string   `toml:"initial"`
	Alarm      bool     `toml:"alarm"`
	AlarmAfter *string  `toml:"alarm_after"`
}

const (
	defaultAlarmAfter = 15 * time.Minute
	maxPolicies       = 64
	maxPatterns       = 256
	minBandwidth      = 16 << 10
)

// PolicyFor is the first policy that fits a domain; ok is false when none does.
func (c Config) PolicyFor(name string, tags []string) (Policy, bool) {
	for _, p := range c.Policies {
		if p.Fits(name, tags) {
			return p, true
		}
	}
	return Policy{}, false
}

// Fits reports whether the policy is meant for a domain. Patterns and tags
// tell upper from lower case, as libvirt does.
func (p Policy) Fits(name string, tags []string) bool {
	if anyFits(p.Exclude, name) {
		return false
	}
	return anyFits(p.Match, name) || slices.ContainsFunc(tags, func(t string) bool { return slices.Contains(p.Tags, t) })
}

func anyFits(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		ok, err := path.Match(pattern, name)
		return ok && err == nil // a bad one is refused when it is read
	})
}

func (p *parser) policy(i int, f filePolicy) Policy {
	key := func(name string) string { return fmt.Sprintf("policy.%d.%s", i+1, name) }
	out := Policy{
		Name: f.Name, Match: f.Match, Tags: f.Tags, Exclude: f.Exclude, To: f.To, Points: f.Points,
		OnSilent: OnSilentPeer(f.OnSilent), Alarm: f.Alarm, AlarmAfter: defaultAlarmAfter,
	}
	span := func(name string, src *string) *time.Duration {
		if src == nil {
			return nil
		}
		var d time.Duration
		p.duration(key(name), &d, src)
		return &d
	}
	out.Every, out.AppEvery, out.Shutdown = span("every", f.Every), span("app_every", f.AppEvery), span("shutdown_time", f.Shutdown)
	if d := span("alarm_after", f.AlarmAfter); d != nil {
		out.AlarmAfter = *d
	}
	if f.Bandwidth != nil {
		rate, ok := strings.CutSuffix(*f.Bandwidth, "/s")
		n, err := ParseSize(rate)
		if err != nil || !ok && n != 0 {
			p.complain(key("bandwidth"), "%.32q is not a rate such as \"20MB/s\"; \"0\" means no limit", *f.Bandwidth)
		}
		out.Bandwidth = &n
	}
	switch at, ok := strings.CutPrefix(f.Initial, "at "); {
	case f.Initial == "" || f.Initial == "now":
	case ok:
		t, good := clock(at, 24*time.Hour)
		if !good || t >= 24*time.Hour {
			p.complain(key("initial"), "%.32q is not now or a time of day such as \"at 22:00\"", f.Initial)
		}
		out.InitialAt = &t
	default:
		p.complain(key("initial"), "%.32q is not now or a time of day such as \"at 22:00\"", f.Initial)
	}
	return out
}

func (c Config) complainPolicies(say func(key, format string, args ...any)) {
	if len(c.Policies) > maxPolicies {
		say("policy", "%d tables are more than %d", len(c.Policies), maxPolicies)
	}
	names := map[string]bool{}
	for i, p := range c.Policies {
		key := func(name, format string, args ...any) {
			say(fmt.Sprintf("policy.%d.%s", i+1, name), format, args...)
		}
		switch {
		case p.Name == "":
			key("name", "is missing")
		case !plain(p.Name):
			key("name", "%.48q is longer than 64 bytes or not printable text", p.Name)
		case names[p.Name]:
			key("name", "there is a policy called %.48q already", p.Name)
		}
		names[p.Name] = true
		if p.To == "" {
			key("to", "is missing: the paired host that keeps the copies")
		}
		p.complainFit(key)
		p.complainSettings(key)
	}
}

func (p Policy) complainFit(say func(name, format string, args ...any)) {
	if len(p.Match) == 0 && len(p.Tags) == 0 {
		say("match", "the policy fits nothing: name match or tags")
	}
	for name, patterns := range map[string][]string{"match": p.Match, "exclude": p.Exclude} {
		if len(patterns) > maxPatterns {
			say(name, "%d patterns are more than %d", len(patterns), maxPatterns)
		}
		for _, pattern := range patterns {
			if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
				say(name, "%.48q is no pattern: * stands for any text, ? for a character, [a-c] for one of several", pattern)
			}
		}
	}
	for _, t := range p.Tags {
		if !plain(t) {
			say("tags", "%.48q is no tag: 1 to 64 bytes of printable text", t)
		}
	}
}

// retention is the form of what a replica is asked to keep; the numbers are
// judged where it is asked.
var retention = regexp.MustCompile(`^(\d{1,2}|(all|\d{1,6}[smhdw]):\d{1,6}[smhdw](,(all|\d{1,6}[smhdw]):\d{1,6}[smhdw])*)$`)

func (p Policy) complainSettings(say func(name, format string, args ...any)) {
	span := func(name string, d *time.Duration, lo, hi time.Duration, what string) {
		if d != nil && *d != 0 && (*d < lo || *d > hi || *d%time.Second != 0) || d != nil && *d < 0 {
			say(name, "%v is not between %v and %v in whole seconds, or \"0s\": %s", *d, lo, hi, what)
		}
	}
	const day = 24 * time.Hour
	span("every", p.Every, time.Second, day, "back to back")
	span("app_every", p.AppEvery, time.Minute, 7*day, "none")
	span("shutdown_time", p.Shutdown, time.Second, day, "5m")
	span("alarm_after", &p.AlarmAfter, time.Second, 7*day, "at once")
	if p.Points != "" && !retention.MatchString(p.Points) {
		say("points", "%.48q is neither 0 to 24 hourly points nor rows such as \"all:1h,1h:1d,1d:30d\"", p.Points)
	}
	if p.Bandwidth != nil && *p.Bandwidth != 0 && *p.Bandwidth < minBandwidth {
		say("bandwidth", "at least 16KiB/s, or \"0\" for no limit")
	}
	if p.OnSilent != "" && p.OnSilent != Start && p.OnSilent != Hold {
		say("on_silent_peer", "%.32q is not start or hold", string(p.OnSilent))
	}
}

func plain(s string) bool {
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

func examplePolicies(p func(string, ...any)) {
	p("")
	p("# How VMs are to be protected, for replicactl policy list, policy apply and")
	p("# vm enable without --to. Nothing is protected by itself. The first table that fits")
	p("# counts: match are patterns of domain names (* ? [a-c]), tags are those of the")
	p("# domain's metadata (urn:kvmreplica:tags:1); one is enough. Settings that are left")
	p("# out are not the policy's to say. alarm: health says so when a domain that the")
	p("# table fits is not protected for longer than alarm_after.")
	p("#[[policy]]")
	p("#name = \"web\"")
	p("#match = [\"web-*\"]")
	p("#tags = [\"gold\"]")
	p("#exclude = [\"*-scratch\"]")
	p("#to = \"kvm-b\"")
	p("#every = \"30s\"")
	p("#app_every = \"1h\"")
	p("#points = \"all:1h,1h:1d\"")
	p("#bandwidth = \"20MB/s\"")
	p("#shutdown_time = \"5m\"")
	p("#on_silent_peer = \"start\"")
	p("#initial = \"at 22:00\"")
	p("#alarm = true")
	p("#alarm_after = \"15m\"")
}
