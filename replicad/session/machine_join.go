package session

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// A disk that was added to a VM joins piece by piece. It is tracked whole from
// the start and all of it is marked; each epoch lists it with a size that is
// one slice more than what the replica has, its window. So the other disks'
// changes go with every epoch, and none has to wait for a whole disk.
//
// What lies behind the window is marked: nothing but an acknowledged epoch
// clears a mark there, because comparisons end at the window. What lies below
// and is not marked, the replica has as of its committed position. If the
// replica stands elsewhere, the marks follow by the rules for whole disks: an
// older position marks everything written since the base, one that the tracker
// does not cover marks everything.

// Bounds of a slice.
const (
	sliceFirst = 64 << 20
	sliceMin   = 16 << 20
	sliceMax   = 16 << 30
	// sliceCycle is what a cycle may take at a shorter interval.
	sliceCycle = time.Second
)

// Joining is how far a disk that was added has come.
type Joining struct{ Done, Total int64 }

// joins is the machine's part of joining disks.
type joins struct {
	disks map[wire.DiskName]Joining
	// mute: the replica does not tell what it has; nothing joins, and no epoch
	// lists such a disk.
	mute  bool
	slice int64
	told  bool // Joined was said since the last handshake
}

// open reports whether the next epoch is to have a slice.
func (j *joins) open() bool { return !j.mute && j.behind() > 0 }

// behind is what lies behind the windows.
func (j *joins) behind() (n int64) {
	for _, d := range j.disks {
		n += d.Total - d.Done
	}
	return n
}

// limits are those of the next epoch. A disk that is whole has none.
func (j *joins) limits() map[wire.DiskName]int64 {
	var l map[wire.DiskName]int64
	for n, d := range j.disks {
		if d.Done == d.Total {
			continue
		}
		if l == nil {
			l = map[wire.DiskName]int64{}
		}
		if !j.mute {
			l[n] = min(d.Total, whole(d.Done)+j.slice)
		} else {
			l[n] = 0
		}
	}
	return l
}

// below are the ends of what can be compared with the replica.
func (j *joins) below() map[wire.DiskName]int64 {
	var b map[wire.DiskName]int64
	for n, d := range j.disks {
		if d.Done == d.Total {
			continue
		}
		if b == nil {
			b = map[wire.DiskName]int64{}
		}
		b[n] = whole(d.Done)
	}
	return b
}

// whole is n without a granule that has only begun.
func whole(n int64) int64 { return n - n%delta.Granule }

// startJoin takes over what a handshake says. It names a disk of which the
// replica has less than it had in the same state: what is missing may not be
// marked any more.
func (m *Machine) startJoin(e EvHandshake, d lineage.Decision) (lost wire.DiskName) {
	was := m.join.disks
	same := m.parent == d.Parent && !d.Parent.IsZero()
	m.join.disks, m.join.told = nil, false
	// Before the first epoch a disk is part of the initial copy like any other.
	initial := d.Outcome == lineage.SeedContinue || d.Parent.IsZero()
	m.join.mute = !initial && len(e.Reply.Sizes) == 0
	for _, disk := range e.Request.Disks {
		if !disk.Joining {
			continue
		}
		if m.join.disks == nil {
			m.join.disks = map[wire.DiskName]Joining{}
		}
		has := Joining{Done: min(e.Reply.Sizes[disk.Name], disk.Size), Total: disk.Size}
		if initial {
			has.Done = has.Total
		}
		if same && !m.join.mute && has.Done < min(was[disk.Name].Done, disk.Size) {
			lost = disk.Name
		}
		m.join.disks[disk.Name] = has
	}
	if m.join.slice == 0 {
		m.join.slice = sliceFirst
	}
	m.bound(func(d dataplane.DiskStatus, j Joining) int64 { return min(d.Suspect, j.Done) })
	return lost
}

// bound takes what cannot be compared out of the suspect bytes.
func (m *Machine) bound(suspect func(dataplane.DiskStatus, Joining) int64) {
	for _, d := range m.source.Disks {
		if j, ok := m.join.disks[d.Name]; ok {
			m.source.Suspect -= d.Suspect - suspect(d, j)
		}
	}
}

// joined: the epoch that was held is acknowledged, and with it its slice. The
// slice grows and shrinks with the time the cycle took, so that the next one
// ends before the interval does.
func (m *Machine) joined(now time.Time, e *dataplane.Epoch) {
	sliced := false
	for n, d := range m.join.disks {
		limit, limited := e.Limits[n]
		if !limited || limit > d.Total {
			limit = d.Total
		}
		sliced = sliced || limit > d.Done
		d.Done = limit
		m.join.disks[n] = d
	}
	// What is behind the windows is suspect as a whole or not at all.
	m.bound(func(d dataplane.DiskStatus, j Joining) int64 { return max(0, d.Suspect-(j.Total-j.Done)) })
	if !sliced {
		return
	}
	target := max(m.cfg.Interval, sliceCycle)
	switch took := now.Sub(m.cutAt); {
	case took > target:
		m.shrinkSlice()
	case took < target/2:
		m.join.slice = min(2*m.join.slice, sliceMax)
	}
}

func (m *Machine) shrinkSlice() { m.join.slice = max(m.join.slice/2, sliceMin) }

// tellJoined says once per handshake that every joining disk is whole.
func (m *Machine) tellJoined() []Action {
	if len(m.join.disks) == 0 || m.join.mute || m.join.told || !m.protected || m.join.behind() > 0 {
		return nil
	}
	m.join.told = true
	return []Action{Joined{slices.Sorted(maps.Keys(m.join.disks))}}
}

// remark has everything marked and compared: what the replica has of a joining
// disk is less than the marks are relative to.
func (m *Machine) remark(why string) lineage.Decision {
	m.markedBy = ""
	return lineage.Decision{Outcome: lineage.VerifyAll, Parent: m.parent, Reason: why}
}

func lostText(disk wire.DiskName) string {
	return fmt.Sprintf("the replica has less of disk %s than it had in the same state", disk)
}
