package vm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// plannedKeeping is a planned failover that keeps the recovery points.
func plannedKeeping(request string) func(context.Context, *Manager, *VM) error {
	return func(ctx context.Context, _ *Manager, v *VM) error {
		return v.Planned(ctx, PlannedOptions{Request: request, KeepPoints: true}, nil)
	}
}

// counterAt is what the guest had written at a recovery point.
func counterAt(t testing.TB, s *points.Store, pos delta.Pos) string {
	t.Helper()
	v, err := s.View(pos)
	must(t, err)
	dev, err := v.Disk("vda")
	must(t, err)
	b := make([]byte, 512)
	_, err = dev.ReadAt(b, 0)
	must(t, err)
	must(t, v.Close())
	return string(b)
}

// kept opens what a planned failover to B kept.
func (w *pair) kept() (*points.Store, []string) {
	w.t.Helper()
	dirs, err := filepath.Glob(filepath.Join(w.b.root, "*.points-*"))
	must(w.t, err)
	if len(dirs) != 1 {
		w.t.Fatalf("kept in %v", dirs)
	}
	var cfg points.Config
	must(w.t, (&points.Dir{Path: dirs[0], ReadOnly: true}).Configure(&cfg))
	s, err := points.Open(cfg)
	must(w.t, err)
	w.t.Cleanup(func() { _ = s.Close() })
	return s, dirs
}

// The plan says what ends and what is kept. Kept points are what they were,
// while the guest writes on over the images they came from; a failover that is
// not asked to keeps nothing.
func TestAPlannedFailoverKeepsTheRecoveryPointsWhenAsked(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	first := w.pin()
	w.write(w.a, 5)
	w.rest()
	second := w.pin()
	s, err := w.b.vm().store()
	must(t, err)
	want := map[delta.Pos]string{first.Pos: counterAt(t, s, first.Pos), second.Pos: counterAt(t, s, second.Pos)}
	if want[first.Pos] == want[second.Pos] {
		t.Fatal("both points are equal")
	}
	for keep, words := range map[bool][]string{false: {"END with the failover", "2 pinned", "--keep-points"}, true: {"kept in " + w.b.root, "2 pinned"}} {
		cs, err := w.a.vm().PlanPlanned(t.Context(), false, keep)
		must(t, err)
		text := ""
		for _, c := range cs {
			if c.Name == "Recovery points" {
				text = c.Detail + " " + c.Remedy
			}
		}
		for _, word := range words {
			if !strings.Contains(text, word) {
				t.Errorf("keep %t: the plan does not say %q: %s", keep, word, text)
			}
		}
	}
	must(t, w.a.do(plannedKeeping("keep-1")))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	w.write(w.b, 5)
	k, _ := w.kept()
	if st := k.Status(); st.State != points.Replica || len(st.Damage) > 0 {
		t.Fatalf("what was kept is %s: %v", st.State, st.Damage)
	}
	for pos, content := range want {
		if counterAt(t, k, pos) != content {
			t.Errorf("point %v is not what it was", pos)
		}
	}
	if h := w.b.vm().record().History; !strings.Contains(h, "keep-1") {
		t.Errorf("the record says %q", h)
	}
	must(t, w.b.do(planned))
	w.rest()
	if dirs, _ := filepath.Glob(filepath.Join(w.a.root, "*.points-*")); len(dirs) > 0 {
		t.Errorf("kept although nobody asked: %v", dirs)
	}
	w.kept()
}

// Where there is no room nothing moves: the check refuses, and a failover that
// goes on all the same is taken back before the role changed, with nothing left.
func TestAPlannedFailoverThatCannotKeepThePointsIsTakenBack(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	w.pin()
	w.b.vm().deps.Store.Reserve = 1 << 60
	cs, err := w.a.vm().PlanPlanned(t.Context(), false, true)
	must(t, err)
	refused := false
	for _, c := range cs {
		refused = refused || c.Name == "Recovery points" && c.Result == wire.Failed && c.Remedy != ""
	}
	if !refused {
		t.Errorf("the checks let it pass: %+v", cs)
	}
	if err := w.a.do(plannedKeeping("keep-2")); err == nil || !strings.Contains(err.Error(), "keeping the recovery points needs") {
		t.Errorf("the failover: %v", err)
	}
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM any more")
	}
	if dirs, _ := filepath.Glob(filepath.Join(w.b.root, "*.points-*")); len(dirs) > 0 {
		t.Errorf("left over: %v", dirs)
	}
}

