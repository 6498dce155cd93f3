package histories_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// patience is how long a person waits for a command before he breaks it off,
// patienceCut while he knows that the link is cut.
const (
	patience    = 15 * time.Second
	patienceCut = 4 * time.Second
)

// pin is a pinned recovery point and what a copy started from it must show.
type pin struct {
	position string
	holds    state
}

// play is the whole history. An error that is no violation means that it could
// not be played to its end.
func (h *history) play(ctx context.Context) error {
	watching, end := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() { defer close(ended); h.watch(watching) }()
	defer func() { end(); <-ended }()
	if err := h.protect(ctx); err != nil {
		return err
	}
	if h.r.IntN(3) == 0 { // so that a host can be put back to this
		if err := h.putBack(ctx, h.any()); err != nil {
			return err
		}
	}
	for range 6 + h.r.IntN(8) {
		if err := h.step(ctx); err != nil {
			return err
		}
		pause := time.Duration(h.r.IntN(1200)) * time.Millisecond // so that guests boot and write
		wait(ctx, pause, func() bool { return false })
		if err := errors.Join(h.revive(ctx), h.broken()); err != nil {
			return err
		}
	}
	h.note("--- the faults end")
	owner, err := h.settle(ctx)
	if err = errors.Join(err, h.broken()); err != nil {
		return err
	}
	if err := h.same(ctx, owner); err != nil {
		return err
	}
	end()
	<-ended
	return errors.Join(h.broken(), h.clean(ctx, h.seed, owner))
}

// protect makes the VM and its first complete copy.
func (h *history) protect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	a := h.hosts["A"]
	if err := h.define(ctx, h.seed); err != nil {
		return err
	}
	if _, err := a.Virsh(ctx, "start", h.name); err != nil {
		return err
	}
	if code, out := h.ctl(ctx, a, time.Minute, "vm", "enable", h.name, "--to", estate.Peer("B"), "--every", "1s", "--yes"); code != 0 {
		return errors.New(out)
	}
	if !wait(ctx, time.Minute, func() bool {
		v, err := a.status(ctx, h.name)
		return err == nil && v.State == status.Replicating && !v.LastCommit.IsZero() && h.holding(a).n > 3
	}) {
		return errors.New("no first copy, or no first record")
	}
	return nil
}

// any is one of the two hosts.
func (h *history) any() *host {
	if h.r.IntN(2) == 0 {
		return h.hosts["A"]
	}
	return h.hosts["B"]
}

// primary is a host whose daemon says that it owns the VM.
func (h *history) primary(ctx context.Context) *host {
	for _, n := range []string{"A", "B"} {
		if k := h.hosts[n]; k.Up() {
			if v, err := k.status(ctx, h.name); err == nil && v.Role == status.Primary {
				return k
			}
		}
	}
	return nil
}

func (h *history) step(ctx context.Context) error {
	k := h.any()
	if !k.Up() && h.r.IntN(3) > 0 {
		return h.reboot(ctx, k)
	}
	if !k.Up() {
		k = k.other
	}
	if !k.Up() {
		return h.reboot(ctx, k)
	}
	switch n := h.r.IntN(26); n {
	case 0:
		h.breathe(ctx, time.Duration(h.r.IntN(2000))*time.Millisecond)
	case 1, 2, 3:
		h.sync(ctx, h.primary(ctx))
	case 4, 5:
		h.pin(ctx)
	case 6:
		return h.killDaemon(k)
	case 7:
		h.killPlane(ctx, k)
	case 8:
		return h.crash(ctx, k, h.r.IntN(2) == 0)
	case 9:
		return h.link(h.cut.Load())
	case 10, 11, 12:
		return h.meanwhile(ctx, k, func() { h.planned(ctx, h.primary(ctx)) })
	case 13, 14, 15, 16:
		return h.meanwhile(ctx, k.other, func() { h.unplanned(ctx, h.replica(ctx, k)) })
	case 17:
		return h.meanwhile(ctx, k, func() { h.commit(ctx, h.trial(ctx, k)) })
	case 18:
		return h.meanwhile(ctx, k, func() { h.cancel(ctx, h.trial(ctx, k)) })
	case 19:
		if p := h.primary(ctx); p != nil {
			return h.meanwhile(ctx, k, func() { h.reverse(ctx, p) })
		}
	case 20:
		h.off(ctx, k)
	case 21:
		h.ctl(ctx, k, patience, "vm", "start", h.name)
	case 22, 23:
		return h.putBack(ctx, k)
	default:
		return h.arm(ctx, k)
	}
	return nil
}

// replica is the host that holds the copy, where one can say so; else k.
func (h *history) replica(ctx context.Context, k *host) *host {
	if p := h.primary(ctx); p != nil && p.other.Up() {
		return p.other
	}
	return k
}

// trial is the host of a failover on trial; else k.
func (h *history) trial(ctx context.Context, k *host) *host {
	if v, err := k.other.status(ctx, h.name); err == nil && v.Failover != nil {
		return k.other
	}
	return k
}

func (h *history) commit(ctx context.Context, k *host) {
	h.ctl(ctx, k, patience, "failover", "commit", h.name, "--yes")
}

func (h *history) breathe(ctx context.Context, d time.Duration) {
	h.note("%v pass", d)
	wait(ctx, d, func() bool { return false })
}

// meanwhile lets, in one of three, something happen to a host while act is
// under way.
func (h *history) meanwhile(ctx context.Context, k *host, act func()) error {
	which, after := h.r.IntN(12), time.Duration(h.r.IntN(1500))*time.Millisecond
	done := make(chan struct{})
	go func() { defer close(done); act() }()
	var err error
	if which < 4 && !wait(ctx, after, func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	}) {
		switch which {
		case 0:
			err = h.killDaemon(k)
		case 1:
			h.killPlane(ctx, k)
		case 2:
			err = h.crash(ctx, k, true)
		default:
			err = h.link(h.cut.Load())
		}
	}
	<-done
	return err
}

