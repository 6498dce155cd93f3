package points_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/boundtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

func choosable() []points.Point {
	at := time.Date(2026, 11, 22, 10, 31, 5, 400, time.UTC)
	gen := delta.Generation{0x4b, 0x1f, 0x20, 0xc1, 9}
	ps := []points.Point{
		{Ordinal: 7, Cut: at, Pos: delta.Pos{Generation: gen, Epoch: 17, Digest: delta.Digest{0xaa}}},
		{Ordinal: 9, Cut: at.Add(10 * time.Second), App: true, Pos: delta.Pos{Generation: gen, Epoch: 19, Digest: delta.Digest{0xbb}}},
		{Ordinal: 12, Cut: at.Add(24 * time.Hour), Pos: delta.Pos{Generation: delta.Generation{0x4b, 0x1f, 0x20, 0xc2}, Epoch: 17, Digest: delta.Digest{0xcc}}},
		{Ordinal: 15, Cut: at.Add(25 * time.Hour), Latest: true, Pos: delta.Pos{Generation: gen, Epoch: 30, Digest: delta.Digest{0xdd}}},
	}
	return ps
}

func TestAPointIsFoundByEveryWayToNameIt(t *testing.T) {
	for text, want := range map[string]uint64{
		"": 15, "latest": 15, " latest ": 15, "oldest": 7, "latest-app": 9, "9": 9, "#9": 9,
		"2026-11-22T10:31:05": 7, "2026-11-22T10:31:05Z": 7, "2026-11-22 10:31:1": 9, "2026-11-22t10:31:1": 9,
		"11:": 15, "2026-11-23T10": 12, "10:31:15": 9, "2026-11-22T12:31:05+02:00": 7,
		"4b1f20c1/17": 7, "4b1f20c2/17": 12, "4B1F/19": 9, "4b1f/17/aa": 7, "4b1f/17/cc": 12,
	} {
		p, err := points.Choose(choosable(), text)
		if err != nil || p.Ordinal != want {
			t.Errorf("%q is point %d, %v; want %d", text, p.Ordinal, err, want)
		}
	}
	for _, p := range choosable() { // what is shown is understood
		for _, text := range []string{p.TimeText(), p.PosText(), p.Pos.String()} {
			if got, err := points.Choose(choosable(), text); err != nil || got.Ordinal != p.Ordinal {
				t.Errorf("%q is point %d, %v; want %d", text, got.Ordinal, err, p.Ordinal)
			}
		}
	}
}

func TestWhatFitsSeveralPointsIsRefusedWithTheCandidates(t *testing.T) {
	for _, text := range []string{"2026-11-22", "10:31", "4b1f/17", "2026-"} {
		_, err := points.Choose(choosable(), text)
		var a *points.AmbiguousError
		if !errors.As(err, &a) || len(a.Candidates) < 2 || !strings.Contains(err.Error(), a.Candidates[0].TimeText()) {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, text := range []string{"8", "2025-", "4b1f20c1/18", "4b1f20c1/17/ab", "23:59"} {
		if _, err := points.Choose(choosable(), text); !errors.Is(err, points.ErrNoPoint) {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, text := range []string{"0", "-1", "newest", "4b1/17", "4b1f20c1/", "/17", "xyzt/17", "a:b", "2026-1122", "1:2:3", strings.Repeat("9", 400), "4b1f/17/zz", "10:31/x", "T10:31"} {
		if p, err := points.Choose(choosable(), text); !errors.Is(err, points.ErrChoice) {
			t.Errorf("%.40q: point %d, %v", text, p.Ordinal, err)
		}
	}
	if _, err := points.Choose(nil, "latest"); !errors.Is(err, points.ErrNoPoint) {
		t.Errorf("latest of nothing: %v", err)
	}
	ps := choosable()
	ps[0].Damage = points.ErrDamaged
	if _, err := points.Choose(ps, "7"); !errors.Is(err, points.ErrDamaged) {
		t.Errorf("a damaged point: %v", err)
	}
	if p, err := points.Choose(ps, "oldest"); err != nil || p.Ordinal != 9 {
		t.Errorf("oldest is %d, %v", p.Ordinal, err)
	}
}

func FuzzChooseNeverPanics(f *testing.F) {
	for _, s := range []string{"latest", "10:31", "4b1f20c1/17/aa", "2026-11-22T10:31:05+02:00", "#3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		defer boundtest.Input(t)()
		if p, err := points.Choose(choosable(), s); err == nil && p.Ordinal == 0 {
			t.Errorf("%q is no point and no error", s)
		}
	})
}

func TestARetentionReadsAsItIsWritten(t *testing.T) {
	for text, want := range map[string]string{
		"": "all:1h,1h:1d", "0": "0", "24": "24", "3": "3", "all:1h, 1h:1d ,1d:30d": "all:1h,1h:1d,1d:30d",
		"15m:24h": "15m:1d", "1h:24h": "24", "1d:4w": "1d:28d",
	} {
		p, err := points.ParsePolicy(text)
		if err != nil || p.String() != want {
			t.Errorf("%q reads as %q, %v; want %q", text, p, err, want)
			continue
		}
		again, err := points.ParsePolicy(p.String())
		if err != nil || again.String() != want {
			t.Errorf("%q reads as %q, %v", p, again, err)
		}
	}
	for _, text := range []string{
		"25", "-1", "all", "1h", "1h:", ":1h", "1x:1h", "all:0h", "1h:30m", "all:1h,30m:30m", "1h:1d,30m:2d", "0s:1h",
		"all:1h,all:2h", "1s:30d", "1h:99999w", strings.Repeat("1h:1d,", 9), strings.Repeat("x", 1000), "all:30d", "1h:9223372036854775807s",
	} {
		if p, err := points.ParsePolicy(text); !errors.Is(err, points.ErrPolicy) {
			t.Errorf("%.40q reads as %v, %v", text, p, err)
		}
	}
}

// TestEveryBucketOfAGridKeepsOnePoint plays a month of the grid the product
// advertises, a cut every five minutes, and an application point a day.
func TestEveryBucketOfAGridKeepsOnePoint(t *testing.T) {
	p, err := points.ParsePolicy("all:1h,1h:1d,1d:30d")
	must(t, err)
	start := time.Date(2026, 1, 1, 0, 2, 0, 0, time.UTC)
	var cs []points.Candidate
	now := start
	for ; now.Sub(start) < 40*24*time.Hour; now = now.Add(5 * time.Minute) {
		cs = append(cs, points.Candidate{At: now, App: now.Hour() == 13 && now.Minute() == 32})
		var left []points.Candidate
		for i, k := range p.Retain(cs, now) {
			if k {
				left = append(left, cs[i])
			}
		}
		cs = left
	}
	var hour, day, month, app int
	for _, c := range cs {
		switch age := now.Sub(c.At); {
		case age <= time.Hour:
			hour++
		case age <= 49*time.Hour: // the hours of a day go together, when all are over a day old
			day++
		default:
			month++
			if c.App {
				app++
			}
		}
	}
	if hour != 12 || day < 23 || day > 49+12 || month < 27 || month > 31 {
		t.Errorf("%d of the last hour, %d of the day, %d of the month", hour, day, month)
	}
	if app != month {
		t.Errorf("%d of %d daily points are the application-consistent ones", app, month)
	}
}
