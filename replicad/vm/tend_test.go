package vm

import (
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"

	"kvmreplica/replicad/dataplane"
)

// The watcher saw a silent data plane, and before it acted the role was given
// up: bringing the data plane back then would lock the images of a replica.
func TestADataPlaneThatWasGivenUpIsNotBroughtBack(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	c, err := v.plane()
	must(t, err)
	cfg := v.planeConfig()
	must(t, v.stopPlane(t.Context()))
	v.revive(t.Context(), c)
	if _, err := os.Stat(cfg.ControlSocket()); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a data plane runs again: %v", err)
	}
}

// Both processes are gone and the role still holds: the watcher brings them back.
func TestAKeeperThatDiedWithItsDataPlaneIsBroughtBack(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	cfg := v.planeConfig()
	must(t, dataplane.Stop(t.Context(), cfg))
	v.tendPlane(t.Context())
	c, err := v.plane()
	must(t, err)
	if _, err := c.Status(t.Context()); err != nil {
		t.Fatalf("the data plane is still away: %v", err)
	}
}

// A session that starts while a backup's snapshot lies above the export, and a
// person's resume, must not let empty cuts pass for fresh ones.
func TestNothingShipsBelowASnapshot(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	v.mu.Lock()
	v.gone = true // the watcher ends: it would see that there is no snapshot
	v.facts.overlay = "vda"
	v.mu.Unlock()
	v.stopShipping()
	v.startShipping()
	must(t, v.Resume())
	look, end := time.NewTicker(10*time.Millisecond), time.After(500*time.Millisecond)
	defer look.Stop()
	for { // a resume is taken up by the session's own loop
		if s := v.session().Status(); !s.Paused {
			t.Fatalf("the session runs: %+v", s)
		}
		select {
		case <-look.C:
		case <-end:
			return
		}
	}
}