// The daemon dies while it keeps the points, or just after: the failover is
// finished, and what was kept is whole.
func TestACrashWhileThePointsAreKeptLosesNone(t *testing.T) {
	for _, p := range []string{"promote/keep/begun", "promote/keep/acted"} {
		t.Run(p, func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.rest()
			pinned := w.pin()
			s, err := w.b.vm().store()
			must(t, err)
			want := counterAt(t, s, pinned.Pos)
			w.b.mu.Lock()
			w.b.crashAt = p
			w.b.mu.Unlock()
			ended := make(chan error, 1)
			go func() { ended <- w.a.do(plannedKeeping("keep-3")) }()
			w.until("the crash", func() error {
				if w.b.died() {
					return nil
				}
				return errors.New("not there yet")
			})
			w.b.restart()
			<-ended
			if o := w.rest(); o == w.b {
				k, _ := w.kept()
				if counterAt(t, k, pinned.Pos) != want {
					t.Error("the kept point is not what it was")
				}
			} else if dirs, _ := os.ReadDir(w.b.root); len(dirs) != 1 {
				t.Errorf("taken back, but left over: %v", dirs)
			}
		})
	}
}

// keepingTrial is a pair that failed over to an older point and is on trial;
// want is what the guest had written at the points.
func keepingTrial(t *testing.T, o UnplannedOptions) (w *pair, want map[delta.Pos]string) {
	t.Helper()
	w = newPair(t)
	w.protect()
	old, _ := w.point()
	w.write(w.a, 5)
	w.rest()
	pinned := w.pin()
	w.write(w.a, 5)
	w.rest()
	s := w.b.vm().keepStore(t)
	want = map[delta.Pos]string{old: counterAt(t, s, old), pinned.Pos: counterAt(t, s, pinned.Pos)}
	if want[old] == want[pinned.Pos] {
		t.Fatal("both points are equal")
	}
	w.powerCutA()
	point := nameOf(old)
	if o.InPlace {
		point = "latest"
	}
	must(t, w.b.do(failoverTo(point, o)))
	w.lossy.Store(false)
	w.write(w.b, 5)
	return w, want
}

// wasKept: what was kept on B holds the points as they were.
func (w *pair) wasKept(want map[delta.Pos]string) {
	w.t.Helper()
	k, _ := w.kept()
	if st := k.Status(); st.State != points.Replica || len(st.Damage) > 0 {
		w.t.Fatalf("what was kept is %s: %v", st.State, st.Damage)
	}
	for pos, content := range want {
		if counterAt(w.t, k, pos) != content {
			w.t.Errorf("point %v is not what it was", pos)
		}
	}
}

func commitKeeping(ctx context.Context, _ *Manager, v *VM) error {
	return v.Commit(ctx, CommitOptions{KeepPoints: true, Request: "keep-c"}, nil)
}

// planText is what a plan says of the recovery points.
func planText(cs []wire.Check) (text string, r wire.Result) {
	for _, c := range cs {
		if c.Name == "Recovery points" {
			return c.Detail + " " + c.Remedy, c.Result
		}
	}
	return "", wire.Unknown
}

// The commit of an unplanned failover keeps the points when asked, under the
// guest that runs on; so does one that comes by itself, or with the way back, and a
// failover in place.
func TestTheCommitOfAnUnplannedFailoverKeepsTheRecoveryPointsWhenAsked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		o   UnplannedOptions
		act action
	}{
		"commit":     {act: commitKeeping},
		"remembered": {o: UnplannedOptions{KeepPoints: true}, act: commit},
		"by itself":  {o: UnplannedOptions{KeepPoints: true, Within: 1, Then: thenCommit}},
		"with the reverse": {act: func(ctx context.Context, _ *Manager, v *VM) error {
			return v.Reverse(ctx, CommitOptions{KeepPoints: true, Request: "keep-r"}, nil)
		}},
		"in place": {o: UnplannedOptions{KeepPoints: true, InPlace: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, want := keepingTrial(t, c.o)
			if name == "commit" {
				for keep, words := range map[bool][]string{false: {"END with the commit", "1 pinned", "--keep-points"}, true: {"kept in " + w.b.root, "1 pinned", "bytes are copied"}} {
					text, _ := planText(w.b.vm().PlanCommit(t.Context(), keep))
					for _, word := range words {
						if !strings.Contains(text, word) {
							t.Errorf("keep %t: the plan does not say %q: %s", keep, word, text)
						}
					}
				}
			}
			if name == "with the reverse" {
				w.a.reboot()
				w.until("A to learn of the promotion", w.primaryHeld)
				w.forced.Store(false)
			}
			if c.act != nil {
				must(t, w.b.do(c.act))
			}
			w.until("the images to hold everything", w.b.flattened)
			w.write(w.b, 5)
			w.wasKept(want)
			w.check()
		})
	}
}

