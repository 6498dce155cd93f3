package config

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// file is the schema as written. Sizes and times are text with a unit, so that
// nobody has to guess it.
type file struct {
	StateDir        *string       `toml:"state_dir"`
	RunDir          *string       `toml:"run_dir"`
	HostName        *string       `toml:"host_name"`
	Listen          *string       `toml:"listen"`
	Advertise       *string       `toml:"advertise"`
	Receiving       *bool         `toml:"receiving"`
	StorageRoots    *[]string     `toml:"storage_roots"`
	LibvirtSocket   *string       `toml:"libvirt_socket"`
	LogLevel        *string       `toml:"log_level"`
	LogFormat       *string       `toml:"log_format"`
	OnSilentPeer    *string       `toml:"on_silent_peer"`
	SilentPeerAfter *string       `toml:"silent_peer_after"`
	ShippingSlots   *int          `toml:"shipping_slots"`
	AnyClient       *bool         `toml:"any_client"`
	TLS             fileTLS       `toml:"tls"`
	Access          fileAccess    `toml:"access"`
	Statistics      fileStats     `toml:"statistics"`
	Limits          fileLimits    `toml:"limits"`
	Domain          fileDomain    `toml:"domain"`
	Bandwidth       []fileWindow  `toml:"bandwidth"`
	Test            fileTests     `toml:"test"`
	Network         []fileNetwork `toml:"network"`
	Drill           []fileDrill   `toml:"drill"`
	Policy          []filePolicy  `toml:"policy"`
}

type fileAccess struct {
	Operators *[]string `toml:"operators"`
	Monitors  *[]string `toml:"monitors"`
}

type fileStats struct {
	Start  *string `toml:"start"`
	Window *string `toml:"window"`
}

type fileTLS struct {
	Cert *string `toml:"cert"`
	Key  *string `toml:"key"`
	CA   *string `toml:"ca"`
}

type fileLimits struct {
	Connections      *int    `toml:"connections"`
	ConnectionsPer   *int    `toml:"connections_per_peer"`
	Unauthenticated  *int    `toml:"unauthenticated"`
	HandshakeTimeout *string `toml:"handshake_timeout"`
	CaptureMemory    *string `toml:"capture_memory"`
	DirtyPageCache   *string `toml:"dirty_page_cache"`
	FreeSpaceReserve *string `toml:"free_space_reserve"`
	Backlog          *string `toml:"backlog"`
	MaxVMs           *int    `toml:"max_vms"`
	MaxPoints        *int    `toml:"max_points"`
}

type fileWindow struct {
	Days []string `toml:"days"`
	From string   `toml:"from"`
	To   string   `toml:"to"`
	Rate string   `toml:"rate"`
}

// Error is one complaint. Line is 0 when it is not known.
type Error struct {
	Key  string
	Line int
	Text string
}

func (e *Error) Error() string {
	s := e.Text
	if e.Key != "" {
		s = e.Key + ": " + s
	}
	if e.Line > 0 {
		s = fmt.Sprintf("line %d: %s", e.Line, s)
	}
	return s
}

// Parse reads a configuration. The error lists every complaint, in the order
// of the lines.
func Parse(data []byte) (Config, error) {
	p := &parser{lines: keyLines(data)}
	var f file
	meta, err := toml.NewDecoder(bytes.NewReader(data)).Decode(&f)
	if err != nil {
		return Config{}, syntaxError(err)
	}
	for _, k := range meta.Undecoded() {
		p.complain(k.String(), "unknown key")
	}
	c := Default()
	p.top(&c, f)
	p.limits(&c.Limits, f.Limits)
	p.domain(&c.Domain, f.Domain)
	p.tests(&c, f)
	for i, w := range f.Bandwidth {
		c.Bandwidth = append(c.Bandwidth, p.window(i, w))
	}
	for i, q := range f.Policy {
		c.Policies = append(c.Policies, p.policy(i, q))
	}
	c.complaints(p.complain)
	if len(p.errs) == 0 {
		return c, nil
	}
	slices.SortStableFunc(p.errs, func(a, b *Error) int { return a.Line - b.Line })
	var all []error
	for _, e := range p.errs {
		all = append(all, e)
	}
	return Config{}, errors.Join(all...)
}

