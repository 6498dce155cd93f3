package model

import "fmt"

// system is a configuration made ready for stepping.
type system struct {
	c         Config
	n         int // granules
	all       uint8
	regions   uint8   // all regions
	disk0     uint8   // granules of disk 0
	targets   []uint8 // granules of each write
	touched   []uint8 // regions of each write
	inRegion  [maxRegions]uint8
	regionOf  [maxGranules]uint8
	nRegions  int
	diskAfter uint8 // granules of the other disks
}

func newSystem(c Config) (*system, error) {
	y := &system{c: c, n: len(c.Granules)}
	if y.n == 0 || y.n > maxGranules || len(c.Program) > 7 || c.Epochs > 6 {
		return nil, fmt.Errorf("model of %d granules, %d writes, %d epochs: at most 6, 7 and 6", y.n, len(c.Program), c.Epochs)
	}
	for g, at := range c.Granules {
		if at.Region >= maxRegions {
			return nil, fmt.Errorf("region %d: at most %d", at.Region, maxRegions-1)
		}
		y.all |= 1 << g
		y.regions |= 1 << at.Region
		y.inRegion[at.Region] |= 1 << g
		y.regionOf[g] = at.Region
		y.nRegions = max(y.nRegions, int(at.Region)+1)
		if at.Disk == 0 {
			y.disk0 |= 1 << g
		}
	}
	y.diskAfter = y.all &^ y.disk0
	for _, t := range c.Program {
		var gs, rs uint8
		for _, g := range t {
			if int(g) >= y.n {
				return nil, fmt.Errorf("write to granule %d of %d", g, y.n)
			}
			gs |= 1 << g
			rs |= 1 << y.regionOf[g]
		}
		y.targets = append(y.targets, gs)
		y.touched = append(y.touched, rs)
	}
	return y, nil
}

// start is a VM just seeded: both sides equal, nothing marked.
func (y *system) start() state {
	s := state{current: 1, session: true, highs: 1, bases: 1}
	for g := range y.n {
		s.platter[g] = 1
	}
	s.mayZero = y.regions
	return s
}

// granulesOf is the set of granules in the regions.
func (y *system) granulesOf(regions uint8) uint8 {
	var gs uint8
	for r := range y.nRegions {
		if regions&(1<<r) != 0 {
			gs |= y.inRegion[r]
		}
	}
	return gs
}

// view is the frozen epoch's content of g as it would be read now.
func view(s *state, g int) uint8 {
	if s.kept&(1<<g) != 0 {
		return s.copied[g]
	}
	return s.image[g]
}

// drained reports whether no write of the frozen epoch is running.
func drained(s *state) bool {
	for _, w := range s.slots {
		if w.write != 0 && w.tag != 0 && w.tag <= s.epoch {
			return false
		}
	}
	return !s.half
}

// dirty is what this host would ship or compare if it asked the replica where
// it is: the exact bits when the replica is not behind the position they are
// relative to, the marked regions too when it is not behind the base, else all.
func (y *system) dirty(s *state) uint8 {
	exact := s.active | s.frozen | s.late
	switch {
	case s.session || s.committed >= s.acked:
		return exact
	case s.committed < s.base:
		return y.all
	case y.c.Mutant == BehindAckedIsTrusted:
		return exact
	}
	return exact | y.granulesOf(s.durable)
}

// check tells which invariant a state breaks.
func (y *system) check(s *state) string {
	dirty := y.dirty(s)
	for g := range y.n {
		if s.image[g] != s.replica[g] && dirty&(1<<g) == 0 {
			return fmt.Sprintf("I1: granule %d is %d here and %d at the replica, and clean", g, s.image[g], s.replica[g])
		}
	}
	if s.epoch != 0 && drained(s) {
		for g := range y.n {
			if s.frozen&(1<<g) != 0 && view(s, g) != s.cut[g] {
				return fmt.Sprintf("I4: granule %d of frozen epoch %d reads %d and was %d at the cut", g, s.epoch, view(s, g), s.cut[g])
			}
		}
	}
	return ""
}

// normalise forgets what can no longer matter, so that states which differ in
// nothing else are one.
func (y *system) normalise(s *state) {
	if int(s.rollbacks) == y.c.Rollbacks || s.previous == s.committed {
		s.previous, s.before = 0, [maxGranules]uint8{}
	}
	if int(s.next) == len(y.targets) {
		s.sawDone = 0
	}
	for i := range s.slots {
		if s.slots[i].at == tagged {
			s.slots[i].saw = 0
		}
	}
	if a, b := s.slots[0].write, s.slots[1].write; b != 0 && (a == 0 || b < a) {
		s.slots[0], s.slots[1] = s.slots[1], s.slots[0] // connections are alike
	}
	for r := range y.nRegions {
		if s.durable&(1<<r) == 0 && s.lastTag[r] != 0 && !y.inUse(s, 1<<r) {
			s.lastTag[r] = 0
		}
	}
}

// inUse reports whether a running write touches one of the regions.
func (y *system) inUse(s *state, regions uint8) bool {
	for _, w := range s.slots {
		if w.write != 0 && y.touched[w.write-1]&regions != 0 {
			return true
		}
	}
	return false
}
