package stats

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/status"
)

func at(s string) time.Time {
	t, err := time.ParseInLocation("2006-01-02 15:04", s, time.Local)
	if err != nil {
		panic(err)
	}
	return t
}

func TestWindowsBeginWhereTheScheduleSays(t *testing.T) {
	for _, c := range []struct {
		s          Schedule
		now        string
		begin, end string
	}{
		{Schedule{}, "2026-11-22 20:59", "2026-11-22 09:00", "2026-11-22 21:00"},
		{Default(), "2026-11-22 21:00", "2026-11-22 21:00", "2026-11-23 09:00"},
		{Default(), "2026-11-23 08:59", "2026-11-22 21:00", "2026-11-23 09:00"},
		{Schedule{0, time.Hour}, "2026-11-22 00:00", "2026-11-22 00:00", "2026-11-22 01:00"},
		{Schedule{30 * time.Minute, 24 * time.Hour}, "2026-11-22 00:29", "2026-11-21 00:30", "2026-11-22 00:30"},
		{Schedule{9 * time.Hour, 7 * day}, "2026-11-23 08:59", "2026-11-16 09:00", "2026-11-23 09:00"}, // Mondays
		{Schedule{9 * time.Hour, 7 * day}, "2026-11-23 09:00", "2026-11-23 09:00", "2026-11-30 09:00"},
		{Schedule{9 * time.Hour, 7 * day}, "2023-12-31 10:00", "2023-12-25 09:00", "2024-01-01 09:00"},
	} {
		if b, e := c.s.Begin(at(c.now)), c.s.End(at(c.now)); !b.Equal(at(c.begin)) || !e.Equal(at(c.end)) {
			t.Errorf("%+v at %s: %v to %v, want %s to %s", c.s, c.now, b, e, c.begin, c.end)
		}
	}
}

func TestEveryCycleIsCountedOnceOverSessionsWindowsAndRestarts(t *testing.T) {
	now := at("2026-11-22 10:00")
	l := New(Default(), now)
	session := Totals{Since: now}
	cycle := func(bytes int64, took time.Duration) {
		t.Helper()
		now = now.Add(10 * time.Minute)
		session.Cycles++
		if bytes == 0 {
			session.Empty++
		}
		session.RawBytes += bytes
		session.SentBytes += bytes / 2
		session.Latency += took
		l.Observe(now, session, 11*time.Minute)
		l.Observe(now, session, 0) // nothing new
	}
	cycle(1000, time.Second)
	cycle(5000, 3*time.Second)
	cycle(0, 0)
	session.Errors, session.LastError = 1, "the line was cut"
	// another session: its totals begin at zero
	l.Observe(now, session, 0)
	session = Totals{Since: now}
	cycle(3000, 2*time.Second)
	// the daemon restarts
	b, err := l.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if l, err = Load(b, Default()); err != nil {
		t.Fatal(err)
	}
	l.Observe(now, session, 0)
	cycle(3000, 2*time.Second)
	want := status.Window{
		From: at("2026-11-22 10:00"), Cycles: 5, Empty: 1, Errors: 1, RawBytes: 12000, SentBytes: 6000, LargestBytes: 5000,
		Latency: 8 * time.Second, LargestLatency: 3 * time.Second, RPOMax: 11 * time.Minute, LastError: "the line was cut",
	}
	m := l.Report()
	if d := cmp.Diff(want, m.Window); d != "" {
		t.Fatal(d)
	}
	if a, b := m.Window.AverageBytes(), m.Window.AverageLatency(); a != 3000 || b != 2*time.Second || !m.Until.Equal(at("2026-11-22 21:00")) {
		t.Fatalf("averages %d, %v; until %v", a, b, m.Until)
	}
	// the window ends; the next cycle counts in the next one
	now = at("2026-11-22 20:55")
	cycle(700, time.Second)
	m = l.Report()
	want.To = at("2026-11-22 21:00")
	if len(m.History) != 1 || cmp.Diff(want, m.History[0]) != "" || m.Window.Cycles != 1 || m.Window.RawBytes != 700 || !m.Window.From.Equal(want.To) {
		t.Fatalf("%+v", m)
	}
	l.Reset(now)
	if m = l.Report(); m.Window.Cycles != 0 || !m.Window.From.Equal(now) || len(m.History) != 1 {
		t.Fatalf("after a reset: %+v", m)
	}
	cycle(800, time.Second)
	if m = l.Report(); m.Window.Cycles != 1 || m.Window.RawBytes != 800 {
		t.Fatalf("after a reset: %+v", m)
	}
}

func TestTheHistoryIsBoundedAndBadFilesAreRefused(t *testing.T) {
	now := at("2026-11-22 10:00")
	l := New(Schedule{Length: time.Hour}, now)
	for range maxHistory + 50 {
		now = now.Add(time.Hour)
		l.Observe(now, Totals{}, -1)
	}
	m := l.Report()
	if len(m.History) != maxHistory || !m.History[maxHistory-1].To.Equal(m.Window.From) || m.Window.RPOMax != 0 {
		t.Fatalf("%d windows, open %+v", len(m.History), m.Window)
	}
	for _, bad := range []string{"", "{", "{}", `{"version":2,"open":{"from":"2026-11-22T10:00:00Z"}}`, `{"version":1}`} {
		if _, err := Load([]byte(bad), Default()); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}