func syntaxError(err error) error {
	var perr toml.ParseError
	if errors.As(err, &perr) {
		return &Error{Key: perr.LastKey, Line: perr.Position.Line, Text: perr.Message}
	}
	return &Error{Text: strings.TrimPrefix(err.Error(), "toml: ")}
}

type parser struct {
	lines map[string]int
	errs  []*Error
}

// complain keeps the first complaint about a key.
func (p *parser) complain(key, format string, args ...any) {
	for _, e := range p.errs {
		if e.Key == key {
			return
		}
	}
	p.errs = append(p.errs, &Error{Key: key, Line: p.lines[key], Text: fmt.Sprintf(format, args...)})
}

func take[T any](dst *T, src *T) {
	if src != nil {
		*dst = *src
	}
}

func (p *parser) top(c *Config, f file) {
	take(&c.StateDir, f.StateDir)
	take(&c.RunDir, f.RunDir)
	take(&c.HostName, f.HostName)
	take(&c.Listen, f.Listen)
	take(&c.Advertise, f.Advertise)
	take(&c.Receiving, f.Receiving)
	take(&c.StorageRoots, f.StorageRoots)
	take(&c.LibvirtSocket, f.LibvirtSocket)
	take(&c.LogFormat, f.LogFormat)
	take((*string)(&c.OnSilentPeer), f.OnSilentPeer)
	take(&c.ShippingSlots, f.ShippingSlots)
	take(&c.AnyClient, f.AnyClient)
	take(&c.TLS.Cert, f.TLS.Cert)
	take(&c.TLS.Key, f.TLS.Key)
	take(&c.TLS.CA, f.TLS.CA)
	take(&c.Access.Operators, f.Access.Operators)
	take(&c.Access.Monitors, f.Access.Monitors)
	if s := f.Statistics.Start; s != nil {
		var ok bool
		if c.StatisticsStart, ok = clock(*s, 0); !ok {
			p.complain("statistics.start", "%.32q is not a time of day such as \"09:00\"", *s)
		}
	}
	p.duration("statistics.window", &c.StatisticsWindow, f.Statistics.Window)
	p.duration("silent_peer_after", &c.SilentPeerAfter, f.SilentPeerAfter)
	if f.LogLevel != nil {
		levels := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
		l, ok := levels[*f.LogLevel]
		if !ok {
			p.complain("log_level", "%.32q is not debug, info, warn or error", *f.LogLevel)
		}
		c.LogLevel = l
	}
}

func (p *parser) limits(l *Limits, f fileLimits) {
	take(&l.Connections, f.Connections)
	take(&l.ConnectionsPer, f.ConnectionsPer)
	take(&l.Unauthenticated, f.Unauthenticated)
	take(&l.MaxVMs, f.MaxVMs)
	take(&l.MaxPoints, f.MaxPoints)
	p.duration("limits.handshake_timeout", &l.HandshakeTimeout, f.HandshakeTimeout)
	p.size("limits.capture_memory", &l.CaptureMemory, f.CaptureMemory)
	p.size("limits.dirty_page_cache", &l.DirtyPageCache, f.DirtyPageCache)
	p.size("limits.free_space_reserve", &l.FreeSpaceReserve, f.FreeSpaceReserve)
	p.size("limits.backlog", &l.Backlog, f.Backlog)
}

func (p *parser) duration(key string, dst *time.Duration, src *string) {
	if src == nil {
		return
	}
	d, err := time.ParseDuration(*src)
	if err != nil {
		p.complain(key, "%.32q is not a time such as \"30s\" or \"5m\"", *src)
		return
	}
	*dst = d
}

func (p *parser) size(key string, dst *int64, src *string) {
	if src == nil {
		return
	}
	n, err := ParseSize(*src)
	if err != nil {
		p.complain(key, "%s", err)
		return
	}
	*dst = n
}

