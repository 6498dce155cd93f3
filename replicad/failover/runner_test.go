package failover_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/failover"
)

var errBoom = errors.New("boom")

// world is what steps act on; it survives "crashes" of the runner.
type world struct {
	log  []string
	done map[string]bool
}

func (w *world) steps(n, commit int, fail func(name string, undo bool) error) []failover.Step {
	var out []failover.Step
	for i := range n {
		name := fmt.Sprintf("s%d", i)
		out = append(out, failover.Step{
			Name: name, Title: name, Commit: i == commit,
			Do: func(context.Context) (string, error) {
				if err := fail(name, false); err != nil {
					return "", err
				}
				w.done[name] = true
				w.log = append(w.log, "do "+name)
				return "", nil
			},
			Undo: func(context.Context) error {
				if err := fail(name, true); err != nil {
					return err
				}
				delete(w.done, name)
				w.log = append(w.log, "undo "+name)
				return nil
			},
		})
	}
	return out
}

func never(string, bool) error { return nil }

func newRunner(t *testing.T, fsys fsx.FS) *failover.Runner {
	t.Helper()
	return &failover.Runner{FS: fsys, Path: "plan.json", Now: time.Now}
}

func diskFS(t *testing.T) fsx.FS {
	t.Helper()
	fsys, err := fsx.OS(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

func TestAPlanRunsItsStepsInOrderAndLeavesNothingToContinue(t *testing.T) {
	t.Parallel()
	fsys, w := diskFS(t), &world{done: map[string]bool{}}
	r := newRunner(t, fsys)
	if err := r.Begin(failover.Planned, "req", map[string]int{"x": 1}); err != nil {
		t.Fatal(err)
	}
	if err := r.Run(t.Context(), w.steps(3, 2, never)); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"do s0", "do s1", "do s2"}, w.log); d != "" {
		t.Fatal(d)
	}
	if j, err := failover.Load(fsys, "plan.json"); err != nil || j != nil {
		t.Fatalf("left behind: %+v, %v", j, err)
	}
}

func TestAFailureBeforeTheCommitTakesEverythingBackInReverse(t *testing.T) {
	t.Parallel()
	for at := range 3 {
		fsys, w := diskFS(t), &world{done: map[string]bool{}}
		r := newRunner(t, fsys)
		if err := r.Begin(failover.Enable, "req", nil); err != nil {
			t.Fatal(err)
		}
		bad := fmt.Sprintf("s%d", at)
		err := r.Run(t.Context(), w.steps(4, 3, func(n string, undo bool) error {
			if n == bad && !undo {
				return errBoom
			}
			return nil
		}))
		if !errors.Is(err, errBoom) || len(w.done) != 0 {
			t.Fatalf("step %d: err %v, still done %v", at, err, w.done)
		}
		if want := "undo " + bad; !strings.Contains(strings.Join(w.log, ","), want) {
			t.Fatalf("the failed step itself was not taken back: %v", w.log)
		}
		if j, _ := failover.Load(fsys, "plan.json"); j != nil {
			t.Fatalf("an undone plan is still open: %+v", j)
		}
	}
}

func TestAFailureBehindTheCommitWaitsToBeContinued(t *testing.T) {
	t.Parallel()
	fsys, w := diskFS(t), &world{done: map[string]bool{}}
	r := newRunner(t, fsys)
	if err := r.Begin(failover.Planned, "req", nil); err != nil {
		t.Fatal(err)
	}
	fail := true
	steps := w.steps(4, 1, func(n string, _ bool) error {
		if n == "s2" && fail {
			return errBoom
		}
		return nil
	})
	if err := r.Run(t.Context(), steps); !errors.Is(err, errBoom) {
		t.Fatal(err)
	}
	if err := r.TakeBack(t.Context(), steps, nil); !errors.Is(err, failover.ErrCommitted) {
		t.Fatalf("taking back behind the commit: %v", err)
	}
	if err := r.Begin(failover.Planned, "other", nil); !errors.Is(err, failover.ErrInterrupted) {
		t.Fatalf("a second plan beside an open one: %v", err)
	}
	j, err := failover.Load(fsys, "plan.json")
	if err != nil || j == nil || j.Begun != "s2" || !j.Committed || j.Request != "req" {
		t.Fatalf("journal %+v, %v", j, err)
	}
	fail = false
	again := newRunner(t, fsys)
	again.Resume(j)
	if err := again.Run(t.Context(), steps); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"do s0", "do s1", "do s2", "do s3"}, w.log); d != "" {
		t.Fatal(d)
	}
}

func TestADurableRefusalAtTheCommitStepTakesBack(t *testing.T) {
	t.Parallel()
	fsys, w := diskFS(t), &world{done: map[string]bool{}}
	r := newRunner(t, fsys)
	if err := r.Begin(failover.Planned, "req", nil); err != nil {
		t.Fatal(err)
	}
	err := r.Run(t.Context(), w.steps(4, 2, func(n string, undo bool) error {
		if n == "s2" && !undo {
			return fmt.Errorf("peer: %w", failover.ErrNotTaken)
		}
		return nil
	}))
	if !errors.Is(err, failover.ErrNotTaken) || len(w.done) != 0 {
		t.Fatalf("err %v, still done %v", err, w.done)
	}
}

