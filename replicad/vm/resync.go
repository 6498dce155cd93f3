package vm

import (
	"context"
	"fmt"
	"time"

	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// ResyncOptions are a person's choices for comparing everything by digest.
type ResyncOptions struct {
	// Background compares between the cycles, which go on. Otherwise the tracker
	// is distrusted: no cut is made until everything was compared.
	Background bool
	Rate       int64          // background: bytes per second; 0 = the default
	Window     session.Window // background: the time of day for it
	Stop       bool           // ends a background comparison
	Request    string
}

// Pass is a comparison of everything in the background: wanted, or the last
// one that came to its end.
type Pass struct {
	Request string         `json:"request"`
	Asked   time.Time      `json:"asked"`
	Rate    int64          `json:"rate,omitempty"`
	Window  session.Window `json:"window,omitzero"`
	// Before is whether everything had been compared when this was asked for.
	Before  bool      `json:"before"`
	Ended   time.Time `json:"ended,omitzero"`
	Differs int64     `json:"differs"` // bytes found, so far
}

func (p *Pass) open() bool { return p != nil && p.Ended.IsZero() }

// bounds are the pass as the session takes it.
func (r *Record) bounds() (p session.Pass, differs int64) {
	if !r.Pass.open() {
		return p, 0
	}
	return session.Pass{ID: r.Pass.Request, Rate: r.Pass.Rate, Window: r.Pass.Window}, r.Pass.Differs
}

// compareRate is what the time of a comparison is estimated from, in bytes per
// second: one side's disk or hash, whichever is slower.
const compareRate = 200 << 20

// CompareTime estimates how long both hosts read n bytes and compare them.
func CompareTime(n, rate int64) time.Duration {
	if rate <= 0 || rate > compareRate {
		rate = compareRate
	}
	return time.Duration(n/rate)*time.Second + time.Second
}

// PlanResync says what a comparison would cost.
func (v *VM) PlanResync(o ResyncOptions) ([]string, error) {
	if v.session() == nil && o.foreground() {
		return []string{"What this replica cannot trust any more is given up, recovery points that need it END; then the primary compares everything."}, v.distrusted()
	}
	if err := v.mayResync(o); err != nil {
		return nil, err
	}
	r := v.record()
	n := r.bytes()
	switch {
	case o.Stop:
		return []string{"The background comparison ends where it is."}, nil
	case !o.Background:
		return []string{
			fmt.Sprintf("Everything is COMPARED by digest: %d bytes, read on both hosts, about %s.", n, CompareTime(n, 0)),
			"No cut is made meanwhile; the replica and its recovery points stay usable. What differs goes with the next epoch.",
		}, nil
	}
	rate := o.Rate
	if rate <= 0 {
		rate = session.DefaultScrubRate
	}
	took := CompareTime(n, rate)
	lines := []string{fmt.Sprintf("%d bytes are compared by digest in the background, at %d bytes a second on each host: about %s of reading.", n, min(rate, compareRate), took)}
	if o.Window != (session.Window{}) {
		days := 1 + int((took-1)/o.Window.Length())
		lines = append(lines, fmt.Sprintf("Only from %s on this host's clock: about %d such times.", o.Window, days))
	}
	if r.Pass.open() {
		lines = append(lines, "A comparison is under way: it goes on where it is, with these bounds.")
	}
	return append(lines, "Cuts go on. What differs is sent with the next epoch, and counted; recovery points stay."), nil
}

func (v *VM) mayResync(o ResyncOptions) error {
	if v.session() == nil {
		return v.notShipping()
	}
	name := v.record().Name
	switch {
	case o.Rate < 0 || o.Window.Length() <= 0:
		return &wire.Error{Kind: wire.KindInvalid, Text: "a comparison needs a rate above 0 and a window that is not empty"}
	case o.Stop && !v.record().Pass.open():
		return &wire.Error{Kind: wire.KindRefused, Text: "no comparison in the background was asked for", Hint: "replicactl vm status " + name}
	case o.Background && v.record().Acked.IsZero() && !v.session().Status().Protected:
		return &wire.Error{Kind: wire.KindRefused, Text: "there is no copy to compare with yet", Hint: "replicactl vm watch " + name}
	case v.record().Lineage.State == lineage.Demoting:
		return &wire.Error{Kind: wire.KindRefused, Text: "a role change is under way", Hint: "replicactl vm status " + name}
	}
	return nil
}

func (o ResyncOptions) foreground() bool { return !o.Background && !o.Stop }

// Resync compares everything by digest; what differs is sent. On a replica that
// takes nothing, because its images were changed from outside or its store is
// damaged, it gives up what cannot be trusted; then the primary compares.
func (v *VM) Resync(ctx context.Context, o ResyncOptions) error {
	if v.session() == nil && o.foreground() {
		return v.trustAgain(ctx)
	}
	if err := v.mayResync(o); err != nil {
		return err
	}
	if o.foreground() {
		return v.distrust(ctx, "asked for by an operator")
	}
	s := v.session()
	if s == nil {
		return v.notShipping()
	}
	before := false
	err := v.update(func(r *Record) error {
		if o.Stop {
			if r.Pass != nil {
				before = r.Pass.Before
			}
			r.Pass, r.Verified, r.Scrub = nil, before, session.Cursor{}
			return nil
		}
		p := Pass{Request: o.Request, Asked: v.deps.Now(), Before: r.Verified}
		if r.Pass.open() {
			p = *r.Pass
		} else {
			r.Scrub = session.Cursor{}
		}
		p.Rate, p.Window = o.Rate, o.Window
		r.Pass = &p
		return nil
	})
	if err != nil {
		return err
	}
	if o.Stop {
		s.StopScan(before)
		return nil
	}
	r := v.record()
	p, _ := r.bounds()
	s.Rescan(p)
	return nil
}

// progress takes the session's place in a pass into the record; it reports
// whether that is worth a sync.
func (p *Pass) progress(s session.Status, now time.Time) (*Pass, bool) {
	if !p.open() || s.Pass.ID != p.Request {
		return p, false
	}
	n := *p
	n.Differs = s.Mismatched
	if s.Verified {
		n.Ended = now
	}
	return &n, n != *p
}

// viewPass shows the comparison that is under way, or the last.
func (v *VM) viewPass(s session.Status, out *status.VM) {
	r := v.record()
	p := r.Pass
	if p == nil {
		return
	}
	c := &status.Compare{Asked: p.Asked, Ended: p.Ended, Rate: p.Rate, Window: p.Window.String(), Total: r.bytes(), Differs: p.Differs}
	if !p.open() {
		c.Done = c.Total
	} else if s.Pass.ID == p.Request {
		for _, d := range r.served() {
			if d.Name == s.Scrub.Disk {
				c.Done += s.Scrub.Offset
				break
			}
			c.Done += d.Size
		}
		if s.Scrub.Disk == "" {
			c.Done = 0
		}
	}
	out.Compare = c
}
