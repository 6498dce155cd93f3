package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// point makes a recovery point of what is committed on B, writes further, and
// returns the position and the counter of the guest there.
func (w *pair) point() (delta.Pos, uint64) {
	w.t.Helper()
	w.synced()
	s, err := w.b.vm().store()
	must(w.t, err)
	n, pos := w.counter.Load(), s.Committed()
	v, err := s.View(pos) // keeps apply from going past it without a point
	must(w.t, err)
	w.write(w.a, 5)
	w.until("the point", func() error {
		for _, p := range s.Points() {
			if p.Pos == pos && s.Status().Applied != pos {
				return nil
			}
		}
		return errors.New("not there yet")
	})
	must(w.t, v.Close())
	return pos, n
}

// synced waits until everything the guest wrote on A is committed on B.
func (w *pair) synced() {
	w.t.Helper()
	must(w.t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.SyncNow(ctx) }))
	w.until("the writes to be committed", w.settled)
}

func (w *pair) powerCutA() {
	w.a.kill()
	w.a.hyper.halt()
	w.a.hyper.SetState(string(testVM), libvirt.StateOff, libvirt.ReasonNone)
	w.lossy.Store(true)
	w.forced.Store(true)
}

func failoverTo(point string, o UnplannedOptions) func(ctx context.Context, _ *Manager, v *VM) error {
	return func(ctx context.Context, _ *Manager, v *VM) error {
		o.Point, o.Force, o.Request = point, true, fmt.Sprintf("unplanned-%d", time.Now().UnixNano())
		return v.Unplanned(ctx, o, nil)
	}
}

func commit(ctx context.Context, _ *Manager, v *VM) error {
	return v.Commit(ctx, CommitOptions{Request: "commit"}, nil)
}
func cancel(ctx context.Context, _ *Manager, v *VM) error { return v.Cancel(ctx, "cancel", nil) }

func nameOf(p delta.Pos) string { return fmt.Sprintf("%v/%d", p.Generation, p.Epoch) }

// flattened: the images hold everything and the record says so.
func (s *side) flattened() error {
	if o := s.vm().record().Overlay; o != nil {
		return fmt.Errorf("overlay %+v", o)
	}
	files, err := filepath.Glob(filepath.Join(s.root, "*", "*.overlay"))
	if err != nil || len(files) > 0 {
		return fmt.Errorf("left over: %v %w", files, err)
	}
	return nil
}

func (s *side) image() []byte {
	s.t.Helper()
	r := s.vm().record()
	b, err := os.ReadFile(r.Disks[0].Path)
	must(s.t, err)
	return b
}

func TestAFailoverToAnOlderPointIsCancelledAndNothingIsLost(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	old, n := w.point()
	mid, _ := w.point()
	w.synced()
	newest := w.b.vm().keepStore(t).Committed()
	before := w.b.vm().record().Lineage
	w.powerCutA()
	must(t, w.b.do(failoverTo(nameOf(old), UnplannedOptions{})))
	if got := w.counter.Load(); got != n {
		t.Fatalf("the guest found %d, the point holds %d", got, n)
	}
	w.write(w.b, 4)
	g := w.b.vm().record().Lineage.Generation
	w.b.restart() // the guest survives the daemon
	w.until("the daemon to be up", func() error { _, err := w.b.vm().plane(); return err })
	w.write(w.b, 2)
	must(t, w.b.do(cancel))
	if w.b.hyper.runs() {
		t.Fatal("the guest still runs")
	}
	l := w.b.vm().record().Lineage
	if l.State != lineage.Replica || l.Generation != before.Generation || len(l.GivenUp) != 1 || l.GivenUp[0] != g {
		t.Fatalf("after the cancel: %+v", l)
	}
	s := w.b.vm().keepStore(t)
	if s.Committed() != newest {
		t.Fatalf("the replica stands at %v, not at %v", s.Committed(), newest)
	}
	for _, p := range []delta.Pos{old, mid, newest} {
		v, err := s.View(p)
		must(t, err)
		must(t, v.Close())
	}
	must(t, w.b.flattened())
	w.counter.Store(0) // A's own, later writes
	w.a.reboot()
	w.forced.Store(false)
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}

// keepStore is the open store.
func (v *VM) keepStore(t *testing.T) *points.Store {
	t.Helper()
	s, err := v.store()
	must(t, err)
	return s
}

func TestAFailoverCanBeCancelledAndDoneAgainAndCommitted(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	old, n := w.point()
	w.powerCutA()
	for range 2 {
		must(t, w.b.do(failoverTo("latest", UnplannedOptions{})))
		w.write(w.b, 3)
		must(t, w.b.do(cancel))
	}
	must(t, w.b.do(failoverTo(nameOf(old), UnplannedOptions{})))
	if got := w.counter.Load(); got != n {
		t.Fatalf("the guest found %d, the point holds %d", got, n)
	}
	w.lossy.Store(false)
	w.write(w.b, 9)
	must(t, w.b.do(commit))
	w.write(w.b, 9)
	w.until("the images to hold everything", w.b.flattened)
	w.write(w.b, 3)
	w.b.reboot()
	w.until("the guest to run again", func() error {
		if !w.b.hyper.runs() {
			return errors.New("off")
		}
		return nil
	})
	w.check()
	for _, f := range []func(context.Context, *Manager, *VM) error{cancel, commit} {
		var we *wire.Error
		if err := w.b.do(f); !errors.As(err, &we) || we.Kind != wire.KindRefused {
			t.Fatalf("after the commit: %v", err)
		}
	}
}

