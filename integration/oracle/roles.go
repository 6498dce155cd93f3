package oracle

import (
	"fmt"
	"slices"
	"sync"
)

// Roles judges who was writable when. Tests note what they see from outside:
// exports opened and closed for writing, guest writes, promotions, hosts that
// talked to each other, reports of divergence. Safe for concurrent use.
type Roles struct {
	mu     sync.Mutex
	gens   map[string]*generation
	open   map[string]map[string]bool // generation → hosts writable in it now
	faults []error
	met    map[string]map[string]bool
	told   map[string]bool
}

type generation struct {
	name, host, parent string
	at                 uint64 // epoch of the parent it starts from
	forced             bool
	beyond             uint64 // a guest write happened after this epoch of it was frozen, plus one
}

// NewRoles returns an empty ledger.
func NewRoles() *Roles {
	return &Roles{gens: map[string]*generation{}, open: map[string]map[string]bool{}, met: map[string]map[string]bool{}, told: map[string]bool{}}
}

func (r *Roles) fault(format string, args ...any) {
	r.faults = append(r.faults, violation(format, args...))
}

// Created notes that host made generation gen, with the epoch of parent it
// starts from; parent is empty for the first. forced is an unplanned promotion
// (or break-glass): it may meet a parent that still runs.
func (r *Roles) Created(host, gen, parent string, epoch uint64, forced bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.gens[gen] != nil {
		r.fault("generation %s was created twice", gen)
		return
	}
	if parent != "" && r.gens[parent] == nil {
		r.fault("generation %s has the unknown parent %s", gen, parent)
	}
	if p := r.gens[parent]; p != nil && !forced {
		if len(r.open[parent]) > 0 {
			r.fault("generation %s was created by plan while %s is still writable", gen, parent)
		}
		if p.beyond > epoch {
			r.fault("generation %s starts at %s/%d by plan, but %s was written after that", gen, parent, epoch, parent)
		}
	}
	r.gens[gen] = &generation{name: gen, host: host, parent: parent, at: epoch, forced: forced}
}

// Opened notes that host lets a guest write in gen.
func (r *Roles) Opened(host, gen string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	g := r.gens[gen]
	switch {
	case g == nil:
		r.fault("%s is writable in generation %s, which nobody created", host, gen)
		return
	case g.host != host:
		r.fault("%s is writable in generation %s, which %s created", host, gen, g.host)
	}
	for _, other := range r.gens {
		if other.parent == gen && !other.forced {
			r.fault("%s is writable again in generation %s, which was handed over to %s", host, gen, other.name)
		}
	}
	if r.open[gen] == nil {
		r.open[gen] = map[string]bool{}
	}
	r.open[gen][host] = true
}

// Closed notes that the guest of host can no longer write in gen.
func (r *Roles) Closed(host, gen string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open[gen], host)
}

// Wrote notes a guest write in gen after epoch of it was frozen.
func (r *Roles) Wrote(host, gen string, epoch uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.open[gen][host] {
		r.fault("%s took a guest write in generation %s without being writable in it", host, gen)
	}
	g := r.gens[gen]
	if g == nil {
		return
	}
	g.beyond = max(g.beyond, epoch+1)
	for _, child := range r.gens {
		if child.parent == gen && !child.forced {
			r.fault("generation %s was written after it was handed over to %s", gen, child.name)
		}
	}
}

// NothingSince notes that whatever a guest wrote in gen after epoch left no
// trace: the images hold what was frozen then.
func (r *Roles) NothingSince(gen string, epoch uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g := r.gens[gen]; g != nil {
		g.beyond = min(g.beyond, epoch)
	}
}

// PutBack notes that somebody lets a host run that was put back to an earlier
// time: every generation so far may meet its parent running again.
func (r *Roles) PutBack() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.gens {
		g.forced = true
	}
}

// Met notes that two hosts exchanged a handshake about this VM.
func (r *Roles) Met(a, b string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range [][2]string{{a, b}, {b, a}} {
		if r.met[p[0]] == nil {
			r.met[p[0]] = map[string]bool{}
		}
		r.met[p[0]][p[1]] = true
	}
}

// Diverged notes that host reports a split brain for this VM.
func (r *Roles) Diverged(host string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told[host] = true
}

// Check returns the first violation: two writers of a generation, a planned
// hand-over that left two, a fork whose hosts met and did not both report it,
// or a report without a fork.
func (r *Roles) Check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.faults) > 0 {
		return r.faults[0]
	}
	forked := map[string]bool{}
	for _, f := range r.forks() {
		a, b := r.gens[f[0]].host, r.gens[f[1]].host
		forked[a], forked[b] = true, true
		if a == b || !r.met[a][b] {
			continue
		}
		for _, host := range []string{a, b} {
			if !r.told[host] {
				return violation("generations %s and %s forked, %s and %s met, and %s does not report it", f[0], f[1], a, b, host)
			}
		}
	}
	for host := range r.told {
		if !forked[host] {
			return violation("%s reports a split brain that is none", host)
		}
	}
	return nil
}

// forks lists the pairs of generations neither of which continues the other.
func (r *Roles) forks() [][2]string {
	var names []string
	for name := range r.gens {
		names = append(names, name)
	}
	slices.Sort(names)
	var out [][2]string
	for i, a := range names {
		for _, b := range names[i+1:] {
			if !r.continues(a, b) && !r.continues(b, a) {
				out = append(out, [2]string{a, b})
			}
		}
	}
	return out
}

// continues reports whether b descends from a and contains all of it.
func (r *Roles) continues(b, a string) bool {
	for range len(r.gens) {
		g := r.gens[b]
		if g == nil || g.parent == "" {
			return false
		}
		if g.parent == a {
			return r.gens[a] == nil || r.gens[a].beyond <= g.at
		}
		b = g.parent
	}
	return false
}

// Settles runs cycle up to n times (a cycle is one replication interval with no
// fault and no guest load) and wants health green and both sides equal at the
// end of one of them.
func Settles(n int, cycle func() (healthy, equal bool, err error)) error {
	state := ""
	for range n {
		healthy, equal, err := cycle()
		if err == nil && healthy && equal {
			return nil
		}
		state = fmt.Sprintf("healthy %v, equal %v, error %v", healthy, equal, err)
	}
	return violation("not settled after %d cycles without faults: %s", n, state)
}
