package points

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// PolicyHelp is the syntax of ParsePolicy for people.
const PolicyHelp = `a number of hourly points (0 to 24), or rows EVERY:FOR such as all:1h,1h:1d,1d:30d`

// Bounds of a policy in words.
const (
	maxPolicyText = 200
	maxPolicyRows = 8
	maxPolicyFor  = 10 * 366 * 24 * time.Hour
)

// ErrPolicy: the text is no retention policy.
var ErrPolicy = errors.New("this is no retention of recovery points")

// ParsePolicy reads the grid of a policy: Hyper-V Replica's number of hourly
// points, "0" to "24", or rows EVERY:FOR separated by commas, EVERY growing,
// with units s, m, h, d and w; EVERY "all" keeps every point. The empty text is
// the default.
func ParsePolicy(text string) (Policy, error) {
	bad := func(format string, a ...any) (Policy, error) {
		return Policy{}, fmt.Errorf("%.60q: %w: %s; say %s", text, ErrPolicy, fmt.Sprintf(format, a...), PolicyHelp)
	}
	if len(text) > maxPolicyText {
		return bad("too long")
	}
	text = strings.TrimSpace(text)
	if text == "" {
		return Policy{}.withDefaults(), nil
	}
	if n, err := strconv.Atoi(text); err == nil {
		if n < 0 || n > 24 {
			return bad("%d hourly points", n)
		}
		p := Policy{Grid: []Row{}}
		if n > 0 {
			p.Grid = []Row{{Every: time.Hour, For: time.Duration(n) * time.Hour}}
		}
		return p.withDefaults(), nil
	}
	var p Policy
	rows := strings.Split(text, ",")
	if len(rows) > maxPolicyRows {
		return bad("more than %d rows", maxPolicyRows)
	}
	for i, row := range rows {
		every, span, ok := strings.Cut(strings.TrimSpace(row), ":")
		r := Row{For: parseSpan(span)}
		if every != "all" {
			r.Every = parseSpan(every)
		}
		switch {
		case !ok || r.Every < 0 || r.For <= 0:
			return bad("row %q", row)
		case every != "all" && r.Every < time.Second, r.For < r.Every, r.For > maxPolicyFor:
			return bad("row %q is out of range", row)
		case i > 0 && (r.Every <= p.Grid[i-1].Every || r.For <= p.Grid[i-1].For):
			return bad("row %q is not longer than the one before", row)
		}
		p.Grid = append(p.Grid, r)
	}
	p = p.withDefaults()
	if n := p.Count(); n > maxPointsOf {
		return bad("it keeps about %d points, at most %d are possible", n, maxPointsOf)
	}
	p.Max = max(p.Max, p.Count())
	return p, nil
}

// maxPointsOf bounds the points of one VM: a view looks through all of them.
const maxPointsOf = 2000

// Count is about how many points the policy keeps at most: rows that keep
// every point are counted at the minimum distance.
func (p Policy) Count() int {
	p = p.withDefaults()
	n := 0
	var before time.Duration
	for _, r := range p.Grid {
		every := max(r.Every, p.MinDistance)
		n += int((r.For - before + every - 1) / every)
		before = r.For
	}
	return n
}

// String is what ParsePolicy reads.
func (p Policy) String() string {
	p = p.withDefaults()
	if len(p.Grid) == 0 {
		return "0"
	}
	if r := p.Grid[0]; len(p.Grid) == 1 && r.Every == time.Hour && r.For <= 24*time.Hour && r.For%time.Hour == 0 {
		return strconv.Itoa(int(r.For / time.Hour))
	}
	var rows []string
	for _, r := range p.Grid {
		every := "all"
		if r.Every > 0 {
			every = spanText(r.Every)
		}
		rows = append(rows, every+":"+spanText(r.For))
	}
	return strings.Join(rows, ",")
}

// spans are the units of a policy, in descending order.
func spans() []struct {
	name string
	unit time.Duration
} {
	return []struct {
		name string
		unit time.Duration
	}{{"w", 7 * 24 * time.Hour}, {"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second}}
}

// parseSpan is negative for what is no span.
func parseSpan(s string) time.Duration {
	for _, u := range spans() {
		if digits, ok := strings.CutSuffix(s, u.name); ok {
			n, err := strconv.ParseUint(digits, 10, 31)
			if err != nil || time.Duration(n) > maxPolicyFor/u.unit {
				return -1
			}
			return time.Duration(n) * u.unit
		}
	}
	return -1
}

func spanText(d time.Duration) string {
	for _, u := range spans() {
		if d%u.unit == 0 && d > 0 && u.name != "w" {
			return fmt.Sprintf("%d%s", d/u.unit, u.name)
		}
	}
	return "0s"
}