// sync runs a cycle and remembers what the replica holds since.
func (h *history) sync(ctx context.Context, p *host) bool {
	if p == nil {
		return false
	}
	h.look()
	s := h.holding(p)
	code, _ := h.ctl(ctx, p, patience, "vm", "sync", h.name)
	if code != 0 {
		return false
	}
	h.hasNow(p.other, s)
	h.note("%s holds %v", p.other.Name(), s)
	if p.other.Up() && !p.other.runs(h.name) {
		if v, err := p.other.status(ctx, h.name); err == nil && v.Role == status.Replica {
			h.calm(s)
		}
	}
	return true
}

// pin keeps the newest point, when what it holds is known.
func (h *history) pin(ctx context.Context) {
	p := h.primary(ctx)
	if p == nil || !p.other.Up() {
		return
	}
	// The guest stands still, so that the newest state is the one that is known.
	if _, err := p.Virsh(ctx, "suspend", h.name); err != nil {
		return
	}
	defer func() { _, _ = p.Virsh(ctx, "resume", h.name) }()
	wait(ctx, 200*time.Millisecond, func() bool { return false }) // what was being answered is said
	h.look()
	before, known := h.knows(p)
	if !known || !h.sync(ctx, p) {
		return
	}
	if h.look(); h.holding(p) != before {
		return
	}
	r := p.other
	if code, _ := h.ctl(ctx, r, patience, "point", "pin", h.name, "latest"); code != 0 {
		return
	}
	_, out := h.ctl(ctx, r, patience, "--json", "point", "list", h.name)
	var l wire.PointsReply
	if json.Unmarshal([]byte(out), &l) != nil || len(l.Points) == 0 {
		return
	}
	pos := l.Points[len(l.Points)-1].Pos
	at := fmt.Sprintf("%.8s/%d", pos.Generation, pos.Epoch)
	h.note("point %s of %s holds %v", at, r.Name(), before)
	h.pins[r.Name()] = pin{at, before}
}

func (h *history) planned(ctx context.Context, p *host) {
	if p == nil {
		return
	}
	h.ctl(ctx, p, patience, "failover", "planned", h.name, "--yes", "--shutdown-timeout", "2s", "--force-off")
}

// unplanned takes the replica's side by force, on trial or for good, from the
// newest state or an older one.
func (h *history) unplanned(ctx context.Context, k *host) {
	if v, err := k.status(ctx, h.name); err != nil || v.Role != status.Replica || k.runs(h.name) {
		return
	}
	args := []string{"failover", "unplanned", h.name, "--force", "--yes"}
	inPlace := h.r.IntN(3) == 0
	if inPlace {
		args = append(args, "--in-place")
	}
	var want *state
	was := h.holding(k)
	switch h.r.IntN(4) {
	case 0:
		args = append(args, "--point", "oldest")
		h.loses(k)
	case 1:
		if p, ok := h.pins[k.Name()]; ok {
			args = append(args, "--point", p.position)
			h.hasNow(k, p.holds)
			want = &p.holds
		}
	}
	h.forced.Store(true)
	code, _ := h.ctl(ctx, k, patience, args...)
	switch code {
	case 0:
		h.before[k.Name()] = nil
		if !inPlace {
			h.before[k.Name()] = &was
		}
		if want != nil {
			h.exactly(ctx, k, *want)
		}
	case exitRefused:
		h.hasNow(k, was)
	default:
		h.before[k.Name()] = &state{} // nobody knows
	}
}

// exactly: the guest that was just started from a point began with it.
func (h *history) exactly(ctx context.Context, k *host, want state) {
	var l *life
	wait(ctx, patience, func() bool {
		h.look()
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, c := range h.consoles {
			if x := h.book.lives[c.life]; c.host == k.Name() && x != nil && !x.over {
				l = x
				return true
			}
		}
		return false
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	if l != nil && l.from != want {
		h.violates("the point that holds %v starts a guest on %s that finds %v", want, k.Name(), l.from)
	}
}

// cancel ends a trial: the copy is what it was before.
func (h *history) cancel(ctx context.Context, k *host) {
	v, err := k.status(ctx, h.name)
	trial := err == nil && v.Failover != nil && v.Failover.Phase == status.Trial
	h.forced.Store(h.forced.Load() || trial)
	code, _ := h.ctl(ctx, k, patience, "failover", "cancel", h.name, "--yes")
	h.look()
	switch was := h.before[k.Name()]; {
	case code == exitRefused || !trial:
	case code == 0 && was != nil:
		h.hasNow(k, *was)
	default:
		h.loses(k)
	}
}

// reverse keeps a host's side where that is asked for.
func (h *history) reverse(ctx context.Context, keep *host) {
	if v, err := keep.status(ctx, h.name); err == nil && (v.State == status.FailedOver || v.State == status.Diverged) {
		h.decide(ctx, keep)
	}
}

// decide keeps a host's side and gives the other one's up.
func (h *history) decide(ctx context.Context, keep *host) {
	o := keep.other
	if o.Up() && o.runs(h.name) {
		h.destroy(ctx, o)
	}
	h.forced.Store(true)
	h.look()
	was := h.loses(o)
	if code, _ := h.ctl(ctx, keep, patience, "failover", "reverse", h.name, "--yes"); code == exitRefused {
		h.hasNow(o, was)
	}
}

func (h *history) destroy(ctx context.Context, k *host) {
	_, err := k.Virsh(ctx, "destroy", h.name)
	h.note("%s: virsh destroy (%v)", k.Name(), err)
	h.look()
}
