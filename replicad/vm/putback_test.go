package vm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// A host is put back while a committed failover is completed, so that its disks
// cannot be opened any more. It says so, starts nothing, keeps all it has and
// refuses what would hide it; the old primary, which is held until then, can be
// started by force and goes on with its own data.
func TestAHostPutBackWhileACommittedFailoverIsCompletedSaysSo(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	w.powerCutA()
	must(t, w.b.do(failoverTo("latest", UnplannedOptions{})))
	w.write(w.b, 5)
	path := w.b.vm().record().Disks[0].Path
	w.b.mu.Lock()
	w.b.crashAt = "commit/role/acted"
	w.b.mu.Unlock()
	if err := w.b.do(commit); err == nil {
		t.Fatal("the daemon did not die")
	}
	w.b.kill()
	w.b.hyper.halt()
	w.b.stopPlane()
	replaced(t, path)
	w.b.reboot()
	w.until("B to say why", func() error {
		c := condition(w.b.vm().Status(t.Context(), "A").Conditions, "plan-interrupted")
		if c == nil || !strings.Contains(c.Text, "changed from outside") {
			return fmt.Errorf("%+v", c)
		}
		return nil
	})
	for name, f := range map[string]func(context.Context, *Manager, *VM) error{"cancel": cancel, "commit": commit, "resync": resync} {
		if err := w.b.do(f); err == nil {
			t.Errorf("%s was not refused", name)
		}
	}
	if r := w.b.vm().record(); w.b.hyper.runs() || r.Overlay == nil || !r.Overlay.Committed {
		t.Fatalf("B runs: %t, its overlay: %+v", w.b.hyper.runs(), r.Overlay)
	}
	w.a.reboot()
	w.until("A to be held", w.primaryHeld)
	w.forced.Store(true)
	w.lossy.Store(true)
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error {
		return v.StartGuest(ctx, StartOptions{Force: true})
	}))
	w.until("A's guest to run", func() error {
		if !w.a.hyper.runs() {
			return errors.New("it is off")
		}
		return nil
	})
}
