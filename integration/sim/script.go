package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"kvmreplica/replicad/delta"
)

// Op is one line of a script: what happens, and the number from which all its
// choices follow.
type Op struct {
	Kind string
	N    uint64
}

// String is the op as ParseScript reads it.
func (o Op) String() string { return fmt.Sprintf("%s:%d", o.Kind, o.N) }

// FormatScript writes ops on one line.
func FormatScript(ops []Op) string {
	var b []string
	for _, o := range ops {
		b = append(b, o.String())
	}
	return strings.Join(b, " ")
}

// ParseScript reads what FormatScript wrote.
func ParseScript(s string) (ops []Op, err error) {
	for _, f := range strings.Fields(s) {
		kind, n, _ := strings.Cut(f, ":")
		o := Op{Kind: kind}
		if o.N, err = strconv.ParseUint(n, 10, 64); err != nil {
			return nil, fmt.Errorf("op %q: %w", f, err)
		}
		if !slices.ContainsFunc(vocabulary(), func(v verb) bool { return v.kind == kind }) {
			return nil, fmt.Errorf("op %q is not known", f)
		}
		ops = append(ops, o)
	}
	return ops, nil
}

// verb is one kind of op with its weight and what it does.
type verb struct {
	kind   string
	weight int
	do     func(w *World, r *rand.Rand) error
}

// options follow from the seed alone.
func options(seed uint64) Options {
	r := rand.New(rand.NewPCG(seed, 1))
	return Options{
		Shared: r.IntN(4) == 0, Torn: r.IntN(2) == 0, DropOnSyncError: r.IntN(2) == 0,
		Capture:  []int64{16 << 10, 256 << 10, 8 << 20}[r.IntN(3)],
		Interval: []time.Duration{0, time.Second, time.Minute}[r.IntN(3)],
		Distance: []time.Duration{time.Second, 30 * time.Second, 5 * time.Minute}[r.IntN(3)],
		Verified: r.IntN(3) > 0, FinalSteps: 60,
	}
}

// Generate makes the script of a seed. Every seed leaves out some kinds of ops,
// so that what remains happens often enough to meet.
func Generate(seed uint64) []Op {
	r := rand.New(rand.NewPCG(seed, 2))
	var vs []verb
	total := 0
	for _, v := range vocabulary() {
		if v.weight > 1 && v.weight < 20 && r.IntN(3) == 0 || v.weight == 1 && r.IntN(2) == 0 {
			continue
		}
		vs = append(vs, v)
		total += v.weight
	}
	ops := make([]Op, 0, 64)
	for range 24 + r.IntN(40) {
		at := r.IntN(total)
		for _, v := range vs {
			if at -= v.weight; at < 0 {
				ops = append(ops, Op{v.kind, uint64(r.Uint32())})
				break
			}
		}
	}
	return ops
}

// vocabulary is everything that can happen.
func vocabulary() []verb {
	return []verb{
		{"write", 60, opWrite},
		{"ship", 60, opShip},
		{"cycle", 30, opCycle},
		{"restless", 12, opRestless},
		{"apply", 25, opApply},
		{"clean", 12, opClean},
		{"look", 8, opLook},
		{"kill", 6, func(w *World, r *rand.Rand) error { return w.pick(r).crash(true, r.Uint64()) }},
		{"cut", 6, func(w *World, r *rand.Rand) error { return w.pick(r).crash(false, r.Uint64()) }},
		{"arm-kill", 8, func(w *World, r *rand.Rand) error { return w.opArm(r, true) }},
		{"arm-cut", 10, func(w *World, r *rand.Rand) error { return w.opArm(r, false) }},
		{"daemon", 4, opDaemon},
		{"start", 40, opStart},
		{"fail-io", 8, opFailIO},
		{"full", 4, opFull},
		{"heal", 10, opHeal},
		{"link-down", 5, func(w *World, _ *rand.Rand) error { w.link.down = true; return nil }},
		{"link-up", 14, func(w *World, _ *rand.Rand) error { w.link.down = false; return nil }},
		{"link-cut", 12, opLinkCut},
		{"link-lose", 10, func(w *World, r *rand.Rand) error { w.link.loseCall = 1 + r.IntN(4); return nil }},
		{"link-mute", 10, func(w *World, r *rand.Rand) error { w.link.loseReply = 1 + r.IntN(4); return nil }},
		{"link-twice", 6, func(w *World, r *rand.Rand) error { w.link.twice = 1 + r.IntN(4); return nil }},
		{"link-keep", 8, func(w *World, r *rand.Rand) error { w.link.keep = 1 + r.IntN(3); return nil }},
		{"replay", 8, opReplay},
		{"clock", 5, opClock},
		{"guest-stop", 3, func(w *World, r *rand.Rand) error { w.pick(r).stopGuest(); return nil }},
		{"guest-start", 5, func(w *World, r *rand.Rand) error { return w.told(w.pick(r).startGuest()) }},
		{"pause", 3, func(w *World, r *rand.Rand) error { return opPause(w, r) }},
		{"planned", 8, opPlanned},
		{"planned-crash", 8, opPlannedCrash},
		{"unplanned", 4, opUnplanned},
		{"reverse", 8, opReverse},
		{"pin", 3, opPin},
		{"snapshot", 2, opSnapshot},
		{"restore", 1, opRestore},
		{"reseed", 1, opReseed},
	}
}

