package model

import (
	"fmt"
	"math/bits"
	"strings"
)

// The steps, for traces.
const (
	doIssue uint8 = iota + 1
	doIntentSync
	doTag
	doCopy
	doWrite
	doFreeze
	doFreezeRest
	doPersistNumber
	doShip
	doCommit
	doAck
	doAbandon
	doLinkLost
	doHandshake
	doRollback
	doImageSync
	doBaseWrite
	doBaseSync
	doClear
	doCompare
	doCompareEnd
	doStop
	doKill
	doCut
)

// stepName is a kind of step in words, with a place for its argument.
func stepName(kind uint8) string {
	switch kind {
	case doIssue:
		return "write %d is issued, takes its range and writes its marks"
	case doIntentSync:
		return "connection %d: the marks are synced"
	case doTag:
		return "connection %d: takes its tag and sets its bits"
	case doCopy:
		return "connection %d: copies old content before its write"
	case doWrite:
		return "connection %d: writes a granule"
	case doFreeze:
		return "freeze epoch %d"
	case doFreezeRest:
		return "freeze the other disks of epoch %d"
	case doPersistNumber:
		return "number %d becomes durable"
	case doShip:
		return "the first byte of epoch %d leaves"
	case doCommit:
		return "the replica commits epoch %d"
	case doAck:
		return "the primary takes the ack of epoch %d"
	case doAbandon:
		return "epoch %d is abandoned"
	case doLinkLost:
		return "the link breaks"
	case doHandshake:
		return "handshake: the replica is at %d"
	case doRollback:
		return "the replica is put back to %d"
	case doImageSync:
		return "clean step for position %d: images synced"
	case doBaseWrite:
		return "clean step: base %d written"
	case doBaseSync:
		return "clean step: base %d durable"
	case doClear:
		return "clean step: regions %03b cleared"
	case doCompare:
		return "granule %d is compared with the replica and found equal"
	case doCompareEnd:
		return "granule %d becomes clean by comparison"
	case doStop:
		return "clean stop and start"
	case doKill:
		return "the process is killed"
	case doCut:
		return "power cut, survivors %d"
	}
	return "?"
}

// describe is a step in words.
func (y *system) describe(l label) string {
	if text := stepName(l.kind); strings.Contains(text, "%") {
		return fmt.Sprintf(text, l.arg)
	}
	return stepName(l.kind)
}

// emit takes a successor; broken names an invariant the step itself broke.
type emit func(s state, l label, broken string)

// next calls out for every step possible in s.
func (y *system) next(s *state, out emit) {
	y.issue(s, out)
	for c := range s.slots {
		if s.slots[c].write != 0 {
			y.advance(s, c, out)
		}
	}
	y.freezing(s, out)
	y.shipping(s, out)
	y.linking(s, out)
	y.cleaning(s, out)
	if y.c.Compares && s.crashes > 0 {
		y.comparing(s, out)
	}
	if int(s.stops) < y.c.Stops {
		y.stop(s, out)
	}
	if int(s.crashes) < y.c.Crashes {
		y.kill(s, out)
		y.cutPower(s, out)
	}
}

func (y *system) issue(s *state, out emit) {
	if int(s.next) == len(y.targets) {
		return
	}
	c := 0
	if s.slots[0].write != 0 {
		c = 1
	}
	if s.slots[c].write != 0 {
		return
	}
	want, other := y.targets[s.next], &s.slots[1-c]
	if other.write != 0 && want&y.targets[other.write-1] != 0 {
		old := other.tag != 0 && other.tag < s.current
		if y.c.Mutant != NoLockAcrossEpochs || !old {
			return
		}
	}
	n := *s
	n.next++
	w := slot{write: n.next, at: marked, saw: s.sawDone, left: want}
	if regions := y.touched[s.next]; regions&^s.durable != 0 && y.c.Mutant != IntentAfterData {
		w.at = written
		y.writeMarks(&n, regions)
	}
	n.slots[c] = w
	out(n, label{doIssue, n.next}, "")
}

func (y *system) writeMarks(n *state, regions uint8) {
	n.shown |= regions
	n.mayOne |= regions
	if y.c.Mutant == BelieveUnsynced {
		n.durable |= regions
	}
}

