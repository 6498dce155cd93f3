package model

import (
	"errors"
	"fmt"
	"hash/maphash"
	"strings"
)

// Result is what a search found.
type Result struct {
	States      int // distinct states
	Transitions int
	Depth       int // steps of the longest shortest path
	// Steps counts the transitions of each kind, by name, so that a search
	// which never came to, say, a rollback does not pass for a proof.
	Steps map[string]int
	// Trace are the steps to the violation, if there is one.
	Trace []string
	// Violation is the invariant that broke, or "".
	Violation string
}

// ErrUnfinished: MaxStates was reached.
var ErrUnfinished = errors.New("state space not exhausted")

// node is a visited state and how it was reached.
type node struct {
	s      state
	parent int32
	label  label
}

// label names a step in two bytes.
type label struct{ kind, arg uint8 }

// search is a breadth-first search, so that traces are shortest.
type search struct {
	*system
	table []uint64 // visited: open addressing; 0 = free
	nodes []node   // all visited states; with Compact the two last levels
	count int
	depth int
	seed  maphash.Seed
	res   Result
	kinds [doCut + 1]int
	from  int32
	bad   string
	badAt label
}

// Explore visits all states of the configuration.
func Explore(c Config) (Result, error) {
	sys, err := newSystem(c)
	if err != nil {
		return Result{}, err
	}
	if c.MaxStates == 0 {
		c.MaxStates = 20_000_000
	}
	x := &search{system: sys, table: make([]uint64, 1<<12), seed: maphash.MakeSeed(), from: -1}
	x.visit(sys.start(), label{})
	for lo := 0; lo < len(x.nodes) && x.bad == ""; x.depth++ {
		hi := len(x.nodes)
		for i := lo; i < hi && x.bad == ""; i++ {
			x.from = int32(i)
			s := x.nodes[i].s
			x.next(&s, x.step)
			if x.count > c.MaxStates {
				return x.result(), fmt.Errorf("%w: more than %d states", ErrUnfinished, c.MaxStates)
			}
		}
		if lo = hi; c.Compact && x.bad == "" {
			x.nodes = append(x.nodes[:0:0], x.nodes[hi:]...)
			lo = 0
		}
	}
	return x.result(), nil
}

// step takes a successor; broken names an invariant that the step itself broke.
func (x *search) step(s state, l label, broken string) {
	if x.bad != "" {
		return
	}
	x.res.Transitions++
	x.kinds[l.kind]++
	if broken == "" {
		broken = x.check(&s)
	}
	if broken != "" {
		x.bad, x.badAt = broken, l
		if crash := l.kind == doKill || l.kind == doCut; crash {
			x.bad = strings.Replace(broken, "I1:", "I1d:", 1)
		}
		return
	}
	x.visit(s, l)
}

// visit adds a state unless it is known. The table holds 64-bit fingerprints:
// with n states the chance that one was mistaken for another is below
// n*n/2^65, 1 in 40,000 for 30 million.
func (x *search) visit(s state, l label) {
	x.normalise(&s)
	if 2*x.count >= len(x.table) {
		x.grow()
	}
	h := maphash.Comparable(x.seed, s) | 1
	mask := uint64(len(x.table) - 1)
	at := h >> 1 & mask
	for ; x.table[at] != 0; at = (at + 1) & mask {
		if x.table[at] == h {
			return
		}
	}
	x.table[at] = h
	x.count++
	x.nodes = append(x.nodes, node{s: s, parent: x.from, label: l})
}

func (x *search) grow() {
	old := x.table
	x.table = make([]uint64, 4*len(old))
	mask := uint64(len(x.table) - 1)
	for _, h := range old {
		if h == 0 {
			continue
		}
		at := h >> 1 & mask
		for x.table[at] != 0 {
			at = (at + 1) & mask
		}
		x.table[at] = h
	}
}

func (x *search) result() Result {
	r := x.res
	r.States, r.Depth, r.Violation = x.count, x.depth-1, x.bad
	r.Steps = map[string]int{}
	for kind := doIssue; kind <= doCut; kind++ {
		r.Steps[stepName(kind)] = x.kinds[kind]
	}
	if x.bad == "" {
		return r
	}
	if !x.c.Compact {
		for i := x.from; i > 0; i = x.nodes[i].parent {
			r.Trace = append([]string{x.describe(x.nodes[i].label)}, r.Trace...)
		}
	}
	r.Trace = append(r.Trace, x.describe(x.badAt))
	return r
}

// String is the result in one line, with the trace behind it.
func (r Result) String() string {
	s := fmt.Sprintf("%d states, %d transitions, depth %d", r.States, r.Transitions, r.Depth)
	if r.Violation != "" {
		s += "\nVIOLATION " + r.Violation + " after\n  " + strings.Join(r.Trace, "\n  ")
	}
	return s
}
