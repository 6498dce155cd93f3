package cbt

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"kvmreplica/internal/block"
)

// Group tracks all disks of one VM. All methods are safe for concurrent use.
type Group struct {
	cfg   Config
	meta  *metaStore
	share atomic.Pointer[sharedVM] // nil without shared memory

	// cleanMu serialises what clears the map or changes the disks.
	cleanMu sync.Mutex
	history []coolMark // guarded by cleanMu

	// cutMu serialises what starts, ends or judges an epoch.
	cutMu    sync.Mutex
	openEp   *Epoch                  // guarded by cutMu
	acked    Position                // guarded by cutMu
	shown    atomic.Pointer[cutView] // acked and openEp for Status
	closed   bool                    // guarded by cutMu
	finished bool                    // guarded by cutMu: Close has released everything
	// guarded by cutMu: found sealed at Open, and what spoke against trusting
	// it; Seal ended with an unknown outcome
	openedSealed bool
	sealDoubts   []string
	sealing      bool

	// gate orders writes and cuts. Writers hold it shared while they take
	// their tag and set their bits; a freeze holds it for a few stores.
	gate   sync.RWMutex
	epoch  uint64 // guarded by gate: the number writes are tagged with
	slot   int    // guarded by gate: which bitmaps are active
	refuse error  // guarded by gate: why writes are refused
	// cutSeq counts everything that makes a running comparison meaningless.
	cutSeq uint64 // guarded by gate
	disks  []*Disk
	byName map[string]*Disk

	frozen atomic.Pointer[Epoch] // the epoch writes must protect
	flight flights

	store     *captureStore
	abandoned atomic.Uint64
	overruns  atomic.Uint32 // epochs lost in a row for want of memory

	healMu sync.Mutex // "verify everything" is put down or taken back
	sickMu sync.Mutex
	sick   sickness // guarded by sickMu

	stop     chan struct{} // closed by Close; ends held writes
	stopOnce sync.Once
}

// cutView is what Status shows of the fields under cutMu, which a freeze holds
// while it waits for the guest's disk.
type cutView struct {
	acked Position
	open  bool
}

// show publishes the cut's state. cutMu held.
func (g *Group) show() { g.shown.Store(&cutView{g.acked, g.openEp != nil}) }

// coolMark: at that time every write tagged epoch or lower had its tag.
type coolMark struct {
	at    time.Time
	epoch uint64
}

// sickness is what keeps tracking from being at its best.
type sickness struct {
	degraded bool   // "verify everything" is durable, intents are not recorded
	held     bool   // first-touch writes are waiting
	keep     bool   // Distrust was called: never take it back
	unsynced bool   // an image sync failed: nothing may be cleared any more
	reason   string // the latest cause, in words
	reasons  []string
}

// flights counts writes in flight by the parity of their tag. A freeze waits
// until the parity it is about to hand out is free of older writes.
type flights struct {
	n       [2]atomic.Int64
	waiters atomic.Int32
	mu      sync.Mutex
	idle    chan struct{} // guarded by mu; closed when a counter fell to zero
}

func (f *flights) begin(parity int) { f.n[parity].Add(1) }

func (f *flights) end(parity int) {
	if f.n[parity].Add(-1) != 0 || f.waiters.Load() == 0 {
		return
	}
	f.mu.Lock()
	if f.idle != nil {
		close(f.idle)
		f.idle = nil
	}
	f.mu.Unlock()
}