// Where there is no room, or nothing is left to keep, the commit is refused and
// the failover is on trial as before: nothing is left, and it can be cancelled.
func TestACommitThatCannotKeepThePointsIsTakenBack(t *testing.T) {
	t.Parallel()
	w, want := keepingTrial(t, UnplannedOptions{})
	was := w.b.vm().deps.Store.Reserve
	w.b.vm().deps.Store.Reserve = 1 << 60
	if text, r := planText(w.b.vm().PlanCommit(t.Context(), true)); r != wire.Failed || !strings.Contains(text, "must stay so") {
		t.Errorf("the plan lets it pass: %s", text)
	}
	if err := w.b.do(commitKeeping); err == nil || !strings.Contains(err.Error(), "keeping the recovery points needs") {
		t.Errorf("the commit: %v", err)
	}
	if o := w.b.vm().record().Overlay; o == nil || o.Committed || w.b.planOpen() || !w.b.hyper.runs() {
		t.Fatalf("not on trial any more: %+v", o)
	}
	if dirs, _ := filepath.Glob(filepath.Join(w.b.root, "*.points-*")); len(dirs) > 0 {
		t.Errorf("left over: %v", dirs)
	}
	w.b.vm().deps.Store.Reserve = was
	w.lossy.Store(true)
	must(t, w.b.do(cancel))
	s := w.b.vm().keepStore(t)
	for pos, content := range want {
		if counterAt(t, s, pos) != content {
			t.Errorf("point %v is not what it was", pos)
		}
	}
	must(t, w.b.do(failoverTo("latest", UnplannedOptions{})))
	must(t, w.b.do(commit))
	var we *wire.Error
	if err := w.b.do(commitKeeping); !errors.As(err, &we) || we.Kind != wire.KindRefused {
		t.Errorf("after the commit: %v", err)
	}
}

// The daemon dies at any step of a commit that keeps the points: it is committed
// in the end, with all of them.
func TestACrashAtAnyStepOfACommitThatKeepsThePointsLosesNone(t *testing.T) {
	for _, p := range []string{"commit/keep/begun", "commit/keep/acted", "commit/role/begun", "commit/role/acted", "commit/seal/begun", "commit/seal/acted"} {
		t.Run(strings.ReplaceAll(p, "/", " "), func(t *testing.T) {
			t.Parallel()
			w, want := keepingTrial(t, UnplannedOptions{})
			w.b.mu.Lock()
			w.b.crashAt = p
			w.b.mu.Unlock()
			w.b.until(commitKeeping, func(v *VM) bool { return v.record().Lineage.State == lineage.Primary && !w.b.planOpen() })
			w.b.mu.Lock()
			if w.b.crashAt != "" {
				t.Errorf("%s was never reached", p)
			}
			w.b.mu.Unlock()
			w.until("the images to hold everything", w.b.flattened)
			w.write(w.b, 3)
			w.wasKept(want)
			w.check()
		})
	}
}

// While a failover is on trial its data plane has disks that no successor can
// take, and while a commit copies the points it may do so for hours: an upgrade
// is refused at once and says what to wait for; afterwards it is not.
func TestAnUpgradeIsRefusedWhileThePointsOfATrialAreKept(t *testing.T) {
	t.Parallel()
	w, want := keepingTrial(t, UnplannedOptions{})
	if _, err := w.b.vm().Upgrade(t.Context(), false, true); err == nil || !strings.Contains(err.Error(), "cannot be handed on") {
		t.Errorf("an upgrade during the trial: %v", err)
	}
	c, err := w.b.vm().plane()
	must(t, err)
	var during, below error
	w.b.vm().deps.Failpoint = func(point string) {
		if point == "commit/keep/begun" {
			_, during = w.b.vm().Upgrade(t.Context(), false, true)
			_, below = c.Upgrade(t.Context(), dataplane.UpgradeRequest{})
		}
	}
	must(t, w.b.do(commitKeeping))
	var we *wire.Error
	if !errors.As(during, &we) || we.Kind != wire.KindConflict || !strings.Contains(we.Text, "commit") || we.Hint == "" {
		t.Errorf("an upgrade during the commit: %v", during)
	}
	if !errors.As(below, &we) || we.Kind != wire.KindRefused || !strings.Contains(we.Hint, "failover commit") {
		t.Errorf("the data plane's answer to an upgrade during the commit: %v", below)
	}
	w.until("the images to hold everything", w.b.flattened)
	w.wasKept(want)
	w.check()
}
