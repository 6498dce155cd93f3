package histories_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"time"

	"kvmreplica/replicad/health"
	"kvmreplica/replicad/status"
)

const (
	// settleWithin is how long the pair and its operator have when the faults end.
	settleWithin = 4 * time.Minute
	// actEvery is how long he looks at what a command of his did.
	actEvery = 2500 * time.Millisecond
	// shownWithin is how long two owners that can talk may not have noticed.
	shownWithin = 30 * time.Second
)

// settle ends the faults, and does what both hosts' status and health say until
// one of them owns the VM and the other has all of it.
func (h *history) settle(ctx context.Context) (*host, error) {
	ctx, cancel := context.WithTimeout(ctx, settleWithin)
	defer cancel()
	for _, n := range []string{"A", "B"} {
		k := h.hosts[n]
		if k.Up() && k.armed != "" {
			if err := h.killDaemon(k); err != nil {
				return nil, err
			}
		}
		if !k.Up() {
			if err := h.reboot(ctx, k); err != nil {
				return nil, err
			}
		}
	}
	if err := h.link(true); err != nil {
		return nil, err
	}
	acted := time.Now()
	for {
		if err := h.revive(ctx); err != nil {
			return nil, err
		}
		if err := h.broken(); err != nil {
			return nil, err
		}
		a, b, err := h.both(ctx)
		if err == nil {
			if o := h.settled(a, b); o != nil && h.sync(ctx, o) {
				return o, nil
			}
			if time.Since(acted) > actEvery {
				h.operate(ctx, a, b)
				acted = time.Now()
			}
		}
		wait(ctx, 200*time.Millisecond, func() bool { return false })
		if ctx.Err() != nil {
			return nil, fmt.Errorf("the pair cannot be brought to rest: %w\nA: %s\nB: %s", ctx.Err(), describe(a), describe(b))
		}
	}
}

func (h *history) both(ctx context.Context) (a, b status.VM, err error) {
	if a, err = h.hosts["A"].status(ctx, h.name); err == nil {
		b, err = h.hosts["B"].status(ctx, h.name)
	}
	return a, b, err
}

func describe(v status.VM) string {
	s := fmt.Sprintf("%s %s %s running %t at %s", v.Role, v.State, v.Health, v.Running, v.Position)
	if v.Plan != nil {
		s += fmt.Sprintf(" plan %s/%s interrupted %t: %s", v.Plan.Kind, v.Plan.Step, v.Plan.Interrupted, v.Plan.Failure)
	}
	if v.Failover != nil {
		s += " failover " + v.Failover.Phase
	}
	for _, c := range v.Conditions {
		s += fmt.Sprintf("\n    %s %s: %s -> %s", c.Severity, c.Code, c.Text, c.Remedy)
	}
	if v.Stats.LastError != "" {
		s += "\n    last error: " + v.Stats.LastError
	}
	return s
}

// settled is the owner of a pair that is at rest.
func (h *history) settled(a, b status.VM) *host {
	o, p, r := h.hosts["A"], a, b
	if b.Role == status.Primary {
		o, p, r = h.hosts["B"], b, a
	}
	if a.Plan != nil || b.Plan != nil || p.Role != status.Primary || r.Role != status.Replica || p.Failover != nil ||
		p.State != status.Replicating || r.State != status.Replicating || !p.Running || r.Running || p.LastCommit.IsZero() ||
		p.Health == health.Critical || r.Health == health.Critical {
		return nil
	}
	return o
}

func owns(v status.VM) bool { return v.Role == status.Primary && v.State != status.Preparing }

func has(v status.VM, code string) *health.Condition {
	for i, c := range v.Conditions {
		if c.Code == code {
			return &v.Conditions[i]
		}
	}
	return nil
}

// shown reports whether a host says that something must be decided.
func shown(v status.VM) bool {
	return v.State == status.Diverged || v.State == status.FailedOver || has(v, "start-held") != nil || has(v, "session-stopped") != nil || has(v, "diverged") != nil
}

// stale reports whether a host says that the other one took over from it.
func stale(v status.VM) bool {
	c := has(v, "session-stopped")
	return c != nil && strings.Contains(c.Remedy, "on the new primary")
}

