package points

import (
	"errors"
	"fmt"
	"time"
)

// When room is short the store gives up, in this order: the oldest recovery
// point that nobody pinned or views, again and again; never the newest one.
// With none left it stops acknowledging epochs, which the primary then keeps.

// shortage says why room is short, "" when it is not; mu is not held.
func (s *Store) shortage() string {
	s.mu.Lock()
	limit, reserve := s.limits.UndoBytes, s.limits.Reserve
	var undo int64
	for _, g := range s.segs {
		undo += g.bytes.Load()
	}
	s.mu.Unlock()
	if limit > 0 && undo > limit {
		return fmt.Sprintf("recovery points take %d bytes, %d are allowed", undo, limit)
	}
	if free := s.freeSpace(); reserve > 0 && free >= 0 && free < reserve {
		return fmt.Sprintf("%d bytes are free, %d are to stay free", free, reserve)
	}
	return ""
}

// freeSpace is -1 when it is not known.
func (s *Store) freeSpace() int64 {
	if s.cfg.Free == nil {
		return -1
	}
	n, err := s.cfg.Free()
	if err != nil {
		s.log.Warn("free space is not known", "err", err)
		return -1
	}
	return n
}

// sacrifice gives up the oldest point that may go, if there is one.
func sacrifice(cs []Candidate, keep []bool) bool {
	for i := range max(0, len(cs)-1) {
		if keep[i] && !cs[i].Pinned {
			keep[i] = false
			return true
		}
	}
	return false
}

// criticalShare of the reserve is what acknowledgements are held back at.
const criticalShare = 4

// room refuses a commit when the space kept free is nearly used up and no
// point is left that could be given up.
func (s *Store) room() error {
	s.mu.Lock()
	reserve := s.limits.Reserve
	spare := false
	for i := range max(0, len(s.segs)-1) {
		g := s.segs[i]
		spare = spare || s.pins[g.start.ordinal] == 0 && !s.kept(g.start.pos)
	}
	s.mu.Unlock()
	if reserve <= 0 || spare {
		return nil
	}
	if free := s.freeSpace(); free >= 0 && free < reserve/criticalShare {
		return fmt.Errorf("%w: %d bytes are free, %d are to stay free, and no recovery point can be given up", ErrNoSpace, free, reserve)
	}
	return nil
}

// relieve gives up a point after work failed for want of room; did reports
// that it is worth trying again.
func (s *Store) relieve(err error) (did bool, out error) {
	if !errors.Is(err, ErrNoSpace) {
		return false, err
	}
	drop := s.dropOldest()
	if drop == nil {
		return false, err
	}
	s.log.Warn("recovery point given up for want of room", "pos", drop.start.pos, "cut", drop.start.cut, "err", err)
	return true, s.fail(s.letGo(drop))
}

// dropOldest takes the oldest segment out if its point may go. Others in
// between would have to be merged, which takes room itself.
func (s *Store) dropOldest() *segment {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.segs) < 2 {
		return nil
	}
	g := s.segs[0]
	if s.pins[g.start.ordinal] > 0 || s.kept(g.start.pos) || g.refs > 0 {
		return nil
	}
	s.segs = append([]*segment(nil), s.segs[1:]...)
	s.sacrificed++
	return g
}

// SetPolicy changes which points are kept and what all undo together may take,
// 0 = no limit but space. Points are thinned as the store goes on.
func (s *Store) SetPolicy(p Policy, undoBytes int64) {
	s.mu.Lock()
	s.policy, s.limits.UndoBytes = p.withDefaults(), undoBytes
	s.mu.Unlock()
	s.signal()
}

// Policy is the one in force.
func (s *Store) Policy() Policy {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.policy
}

// Forecast says how the space of recovery points develops.
type Forecast struct {
	Rate int64         // undo bytes per day that are written at present
	Full time.Duration // until points must be given up; negative = not foreseen
}

// forecastWindow is what counts as present.
const forecastWindow = time.Hour

// forecast is pure: undo per point (oldest first), the bytes that may still be
// taken (negative = unknown) and the age at which the policy lets points go.
func forecast(starts []time.Time, undo []int64, room int64, horizon time.Duration, now time.Time) Forecast {
	out := Forecast{Full: -1}
	first := -1
	var written int64
	for i := range starts {
		if i == len(starts)-1 || now.Sub(starts[i+1]) <= forecastWindow {
			if first < 0 {
				first = i
			}
			written += undo[i]
		}
	}
	if first < 0 {
		return out
	}
	span := now.Sub(starts[first])
	if span < time.Minute {
		return out // too little to tell
	}
	perSecond := float64(written) / span.Seconds()
	out.Rate = int64(perSecond * (24 * time.Hour).Seconds())
	if room < 0 || perSecond <= 0 {
		return out
	}
	until := float64(room) / perSecond
	if age := now.Sub(starts[0]); until >= max(0, horizon-age).Seconds() {
		return out // the oldest points end by themselves before that
	}
	out.Full = time.Duration(until * float64(time.Second))
	return out
}

// forecast looks at the store; s.mu is held.
func (s *Store) forecast(free int64, now time.Time) Forecast {
	room := int64(-1)
	var starts []time.Time
	var undo []int64
	var total int64
	for _, g := range s.segs {
		if g.start.ordinal == 0 {
			continue
		}
		starts, undo = append(starts, g.start.at), append(undo, g.bytes.Load())
		total += g.bytes.Load()
	}
	if free >= 0 {
		room = max(0, free-s.limits.Reserve)
	}
	if limit := s.limits.UndoBytes; limit > 0 && (room < 0 || limit-total < room) {
		room = max(0, limit-total)
	}
	return forecast(starts, undo, room, s.policy.horizon(), now)
}