// wait returns once no write of the given parity is in flight.
func (f *flights) wait(ctx context.Context, parity int) error {
	f.waiters.Add(1)
	defer f.waiters.Add(-1)
	for {
		f.mu.Lock()
		if f.idle == nil {
			f.idle = make(chan struct{})
		}
		idle := f.idle
		f.mu.Unlock()
		if f.n[parity].Load() == 0 {
			return nil
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Disk returns the named disk, or nil.
func (g *Group) Disk(name string) *Disk {
	g.gate.RLock()
	defer g.gate.RUnlock()
	return g.byName[name]
}

// all is a snapshot of the disks.
func (g *Group) all() []*Disk {
	g.gate.RLock()
	defer g.gate.RUnlock()
	return g.disks
}

// Freeze cuts: everything written before belongs to the returned epoch,
// everything after to the next. The guest waits for a few memory stores at
// most. The epoch's number is durable when Freeze returns. ctx bounds the wait
// for writes left over from two epochs ago. When nothing changed since the
// last ack, the returned epoch is Empty, costs nothing and uses up no number.
func (g *Group) Freeze(ctx context.Context) (*Epoch, error) { return g.freeze(ctx, false) }

// FreezeForced is Freeze, but uses up a number even if nothing changed (for an
// epoch that carries firmware state, or a point asked for by a person).
func (g *Group) FreezeForced(ctx context.Context) (*Epoch, error) { return g.freeze(ctx, true) }

func (g *Group) freeze(ctx context.Context, force bool) (*Epoch, error) {
	g.cutMu.Lock()
	defer g.cutMu.Unlock()
	if g.closed {
		return nil, block.ErrClosed
	}
	if g.openEp != nil && !g.openEp.lost() {
		return nil, ErrEpochOpen
	}
	if g.openEp != nil {
		g.mergeBack(g.openEp)
	}
	if e, err := g.emptyCut(force); e != nil || err != nil {
		return e, err
	}
	next := g.epoch + 1 // only a freeze changes it, and we are the freeze
	if next >= math.MaxUint32 {
		return nil, fmt.Errorf("freeze epoch %d: numbers of this generation are used up; start a new generation", g.epoch)
	}
	if err := g.flight.wait(ctx, int(next%2)); err != nil {
		return nil, fmt.Errorf("freeze epoch %d: wait for old writes: %w", g.epoch, err)
	}
	if err := g.meta.commit(false, func(s *super) { s.highest = next - 1 }); err != nil {
		return nil, fmt.Errorf("freeze epoch %d: %w", next-1, err)
	}
	e := newEpoch(g, next-1)
	g.allowSpill()
	g.gate.Lock()
	e.slot = g.slot // allocated before: the gate is held for five stores
	g.slot ^= 1
	g.epoch = next
	g.cutSeq++
	g.frozen.Store(e)
	g.gate.Unlock()
	g.openEp = e
	g.show()
	return e, nil
}

// emptyCut returns an empty epoch if at one instant nothing was dirty.
func (g *Group) emptyCut(force bool) (*Epoch, error) {
	g.gate.Lock()
	defer g.gate.Unlock()
	if g.refuse != nil && (force || !errors.Is(g.refuse, ErrSealed)) {
		return nil, g.refuse
	}
	if force || g.dirtyLocked() {
		return nil, nil
	}
	e := newEpoch(g, g.epoch)
	e.empty = true
	e.end(ErrEpochEnded)
	return e, nil
}

// dirtyLocked reports whether an active bitmap has a bit. Gate held.
func (g *Group) dirtyLocked() bool {
	for _, d := range g.disks {
		if d.st.Load().fine[g.slot].count.Load() != 0 {
			return true
		}
	}
	return false
}

// DiskStatus is one disk in a Status.
type DiskStatus struct {
	Name          string
	Size          int64
	DirtyBytes    int64 // active and frozen
	FrozenBytes   int64
	SuspectBytes  int64
	MarkedRegions int64
	Regions       int64
	IntentSyncs   uint64
}

// Status is a snapshot for people, metrics and decisions.
type Status struct {
	State          string // durable state: clean, in-use, verify-all, sealed
	Generation     [16]byte
	Base, Parent   Position
	Acked          Position
	Highest        uint64 // highest epoch ever frozen
	Current        uint64 // number new writes are tagged with
	EpochOpen      bool
	CaptureBytes   int64 // old content held now
	CaptureLimit   int64
	SpilledBytes   int64 // of those, in the spill file
	Abandoned      uint64
	Degraded       bool // a crash now would cost a full verification
	Held           bool // first-touch writes wait: intents cannot be recorded
	Unsynced       bool // an image sync failed; nothing is cleared any more
	SharedExact    bool // a kill now would cost nothing
	Reasons        []string
	Disks          []DiskStatus
	SuperSyncs     uint64
	WritesInFlight int64
}

// Status returns a snapshot. It waits for no I/O.
func (g *Group) Status() Status {
	cut := g.shown.Load()
	sb := g.meta.current()
	st := Status{
		State: sb.state.String(), Generation: sb.generation, Base: sb.base, Parent: sb.parent,
		Acked: cut.acked, Highest: sb.highest, EpochOpen: cut.open,
		CaptureLimit: g.cfg.CaptureBytes, CaptureBytes: g.store.bytes(), Abandoned: g.abandoned.Load(), SpilledBytes: g.store.spilled(),
		WritesInFlight: g.flight.n[0].Load() + g.flight.n[1].Load(),
	}
	g.gate.RLock()
	vm := g.share.Load()
	st.Current = g.epoch
	st.SharedExact = vm != nil && !errors.Is(g.refuse, block.ErrClosed) && !vm.isVoid()
	disks := g.disks
	slot := g.slot
	g.gate.RUnlock()
	for _, d := range disks {
		st.Disks = append(st.Disks, d.status(slot))
	}
	g.sickMu.Lock()
	st.Degraded, st.Held, st.Unsynced = g.sick.degraded, g.sick.held, g.sick.unsynced
	st.Reasons = append([]string(nil), g.sick.reasons...)
	g.sickMu.Unlock()
	st.SuperSyncs = g.meta.syncs.Load()
	return st
}

// note remembers a reason for Status, once.
func (g *Group) note(change func(*sickness), reason string) {
	g.sickMu.Lock()
	defer g.sickMu.Unlock()
	if change != nil {
		change(&g.sick)
	}
	if reason == "" {
		return
	}
	g.sick.reason = reason
	for _, r := range g.sick.reasons {
		if r == reason {
			return
		}
	}
	if len(g.sick.reasons) < 16 {
		g.sick.reasons = append(g.sick.reasons, reason)
	}
}

// Generation is the generation this tracker serves.
func (g *Group) Generation() [16]byte { return g.meta.current().generation }
