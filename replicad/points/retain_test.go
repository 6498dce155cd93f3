package points_test

import (
	"testing"
	"time"

	"kvmreplica/replicad/points"
)

// kept plays a point every 30 s for the given time, thinning at each, and
// returns the ages of what stays.
func kept(p points.Policy, run time.Duration) []time.Duration {
	start := time.Unix(1_700_000_000, 0)
	var times []time.Time
	now := start
	for ; now.Sub(start) < run; now = now.Add(30 * time.Second) {
		times = append(times, now)
		keep := p.Retain(at(times), now)
		var left []time.Time
		for i, k := range keep {
			if k {
				left = append(left, times[i])
			}
		}
		times = left
	}
	var ages []time.Duration
	for _, t := range times {
		ages = append(ages, now.Sub(t))
	}
	return ages
}

func at(times []time.Time) []points.Candidate {
	var out []points.Candidate
	for _, t := range times {
		out = append(out, points.Candidate{At: t})
	}
	return out
}

func TestDefaultPolicyKeepsAnHourOfEverythingAndADayOfHours(t *testing.T) {
	ages := kept(points.Policy{}, 30*time.Hour)
	var recent, hourly int
	for _, a := range ages {
		if a <= time.Hour {
			recent++
		} else {
			hourly++
		}
	}
	if recent < 119 || recent > 121 {
		t.Errorf("%d points of the last hour, want 120", recent)
	}
	if hourly < 22 || hourly > 24+120 {
		t.Errorf("%d older points", hourly)
	}
	if oldest := ages[0]; oldest < 23*time.Hour || oldest > 25*time.Hour {
		t.Errorf("the oldest is %v old", oldest)
	}
	for i := 1; i < len(ages); i++ {
		if gap := ages[i-1] - ages[i]; gap > time.Hour+time.Minute {
			t.Errorf("gap of %v before the point of age %v", gap, ages[i])
		}
	}
}

func TestPolicyKeepsNewestPinnedAndNoMoreThanMax(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	var times []time.Time
	for i := range 50 {
		times = append(times, now.Add(time.Duration(i-50)*time.Second))
	}
	cs := at(times)
	cs[3].Pinned = true
	keep := points.Policy{Max: 5}.Retain(cs, now)
	n := 0
	for _, k := range keep {
		if k {
			n++
		}
	}
	if n != 5 || !keep[3] || !keep[49] || keep[4] {
		t.Errorf("%d kept: %v", n, keep)
	}
	// A clock that jumped back keeps everything; one that jumped ahead keeps
	// the newest.
	if keep := (points.Policy{}).Retain(at(times), now.Add(-1000*time.Hour)); !keep[0] {
		t.Error("dropped points of the future")
	}
	if keep := (points.Policy{}).Retain(at(times), now.Add(1000*time.Hour)); !keep[49] || keep[0] {
		t.Errorf("after a jump ahead: %v", keep)
	}
}
