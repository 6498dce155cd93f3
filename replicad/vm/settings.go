package vm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// Settings are what a person may change of a VM while it is protected; nil
// leaves as it is. All of them are the VM's: they go with it when roles change.
type Settings struct {
	Interval *time.Duration
	AppEvery *time.Duration
	OnSilent *string
	// Shutdown is how long the guest may take to shut down in a planned failover
	// that does not say; 0 = the default.
	Shutdown *time.Duration
}

// Bounds of the settings.
const (
	maxInterval = 24 * time.Hour
	maxShutdown = 24 * time.Hour
)

// Check refuses values that cannot be.
func (s Settings) Check() error {
	bad := func(hint, format string, a ...any) error {
		return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf(format, a...), Hint: hint}
	}
	if d := s.Interval; d != nil && (*d < 0 || *d > maxInterval || *d%time.Second != 0) {
		return bad("whole seconds from 1s to 24h, or 0 for back to back", "interval %s", *d)
	}
	if d := s.AppEvery; d != nil {
		if err := (&EnableOptions{AppEvery: *d}).check(); err != nil {
			return err
		}
	}
	if o := s.OnSilent; o != nil && *o != "start" && *o != "hold" {
		return bad("use start or hold", "on-silent-peer is %.32q", *o)
	}
	if d := s.Shutdown; d != nil && *d != 0 && (*d < time.Second || *d > maxShutdown || *d%time.Second != 0) {
		return bad("whole seconds from 1s to 24h, or 0 for the default of 5m", "shutdown time %s", *d)
	}
	return nil
}

// PlanSet says what Set would change, or why it would refuse.
func (v *VM) PlanSet(s Settings) ([]string, error) {
	if err := errors.Join(s.Check(), v.mayChange("vm set")); err != nil {
		return nil, err
	}
	r := v.record()
	return s.changes(&r), nil
}

// Bytes is the size of the protected disks.
func (v *VM) Bytes() int64 {
	r := v.record()
	return r.bytes()
}

// Rate bounds what this host sends of the VM, in bytes per second; 0 = only the
// host's limits do.
func (v *VM) Rate() int64 { return v.record().Rate }

func (s Settings) changes(r *Record) (out []string) {
	span := func(name, none string, was time.Duration, to *time.Duration) {
		if to == nil || *to == was {
			return
		}
		text := func(d time.Duration) string {
			if d == 0 {
				return none
			}
			return d.String()
		}
		out = append(out, fmt.Sprintf("%s %s -> %s", name, text(was), text(*to)))
	}
	span("every", "back to back", r.Interval, s.Interval)
	span("app-every", "none", r.AppEvery, s.AppEvery)
	if s.OnSilent != nil && *s.OnSilent != r.OnSilent {
		out = append(out, fmt.Sprintf("on-silent-peer %s -> %s", r.OnSilent, *s.OnSilent))
	}
	span("shutdown-time", defaultShutdown.String(), r.Shutdown, s.Shutdown)
	return out
}

// Set changes a protected VM's settings on its primary and returns what
// changed. They are durable first, count at once, and the other host hears of
// them now or, when it does not answer, as soon as it does. What is as asked
// already is left alone.
func (v *VM) Set(ctx context.Context, s Settings) ([]string, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	if err := v.mayChange("vm set"); err != nil {
		return nil, err
	}
	var changed []string
	var was Record
	err := v.update(func(r *Record) error {
		was, changed = *r, s.changes(r)
		if s.Interval != nil {
			r.Interval = *s.Interval
		}
		if s.AppEvery != nil {
			r.AppEvery = *s.AppEvery
		}
		if s.OnSilent != nil {
			r.OnSilent = *s.OnSilent
		}
		if s.Shutdown != nil {
			r.Shutdown = *s.Shutdown
		}
		return nil
	})
	if err != nil || len(changed) == 0 {
		return nil, err
	}
	v.log.Info("settings changed", "changes", fmt.Sprint(changed))
	v.follows(was)
	v.tellSettings(ctx)
	return changed, nil
}