// ParseSize reads a number of bytes: "0", "512MiB", "10GiB", "100MB".
func ParseSize(s string) (int64, error) {
	bad := fmt.Errorf("%.32q is not a size such as \"512MiB\" or \"10GiB\"", s)
	end := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	num, unit := s, ""
	if end >= 0 {
		num, unit = s[:end], strings.TrimSpace(s[end:])
	}
	units := map[string]int64{
		"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
		"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
	}
	n, err := strconv.ParseInt(num, 10, 64)
	u, ok := units[unit]
	if err != nil || !ok || n > (1<<62)/u {
		return 0, bad
	}
	if unit == "" && n != 0 {
		return 0, fmt.Errorf("%.32q lacks a unit, e.g. \"%sMiB\"", s, num)
	}
	return n * u, nil
}

func (p *parser) window(i int, f fileWindow) Window {
	key := func(name string) string { return fmt.Sprintf("bandwidth.%d.%s", i+1, name) }
	var w Window
	for _, d := range f.Days {
		days := dayNames(d)
		if days == nil {
			p.complain(key("days"), "%.32q is not mon, tue, wed, thu, fri, sat, sun, workdays, weekend or all", d)
		}
		w.Days = append(w.Days, days...)
	}
	if len(f.Days) == 0 {
		w.Days = dayNames("all")
	}
	var ok bool
	if w.From, ok = clock(f.From, 0); !ok {
		p.complain(key("from"), "%.32q is not a time of day such as \"08:00\"", f.From)
	}
	if w.To, ok = clock(f.To, 24*time.Hour); !ok {
		p.complain(key("to"), "%.32q is not a time of day such as \"18:00\"", f.To)
	} else if w.To <= w.From {
		p.complain(key("to"), "the window ends before it begins; write two windows for a night")
	}
	rate, ok := strings.CutSuffix(f.Rate, "/s")
	n, err := ParseSize(rate)
	if err != nil || !ok && n != 0 {
		p.complain(key("rate"), "%.32q is not a rate such as \"20MB/s\"; \"0\" means no limit", f.Rate)
	}
	w.Rate = n
	return w
}

func dayNames(s string) []time.Weekday {
	switch s {
	case "all":
		return []time.Weekday{0, 1, 2, 3, 4, 5, 6}
	case "workdays":
		return []time.Weekday{1, 2, 3, 4, 5}
	case "weekend":
		return []time.Weekday{0, 6}
	}
	for d := time.Sunday; d <= time.Saturday; d++ {
		if s == strings.ToLower(d.String()[:3]) {
			return []time.Weekday{d}
		}
	}
	return nil
}

func clock(s string, empty time.Duration) (time.Duration, bool) {
	switch s {
	case "":
		return empty, true
	case "24:00":
		return 24 * time.Hour, true
	}
	t, err := time.Parse("15:04", s)
	return time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute, err == nil
}

// keyLines finds where each key is written. It reads lines, not TOML: a key
// inside a multi-line string may be taken for one, which costs nothing but a
// number nobody asks for.
func keyLines(data []byte) map[string]int {
	lines, table := map[string]int{}, ""
	arrays := map[string]int{}
	for i, line := range strings.Split(string(data), "\n") {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "[["):
			name := strings.TrimSpace(strings.Trim(strings.SplitN(line, "]", 2)[0], "["))
			arrays[name]++
			table = fmt.Sprintf("%s.%d.", name, arrays[name])
		case strings.HasPrefix(line, "["):
			table = strings.TrimSpace(strings.Trim(strings.SplitN(line, "]", 2)[0], "[")) + "."
			lines[strings.TrimSuffix(table, ".")] = i + 1
		default:
			k, _, ok := strings.Cut(line, "=")
			if !ok || strings.HasPrefix(line, "#") {
				continue
			}
			key := table + strings.Trim(strings.TrimSpace(k), `"'`)
			if _, seen := lines[key]; !seen {
				lines[key] = i + 1
			}
		}
	}
	// Undecoded keys of arrays come without an index: point at the first one.
	for k, n := range lines {
		parts := strings.Split(k, ".")
		if len(parts) == 3 {
			short := parts[0] + "." + parts[2]
			if old, ok := lines[short]; !ok || n < old {
				lines[short] = n
			}
		}
	}
	return lines
}
