package vm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// divergeAt lets both sides find, at a point of a plan of A, that the copies
// have diverged, as a handshake at that moment would.
func (w *pair) divergeAt(point string) {
	w.a.mu.Lock()
	defer w.a.mu.Unlock()
	w.a.atPoint = map[string]func(){point: func() {
		for _, s := range []*side{w.b, w.a} {
			s.vm().conclude(lineage.Decision{Alarm: true, Diverged: true, Row: "forked", Reason: "both sides went on from a common point"}, delta.Generation{7})
		}
	}}
}

// both says why not both sides are marked as diverged.
func (w *pair) bothDiverged() error {
	for _, s := range []*side{w.a, w.b} {
		if s.vm().record().Lineage.Diverged == nil {
			return fmt.Errorf("%s has not noticed", s.name)
		}
	}
	return nil
}

// The last handshake of a planned failover finds a fork. The plan must end by
// itself, nobody may run, and the operator's choice works for either side.
func TestAPlannedFailoverThatFindsAForkEndsAndEitherSideCanBeKept(t *testing.T) {
	t.Parallel()
	for _, keep := range []string{"A", "B"} {
		for _, point := range []string{"planned/demote/begun", "planned/final/begun", "planned/seal/begun"} {
			t.Run(keep+" "+strings.ReplaceAll(point, "/", " "), func(t *testing.T) {
				t.Parallel()
				w := newPair(t)
				w.protect()
				w.divergeAt(point)
				if err := w.a.do(planned); err == nil {
					t.Fatal("a fork was handed over")
				}
				w.until("the plan to end and both sides to know", func() error {
					if w.a.planOpen() || w.b.planOpen() {
						return errors.New("a plan is open")
					}
					return w.bothDiverged()
				})
				w.check()
				if l := w.a.vm().record().Lineage; l.State != lineage.Primary || l.MayServe() || w.a.hyper.runs() {
					t.Fatalf("A: %+v, the guest runs: %t", l, w.a.hyper.runs())
				}
				var we *wire.Error
				if err := w.a.do(planned); !errors.As(err, &we) || !strings.Contains(we.Hint, "failover reverse") {
					t.Fatalf("a second planned failover: %v", err)
				}
				s := w.a
				if keep == "B" {
					s = w.b
					err := s.do(func(ctx context.Context, _ *Manager, v *VM) error {
						return v.Unplanned(ctx, UnplannedOptions{Request: "mild"}, nil)
					})
					if !errors.As(err, &we) || !strings.Contains(we.Hint, "--force") {
						t.Fatalf("without --force: %v", err)
					}
					w.lossy.Store(true)
					w.forced.Store(true)
					must(t, s.do(failoverTo("latest", UnplannedOptions{InPlace: true})))
				}
				w.until("the return", func() error {
					if s.planOpen() {
						return errors.New("the return goes on")
					}
					return s.do(reverse)
				})
				w.until("the guest to run", func() error {
					if s.hyper.runs() {
						return nil
					}
					return s.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) })
				})
				w.forced.Store(false)
				if o := w.rest(); o != s {
					t.Fatalf("%s does not own the VM", s.name)
				}
			})
		}
	}
}

// The old primary does not know yet that a person settled the divergence, and
// its next handshake finds it once more, before it gives its writes up.
func TestADivergenceThatIsFoundOnceMoreWhileItIsSettledIsSettled(t *testing.T) {
	t.Parallel()
	for _, point := range []string{"reverse/keep/acted", "reverse/release/begun", "reverse/release/acted"} {
		t.Run(strings.ReplaceAll(point, "/", " "), func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.divergeAt("planned/final/begun")
			if err := w.a.do(planned); err == nil {
				t.Fatal("a fork was handed over")
			}
			w.until("the plan to end and both sides to know", func() error {
				if w.a.planOpen() || w.b.planOpen() {
					return errors.New("a plan is open")
				}
				return w.bothDiverged()
			})
			w.lossy.Store(true)
			w.forced.Store(true)
			must(t, w.b.do(failoverTo("latest", UnplannedOptions{InPlace: true})))
			found := false
			w.b.mu.Lock()
			w.b.atPoint = map[string]func(){point: func() {
				found = true
				w.b.vm().conclude(lineage.Decision{Alarm: true, Diverged: true, Row: "forked", Reason: "both sides went on from a common point"}, delta.Generation{7})
			}}
			w.b.mu.Unlock()
			must(t, w.b.do(reverse))
			if !found {
				t.Fatal("it was not found once more")
			}
			w.until("the guest to run", func() error {
				if w.b.hyper.runs() {
					return nil
				}
				return w.b.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) })
			})
			w.forced.Store(false)
			if o := w.rest(); o != w.b {
				t.Fatal("B does not own the VM")
			}
		})
	}
}

