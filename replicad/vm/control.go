package vm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

func (v *VM) notShipping() error {
	return &wire.Error{Kind: wire.KindRefused, Text: "this host does not ship the VM", Hint: "run the command on the primary; replicactl vm status " + v.record().Name}
}

// Pause stops shipping; tracking goes on. It is remembered.
func (v *VM) Pause() error {
	s := v.session()
	if s == nil {
		return v.notShipping()
	}
	if err := v.update(func(r *Record) error { r.Paused = true; return nil }); err != nil {
		return err
	}
	s.Pause()
	return nil
}

// Resume takes Pause back; a scheduled initial copy begins at once. Below a backup's snapshot shipping goes on when that
// is merged.
func (v *VM) Resume() error {
	s := v.session()
	if s == nil {
		return v.notShipping()
	}
	if err := v.update(func(r *Record) error { r.Paused, r.StartAt = false, time.Time{}; return nil }); err != nil {
		return err
	}
	v.proceed(s)
	return nil
}

// startDue begins the initial copy when its time has come.
func (v *VM) startDue() {
	r := v.record()
	s := v.session()
	if s == nil || r.StartAt.IsZero() || v.deps.Now().Before(r.StartAt) {
		return
	}
	if err := v.update(func(r *Record) error { r.StartAt = time.Time{}; return nil }); err != nil {
		v.log.Error("begin the initial copy", "err", err)
		return
	}
	v.log.Info("the time of the initial copy has come")
	v.proceed(s)
}

// SyncNow runs one cycle and returns when its cut is committed. It refuses while
// nothing may be shipped, and gives up after two failed tries; the session goes
// on trying by itself.
func (v *VM) SyncNow(ctx context.Context) error {
	s := v.session()
	if s == nil {
		return v.notShipping()
	}
	asked, errs := v.deps.Now(), s.Status().Stats.Errors
	s.TriggerNow()
	s.Retry() // not after a back-off
	for pause := newPause(); ; {
		if err := v.mayShip(); err != nil {
			return err
		}
		st := s.Status()
		if st.LastCut.After(asked) || st.LastCut.Equal(asked) {
			return nil
		}
		if st.Stop != nil {
			return &wire.Error{Kind: wire.KindRefused, Text: st.Stop.Reason, Hint: st.Stop.Hint}
		}
		if st.Failures > 0 && st.Stats.Errors >= errs+syncTries {
			return &wire.Error{Kind: wire.KindUnavailable, Text: "the cycle failed: " + st.LastError + "; it is tried again by itself", Hint: "replicactl vm status " + v.record().Name}
		}
		pause.next = pauseFirst // a cycle is short: keep asking
		if !pause.wait(ctx) {
			return fmt.Errorf("wait for the cycle: %w", ctx.Err())
		}
	}
}

// syncTries is after how many failures a person is told.
const syncTries = 2

// mayShip refuses while shipping waits for somebody.
func (v *VM) mayShip() error {
	if err := v.writesArrive(); err != nil {
		return err
	}
	r := v.record()
	switch hint := "replicactl vm resume " + r.Name; {
	case r.Paused:
		return &wire.Error{Kind: wire.KindRefused, Text: "replication is paused", Hint: hint}
	case v.deps.Now().Before(r.StartAt):
		return &wire.Error{Kind: wire.KindRefused, Text: "the initial copy begins at " + r.StartAt.Format(time.DateTime), Hint: hint}
	}
	return nil
}

// distrusted refuses where no replica distrusts what it holds.
func (v *VM) distrusted() error {
	s, err := v.store()
	if err != nil {
		return v.notShipping()
	}
	if st := s.Status().State; st != points.Suspect && st != points.Damaged {
		return v.notShipping()
	}
	return nil
}

// trustAgain ends a replica's distrust in its own images or store.
func (v *VM) trustAgain(ctx context.Context) error {
	unlock, err := v.lockAsked(ctx, "resync")
	if err != nil {
		return err
	}
	defer unlock()
	s, err := v.store()
	if err != nil {
		return v.notShipping()
	}
	st := s.Status()
	switch st.State {
	case points.Suspect:
		v.forgetAsked()
		err = s.Discard()
	case points.Damaged:
		v.forgetAsked()
		err = s.DropDamaged()
	default:
		return v.notShipping()
	}
	if errors.Is(err, points.ErrDamaged) {
		name := v.record().Name
		return &wire.Error{Kind: wire.KindRefused, Text: err.Error(), Hint: fmt.Sprintf("replicactl vm disable %s --force --delete-replica here, and on the primary: replicactl vm disable %s --force; then enable it again", name, name)}
	}
	if err != nil {
		return err
	}
	v.log.Warn("an operator gave up what the replica could not trust; everything is compared next", "was", string(st.State), "why", whySuspect(storeState{Status: st}), "points", st.Points)
	return nil
}
