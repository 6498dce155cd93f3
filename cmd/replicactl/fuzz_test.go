package main

import (
	"testing"
	"time"

	"kvmreplica/internal/boundtest"
)

// FuzzTyped: sizes and times that a person types are sensible or refused.
func FuzzTyped(f *testing.F) {
	for _, s := range []string{"200G", "1.5T", "4096P", "9223372036854775807", "in 8h", "at 22:00", "at 2026-01-31 22:00", "now", "in -1h"} {
		f.Add(s)
	}
	now := time.Date(2026, 1, 30, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, s string) {
		defer boundtest.Input(t)()
		if n, err := parseSize(s); err == nil && n < 0 {
			t.Fatalf("%q is %d bytes", s, n)
		}
		if at, err := parseStart(s, now); err == nil && !at.IsZero() && (!at.After(now) || at.Sub(now) > maxStart) {
			t.Fatalf("%q is %v", s, at)
		}
	})
}
