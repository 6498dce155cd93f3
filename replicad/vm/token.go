package vm

import (
	"context"
	"errors"
	"time"

	"kvmreplica/replicad/wire"
)

// Who holds the plan token says what for, so that a refusal names it. What the
// daemon does by itself is short, begins without a person's knowledge (most of
// it when the daemon starts), and is waited for; what a person asked for may
// take hours and is not.

const (
	// ownPatience is how long what was asked for waits for the daemon's own work.
	// It is shorter than peerTimeout: hosts ask each other, too.
	ownPatience = 5 * time.Second
	ownLook     = 20 * time.Millisecond
)

// errOwn is in the refusal of a token that the daemon's own work holds.
var errOwn = errors.New("the daemon's own work")

// lock takes the plan token, or refuses because another operation runs.
func (v *VM) lock(what string) (unlock func(), err error) { return v.take(what, false) }

// lockOwn is lock for what the daemon does by itself.
func (v *VM) lockOwn(what string) (unlock func(), err error) { return v.take(what, true) }

// lockAsked is lock for what a person or the other host asked for: for a while
// it waits until the daemon's own work is done, and after a start until the
// role was brought up or could not be.
func (v *VM) lockAsked(ctx context.Context, what string) (unlock func(), err error) {
	end, look := time.NewTimer(ownPatience), time.NewTicker(ownLook)
	defer end.Stop()
	defer look.Stop()
	for patient := true; ; {
		if err = v.notTried(); err == nil || !patient {
			unlock, err = v.lock(what)
		}
		if err == nil || !patient || !errors.Is(err, errOwn) {
			return unlock, err
		}
		select {
		case <-look.C:
		case <-end.C:
			patient = false
		case <-ctx.Done():
			return nil, errors.Join(err, context.Cause(ctx))
		}
	}
}

// take never waits for the token: what it is held for changes with it, under mu.
func (v *VM) take(what string, own bool) (unlock func(), err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	select {
	case v.plan <- struct{}{}:
		v.holds, v.owns = what, own
		return v.free, nil
	default:
		return nil, v.busyWith(v.holds, v.owns)
	}
}

// free gives the token back.
func (v *VM) free() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.holds, v.owns = "", false
	<-v.plan
}

// busyWith is the refusal while somebody holds the token for what; a plan is
// named, and not waited for, whoever drives it. The caller holds mu.
func (v *VM) busyWith(what string, own bool) error {
	text := "another operation of this VM is under way"
	if what != "" {
		text += ": " + what
	}
	if v.running != nil {
		text, own = "the plan "+string(v.running.Kind)+" of this VM is under way", false
	}
	e := &busyError{cause: &wire.Error{Kind: wire.KindConflict, Text: text, Hint: "replicactl vm status " + v.rec.Name}}
	if own {
		return &ownError{e}
	}
	return e
}

// notTried refuses while the daemon, which began a moment ago, has not tried to
// bring the VM into its role to the end, nor goes on with a plan for that.
func (v *VM) notTried() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.starting || v.running != nil {
		return nil
	}
	return v.busyWith("bring the VM into its role", true)
}

// tried ends the time in which what is asked for waits for the role.
func (v *VM) tried() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.starting = false
}

// busyError tells an operation of this VM that is under way from every other
// conflict, such as an image that another program has locked.
type busyError struct{ cause *wire.Error }

func (e *busyError) Error() string { return e.cause.Error() }

// Unwrap gives the kind and the hint.
func (e *busyError) Unwrap() error { return e.cause }

// ownError is the busyError of what ends soon by itself.
type ownError struct{ cause *busyError }

func (e *ownError) Error() string { return e.cause.Error() }

// Is: it is errOwn.
func (e *ownError) Is(target error) bool { return target == errOwn }

// Unwrap gives the busyError.
func (e *ownError) Unwrap() error { return e.cause }

// conflict: another operation of the VM is under way, here or on the host that
// answered.
func conflict(err error) bool {
	var w *wire.Error
	return errors.As(err, &w) && w.Kind == wire.KindConflict
}

// busy: another operation of the VM is under way here. Other conflicts, such
// as an image that another program has locked, are troubles.
func busy(err error) bool {
	var b *busyError
	return errors.As(err, &b)
}