// The daemon dies at any step of a failover to an older point, of its cancel
// and of its commit; afterwards it is as if it had not.
func TestACrashAtAnyStepOfAFailoverOnAnOverlayItsCancelAndItsCommit(t *testing.T) {
	if testing.Short() {
		t.Skip("a sweep over every point")
	}
	var at []string
	for plan, steps := range map[string][]string{
		"unplanned": {"apply", "generation", "store", "tracker", "start"},
		"cancel":    {"stop", "close", "role", "drop", "follow"},
		"commit":    {"role", "seal"},
	} {
		for _, s := range steps {
			at = append(at, plan+"/"+s+"/begun", plan+"/"+s+"/acted")
		}
	}
	for _, p := range at {
		t.Run(strings.ReplaceAll(p, "/", " "), func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			old, n := w.point()
			w.powerCutA()
			w.b.mu.Lock()
			w.b.crashAt = p
			w.b.mu.Unlock()
			w.b.until(failoverTo(nameOf(old), UnplannedOptions{}), func(v *VM) bool { return v.record().Lineage.MayServe() && w.b.hyper.runs() })
			if got := w.counter.Load(); got != n {
				t.Fatalf("the guest found %d, the point holds %d", got, n)
			}
			w.write(w.b, 3)
			if strings.HasPrefix(p, "cancel") {
				w.b.until(cancel, func(v *VM) bool {
					return v.record().Lineage.State == lineage.Replica && !w.b.planOpen() && w.b.flattened() == nil
				})
				w.a.reboot()
				w.forced.Store(false)
				if o := w.rest(); o != w.a {
					t.Fatal("A does not own the VM")
				}
				return
			}
			w.lossy.Store(false)
			w.b.until(commit, func(v *VM) bool { return v.record().Lineage.State == lineage.Primary && !w.b.planOpen() })
			w.until("the images to hold everything", w.b.flattened)
			w.a.reboot()
			w.until("A to learn of the promotion", w.primaryHeld)
			w.forced.Store(false)
			w.b.until(reverse, func(v *VM) bool { return !v.record().NoReverse })
			if o := w.rest(); o != w.b {
				t.Fatal("B does not own the VM")
			}
		})
	}
}

// Amendment M1: the oldest point is promoted and nothing is written on either
// side afterwards. The way back brings exactly what lies between.
func TestTheWayBackFromAnOlderPointSendsWhatLiesBetweenAndNothingElse(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	old, _ := w.point()
	for range 3 {
		w.point()
	}
	w.synced()
	w.powerCutA()
	must(t, w.b.do(failoverTo(nameOf(old), UnplannedOptions{NoStart: true})))
	must(t, w.b.do(commit))
	w.until("the images to hold everything", w.b.flattened)
	between, known, why := w.b.vm().middle()
	if !known || len(between) == 0 {
		t.Fatalf("what lies between is not known: %s", why)
	}
	var want int64
	for _, r := range between["vda"] {
		want += r.Len
	}
	w.a.reboot()
	w.until("A to learn of the promotion", w.primaryHeld)
	if bytes.Equal(w.a.image(), w.b.image()) {
		t.Fatal("nothing differs: the test shows nothing")
	}
	must(t, w.b.do(reverse))
	w.until("the copy to be complete", func() error { return w.copied(w.b, w.a) })
	w.until("the images to be equal", func() error {
		if !bytes.Equal(w.a.image(), w.b.image()) {
			return errors.New("they differ")
		}
		return nil
	})
	w.until("everything to be compared once", func() error {
		if !w.b.vm().session().Status().Verified {
			return errors.New("the scrub goes on")
		}
		return nil
	})
	if n := w.b.vm().session().Status().Mismatched; n != 0 {
		t.Fatalf("%d bytes differed without being marked: the scrub had to find them", n)
	}
	if got := w.b.vm().session().Status().Stats.RawBytes; got > want || got == 0 {
		t.Fatalf("%d bytes were sent, %d lie between", got, want)
	}
}

func TestAFailoversTrialEndsByItself(t *testing.T) {
	t.Parallel()
	for _, then := range []string{thenCommit, thenCancel} {
		t.Run(then, func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.powerCutA()
			must(t, w.b.do(failoverTo("latest", UnplannedOptions{Within: time.Millisecond, Then: then})))
			w.until("the trial to end", func() error {
				want := map[string]lineage.State{thenCommit: lineage.Primary, thenCancel: lineage.Replica}[then]
				if st := w.b.vm().record().Lineage.State; st != want {
					return fmt.Errorf("B is %s", st)
				}
				return w.b.flattened()
			})
		})
	}
}

func TestWhatNeedsTheImagesAloneIsRefusedWhileAFailoverIsOnTrial(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.powerCutA()
	if err := w.b.do(failoverTo("12345", UnplannedOptions{})); err == nil || !strings.Contains(err.Error(), "no such recovery point") {
		t.Fatalf("a point that is not there: %v", err)
	}
	must(t, w.b.do(failoverTo("latest", UnplannedOptions{})))
	for name, f := range map[string]func(context.Context, *Manager, *VM) error{
		"planned": planned,
		"disable": func(ctx context.Context, m *Manager, v *VM) error {
			return m.Disable(ctx, v, DisableOptions{Force: true, Request: "disable"}, nil)
		},
	} {
		var we *wire.Error
		if err := w.b.do(f); !errors.As(err, &we) || !strings.Contains(we.Hint, "commit") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
