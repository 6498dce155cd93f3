package model

import (
	"fmt"
	"math/bits"
)

// clearable lists the regions the clean step may forget.
func (y *system) clearable(s *state, upTo uint8) uint8 {
	var out uint8
	busy := s.active | s.frozen | s.late
	pinned := uint8(0)
	for _, w := range s.slots {
		if w.write != 0 && y.c.Mutant != ClearPinned {
			pinned |= y.touched[w.write-1]
		}
	}
	for r := range y.nRegions {
		bit := uint8(1) << r
		if s.durable&bit != 0 && pinned&bit == 0 && busy&y.inRegion[r] == 0 && s.lastTag[r] <= upTo {
			out |= bit
		}
	}
	return out
}

func (y *system) cleaning(s *state, out emit) {
	n := *s
	switch s.clean {
	case resting:
		if s.acked == s.base && y.clearable(s, s.acked) == 0 {
			return
		}
		if y.c.Mutant != ClearWithoutSync {
			for g := range y.n {
				n.platter[g] = 1 << s.image[g]
			}
		}
		n.clean, n.covered = imageSynced, s.acked
		out(n, label{doImageSync, n.covered}, "")
	case imageSynced:
		if y.c.Mutant == ClearForLaterAck {
			n.covered = s.acked
		}
		if y.c.Mutant == BaseAfterClears {
			out(n, label{doClear, y.clearable(s, s.covered)}, y.clear(&n, cleared))
			return
		}
		y.writeBase(n, out)
	case baseWritten:
		n.bases = 1 << s.base
		if n.clean = baseSynced; y.c.Mutant == BaseAfterClears {
			n.clean, n.covered = resting, 0
		}
		out(n, label{doBaseSync, s.base}, "")
	case baseSynced:
		out(n, label{doClear, y.clearable(s, s.covered)}, y.clear(&n, resting))
	case cleared:
		y.writeBase(n, out)
	}
}

func (y *system) writeBase(n state, out emit) {
	n.base = n.covered
	n.bases |= 1 << n.base
	n.clean = baseWritten
	out(n, label{doBaseWrite, n.base}, "")
}

func (y *system) clear(n *state, then phase) (broken string) {
	rs := y.clearable(n, n.covered)
	if y.c.Rules {
		broken = y.mayClear(n, rs)
	}
	n.shown &^= rs
	n.durable &^= rs
	n.mayZero |= rs
	if n.clean = then; then == resting {
		n.covered = 0
	}
	return broken
}

// mayClear are I6 and I10 as rules.
func (y *system) mayClear(s *state, rs uint8) string {
	for _, w := range s.slots {
		if w.write != 0 && y.touched[w.write-1]&rs != 0 {
			return fmt.Sprintf("I6: a region of write %d, which is running, is cleared", w.write)
		}
	}
	for g := range y.n {
		if y.granulesOf(rs)&(1<<g) != 0 && s.platter[g] != 1<<s.image[g] {
			return fmt.Sprintf("I6: the region of granule %d is cleared, its content is not synced", g)
		}
	}
	for r := range y.nRegions {
		oldest := uint8(bits.TrailingZeros8(s.bases))
		if rs&(1<<r) != 0 && oldest < s.lastTag[r] {
			return fmt.Sprintf("I10: region %d, last written in epoch %d, is cleared while the durable base may be %d", r, s.lastTag[r], oldest)
		}
	}
	return ""
}

// comparing: while no epoch is frozen, a dirty granule that no running write
// touches may be read, found equal to what the replica committed, and become
// clean - unless it was written, or the position changed, in between.
func (y *system) comparing(s *state, out emit) {
	if s.compared != 0 {
		n := *s
		n.active &^= 1 << (s.compared - 1)
		n.compared = 0
		out(n, label{doCompareEnd, s.compared - 1}, "")
		return
	}
	if !s.session || s.epoch != 0 || s.acked != s.committed {
		return
	}
	for g := range y.n {
		bit := uint8(1) << g
		if s.active&bit == 0 || s.image[g] != s.replica[g] || y.running(s, bit) {
			continue
		}
		n := *s
		n.compared = uint8(g) + 1
		out(n, label{doCompare, uint8(g)}, "")
	}
}

// running reports whether a write to the granule is in flight.
func (y *system) running(s *state, bit uint8) bool {
	for _, w := range s.slots {
		if w.write != 0 && y.targets[w.write-1]&bit != 0 {
			return y.c.Mutant != CompareForgetsWrites
		}
	}
	return false
}

// touch voids the comparison of a granule that is being written.
func (y *system) touch(n *state, granules uint8) {
	if n.compared != 0 && granules&(1<<(n.compared-1)) != 0 {
		n.compared = 0
	}
}
