package points

import (
	"slices"
	"time"
)

// Candidate is a recovery point as retention sees it.
type Candidate struct {
	At     time.Time // when it was committed here
	Pinned bool
	App    bool // application-consistent
}

// Retain decides which points (oldest first) a policy keeps at time now; it is
// a pure function. The newest point and pinned ones always stay. Of a bucket
// the first application-consistent point stays, else the first.
//
// A row's age is counted to the end of the next row's bucket, so that all
// points of a bucket lose their protection together and are thinned in one
// merge instead of one by one.
func (p Policy) Retain(cs []Candidate, now time.Time) []bool {
	p = p.withDefaults()
	keep := make([]bool, len(cs))
	for i, row := range p.Grid {
		var bucket time.Duration
		if i+1 < len(p.Grid) {
			bucket = p.Grid[i+1].Every
		}
		row.mark(cs, now, bucket, keep)
	}
	kept := 0
	for i, c := range cs {
		if i == len(cs)-1 || c.Pinned {
			keep[i] = true
		}
		if keep[i] {
			kept++
		}
	}
	for i := 0; i < len(cs)-1 && kept > p.Max; i++ {
		if keep[i] && !cs[i].Pinned {
			keep[i] = false
			kept--
		}
	}
	return keep
}

// mark keeps what one row wants: one point of each bucket young enough.
func (r Row) mark(cs []Candidate, now time.Time, bucket time.Duration, keep []bool) {
	chosen := -1 // of the bucket last
	var last time.Time
	for i, c := range cs {
		end := c.At
		if bucket > 0 {
			end = c.At.Truncate(bucket).Add(bucket)
		}
		if now.Sub(end) > r.For {
			continue
		}
		if r.Every == 0 {
			keep[i] = true
			continue
		}
		b := c.At.Truncate(r.Every)
		switch {
		case chosen < 0 || !b.Equal(last):
			if chosen >= 0 {
				keep[chosen] = true
			}
			chosen, last = i, b
		case c.App && !cs[chosen].App:
			chosen = i
		}
	}
	if chosen >= 0 {
		keep[chosen] = true
	}
}

// due reports whether a state committed at is to become a point when the
// newest one is of last. A policy that keeps one point per bucket makes no more.
func (p Policy) due(last, at time.Time) bool {
	switch {
	case len(p.Grid) == 0:
		return false
	case at.Before(last):
		return true
	case at.Sub(last) < p.MinDistance:
		return false
	}
	finest := slices.MinFunc(p.Grid, func(a, b Row) int { return int(min(max(a.Every-b.Every, -1), 1)) }).Every
	return finest == 0 || !at.Truncate(finest).Equal(last.Truncate(finest))
}

// horizon is the age at which the policy lets go of every point.
func (p Policy) horizon() time.Duration {
	var h time.Duration
	for _, r := range p.Grid {
		h = max(h, r.For)
	}
	return h
}