// syncMarks makes the pages durable as the page cache has them.
func (y *system) syncMarks(n *state) {
	n.mayOne = n.shown
	n.mayZero = y.regions &^ n.shown
}

func (y *system) advance(s *state, c int, out emit) {
	n := *s
	w := &n.slots[c]
	arg := uint8(c)
	switch w.at {
	case written:
		y.syncMarks(&n)
		n.durable |= y.touched[w.write-1]
		w.at = marked
		if y.c.Mutant == IntentAfterData {
			*w = slot{}
		}
		out(n, label{doIntentSync, arg}, "")
	case marked:
		y.tag(&n, w, arg, out)
	case tagged:
		y.data(&n, w, arg, out)
	}
}

func (y *system) tag(n *state, w *slot, arg uint8, out emit) {
	gs := y.targets[w.write-1]
	w.at, w.tag = tagged, n.current
	if n.half && gs&y.diskAfter != 0 {
		w.tag = n.epoch
	}
	n.active |= gs
	y.touch(n, gs)
	for r := range y.nRegions {
		if y.touched[w.write-1]&(1<<r) != 0 {
			n.lastTag[r] = max(n.lastTag[r], w.tag)
		}
	}
	broken := ""
	if w.tag < w.saw {
		broken = fmt.Sprintf("I3: write %d belongs to epoch %d and saw an answer from epoch %d", w.write, w.tag, w.saw)
	}
	out(*n, label{doTag, arg}, broken)
}

func (y *system) data(n *state, w *slot, arg uint8, out emit) {
	g := bits.TrailingZeros8(w.left)
	bit := uint8(1) << g
	protect := n.epoch != 0 && n.frozen&bit != 0 && n.kept&bit == 0 && w.tag > n.epoch
	if protect && y.c.Mutant != CopyAfterWrite {
		n.copied[g] = n.image[g]
		n.kept |= bit
		out(*n, label{doCopy, arg}, "")
		return
	}
	broken := ""
	region := uint8(1) << y.regionOf[g]
	if y.c.Rules && (n.mayZero&region != 0 || n.mayOne&region == 0) {
		broken = fmt.Sprintf("I2: granule %d is written, the mark of region %d is not durable", g, y.regionOf[g])
	}
	if y.c.Mutant != CompareForgetsWrites {
		y.touch(n, bit)
	}
	v := w.write // values are write numbers; 0 is the seed
	n.image[g] = v
	n.platter[g] |= 1 << v
	if n.epoch != 0 && w.tag <= n.epoch {
		n.cut[g] = v
	}
	if protect {
		n.copied[g] = v
		n.kept |= bit
	}
	if w.left &^= bit; w.left == 0 {
		n.sawDone = max(n.sawDone, w.tag)
		regions := y.touched[w.write-1]
		if y.c.Mutant == IntentAfterData && regions&^n.durable != 0 {
			w.at = written
			y.writeMarks(n, regions)
		} else {
			*w = slot{}
		}
	}
	out(*n, label{doWrite, arg}, broken)
}

func (y *system) freezing(s *state, out emit) {
	n := *s
	switch {
	case s.half:
		n.half = false
		n.frozen |= s.active & y.diskAfter
		n.active &^= y.diskAfter
		y.remember(&n, y.diskAfter)
		out(n, label{doFreezeRest, s.epoch}, "")
	case s.epoch == 0 && int(s.freezes) < y.c.Epochs && s.active != 0:
		n.freezes++
		n.compared = 0
		n.epoch = s.current
		n.current++
		if y.c.Mutant != NumberAfterShipping {
			n.highest = n.epoch
			n.highs |= 1 << n.epoch
		}
		if y.c.Mutant == FreezePerDisk {
			n.half = true
			n.frozen = s.active & y.disk0
			n.active &^= y.disk0
			y.remember(&n, y.disk0)
		} else {
			n.frozen, n.active = s.active, 0
			y.remember(&n, y.all)
		}
		n.active |= s.late
		n.late = 0
		out(n, label{doFreeze, n.epoch}, "")
	}
	if s.highs != 1<<s.highest {
		n = *s
		n.highs = 1 << s.highest
		out(n, label{doPersistNumber, s.highest}, "")
	}
}