// The process dies between any two durable writes; the next one finds the
// journal and continues, and every step has happened at least once.
func TestACrashAnywhereIsContinuedOrTakenBack(t *testing.T) {
	t.Parallel()
	const steps = 4
	for _, takeBack := range []bool{false, true} {
		for crash := 1; crash < 64; crash++ {
			fsys, w := diskFS(t), &world{done: map[string]bool{}}
			dying := &dyingFS{FS: fsys, left: crash}
			r := newRunner(t, dying)
			err := r.Begin(failover.Enable, "req", nil)
			if err == nil {
				err = r.Run(t.Context(), w.steps(steps, -1, never))
			}
			if err == nil {
				if crash < 5 {
					t.Fatalf("no crash at write %d", crash)
				}
				break
			}
			j, lerr := failover.Load(fsys, "plan.json")
			if lerr != nil {
				t.Fatalf("crash %d: %v", crash, lerr)
			}
			if j == nil {
				if len(w.done) != 0 && len(w.done) != steps {
					t.Fatalf("crash %d: steps ran without a journal: %v", crash, w.done)
				}
				continue
			}
			again := newRunner(t, fsys)
			again.Resume(j)
			if takeBack {
				if err := again.TakeBack(t.Context(), w.steps(steps, -1, never), nil); err != nil || len(w.done) != 0 {
					t.Fatalf("crash %d: taken back to %v, %v", crash, w.done, err)
				}
			} else if err := again.Run(t.Context(), w.steps(steps, -1, never)); err != nil || len(w.done) != steps {
				t.Fatalf("crash %d: continued to %v, %v", crash, w.done, err)
			}
		}
	}
}

// dyingFS fails every open from the left-th on.
type dyingFS struct {
	fsx.FS
	left int
}

func (d *dyingFS) Open(name string, flag int) (fsx.File, error) {
	if d.left--; d.left <= 0 {
		return nil, errBoom
	}
	return d.FS.Open(name, flag)
}

func (d *dyingFS) Rename(a, b string) error {
	if d.left--; d.left <= 0 {
		return errBoom
	}
	return d.FS.Rename(a, b)
}

func TestStepsAreTakenBackInReverseOrder(t *testing.T) {
	t.Parallel()
	fsys, w := diskFS(t), &world{done: map[string]bool{}}
	r := newRunner(t, fsys)
	if err := r.Begin(failover.Planned, "req", nil); err != nil {
		t.Fatal(err)
	}
	err := r.Run(t.Context(), w.steps(4, -1, func(name string, undo bool) error {
		if name == "s3" && !undo {
			return errBoom
		}
		return nil
	}))
	if !errors.Is(err, errBoom) {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"do s0", "do s1", "do s2", "undo s3", "undo s2", "undo s1", "undo s0"}, w.log); d != "" {
		t.Fatal(d)
	}
}

func TestAStepThatCannotBeTakenBackLeavesThePlanOpen(t *testing.T) {
	fsys := diskFS(t)
	w := &world{done: map[string]bool{}}
	stuck := true
	steps := w.steps(4, 3, func(name string, undo bool) error {
		if undo && name == "s1" && stuck || !undo && name == "s2" {
			return errBoom
		}
		return nil
	})
	r := newRunner(t, fsys)
	if err := r.Begin(failover.Planned, "one", nil); err != nil {
		t.Fatal(err)
	}
	if err := r.Run(t.Context(), steps); !errors.Is(err, errBoom) {
		t.Fatal(err)
	}
	if !w.done["s0"] || !w.done["s1"] {
		t.Fatalf("a step behind one that could not be taken back was taken back: %v", w.log)
	}
	j, err := failover.Load(fsys, "plan.json")
	if err != nil || j == nil || j.Phase != failover.Undoing {
		t.Fatalf("the journal says %+v, %v", j, err)
	}
	if err := newRunner(t, fsys).Begin(failover.Planned, "two", nil); !errors.Is(err, failover.ErrInterrupted) {
		t.Fatalf("another plan over it: %v", err)
	}
	stuck = false
	again := newRunner(t, fsys)
	again.Resume(j)
	if err := again.Run(t.Context(), steps); err == nil {
		t.Fatal("what was taken back counts as done")
	}
	if j, err := failover.Load(fsys, "plan.json"); len(w.done) > 0 || j != nil || err != nil {
		t.Fatalf("left: %v, %+v, %v", w.done, j, err)
	}
}

func TestAPlanWhoseCallerIsGoneDoesNotBeginItsCommit(t *testing.T) {
	w := &world{done: map[string]bool{}}
	ctx, cancel := context.WithCancel(t.Context())
	steps := w.steps(3, 2, func(name string, undo bool) error {
		if name == "s1" && !undo {
			cancel()
		}
		return nil
	})
	r := newRunner(t, diskFS(t))
	if err := r.Begin(failover.Planned, "one", nil); err != nil {
		t.Fatal(err)
	}
	if err := r.Run(ctx, steps); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if r.Journal().Committed || len(w.done) > 0 {
		t.Fatalf("committed %v, done %v", r.Journal().Committed, w.log)
	}
}