// follows has the session do as the record says.
func (v *VM) follows(was Record) {
	s, r := v.session(), v.record()
	if s == nil {
		return // the next one begins with the record
	}
	if r.Interval != was.Interval {
		s.SetInterval(r.Interval)
	}
	if r.AppEvery != was.AppEvery {
		s.SetAppEvery(r.AppEvery)
	}
}

// tellSettings has the other host know what a failover to it goes on with. One
// that does not answer is told in the background: a session that had nothing to
// send notices nothing and makes no new handshake.
func (v *VM) tellSettings(ctx context.Context) {
	if err := v.tellNow(ctx); err != nil {
		v.log.Info("the other host hears of the settings when it answers", "err", err)
		v.tellLater()
	}
}

func (v *VM) tellNow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	p, err := v.peer()
	if err != nil {
		return err
	}
	return v.offer(ctx, p, "settings")
}

// tellLater offers until it was taken, somebody answers that it will not be, or
// the VM is no longer this host's. A daemon that starts makes a handshake.
func (v *VM) tellLater() {
	v.mgr.mu.Lock()
	ctx := v.mgr.ctx
	v.mgr.mu.Unlock()
	if ctx == nil || ctx.Err() != nil {
		return
	}
	v.mu.Lock()
	v.untold++
	busy := v.untold > 1
	v.mu.Unlock()
	if busy {
		return
	}
	v.mgr.background.Add(1)
	go func() {
		defer v.mgr.background.Done()
		for pause := newPause(); pause.wait(ctx); {
			v.mu.Lock()
			n := v.untold
			v.mu.Unlock()
			err := v.tellNow(ctx)
			over := err == nil || refusal(err) || v.forgotten() || v.mayChange("") != nil
			v.mu.Lock()
			if over = over && n == v.untold; over {
				v.untold = 0
			}
			v.mu.Unlock()
			if over {
				return
			}
		}
	}()
}

// mayChange refuses a change of settings where the VM is not this host's.
func (v *VM) mayChange(command string) error {
	r := v.record()
	if d := r.Lineage.Diverged; d != nil {
		return &wire.Error{
			Kind: wire.KindRefused, Text: "the two copies have diverged: " + d.Reason,
			Hint: "replicactl failover reverse " + r.Name + " on the host whose data is to be kept; then change its settings there",
		}
	}
	if st := r.Lineage.State; st != lineage.Primary && st != lineage.Promoted {
		other := v.mgr.peerName(r.Peer)
		return &wire.Error{
			Kind: wire.KindRefused, Text: fmt.Sprintf("the settings of %s are its primary's, which is %s", r.Name, other),
			Hint: "on " + other + ": replicactl " + command + " " + r.Name,
		}
	}
	return nil
}

// silentWord is OnSilent as an offer has it: a peer of an earlier build knows
// only offers without the word, and starts.
func (r *Record) silentWord() string {
	if r.OnSilent == "hold" {
		return r.OnSilent
	}
	return ""
}

func silentOf(o wire.Offer) string {
	if o.OnSilent == "" {
		return "start"
	}
	return o.OnSilent
}

// follows reports that the record has the settings of the primary's offer,
// which follow takes over. The retention is this host's own.
func (r *Record) follows(o wire.Offer) bool {
	return r.Interval == o.Interval && r.AppEvery == o.AppEvery && r.OnSilent == silentOf(o) && r.Shutdown == o.Shutdown
}

func (r *Record) follow(o wire.Offer) {
	r.Interval, r.AppEvery, r.OnSilent, r.Shutdown = o.Interval, o.AppEvery, silentOf(o), o.Shutdown
}

// shutdown is how long the guest may take in a planned failover that does not say.
func (r *Record) shutdown() time.Duration {
	if r.Shutdown > 0 {
		return r.Shutdown
	}
	return defaultShutdown
}
