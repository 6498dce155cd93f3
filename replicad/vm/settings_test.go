package vm

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

func (s *side) set(o Settings) (changed []string, err error) {
	err = s.do(func(ctx context.Context, _ *Manager, v *VM) error {
		changed, err = v.Set(ctx, o)
		return err
	})
	return changed, err
}

func span(d time.Duration) *time.Duration { return &d }

func word(s string) *string { return &s }

// settled settings of a side, as its record has them.
func (s *side) hasSettings(every, app, shutdown time.Duration, silent string) error {
	r := s.vm().record()
	if r.Interval != every || r.AppEvery != app || r.Shutdown != shutdown || r.OnSilent != silent {
		return fmt.Errorf("%s has every %s, app-every %s, shutdown-time %s, on-silent-peer %s", s.name, r.Interval, r.AppEvery, r.Shutdown, r.OnSilent)
	}
	return nil
}

func TestSettingsCountAtOnceAndGoWithTheVMThereAndBack(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	must(t, errOf(w.a.set(Settings{Interval: span(24 * time.Hour)})))
	w.a.restart() // its session begins with that
	v := w.a.vm()
	w.until("the session", func() error { return w.copied(w.a, w.b) })
	cycles := v.session().Status().Stats.Cycles
	changed, err := w.a.set(Settings{Interval: span(time.Second), AppEvery: span(2 * time.Hour), OnSilent: word("hold"), Shutdown: span(7 * time.Minute)})
	if err != nil || len(changed) != 4 {
		t.Fatalf("changed %q, %v", changed, err)
	}
	w.until("cycles at the new interval, without a restart", func() error {
		if n := v.session().Status().Stats.Cycles; n < cycles+2 {
			return fmt.Errorf("%d cycles since", n-cycles)
		}
		return nil
	})
	st := v.Status(t.Context(), "B")
	if st.Interval != time.Second || st.OnSilent != "hold" || st.Shutdown != 7*time.Minute {
		t.Errorf("shown: %+v", st)
	}
	if again, err := w.a.set(Settings{Interval: span(time.Second), OnSilent: word("hold")}); err != nil || len(again) != 0 {
		t.Errorf("asked again it changes %q, %v", again, err)
	}
	for _, s := range []*side{w.b, w.a} {
		must(t, s.hasSettings(time.Second, 2*time.Hour, 7*time.Minute, "hold"))
		must(t, s.other.do(planned))
		w.rest()
		must(t, s.hasSettings(time.Second, 2*time.Hour, 7*time.Minute, "hold"))
	}
}

func errOf[A any](_ A, err error) error { return err }

// The guest's shutdown deadline is the one that was set, also when the failover
// is asked for on the other host; one that is typed with the failover wins.
func TestAPlannedFailoverGivesTheGuestTheTimeThatWasSet(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	must(t, errOf(w.a.set(Settings{Shutdown: span(7 * time.Minute)})))
	var got time.Duration
	w.a.hyper.shutdown = func(o libvirt.ShutdownOptions) { got = o.Within }
	must(t, w.a.do(planned))
	if got != 7*time.Minute {
		t.Errorf("the guest had %s", got)
	}
	w.rest()
	w.b.hyper.shutdown = func(o libvirt.ShutdownOptions) { got = o.Within }
	ask := func(within time.Duration) {
		t.Helper()
		must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error {
			p, err := v.peer()
			if err != nil {
				return err
			}
			r, err := p.Failover(ctx, wire.FailoverRequest{VM: testVM, Step: stepRequest, Request: fmt.Sprint("ask-", within), Start: true, Reverse: true, Timeout: within, Before: time.Now().Add(AskedWithin)})
			if err == nil && r.State != stateAccepted {
				err = fmt.Errorf("%s: %s", r.State, r.Detail)
			}
			return err
		}))
		w.rest()
	}
	if ask(0); got != 7*time.Minute {
		t.Errorf("asked by the replica's host: the guest had %s", got)
	}
	must(t, w.a.do(planned))
	w.rest()
	if ask(90 * time.Second); got != 90*time.Second {
		t.Errorf("typed with the failover on the replica's host: the guest had %s", got)
	}
}

// Whatever the daemon dies in the middle of, the record is what counts: nothing
// of the change before it was written, everything after it.
func TestASettingIsWholeOrNotThereWhateverTheDaemonDiesIn(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	refuse := func(name string) error {
		if name == recordFile || strings.HasSuffix(name, "/"+recordFile) {
			return errCrashed
		}
		return nil
	}
	w.a.fs.refuse.Store(&refuse)
	if changed, err := w.a.set(Settings{Interval: span(time.Second), OnSilent: word("hold")}); err == nil || len(changed) != 0 {
		t.Fatalf("the record cannot be written, and the answer is %q, %v", changed, err)
	}
	must(t, w.a.hasSettings(testInterval, 0, 0, "start"))
	w.a.restart()
	must(t, w.a.hasSettings(testInterval, 0, 0, "start"))
	w.rest()
	// It dies with the record written, before the session and the other host know.
	w.a.silent.Store(true)
	must(t, w.a.vm().update(func(r *Record) error { r.Interval, r.OnSilent = 24*time.Hour, "hold"; return nil }))
	w.a.silent.Store(false)
	w.a.restart()
	w.until("the other host to hear of it", func() error { return w.b.hasSettings(24*time.Hour, 0, 0, "hold") })
	must(t, w.a.hasSettings(24*time.Hour, 0, 0, "hold"))
	// The other host is away: it hears of it when it is back.
	w.a.silent.Store(true)
	must(t, errOf(w.a.set(Settings{Interval: span(time.Second)})))
	w.a.silent.Store(false)
	w.until("the other host to hear of it", func() error { return w.b.hasSettings(time.Second, 0, 0, "hold") })
	// Only this message is lost: the session has noticed nothing, and no handshake follows.
	w.inject("A/Offer", lostRequest)
	must(t, errOf(w.a.set(Settings{Shutdown: span(time.Minute)})))
	w.until("the other host to hear of it", func() error { return w.b.hasSettings(time.Second, 0, time.Minute, "hold") })
	w.rest()
}

func TestSettingsAreRefusedWhereTheyAreNotToBeMade(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	_, err := w.b.set(Settings{Interval: span(time.Second)})
	if !kindIs(err, wire.KindRefused) || !strings.Contains(err.Error(), "replicactl vm set web") {
		t.Errorf("on the replica: %v", err)
	}
	for _, bad := range []Settings{
		{Interval: span(25 * time.Hour)},
		{Interval: span(-time.Second)},
		{Interval: span(1500 * time.Millisecond)},
		{AppEvery: span(time.Second)},
		{OnSilent: word("maybe")},
		{OnSilent: word("")},
		{Shutdown: span(time.Millisecond)},
		{Shutdown: span(25 * time.Hour)},
	} {
		if _, err := w.a.set(bad); !kindIs(err, wire.KindInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	must(t, w.a.hasSettings(testInterval, 0, 0, "start"))
	w.a.vm().conclude(lineage.Decision{Alarm: true, Diverged: true, Row: "forked", Reason: "both sides went on from a common point"}, delta.Generation{7})
	if _, err := w.a.set(Settings{Interval: span(time.Second)}); !kindIs(err, wire.KindRefused) || !strings.Contains(err.Error(), "replicactl failover reverse web") {
		t.Errorf("diverged: %v", err)
	}
}
