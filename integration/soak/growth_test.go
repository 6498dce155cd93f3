package soak_test

import (
	"strings"
	"testing"
	"time"
)

// A run in which one thing leaks, little by little, is told from one that is
// only restless.
func TestWhatGrowsDuringASoakIsNamed(t *testing.T) {
	run := func(leak func(s *sample, i int64)) []sample {
		var all []sample
		for i := range int64(240) { // an hour, every 15 s
			wave := i * 7 % 11
			s := sample{
				at: time.Duration(i) * 15 * time.Second, goroutines: int(47 + wave), rss: 260<<20 + wave<<20, fds: 110 + wave,
				planeRSS: 130<<20 + wave<<20, planeFDs: 84 + wave,
			}
			if leak != nil {
				leak(&s, i)
			}
			all = append(all, s)
		}
		return all
	}
	if got := growth(t.Logf, run(nil)); len(got) != 0 {
		t.Errorf("nothing leaks, told: %q", got)
	}
	for what, leak := range map[string]func(s *sample, i int64){
		"goroutines ":              func(s *sample, i int64) { s.goroutines += int(i / 2) },
		"memory ":                  func(s *sample, i int64) { s.rss += i << 20 },
		"descriptors ":             func(s *sample, i int64) { s.fds += i / 2 },
		"data planes' memory ":     func(s *sample, i int64) { s.planeRSS += i << 20 },
		"data planes' descriptors": func(s *sample, i int64) { s.planeFDs += i / 2 },
	} {
		if got := growth(t.Logf, run(leak)); len(got) != 1 || !strings.HasPrefix(got[0], what) {
			t.Errorf("%s leak, told: %q", what, got)
		}
	}
}
