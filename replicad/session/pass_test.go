package session

import (
	"testing"
	"time"

	"kvmreplica/replicad/dataplane"
)

func TestWindowOfADay(t *testing.T) {
	at := func(clock string) time.Time {
		x, err := time.Parse("2006-01-02 15:04:05", "2026-05-06 "+clock)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	for _, c := range []struct {
		window, now string
		wait        time.Duration
	}{
		{"", "13:00:00", 0},
		{"08:00-18:00", "08:00:00", 0},
		{"08:00-18:00", "17:59:59", 0},
		{"08:00-18:00", "18:00:00", 14 * time.Hour},
		{"08:00-18:00", "07:59:30", 30 * time.Second},
		{"22:00-06:00", "23:30:00", 0},
		{"22:00-06:00", "05:59:59", 0},
		{"22:00-06:00", "06:00:00", 16 * time.Hour},
		{"00:00-06:00", "00:00:00", 0},
	} {
		w, err := ParseWindow(c.window)
		if err != nil || w.String() != c.window {
			t.Fatalf("%q is read as %v: %v", c.window, w, err)
		}
		if got := w.next(at(c.now)).Sub(at(c.now)); got != c.wait || w.Holds(at(c.now)) != (c.wait == 0) {
			t.Errorf("window %q at %s: in %s, want %s", c.window, c.now, got, c.wait)
		}
	}
	for _, bad := range []string{"08:00", "8-9", "25:00-06:00", "06:00-06:00", "-", "08:00-18:00-20:00"} {
		if w, err := ParseWindow(bad); err == nil {
			t.Errorf("%q is taken for %v", bad, w)
		}
	}
}

// scanner drives a waiting machine of one disk of 64 MiB.
type scanner struct {
	m      *Machine
	now    time.Time
	read   []time.Time // of the pieces of the pass
	from   []int64
	cuts   []time.Time
	differ int64
}

func newScanner(cfg MachineConfig, now time.Time) *scanner {
	cfg.Interval, cfg.Rand = 10*time.Minute, func() float64 { return 0 }
	s := &scanner{m: NewMachine(cfg, now), now: now}
	s.m.protected, s.m.phase, s.m.nextCut = true, Waiting, now.Add(10*time.Minute)
	s.m.wake = s.m.nextCut
	return s
}

func (s *scanner) do(ev Event) {
	acts := s.m.Step(s.now, ev)
	for len(acts) == 1 {
		switch a := acts[0].(type) {
		case DoScrub:
			s.read, s.from = append(s.read, s.now), append(s.from, a.From.Offset)
			acts = s.m.Step(s.now, EvScrubbed{Next: Cursor{"vda", a.From.Offset + scrubWindow}, Bytes: scrubWindow, Mismatched: s.differ, Done: a.From.Offset+scrubWindow == 64<<20})
		case DoFreeze:
			s.cuts = append(s.cuts, s.now)
			s.m.Step(s.now, EvFrozen{Epoch: dataplane.Epoch{Empty: true, Cut: s.now}})
			acts = s.m.Step(s.now, EvBeaten{})
		default:
			return
		}
	}
}

// until lets time pass in the machine's own steps.
func (s *scanner) until(end time.Time) {
	for {
		at, ok := s.m.Wake()
		if !ok || at.After(end) {
			s.now = end
			return
		}
		s.now = at
		s.do(EvWake{})
	}
}

func TestComparisonOnDemandKeepsRateAndWindowAndCutsGoOn(t *testing.T) {
	noon := time.Date(2026, 5, 6, 12, 0, 0, 0, time.UTC)
	s := newScanner(MachineConfig{Verified: true, ScrubRate: 1 << 40}, noon)
	s.until(noon.Add(time.Hour))
	if len(s.read) != 0 || len(s.cuts) != 6 {
		t.Fatalf("before anything is asked: %d pieces, %d cuts", len(s.read), len(s.cuts))
	}
	w, _ := ParseWindow("22:00-22:40")
	s.do(EvScan{Pass: Pass{ID: "a", Rate: scrubWindow / 900, Window: w}}) // a piece each quarter of an hour
	if s.m.Status().Verified {
		t.Fatal("it counts as compared while it is not")
	}
	s.until(noon.Add(36 * time.Hour))
	ten := noon.Add(10 * time.Hour)
	for i, want := range []time.Time{ten, ten.Add(15 * time.Minute), ten.Add(30 * time.Minute), ten.Add(24 * time.Hour)} {
		if i >= len(s.read) || s.read[i].Sub(want).Abs() > 2*time.Second || s.from[i] != int64(i)*scrubWindow {
			t.Fatalf("pieces at %v from %v, the one with number %d should be at %s", s.read, s.from, i, want)
		}
	}
	if st := s.m.Status(); !st.Verified || len(s.read) != 4 || st.Pass.ID != "a" {
		t.Errorf("verified %v after %d pieces", st.Verified, len(s.read))
	}
	if len(s.cuts) < 36*6-1 {
		t.Errorf("%d cuts in 36 hours", len(s.cuts))
	}
}

func TestComparisonGoesOnCountsAnewAndCanBeStopped(t *testing.T) {
	now := time.Date(2026, 5, 6, 12, 0, 0, 0, time.UTC)
	// After a restart: from the cursor, with what was found before.
	s := newScanner(MachineConfig{ScrubRate: 1 << 40, Scrub: Cursor{"vda", 32 << 20}, Pass: Pass{ID: "a", Rate: scrubWindow / 60}, Mismatched: 4096}, now)
	s.differ = 4096
	s.do(EvWake{})
	if len(s.from) != 1 || s.from[0] != 32<<20 || s.m.Status().Mismatched != 8192 {
		t.Fatalf("goes on at %v with %d bytes that differ", s.from, s.m.Status().Mismatched)
	}
	// Other bounds while it is under way: not from the beginning.
	s.do(EvScan{Pass: Pass{ID: "a", Rate: 1 << 40}})
	if len(s.from) != 2 || s.from[1] != 48<<20 || !s.m.Status().Verified {
		t.Fatalf("with other bounds: %v", s.from)
	}
	// Asked for again: from the beginning, counting from nothing; also while
	// another pass, such as the one after the initial copy, is half way.
	half := newScanner(MachineConfig{ScrubRate: 1 << 40, Scrub: Cursor{"vda", 32 << 20}}, now)
	half.do(EvScan{Pass: Pass{ID: "b", Rate: scrubWindow / 60}})
	if len(half.from) != 1 || half.from[0] != 0 {
		t.Fatalf("another pass was half way: begins at %v", half.from)
	}
	s.differ = 0
	s.do(EvScan{Pass: Pass{ID: "b", Rate: scrubWindow / 60}})
	if st := s.m.Status(); len(s.from) != 3 || s.from[2] != 0 || st.Mismatched != 0 || len(st.Conditions) != 0 {
		t.Fatalf("asked for again: %v, %+v", s.from, st)
	}
	s.do(EvScan{Stop: true, Verified: true})
	s.until(now.Add(time.Hour))
	if len(s.from) != 3 || !s.m.Status().Verified {
		t.Errorf("after the stop: %v", s.from)
	}
}
