package oracle

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"sync"
)

// Time is logical: a counter that every noted event advances.
type Time int64

// Never is the time of what has not happened.
const Never Time = math.MaxInt64

// OpKind is what a guest asked for.
type OpKind uint8

// The guest's operations.
const (
	OpWrite OpKind = iota + 1 // stamped sectors
	OpZero                    // write zeroes or trim
	OpFlush
)

// Op is one guest operation. It must be atomic for the system under test (one
// piece of at most 64 KiB): a cut contains all of it or nothing.
type Op struct {
	Seq     uint64 // its number, from 1; the stamps of a write carry it
	Kind    OpKind
	Disk    int
	LBA     uint64 // first sector
	Sectors uint64
	Writer  uint32
	Issued  Time
	Done    Time // answered, or given up for good; Never while open
	// Failed: answered with an error or never answered. Any part of it may
	// have happened, and nothing of it may happen after Done.
	Failed bool
}

// before reports whether o was answered before p was issued.
func (o *Op) before(p *Op) bool { return o.Done < p.Issued }

// Window is a span of logical time within which something took effect.
type Window struct{ Begin, End Time }

// History is the log of one run of a VM's disks, kept outside the storage
// under test. It starts from Base; after a power cut of the primary start a
// new one from what is found then (after CheckDurable). Safe for concurrent use.
type History struct {
	VM   uint64
	Base Images // content before the first operation

	mu      sync.Mutex
	now     Time
	ops     []*Op           // by Seq-1
	covered map[place][]*Op // by sector, in order of issue
	events  []Event
}

// Event is a noted moment, for people and for saving.
type Event struct {
	At   Time
	Name string
	N    uint64
}

// NewHistory starts a log over disks that hold base, which is copied.
func NewHistory(vm uint64, base Images) *History {
	h := &History{VM: vm, covered: map[place][]*Op{}}
	for _, b := range base {
		h.Base = append(h.Base, append([]byte(nil), b...))
	}
	return h
}

// Restart returns a new History of the same VM from base that numbers its
// writes on from this one, so that stamps stay unique.
func (h *History) Restart(base Images) *History {
	n := NewHistory(h.VM, base)
	h.mu.Lock()
	defer h.mu.Unlock()
	n.now = h.now
	for range h.ops {
		n.ops = append(n.ops, nil)
	}
	return n
}

// Issue notes that an operation is about to be sent and returns it with its
// Seq. For OpFlush only the kind counts.
func (h *History) Issue(kind OpKind, writer uint32, disk int, lba, sectors uint64) Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now++
	o := &Op{Seq: uint64(len(h.ops)) + 1, Kind: kind, Disk: disk, LBA: lba, Sectors: sectors, Writer: writer, Issued: h.now, Done: Never}
	h.ops = append(h.ops, o)
	if kind != OpFlush {
		for i := range sectors {
			p := place{disk, lba + i}
			h.covered[p] = append(h.covered[p], o)
		}
	}
	return *o
}

// Done notes the answer. Call it before anybody can act upon it.
func (h *History) Done(seq uint64, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now++
	o := h.ops[seq-1]
	o.Done, o.Failed = h.now, err != nil
}

// GiveUp notes that open operations will never be answered: their connection
// is gone and, as the server promises, nothing of them happens from now on.
func (h *History) GiveUp() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now++
	for _, o := range h.ops {
		if o != nil && o.Done == Never {
			o.Done, o.Failed = h.now, true
		}
	}
}

// Mark notes a moment under a name: freeze begin, freeze end, ack, commit,
// promotion.
func (h *History) Mark(name string, n uint64) Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now++
	h.events = append(h.events, Event{h.now, name, n})
	return h.now
}

// During runs fn and returns the window in which it ran.
func (h *History) During(name string, n uint64, fn func() error) (Window, error) {
	w := Window{Begin: h.Mark(name+" begins", n)}
	err := fn()
	w.End = h.Mark(name+" ended", n)
	return w, err
}

// Events returns the noted moments in order.
func (h *History) Events() []Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Event(nil), h.events...)
}

// Ops returns a copy of all operations of this History in order of issue.
func (h *History) Ops() []Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []Op
	for _, o := range h.ops {
		if o != nil {
			out = append(out, *o)
		}
	}
	return out
}

// Fill returns the bytes a write must carry.
func (h *History) Fill(o Op) []byte {
	b := make([]byte, o.Sectors*SectorSize)
	for i := range o.Sectors {
		Stamp{VM: h.VM, Disk: uint32(o.Disk), Writer: o.Writer, LBA: o.LBA + i, Seq: o.Seq}.Put(b[i*SectorSize:])
	}
	return b
}

// Save writes operations and events as JSON lines, for people who study a
// failure.
func (h *History) Save(w io.Writer) error {
	e := json.NewEncoder(w)
	for _, o := range h.Ops() {
		if err := e.Encode(o); err != nil {
			return fmt.Errorf("save history: %w", err)
		}
	}
	for _, ev := range h.Events() {
		if err := e.Encode(ev); err != nil {
			return fmt.Errorf("save history: %w", err)
		}
	}
	return nil
}

// clock returns the time after now.
func (h *History) clock() Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now++
	return h.now
}

// table is a copy of the operations for one check, indexed by sector.
type table struct {
	h       *History
	ops     []*Op
	covered map[place][]*Op
	synced  Time // what was answered before it is covered by an answered flush
}

type place struct {
	disk int
	lba  uint64
}

func (h *History) table() *table {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := &table{h: h, covered: make(map[place][]*Op, len(h.covered))}
	copies := make(map[*Op]*Op, len(h.ops))
	for _, o := range h.ops {
		if o == nil {
			continue
		}
		c := *o
		copies[o] = &c
		t.ops = append(t.ops, &c)
		if o.Kind == OpFlush && !o.Failed && o.Done != Never {
			t.synced = max(t.synced, o.Issued)
		}
	}
	for p, ops := range h.covered {
		for _, o := range ops {
			t.covered[p] = append(t.covered[p], copies[o])
		}
	}
	return t
}

// part is table for some sectors only, without ops and synced.
func (h *History) part(disk int, lba, n uint64) *table {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := &table{h: h, covered: map[place][]*Op{}}
	for i := range n {
		p := place{disk, lba + i}
		for _, o := range h.covered[p] {
			c := *o
			t.covered[p] = append(t.covered[p], &c)
		}
	}
	return t
}

// explain lists what the content b (decoded: s) at p can come from: operations
// in order of issue, and nil for what was there before the first of them.
func (t *table) explain(p place, b []byte, s Sector) []*Op {
	var out []*Op
	base := t.h.Base[p.disk]
	if bytes.Equal(b, base[p.lba*SectorSize:][:SectorSize]) {
		out = append(out, nil)
	}
	for _, o := range t.covered[p] {
		if s.Content == Zeros && o.Kind == OpZero || s.Content == Written && o.Kind == OpWrite && o.Seq == s.Stamp.Seq {
			out = append(out, o)
		}
	}
	return out
}
