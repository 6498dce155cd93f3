package oracle

import (
	"fmt"
	"slices"
	"sync"
)

// Points remembers what recovery points must contain. Safe for concurrent use.
type Points struct {
	mu     sync.Mutex
	points map[string]Images
	gone   map[string]bool
}

// NewPoints returns an empty memory.
func NewPoints() *Points { return &Points{points: map[string]Images{}, gone: map[string]bool{}} }

// Keep stores a copy of the state that point name stands for, as the oracle
// saw it when it was committed. A name means one state for ever.
func (p *Points) Keep(name string, state Images) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if old, ok := p.points[name]; ok {
		if err := CheckEqual(state, old); err != nil {
			return violation("point %s was used again for another state: %v", name, err)
		}
		return nil
	}
	c := make(Images, len(state))
	for i := range state {
		c[i] = slices.Clone(state[i])
	}
	p.points[name] = c
	return nil
}

// Drop notes that the point may disappear; it was pruned, or is about to be.
func (p *Points) Drop(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone[name] = true
}

// CheckList verifies that every point that was not dropped is listed and that
// nothing unknown is.
func (p *Points) CheckList(listed []string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range listed {
		if p.points[name] == nil {
			return violation("point %s is listed and was never committed", name)
		}
	}
	for name := range p.points {
		if !p.gone[name] && !slices.Contains(listed, name) {
			return violation("point %s is missing", name)
		}
	}
	return nil
}

// Check verifies the content of one point.
func (p *Points) Check(name string, state Images) error {
	p.mu.Lock()
	want := p.points[name]
	p.mu.Unlock()
	if want == nil {
		return violation("point %s was never committed", name)
	}
	if err := CheckEqual(state, want); err != nil {
		return fmt.Errorf("point %s: %w", name, err)
	}
	return nil
}

// Position names a state: an epoch of a generation with the digest of its
// content or manifest. The oracle does not compute digests, it compares them.
type Position struct {
	Generation string
	Epoch      uint64
	Digest     string
}

func (p Position) String() string { return fmt.Sprintf("%s/%d", p.Generation, p.Epoch) }

// Acks judges the order and the lasting of commits and acknowledgements. Safe
// for concurrent use.
type Acks struct {
	mu      sync.Mutex
	digest  map[string]string // by generation and epoch
	commits []Position
	acked   []Position
}

// NewAcks returns an empty ledger.
func NewAcks() *Acks { return &Acks{digest: map[string]string{}} }

func (a *Acks) name(p Position) error {
	if old, ok := a.digest[p.String()]; ok && old != p.Digest {
		return violation("position %v has two contents", p)
	}
	a.digest[p.String()] = p.Digest
	return nil
}

// Frozen notes that the name was given to a content, whether or not it is
// ever shipped; an abandoned number must not come back.
func (a *Acks) Frozen(p Position) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.name(p)
}

// Committed notes a commit of the replica on top of parent (zero for the first).
func (a *Acks) Committed(p, parent Position) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.name(p); err != nil {
		return err
	}
	if slices.Contains(a.commits, p) {
		return nil // a duplicate is a no-op
	}
	if n := len(a.commits); n > 0 && a.commits[n-1] != parent {
		return violation("epoch %v was committed on %v, the replica was at %v", p, parent, a.commits[n-1])
	}
	if n := len(a.commits); n > 0 && a.commits[n-1].Generation == p.Generation && a.commits[n-1].Epoch >= p.Epoch {
		return violation("epoch %v was committed after %v", p, a.commits[n-1])
	}
	a.commits = append(a.commits, p)
	return nil
}

// Acked notes that the primary took an acknowledgement.
func (a *Acks) Acked(p Position) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Contains(a.commits, p) {
		return violation("epoch %v was acknowledged and never committed", p)
	}
	a.acked = append(a.acked, p)
	return nil
}

// Check verifies what a replica says it has, after any fault: nothing that was
// acknowledged may be missing, nothing may be there that was not committed.
// A commit whose answer was lost may be there or, after a power cut, not.
func (a *Acks) Check(committed Position) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := slices.Index(a.commits, committed)
	if at < 0 && committed != (Position{}) {
		return violation("the replica claims %v, which was never committed with that content", committed)
	}
	for _, p := range a.acked {
		if slices.Index(a.commits, p) > at {
			return violation("epoch %v was acknowledged and is missing: the replica is at %v", p, committed)
		}
	}
	a.commits = a.commits[:at+1]
	return nil
}
