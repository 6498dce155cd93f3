package histories_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kvmreplica/integration/estate"
)

// history is one random life of a protected VM on two hosts.
type history struct {
	*world
	seed  uint64
	name  string
	r     *rand.Rand
	began time.Time
	done  map[string]int
	cut   atomic.Bool // the link is cut
	// copies says which hosts have a kept copy of an earlier state.
	copies map[string]bool
	pins   map[string]pin    // a pinned point of a host
	before map[string]*state // what a host's copy had before a trial there
	tried  int
	talked time.Time // both hosts have been able to talk since
	forks  int

	forced atomic.Bool // a person accepted that two copies may run, or a loss

	mu       sync.Mutex
	log      []string         // guarded by mu
	book     *book            // guarded by mu
	consoles []*console       // guarded by mu
	tip      state            // guarded by mu; what was answered last, while nothing was forced
	holds    map[string]state // guarded by mu; what a host's copy has, by host
	bad      error            // guarded by mu; the first violation
	boots    int              // guarded by mu
}

// errViolation: the product broke a promise. Other errors of a history are of
// the machine or the script.
var errViolation = errors.New("violation")

func newHistory(w *world, seed uint64) *history {
	h := &history{
		world: w, seed: seed, name: vmName(seed), r: rand.New(rand.NewPCG(seed, 23)), began: time.Now(), talked: time.Now(),
		done: map[string]int{}, copies: map[string]bool{}, pins: map[string]pin{}, before: map[string]*state{},
		book: &book{map[uint32]*life{}}, holds: map[string]state{},
	}
	for _, k := range w.hosts {
		for _, p := range []string{ownConsole(h.name), "/var/log/libvirt/qemu/" + vmUUID(seed) + ".log"} {
			h.consoles = append(h.consoles, &console{path: k.Path(p), host: k.Name()})
		}
	}
	return h
}

func (h *history) note(format string, a ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.says(format, a...)
}

// says is note for whoever has mu.
func (h *history) says(format string, a ...any) {
	h.log = append(h.log, fmt.Sprintf("%6.2fs ", time.Since(h.began).Seconds())+fmt.Sprintf(format, a...))
}

// story is what happened, for people.
func (h *history) story() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.log, "\n")
}

func (h *history) violation(format string, a ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.violates(format, a...)
}

// violates is violation for whoever has mu.
func (h *history) violates(format string, a ...any) {
	err := fmt.Errorf("%w: %s", errViolation, fmt.Sprintf(format, a...))
	h.says("%v", err)
	if h.bad == nil {
		h.bad = err
	}
}

func (h *history) broken() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.bad
}

// lookEvery is how often the guests' consoles are read and QEMUs looked for.
const lookEvery = 25 * time.Millisecond

