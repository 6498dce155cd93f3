package main

import (
	"strings"
	"time"
)

// maxStart is how far ahead the initial copy may begin.
const maxStart = 7 * 24 * time.Hour

// parseStart reads when the initial copy begins: zero = now. A time of day is
// the next one on this machine's clock.
func parseStart(s string, now time.Time) (time.Time, error) {
	bad := func() (time.Time, error) {
		return time.Time{}, usagef(`--initial is %q: now, existing, "in 8h", "at 22:00" or "at 2026-01-31 22:00", up to seven days ahead`, s)
	}
	how, what, _ := strings.Cut(strings.TrimSpace(s), " ")
	what = strings.TrimSpace(what)
	var at time.Time
	switch how {
	case "now":
		if what != "" {
			return bad()
		}
		return time.Time{}, nil
	case "in":
		d, err := time.ParseDuration(what)
		if err != nil {
			return bad()
		}
		at = now.Add(d)
	case "at":
		if t, err := time.ParseInLocation("2006-01-02 15:04", what, now.Location()); err == nil {
			at = t
			break
		}
		t, err := time.ParseInLocation("15:04", what, now.Location())
		if err != nil {
			return bad()
		}
		at = time.Date(now.Year(), now.Month(), now.Day(), t.Hour(), t.Minute(), 0, 0, now.Location())
		if !at.After(now) {
			at = time.Date(now.Year(), now.Month(), now.Day()+1, t.Hour(), t.Minute(), 0, 0, now.Location())
		}
	default:
		return bad()
	}
	if !at.After(now) || at.Sub(now) > maxStart {
		return bad()
	}
	return at, nil
}
