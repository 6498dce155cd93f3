package model

import "math/bits"

// forget is what every crash does to memory.
func forget(n *state) {
	n.crashes++
	n.slots = [2]slot{}
	n.half, n.session = false, false
	unfreeze(n)
	n.clean, n.covered = resting, 0
	n.sawDone, n.compared = 0, 0
}

// kill: the process dies, the kernel lives. The next one takes the exact bits
// of both bitmaps and the numbers from boot-scoped memory, and makes durable
// what it reads from its files before it relies on it.
func (y *system) kill(s *state, out emit) {
	n := *s
	if y.c.Mutant != KillLosesFrozen {
		n.active |= s.frozen
	}
	n.active |= s.late
	n.frozen, n.late = 0, 0
	forget(&n)
	if y.c.Mutant != OpenTrustsPages {
		y.syncMarks(&n)
	}
	n.durable = n.shown
	n.bases, n.highs = 1<<n.base, 1<<n.highest
	y.raise(&n, n.durable)
	out(n, label{doKill, 0}, "")
}

// stop: no write is running; the images are synced, the exact bits and the
// position they are relative to are written and become durable together.
func (y *system) stop(s *state, out emit) {
	if s.slots[0].write != 0 || s.slots[1].write != 0 || s.clean != resting || s.half {
		return
	}
	n := *s
	n.active |= s.frozen | s.late
	n.frozen, n.late = 0, 0
	crashes := s.crashes
	forget(&n)
	n.crashes, n.stops = crashes, s.stops+1
	for g := range y.n {
		n.platter[g] = 1 << s.image[g]
	}
	y.syncMarks(&n)
	n.durable = n.shown
	if y.c.Mutant == StopKeepsBase {
		n.acked = s.base
	} else {
		n.base = s.acked
	}
	n.bases, n.highs = 1<<n.base, 1<<n.highest
	y.raise(&n, n.durable)
	out(n, label{doStop, 0}, "")
}

// raise notes that bits of the regions will travel in the current epoch at the
// earliest: they may be cleared only when that is acknowledged, even if nobody
// writes to them any more (I6: the last epoch that contained them).
func (y *system) raise(n *state, regions uint8) {
	if y.c.Mutant == RecoveredAsOld {
		return
	}
	for r := range y.nRegions {
		if regions&(1<<r) != 0 {
			n.lastTag[r] = n.current
		}
	}
}

// cutPower calls out for everything a power cut may leave: each granule, each
// mark, the base and the highest number on its own.
func (y *system) cutPower(s *state, out emit) {
	n := *s
	forget(&n)
	n.active, n.frozen, n.late = 0, 0, 0
	n.lastTag = [maxRegions]uint8{}
	survivors := uint8(0)
	y.eachGranule(n, 0, func(n state) {
		// Marks that may be there or not: walk the subsets.
		doubt := s.mayOne & s.mayZero
		for sub := doubt; ; sub = (sub - 1) & doubt {
			n.shown = s.mayOne&^s.mayZero | sub
			n.durable = n.shown
			y.syncMarks(&n)
			n.active = y.granulesOf(n.shown)
			for b := range each(s.bases) {
				for h := range each(s.highs) {
					n.base, n.bases, n.acked = b, 1<<b, b
					n.highest, n.highs, n.current = h, 1<<h, h+1
					y.raise(&n, n.shown)
					survivors++
					out(n, label{doCut, survivors}, "")
				}
			}
			if sub == 0 {
				return
			}
		}
	})
}

// eachGranule chooses a surviving value for each granule from g on.
func (y *system) eachGranule(n state, g int, then func(state)) {
	if g == y.n {
		then(n)
		return
	}
	for v := range each(n.platter[g]) {
		m := n
		m.image[g], m.platter[g] = v, 1<<v
		y.eachGranule(m, g+1, then)
	}
}

// each yields the members of a small set.
func each(set uint8) func(yield func(uint8) bool) {
	return func(yield func(uint8) bool) {
		for set != 0 {
			v := uint8(bits.TrailingZeros8(set))
			set &= set - 1
			if !yield(v) {
				return
			}
		}
	}
}
