package blocktest

import (
	"fmt"
	"slices"
	"sync"

	"kvmreplica/internal/fsx/fsxtest"
)

// Host is one machine: a file system and disks under one Power, so that one
// count of operations and one crash point span them all.
type Host struct {
	// Power counts the operations and takes hooks.
	Power *fsxtest.Power
	// FS is the machine's file system.
	FS *fsxtest.Mem

	torn  bool
	mu    sync.Mutex
	disks map[string]*Crashable // guarded by mu
}

// NewHost returns a new machine with an empty file system and no disks.
func NewHost() *Host {
	p := fsxtest.NewPower()
	return &Host{Power: p, FS: fsxtest.NewMemOn(p), disks: map[string]*Crashable{}}
}

// SetTorn makes power cuts leave garbage in one sector of the write they hit.
func (h *Host) SetTorn(torn bool) {
	h.torn = torn
	h.FS.SetTorn(torn)
	for _, name := range h.Disks() {
		h.disk(name).SetTorn(torn)
	}
}

// Disk opens the disk called name. The first call on any incarnation of the
// machine makes it, all zeros; later ones, also after a restart, open the same
// content. A different size is a panic: a mistake of the test.
func (h *Host) Disk(name string, size int64) *Crashable {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.disks[name]
	if d == nil {
		d = NewCrashableOn(h.Power, name, size)
		d.torn = h.torn
		h.disks[name] = d
	}
	if d.size != size {
		panic(fmt.Sprintf("disk %s has %d bytes, not %d", name, d.size, size))
	}
	return &Crashable{name: d.name, size: d.size, power: d.power, data: d.data, torn: d.torn}
}

// Disks lists the names of the disks, sorted.
func (h *Host) Disks() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	names := make([]string, 0, len(h.disks))
	for name := range h.disks {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (h *Host) disk(name string) *Crashable {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.disks[name]
}

// Setup runs fn without crash points, hooks or counting.
func (h *Host) Setup(fn func() error) error { return h.Power.Setup(fn) }

// Cut returns the machine after a power cut and a restart.
func (h *Host) Cut(choose fsxtest.Chooser) *Host {
	n := &Host{Power: fsxtest.NewPower(), disks: map[string]*Crashable{}, torn: h.torn}
	n.FS = h.FS.CrashCloneOn(n.Power, choose)
	for _, name := range h.Disks() {
		n.disks[name] = h.disk(name).crashCloneOn(n.Power, choose)
	}
	return n
}

// Kill returns the machine after the process died and was started again: the
// kernel lives, what was not synced is still pending.
func (h *Host) Kill(choose fsxtest.Chooser) *Host {
	n := &Host{Power: fsxtest.NewPower(), disks: map[string]*Crashable{}, torn: h.torn}
	n.FS = h.FS.KillCloneOn(n.Power, choose)
	for _, name := range h.Disks() {
		n.disks[name] = h.disk(name).killCloneOn(n.Power, choose)
	}
	return n
}
