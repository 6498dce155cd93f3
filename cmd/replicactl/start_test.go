package main

import (
	"testing"
	"time"
)

func TestTheStartOfTheInitialCopyIsReadAsAPersonWritesIt(t *testing.T) {
	now := time.Date(2026, 11, 22, 20, 30, 0, 0, time.Local)
	for s, want := range map[string]time.Time{
		"now": {}, "in 8h": now.Add(8 * time.Hour), "at 22:00": now.Add(90 * time.Minute), "at  20:30": now.Add(24 * time.Hour),
		"at 03:00": time.Date(2026, 11, 23, 3, 0, 0, 0, time.Local), "at 2026-11-29 20:30": now.Add(7 * 24 * time.Hour),
	} {
		if got, err := parseStart(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
	for _, s := range []string{
		"", "later", "now please", "in", "in 8", "in -1h", "in 0s", "in 169h", "at", "at 25:00", "at noon",
		"at 2026-11-22 20:30", "at 2026-11-29 20:31", "22:00", "at 2026-13-01 10:00",
	} {
		if got, err := parseStart(s, now); err == nil {
			t.Errorf("%q is taken as %v", s, got)
		}
	}
}
