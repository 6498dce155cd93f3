package vm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// A guest that we froze must never stay frozen. Three things see to it: the cut
// thaws it at once, whatever came of it; a watchdog in package libvirt does
// after quiesceHold; and a journal that is durable before the freeze tells a
// daemon that comes after a dead one.

const (
	quiesceHold   = 5 * time.Second  // the watchdog
	quiesceWithin = 15 * time.Second // the guest has flushed and frozen by then
	frozenFile    = "frozen.json"
	frozenPoint   = "quiesce/frozen/acted" // for Deps.Failpoint
)

// frozenRecord is the journal: the guest may be frozen.
type frozenRecord struct {
	Version int       `json:"version"`
	Since   time.Time `json:"since"`
}

// quiesce freezes the guest's file systems for one cut. A guest that is off has
// nothing to freeze.
func (v *VM) quiesce(ctx context.Context) (func() (bool, error), error) {
	if !v.guestRuns() || v.outOfHands() {
		return nil, nil
	}
	if err := v.noteFrozen(); err != nil {
		return nil, fmt.Errorf("the guest is not frozen: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, quiesceWithin)
	defer cancel()
	_, thaw, err := v.deps.Hyper.Quiesce(ctx, string(v.id), quiesceHold)
	if err != nil {
		var e *libvirt.Error
		if errors.As(err, &e) && !e.Unknown {
			v.notFrozen() // it was refused, and thawed to be sure
		} else {
			v.thawLater()
		}
		return nil, err
	}
	v.failpoint(frozenPoint)
	return func() (bool, error) {
		held, err := thaw()
		if err == nil {
			v.notFrozen()
		} else {
			v.thawLater()
		}
		return held, err
	}, nil
}

// noteFrozen makes durable that the guest may be frozen.
func (v *VM) noteFrozen() error {
	now := v.deps.Now()
	if err := fsx.WriteJSON(v.fsys, frozenFile, frozenRecord{Version: 1, Since: now}); err != nil {
		return fmt.Errorf("note that the guest is about to be frozen: %w", err)
	}
	v.mu.Lock()
	v.frozen = now
	v.mu.Unlock()
	return nil
}

// notFrozen removes the journal.
func (v *VM) notFrozen() {
	v.mu.Lock()
	v.frozen = time.Time{}
	v.mu.Unlock()
	if err := v.fsys.Remove(frozenFile); err != nil && !absent(err) {
		v.log.Warn("note that the guest has thawed; it is thawed once more at the next start", "err", err)
	}
}

// wasFrozen looks for the journal of a daemon that died. One that cannot be
// read counts.
func (v *VM) wasFrozen() bool {
	var r frozenRecord
	err := fsx.ReadJSON(v.fsys, frozenFile, 1<<10, &r)
	if absent(err) {
		return false
	}
	if err != nil || r.Since.IsZero() {
		r.Since = v.deps.Now()
	}
	v.mu.Lock()
	v.frozen = r.Since
	v.mu.Unlock()
	return true
}

// thawLater keeps thawing in the background until the guest has, is off or gone.
func (v *VM) thawLater() {
	v.mgr.mu.Lock()
	ctx := v.mgr.ctx
	v.mgr.mu.Unlock()
	if ctx == nil || ctx.Err() != nil {
		return // the journal tells the next daemon
	}
	v.mu.Lock()
	busy := v.thawing
	v.thawing = true
	v.mu.Unlock()
	if busy {
		return
	}
	v.mgr.background.Add(1)
	go func() {
		defer v.mgr.background.Done()
		v.thawUntilDone(ctx)
		v.mu.Lock()
		v.thawing = false
		v.mu.Unlock()
	}()
}

func (v *VM) thawUntilDone(ctx context.Context) {
	told := false
	for pause := newPause(); ; {
		err := v.deps.Hyper.Thaw(ctx, string(v.id))
		if err == nil {
			v.notFrozen()
			v.log.Info("the guest was thawed")
			return
		}
		if !told {
			v.log.Error("the guest may be frozen; it is thawed again and again", "err", err)
			told = true
		}
		if !pause.wait(ctx) {
			return
		}
	}
}

// SetAppEvery changes the interval of application-consistent points.
func (v *VM) SetAppEvery(ctx context.Context, d time.Duration) error {
	o := EnableOptions{AppEvery: d}
	if err := o.check(); err != nil {
		return err
	}
	r := v.record()
	if st := r.Lineage.State; st != lineage.Primary && st != lineage.Promoted {
		return &wire.Error{
			Kind: wire.KindRefused, Text: fmt.Sprintf("%s runs on %s, which takes application-consistent points", r.Name, v.mgr.peerName(r.Peer)),
			Hint: "there: replicactl point app " + r.Name,
		}
	}
	if err := v.update(func(r *Record) error { r.AppEvery = d; return nil }); err != nil {
		return err
	}
	if s := v.session(); s != nil {
		s.SetAppEvery(d)
	}
	v.tellSettings(ctx)
	return nil
}