func (w *World) pick(r *rand.Rand) *host { return w.hosts[r.IntN(2)] }

// told notes an error that a person would read; it is no violation.
func (w *World) told(err error) error {
	if err != nil {
		w.note("  refused: %v", err)
	}
	return nil
}

func opWrite(w *World, r *rand.Rand) error {
	for _, h := range w.hosts {
		if h.guest == nil || !h.up || h.lost() {
			continue
		}
		for range 1 + r.IntN(12) {
			if err := h.guest.step(r); err != nil || h.guest == nil || h.lost() {
				return err
			}
		}
	}
	return nil
}

func opShip(w *World, r *rand.Rand) error {
	for _, h := range w.hosts {
		if h.up {
			h.settleShip(1 + r.IntN(4))
		}
	}
	return nil
}

func opCycle(w *World, r *rand.Rand) error {
	for _, h := range w.hosts {
		if h.up && h.ship != nil {
			h.ship.feed(eventTrigger())
			h.settleShip(4 + r.IntN(6))
		}
	}
	return nil
}

// opRestless lets the guest write in the middle of the next reads.
func opRestless(w *World, r *rand.Rand) error {
	w.restless = 1 + r.IntN(6)
	w.restlessRand = rand.New(rand.NewPCG(r.Uint64(), 3))
	return opCycle(w, r)
}

func opApply(w *World, r *rand.Rand) error {
	for _, h := range w.hosts {
		for range 1 + r.IntN(4) {
			if !h.up || h.lost() || h.store == nil {
				break
			}
			did, err := h.store.Step(background())
			if err != nil {
				w.note("  %s apply: %v", h.name, err)
				break
			}
			if !did {
				break
			}
		}
	}
	return nil
}

func opClean(w *World, _ *rand.Rand) error {
	for _, h := range w.hosts {
		if !h.up || h.lost() || h.client == nil {
			continue
		}
		a, err := h.client.Clean(background())
		if err == nil && a.Cleared > 0 {
			w.count("regions cleared")
		}
	}
	return nil
}

func opLook(w *World, _ *rand.Rand) error {
	for _, h := range w.hosts {
		if err := h.look(); err != nil {
			return err
		}
	}
	return nil
}

func (w *World) opArm(r *rand.Rand, kill bool) error {
	h := w.pick(r)
	if h.up && h.arm == nil {
		h.armCrash(kill, 1+r.IntN(30), r.Uint64())
	}
	return nil
}

// opDaemon ends the daemon alone: the data plane and its guest go on.
func opDaemon(w *World, r *rand.Rand) error {
	h := w.pick(r)
	if !h.up || h.lost() {
		return nil
	}
	w.count("daemon restarted")
	h.ship, h.closed, h.allowed, h.held = nil, false, delta.Generation{}, ""
	_ = h.closeStore()
	return w.told(h.tend())
}

func opStart(w *World, _ *rand.Rand) error {
	for _, h := range w.hosts {
		var err error
		if !h.up {
			err = h.start()
		} else if !h.lost() {
			err = h.tend()
		}
		if err != nil {
			w.note("  %s starts: %v", h.name, err)
		}
	}
	return nil
}

// opFailIO lets one of the next operations of a machine fail, or some in a row.
func opFailIO(w *World, r *rand.Rand) error {
	h := w.pick(r)
	errno := []error{syscall.EIO, syscall.ENOSPC, syscall.EDQUOT}[r.IntN(3)]
	skip, times := r.IntN(25), 1
	if r.IntN(3) == 0 {
		times = 1 + r.IntN(10)
	}
	h.failIO(errno, skip, times)
	return nil
}

// opFull fills a machine's file system up to a little.
func opFull(w *World, r *rand.Rand) error {
	h := w.pick(r)
	h.m.FS.SetCapacity(h.m.FS.Used() + int64(r.IntN(64))<<10)
	w.count("disk full")
	return nil
}

func opHeal(w *World, _ *rand.Rand) error {
	for _, h := range w.hosts {
		h.m.FS.SetCapacity(0)
		h.m.Power.SetHook(nil)
	}
	return nil
}

func opLinkCut(w *World, r *rand.Rand) error {
	w.link.cut = r.Int64N(1 << (4 + r.IntN(17)))
	return nil
}

func opReplay(w *World, r *rand.Rand) error {
	if n := len(w.link.kept); n > 0 {
		return w.replay(r.IntN(n))
	}
	return nil
}

func opClock(w *World, r *rand.Rand) error {
	d := time.Duration(r.Int64N(int64(48 * time.Hour)))
	if r.IntN(3) == 0 {
		d = -d
	}
	if r.IntN(10) == 0 {
		d *= 365
	}
	w.now = w.now.Add(d)
	w.count("clock jumped")
	return nil
}
