package stats

import "time"

// Schedule says when windows begin: at Start of the day on this host's clock
// and every Length from then on. The zero value is Default.
type Schedule struct {
	Start  time.Duration // since midnight
	Length time.Duration // divides a day, or is one to seven whole days
}

// Default is Hyper-V Replica's: twelve hours, from nine o'clock.
func Default() Schedule { return Schedule{Start: 9 * time.Hour, Length: 12 * time.Hour} }

const day = 24 * time.Hour

// Begin is when the window that holds now began.
func (s Schedule) Begin(now time.Time) time.Time {
	if s.Length == 0 {
		s = Default()
	}
	y, m, d := now.Date()
	if s.Length < day {
		at := time.Date(y, m, d-1, 0, 0, 0, 0, now.Location()).Add(s.Start)
		for next := at.Add(s.Length); !next.After(now); next = at.Add(s.Length) {
			at = next
		}
		return at
	}
	// Windows of whole days are counted from a Monday.
	days := int(s.Length / day)
	first := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	n := int(time.Date(y, m, d, 0, 0, 0, 0, time.UTC).Sub(first) / day)
	at := func(n int) time.Time {
		return time.Date(2024, 1, 1+n, 0, 0, 0, 0, now.Location()).Add(s.Start)
	}
	if at(n).After(now) {
		n--
	}
	n -= ((n % days) + days) % days
	return at(n)
}

// End is when the window that holds at ends.
func (s Schedule) End(at time.Time) time.Time {
	if s.Length == 0 {
		s = Default()
	}
	b := s.Begin(at)
	if s.Length < day {
		return b.Add(s.Length)
	}
	return b.AddDate(0, 0, int(s.Length/day))
}