// operate is one decision of a person who looks at both hosts.
func (h *history) operate(ctx context.Context, a, b status.VM) {
	h.note("the operator sees\n  A: %s\n  B: %s", describe(a), describe(b))
	h.tried++
	ka, kb := h.hosts["A"], h.hosts["B"]
	for k, v := range map[*host]status.VM{ka: a, kb: b} {
		if v.Plan == nil {
			continue
		}
		if v.Plan.Interrupted && h.tried%3 == 0 { // it goes on by itself; a person helps
			o := map[*host]status.VM{ka: b, kb: a}[k]
			if h.tried > 9 && o.State == status.Diverged && o.Plan == nil && owns(o) {
				h.decide(ctx, k.other) // the side that can
				return
			}
			verb := "resume"
			if h.tried%2 == 0 && !v.Plan.Committed {
				verb = "take-back"
			}
			h.ctl(ctx, k, patience, "failover", verb, h.name)
		}
		return
	}
	for k, v := range map[*host]status.VM{ka: a, kb: b} {
		if v.Failover != nil && v.Failover.Phase == status.Trial && has(v, "data-plane-down") != nil {
			h.cancel(ctx, k) // it cannot be committed
			return
		}
	}
	keep, v := ka, a
	switch {
	case owns(a) && owns(b):
		if !shown(a) || !shown(b) {
			if time.Since(h.talked) > shownWithin {
				h.violation("both hosts own the VM, they can talk, and it is not shown\nA: %s\nB: %s", describe(a), describe(b))
			}
			return
		}
		h.forks++
		// The side that was failed over to last; with two of them, or none, either.
		overA, overB := a.State == status.FailedOver || a.Failover != nil || stale(b), b.State == status.FailedOver || b.Failover != nil || stale(a)
		if overB && !overA || overA == overB && h.r.IntN(2) == 0 {
			keep = kb
		}
		h.decide(ctx, keep)
		return
	case owns(b):
		keep, v = kb, b
	case !owns(a):
		if h.tried%2 == 0 {
			keep = kb
		}
		h.byForce(ctx, keep)
		return
	}
	h.mend(ctx, keep, v, map[*host]status.VM{ka: b, kb: a}[keep])
}

// mend does what health says of the owner and of its replica.
func (h *history) mend(ctx context.Context, keep *host, v, r status.VM) {
	stop := has(v, "session-stopped")
	switch {
	case v.Failover != nil && v.Failover.Phase == status.Trial && v.State != status.Diverged:
		h.ctl(ctx, keep, patience, "failover", "commit", h.name, "--yes")
	case v.State == status.FailedOver || v.State == status.Diverged || has(v, "diverged") != nil:
		h.decide(ctx, keep)
	case r.State == status.Suspect:
		h.ctl(ctx, keep.other, patience, "vm", "resync", h.name)
	case stop != nil && strings.Contains(stop.Remedy, "failover unplanned") && r.Role == status.Replica:
		h.destroy(ctx, keep)
		h.byForce(ctx, keep.other)
	case stop != nil && strings.Contains(stop.Remedy, "failover reverse"):
		h.decide(ctx, keep)
	case !v.Running && has(v, "start-held") != nil && h.tried%2 == 0 && !r.Running:
		h.ctl(ctx, keep, patience, "vm", "start", h.name, "--force")
	case !v.Running:
		h.ctl(ctx, keep, patience, "vm", "start", h.name)
	default:
		h.sync(ctx, keep) // waits for a silent host have grown meanwhile
	}
}

// byForce takes a host's side, whatever it loses.
func (h *history) byForce(ctx context.Context, k *host) {
	h.forced.Store(true)
	h.before[k.Name()] = nil
	h.ctl(ctx, k, patience, "failover", "unplanned", h.name, "--force", "--in-place", "--yes")
}

// same proves that both hosts hold the same at the end, and that it is what the
// guest wrote.
func (h *history) same(ctx context.Context, owner *host) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := owner.Virsh(ctx, "suspend", h.name); err != nil {
		return err
	}
	if code, out := h.ctl(ctx, owner, time.Minute, "vm", "sync", h.name); code != 0 {
		return fmt.Errorf("the last cycle: %s", out)
	}
	a, b, err := h.both(ctx)
	if err != nil {
		return err
	}
	var x, y []byte
	equal := wait(ctx, 20*time.Second, func() bool {
		var errX, errY error
		x, errX = os.ReadFile(h.hosts["A"].Path(a.Disks[0].Path))
		y, errY = os.ReadFile(h.hosts["B"].Path(b.Disks[0].Path))
		return errX == nil && errY == nil && bytes.Equal(x, y)
	})
	if !equal {
		h.violation("the two copies differ at the end: %s (%d bytes) and %s (%d bytes)\nA: %s\nB: %s", a.Disks[0].Path, len(x), b.Disks[0].Path, len(y), describe(a), describe(b))
	}
	h.look()
	h.mu.Lock()
	defer h.mu.Unlock()
	top, err := h.book.judge(scan(y))
	if err != nil {
		h.violates("the copies at the end: %v", err)
	}
	if want := h.holds[owner.Name()]; !h.book.holds(top, want) {
		h.violates("the copies at the end are at %v, the guest had written %v", top, want)
	}
	return h.bad
}

// scan reads an image as the guest does at its boot.
func scan(image []byte) map[int]record {
	found := map[int]record{}
	for i := range slots {
		at := (firstLBA + i*slotStride) * sector
		if at+2*sector > len(image) {
			break
		}
		var r record
		for k := range 3 {
			r.head[k] = binary.LittleEndian.Uint32(image[at+4*k:])
			r.tail[k] = binary.LittleEndian.Uint32(image[at+sector+4*k:])
		}
		if r != (record{}) {
			found[i] = r
		}
	}
	return found
}