// watch looks at both hosts all the time, until ctx ends.
func (h *history) watch(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	said := false
	for {
		h.look()
		if a, b := h.hosts["A"].runs(h.name), h.hosts["B"].runs(h.name); a && b {
			if !h.forced.Load() && !said {
				h.violation("the guest runs on both hosts, and nobody forced it")
			}
			said = true
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look reads the consoles and judges what guests found when they booted.
func (h *history) look() {
	up := map[string]bool{}
	for n, k := range h.hosts {
		up[n] = k.runs(h.name)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	was := make([]uint32, len(h.consoles))
	for i, c := range h.consoles {
		was[i] = c.life
	}
	tip := h.tip
	var boots []boot
	// Twice: what a guest found may have been written by the other host's guest
	// after that one's console was read.
	for range 2 {
		for _, c := range h.consoles {
			nb, err := c.read(h.book)
			boots = append(boots, nb...)
			if err != nil {
				h.violates("%v", err)
			}
		}
		if len(boots) == 0 {
			break
		}
	}
	for _, b := range boots {
		h.judge(b, tip)
	}
	for i, c := range h.consoles {
		if c.fail {
			c.fail = false
			h.says("the guest on %s is answered with an I/O error", c.host)
			if h.counts("I/O error"); !h.forced.Load() {
				h.violates("the guest on %s was answered with an I/O error, and nobody forced anything", c.host)
			}
		}
		if c.life == was[i] && !up[c.host] {
			c.end(h.book)
		}
		if l := h.book.lives[c.life]; l != nil && !l.over {
			now := h.book.now(c.life)
			h.holds[c.host] = now
			if h.book.holds(now, h.tip) {
				h.tip = now
			}
		}
	}
}

// judge checks a boot against what the host must have, and what was answered
// last; called with mu.
func (h *history) judge(b boot, tip state) {
	top, err := h.book.judge(b.found)
	must := h.holds[b.host]
	has, hasTip := h.book.holds(top, must), h.book.holds(top, tip)
	for _, c := range h.consoles { // an earlier life of this host is over
		if c.host == b.host && c.life != b.life {
			c.end(h.book)
		}
	}
	h.book.lives[b.life].from = top
	h.holds[b.host] = top
	h.boots++
	h.says("the guest on %s finds %v (it must have %v)", b.host, top, must)
	switch {
	case err != nil:
		h.violates("the guest on %s: %v", b.host, err)
	case b.says != top.n:
		h.violates("the guest on %s goes on from %d, its disk shows %v", b.host, b.says, top)
	case !has:
		h.violates("the guest on %s finds %v, its host was known to hold %v", b.host, top, must)
	case !hasTip && !h.forced.Load():
		h.violates("the guest on %s finds %v, %v was written and nobody accepted a loss", b.host, top, tip)
	}
	if h.forced.Load() {
		h.tip = state{}
	}
}

// calm ends the licence that a person gave: one host owns the VM again.
func (h *history) calm(tip state) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.forced.Store(false)
	h.tip = tip
}

// loses notes that a person accepts what happens to a host's copy; the former
// state is returned, for a command that is refused.
func (h *history) loses(k *host) (was state) {
	h.mu.Lock()
	defer h.mu.Unlock()
	was = h.holds[k.Name()]
	h.holds[k.Name()] = state{}
	return was
}

func (h *history) holding(k *host) state {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.holds[k.Name()]
}

// knows is exactly what a host holds, if its guest has said so since it started.
func (h *history) knows(k *host) (state, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.consoles {
		if l := h.book.lives[c.life]; c.host == k.Name() && l != nil && !l.over && c.scan == nil {
			return h.book.now(c.life), true
		}
	}
	return state{}, false
}

func (h *history) hasNow(k *host, s state) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.holds[k.Name()] = s
}

// Exit codes of replicactl that are no success; see its help.
const (
	exitRefused = 6
	exitKilled  = -1
)

// ctl is a person's command; it gets some seconds. What it says belongs to the
// story.
func (h *history) ctl(ctx context.Context, k *host, limit time.Duration, args ...string) (code int, out string) {
	if h.cut.Load() {
		limit = min(limit, patienceCut)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	out, err := h.Ctl(ctx, k.Name(), args...)
	var ce *estate.CtlError
	switch {
	case err == nil:
	case errors.As(err, &ce) && ce.Code >= 0:
		code = ce.Code
	default:
		code = exitKilled
	}
	h.count(strings.Join(args[:min(2, len(args))], " "))
	text := ""
	if code != 0 {
		text = "\n           | " + strings.ReplaceAll(strings.TrimSpace(out), "\n", "\n           | ")
	}
	h.note("%s: replicactl %s: %d after %.1fs%s", k.Name(), strings.Join(args, " "), code, time.Since(began).Seconds(), text)
	return code, out
}

func (h *history) count(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.counts(what)
}

// counts is count for whoever has mu.
func (h *history) counts(what string) { h.done[what]++ }

// wait waits until ok, or for a while.
func wait(ctx context.Context, limit time.Duration, ok func() bool) bool {
	end := time.NewTimer(limit)
	defer end.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok() {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-end.C:
			return ok()
		case <-tick.C:
		}
	}
}