// A journal that cannot be read for a moment is no reason to leave a plan
// where it stands, nor to refuse the primary's epochs for ever.
func TestAPlanWhoseJournalCannotBeReadForAMomentGoesOn(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.a.mu.Lock()
	w.a.atPoint = map[string]func(){"planned/promote/acted": func() {
		w.a.fs.unreadable.Store(planFile)
		w.a.refuseWrites(func(name string) error {
			if strings.HasSuffix(name, planFile) {
				return errors.New("input/output error")
			}
			return nil
		})
	}}
	w.a.mu.Unlock()
	if err := w.a.do(planned); err == nil {
		t.Fatal("the fault was not met")
	}
	if !w.a.planOpen() {
		t.Fatal("A has forgotten its plan")
	}
	w.a.fs.unreadable.Store("")
	w.a.refuseWrites(nil)
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	// An unplanned failover that could not begin must not leave the intake shut.
	w.a.fs.unreadable.Store(planFile)
	if err := w.a.do(failoverTo("latest", UnplannedOptions{InPlace: true})); err == nil {
		t.Fatal("a failover without a journal")
	}
	w.a.fs.unreadable.Store("")
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
}

// handshakes counts those that arrived.
func (w *pair) handshakes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls["Handshake"]
}

// reported says why a side does not report a split brain: its record, what
// `vm status` shows, and its health.
func (s *side) reported(ctx context.Context) error {
	st := s.vm().Status(ctx, "peer")
	switch {
	case s.vm().record().Lineage.Diverged == nil:
		return fmt.Errorf("%s: nothing is recorded", s.name)
	case st.State != status.Diverged || st.Health != health.Critical:
		return fmt.Errorf("%s: shown as %s, %s", s.name, st.State, st.Health)
	}
	return nil
}

// Two running copies: from the first contact on both hosts say so within one
// cycle, also when only one of them ever asks.
func TestTwoRunningCopiesAreReportedOnBothSidesWithinOneCycleOfContact(t *testing.T) {
	t.Parallel()
	for _, asks := range []string{"A", "B", "both"} {
		t.Run(asks, func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.a.silent.Store(true)
			w.lossy.Store(true)
			w.forced.Store(true)
			must(t, w.b.do(failoverTo("latest", UnplannedOptions{InPlace: true})))
			w.write(w.a, 2) // A knows nothing and goes on
			w.write(w.b, 2)
			for _, s := range []*side{w.a, w.b} {
				if s.reported(t.Context()) == nil {
					t.Fatalf("%s reports a split that it cannot know of", s.name)
				}
			}
			if asks != "A" { // B replicates back, as after a planned failover
				b := w.b.vm()
				must(t, b.update(func(r *Record) error { r.NoReverse = false; return nil }))
				b.startShipping()
			}
			if asks == "B" {
				w.a.vm().stopShipping()
			}
			before, contact := w.handshakes(), time.Now()
			w.a.silent.Store(false)
			for _, s := range []*side{w.a, w.b} { // the retry is due: one cycle
				if x := s.vm().session(); x != nil {
					x.Retry()
				}
			}
			w.until("both sides to report it", func() error {
				return errors.Join(w.a.reported(t.Context()), w.b.reported(t.Context()))
			})
			t.Logf("reported on both sides %v after the contact", time.Since(contact).Round(time.Millisecond))
			if n := w.handshakes() - before; n > 2 {
				t.Fatalf("%d handshakes until both knew", n)
			}
			// It stays so over a restart of both, and neither copy is touched.
			w.a.restart()
			w.b.restart()
			w.until("both sides to report it still", func() error {
				return errors.Join(w.a.reported(t.Context()), w.b.reported(t.Context()))
			})
			if !w.a.hyper.runs() || !w.b.hyper.runs() {
				t.Fatal("a guest was stopped")
			}
		})
	}
}