// remember notes what the cut contains.
func (y *system) remember(n *state, granules uint8) {
	for g := range y.n {
		if granules&(1<<g) != 0 {
			n.cut[g] = n.image[g]
		}
	}
}

func (y *system) shipping(s *state, out emit) {
	if s.epoch == 0 || s.half {
		return
	}
	ready := s.session && (drained(s) || y.c.Mutant == NoDrain)
	n := *s
	switch {
	case s.answer:
		if y.c.Mutant == NumberAfterShipping {
			n.highest = s.epoch
			n.highs |= 1 << s.epoch
		}
		if y.c.Mutant == ClearBySubtraction {
			n.active &^= s.frozen
		}
		n.acked = s.committed
		unfreeze(&n)
		out(n, label{doAck, s.epoch}, "")
	case ready && !s.partial && (s.highs == 1<<s.highest || y.c.Mutant == NumberAfterShipping):
		broken := ""
		if s.left >= s.epoch {
			broken = fmt.Sprintf("I9: number %d leaves the host a second time", s.epoch)
		}
		n.partial, n.left = true, s.epoch
		out(n, label{doShip, s.epoch}, broken)
	case ready && s.partial && s.committed != s.epoch:
		out(n, label{doCommit, s.epoch}, y.commit(&n))
	}
	n = *s
	if y.c.Mutant == YoungerKept {
		n.late |= s.frozen
	} else {
		n.active |= s.frozen
	}
	n.session = s.session && !s.answer
	unfreeze(&n)
	out(n, label{doAbandon, s.epoch}, "")
}

func unfreeze(n *state) {
	n.epoch, n.frozen, n.kept, n.answer, n.partial = 0, 0, 0, false, false
	n.copied, n.cut = [maxGranules]uint8{}, [maxGranules]uint8{}
}

func (y *system) commit(n *state) (broken string) {
	n.previous, n.before = n.committed, n.replica
	for g := range y.n {
		if n.frozen&(1<<g) != 0 {
			n.replica[g] = view(n, g)
		}
		if n.replica[g] != n.cut[g] && broken == "" {
			broken = fmt.Sprintf("I5: the replica's epoch %d has %d in granule %d, the cut has %d", n.epoch, n.replica[g], g, n.cut[g])
		}
	}
	n.committed, n.answer = n.epoch, true
	return broken
}

func (y *system) linking(s *state, out emit) {
	n := *s
	if s.session && s.epoch != 0 && !s.half {
		n.session, n.answer = false, false
		out(n, label{doLinkLost, 0}, "")
	}
	if !s.session && s.clean == resting && !s.half {
		n = *s
		if ok, broken := y.handshake(&n); ok {
			n.session, n.compared = true, 0
			out(n, label{doHandshake, s.committed}, broken)
		}
	}
	if int(s.rollbacks) < y.c.Rollbacks && s.previous < s.committed {
		n = *s
		n.rollbacks++
		n.replica, n.committed = s.before, s.previous
		n.answer, n.compared = false, 0
		n.session = s.session && y.c.Mutant == NoHandshake
		out(n, label{doRollback, n.committed}, "")
	}
}

func (y *system) handshake(n *state) (ok bool, broken string) {
	if n.committed > n.highest {
		broken = fmt.Sprintf("I9: the replica is at %d, this host knows of %d at most", n.committed, n.highest)
	}
	if n.epoch != 0 {
		n.answer = n.committed == n.epoch // committed, the answer was lost
		return n.answer || n.committed == n.acked, broken
	}
	switch {
	case n.committed >= n.acked:
	case n.committed < n.base:
		n.active = y.all
		n.base, n.bases = n.committed, 1<<n.committed
		if y.c.Mutant != RebaseInMemory {
			n.shown, n.durable = y.regions, y.regions
			y.syncMarks(n)
		}
		y.raise(n, y.regions)
	case y.c.Mutant != BehindAckedIsTrusted:
		n.active |= y.granulesOf(n.durable)
		y.raise(n, n.durable)
	}
	n.acked = n.committed
	return true, broken
}
