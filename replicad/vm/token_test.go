package vm

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"kvmreplica/replicad/wire"
)

// aWhile is how long a test looks whether something waits that could end at once.
const aWhile = 200 * time.Millisecond

// waiting runs what a person asked for and fails when it does not wait.
func waiting(t *testing.T, what string, f func() error) <-chan error {
	t.Helper()
	res := make(chan error, 1)
	go func() { res <- f() }()
	select {
	case err := <-res:
		t.Fatalf("%s did not wait: %v", what, err)
	case <-time.After(aWhile):
	}
	return res
}

func TestWhatAPersonAsksForWaitsForTheDaemonsOwnWork(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	v := w.a.vm()
	unlock, err := v.lockOwn("bring the VM into its role")
	must(t, err)
	res := waiting(t, "a planned failover", func() error { return w.a.do(planned) })
	unlock()
	must(t, <-res)
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
}

// The daemon brings a VM up in several bites, and the token is free between
// them: what came then would find a role that is not up.
func TestWhatAPersonAsksForWaitsUntilTheRoleWasTried(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	v := w.a.vm()
	v.mu.Lock()
	v.starting = true
	v.mu.Unlock()
	res := waiting(t, "a planned failover", func() error { return w.a.do(planned) })
	v.tried()
	must(t, <-res)
}

func TestACommandRightAfterTheDaemonsStartIsNotRefused(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	w.a.restart()
	must(t, w.a.do(planned))
	w.rest()
	w.a.restart() // the replica's daemon now
	must(t, w.b.do(planned))
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}

func TestALongOperationIsNamedAndNotWaitedFor(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	unlock, err := v.lockAsked(t.Context(), "resize a disk")
	must(t, err)
	defer unlock()
	begun := time.Now()
	_, err = v.lockAsked(t.Context(), "commit")
	var we *wire.Error
	if !errors.As(err, &we) || we.Kind != wire.KindConflict || !strings.Contains(we.Text, "resize a disk") || !busy(err) {
		t.Fatalf("refused with %v", err)
	}
	if time.Since(begun) >= ownPatience {
		t.Fatal("it was waited for")
	}
}

func TestAWaitForTheDaemonsOwnWorkEnds(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	unlock, err := v.lockOwn("take the VM back")
	must(t, err)
	defer unlock()
	ctx, cancel := context.WithCancel(t.Context())
	res := waiting(t, "a commit", func() error { _, err := v.lockAsked(ctx, "commit"); return err })
	cancel()
	if err := <-res; !busy(err) || !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	if _, err := v.lockAsked(t.Context(), "commit"); !busy(err) || !strings.Contains(err.Error(), "take the VM back") {
		t.Fatalf("in the end: %v", err)
	}
}
