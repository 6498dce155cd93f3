package points

import "time"

// Retain decides which points (oldest first) a policy keeps at time now; it is
// a pure function. The newest point and pinned ones always stay.
//
// A row's age is counted to the end of the next row's bucket, so that all
// points of a bucket lose their protection together and are thinned in one
// merge instead of one by one.
func (p Policy) Retain(times []time.Time, pinned []bool, now time.Time) []bool {
	p = p.withDefaults()
	keep := make([]bool, len(times))
	for i, row := range p.Grid {
		var bucket time.Duration
		if i+1 < len(p.Grid) {
			bucket = p.Grid[i+1].Every
		}
		row.mark(times, now, bucket, keep)
	}
	kept := 0
	for i := range times {
		if i == len(times)-1 || (i < len(pinned) && pinned[i]) {
			keep[i] = true
		}
		if keep[i] {
			kept++
		}
	}
	for i := 0; i < len(times)-1 && kept > p.Max; i++ {
		if keep[i] && !(i < len(pinned) && pinned[i]) {
			keep[i] = false
			kept--
		}
	}
	return keep
}

// mark keeps what one row wants: the first point of each bucket young enough.
func (r Row) mark(times []time.Time, now time.Time, bucket time.Duration, keep []bool) {
	var last time.Time
	first := true
	for i, t := range times {
		end := t
		if bucket > 0 {
			end = t.Truncate(bucket).Add(bucket)
		}
		if now.Sub(end) > r.For {
			continue
		}
		b := t
		if r.Every > 0 {
			b = t.Truncate(r.Every)
		}
		if r.Every == 0 || first || !b.Equal(last) {
			keep[i] = true
		}
		first, last = false, b
	}
}
