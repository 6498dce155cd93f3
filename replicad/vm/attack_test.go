package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/libvirt/libvirttest"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

func unplanned(force bool) func(ctx context.Context, _ *Manager, v *VM) error {
	return func(ctx context.Context, _ *Manager, v *VM) error {
		return v.Unplanned(ctx, UnplannedOptions{Force: force, Request: fmt.Sprintf("unplanned-%d", time.Now().UnixNano())}, nil)
	}
}

func reverse(ctx context.Context, _ *Manager, v *VM) error {
	return v.Reverse(ctx, CommitOptions{Request: fmt.Sprintf("reverse-%d", time.Now().UnixNano())}, nil)
}

func (s *side) refuseWrites(f func(name string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f == nil {
		s.fs.refuse.Store(nil)
		return
	}
	s.fs.refuse.Store(&f)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The primary host loses power, the replica is promoted, the old primary
// returns: it must not start its guest, and it follows once a person said so.
func (w *pair) losePrimary() {
	w.t.Helper()
	w.a.kill()
	w.a.hyper.halt()
	w.a.hyper.SetState(string(testVM), libvirt.StateOff, libvirt.ReasonNone)
	w.lossy.Store(true)
	w.forced.Store(true)
	must(w.t, w.b.do(unplanned(true)))
	w.write(w.b, 3)
	w.lossy.Store(false)
}

func (w *pair) primaryHeld() error {
	if w.a.hyper.runs() {
		w.violation("the old primary started its guest")
	}
	if w.a.vm().record().Superseded == "" {
		return errors.New("A does not know yet that B was promoted")
	}
	return nil
}

func TestAReturningOldPrimaryIsHeldAndFollowsOnceAPersonSaysSo(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.losePrimary()
	w.a.reboot()
	w.until("A to learn of the promotion", w.primaryHeld)
	w.forced.Store(false)
	must(t, w.b.do(reverse))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	must(t, w.b.do(planned))
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}

// It was told of the promotion; then the other host falls silent over the next
// boot, and the policy would start the guest.
func TestASupersededPrimaryStaysHeldOverABootWithASilentPeer(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.losePrimary()
	w.a.reboot()
	w.until("A to learn of the promotion", w.primaryHeld)
	w.b.silent.Store(true)
	w.a.reboot()
	w.until("A to hold its guest", func() error {
		v := w.a.vm()
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.held == "" || v.held == "the other host is being asked" {
			return fmt.Errorf("held %q", v.held)
		}
		return nil
	})
	if w.a.hyper.runs() {
		t.Fatal("the guest runs on both hosts")
	}
	if err := w.a.hyper.Start(t.Context(), string(testVM), libvirt.StartOptions{}); err == nil || !strings.Contains(err.Error(), "hook") {
		t.Fatalf("virsh start: %v", err)
	}
}

func TestACrashAtAnyPointOfAnUnplannedFailoverAndOfTheReturn(t *testing.T) {
	if testing.Short() {
		t.Skip("a sweep over every point")
	}
	var at []string
	for _, p := range []string{
		"unplanned/apply", "unplanned/generation", "unplanned/store", "unplanned/tracker", "unplanned/define",
		"unplanned/firmware", "unplanned/start", "unplanned/reverse", "reverse/keep", "reverse/release", "reverse/ship",
	} {
		at = append(at, p+"/begun", p+"/acted")
	}
	for _, p := range at {
		t.Run(strings.ReplaceAll(p, "/", " "), func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.a.kill()
			w.a.hyper.halt()
			w.a.hyper.SetState(string(testVM), libvirt.StateOff, libvirt.ReasonNone)
			w.lossy.Store(true)
			w.forced.Store(true)
			w.b.mu.Lock()
			w.b.crashAt = p
			w.b.mu.Unlock()
			w.b.until(unplanned(true), func(v *VM) bool { return v.record().Lineage.MayServe() && w.b.hyper.runs() })
			w.lossy.Store(false)
			w.write(w.b, 2)
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

// until repeats an action, restarting the daemon when it died, until done.
func (s *side) until(f func(context.Context, *Manager, *VM) error, done func(v *VM) bool) {
	s.t.Helper()
	s.w.until("the action to be done", func() error {
		if s.died() {
			s.restart()
		}
		v := s.vm()
		if v == nil {
			return errors.New("down")
		}
		if done(v) {
			return nil
		}
		return errors.Join(s.do(f), errors.New("not done yet"))
	})
	if s.died() {
		s.restart()
	}
}

// A full disk at the moment of the role change: the answer to the primary must
// not be a refusal as long as the promotion may still happen.
func TestAPromotionWhoseRecordCannotBeWrittenIsNotDeclined(t *testing.T) {
	t.Parallel()
	for fails := 1; fails <= 4; fails++ {
		t.Run(fmt.Sprint(fails), func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			left := fails
			w.b.refuseWrites(func(name string) error {
				if !strings.HasSuffix(name, recordFile) {
					return nil
				}
				j, err := failover.Load(w.b.vm().fsys, planFile)
				if err != nil || j == nil || j.Begun != "generation" || left == 0 {
					return nil
				}
				left--
				return errors.New("no space left on device")
			})
			if err := w.a.do(planned); err != nil {
				t.Log(err)
			}
			w.b.restart() // what stands in the journal now is what counts
			w.rest()
		})
	}
}

func TestAPrimaryWithoutLibvirtIsNotReportedAsStopped(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.a.hyper.On(libvirttest.Rule{Op: "DomainState", Err: &libvirt.Error{Op: "DomainState", Kind: libvirt.KindUnavailable, Msg: "libvirtd is away"}})
	w.a.restart() // a fresh daemon has never seen the guest
	err := w.b.do(unplanned(false))
	var we *wire.Error
	if !errors.As(err, &we) || we.Kind != wire.KindRefused {
		t.Fatalf("an unplanned failover while the primary's guest runs: %v", err)
	}
	w.a.hyper.Clear()
	w.rest()
}

func (s *side) step() string {
	v := s.vm()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.running == nil {
		return ""
	}
	return v.running.Begun
}

func (s *side) waitStep(name string) {
	s.t.Helper()
	s.w.until("step "+name, func() error {
		if got := s.step(); got != name {
			return fmt.Errorf("at %q", got)
		}
		return nil
	})
}

func takeBack(force bool) func(ctx context.Context, _ *Manager, v *VM) error {
	return func(ctx context.Context, _ *Manager, v *VM) error { return v.Settle(ctx, true, force) }
}

func TestAHangingPlannedFailoverIsTakenBackOnRequest(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.b.silent.Store(true)
	w.write(w.a, 2)
	ended := make(chan error, 1)
	go func() { ended <- w.a.do(planned) }()
	w.a.waitStep("final")
	must(t, w.a.do(takeBack(false)))
	if err := <-ended; err == nil {
		t.Fatal("the plan says that it succeeded")
	}
	if !w.a.hyper.runs() {
		t.Fatal("the guest does not run again")
	}
	w.b.silent.Store(false)
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}

func TestAHandOverIsTakenBackOnlyWithThePeersWordOrByForce(t *testing.T) {
	t.Parallel()
	for _, force := range []bool{false, true} {
		t.Run(fmt.Sprintf("force %t", force), func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.a.mu.Lock()
			w.a.crashAt = "planned/promote/begun"
			w.a.mu.Unlock()
			if err := w.a.do(planned); !errors.Is(err, errCrashed) {
				t.Fatal(err)
			}
			w.b.silent.Store(true)
			w.a.restart()
			w.a.waitStep("promote")
			before := w.a.vm().record().Lineage.Generation
			err := w.a.do(takeBack(false))
			var we *wire.Error
			if !errors.As(err, &we) || !strings.Contains(we.Hint, "--force") {
				t.Fatalf("taken back without the peer's word: %v", err)
			}
			if !force {
				w.b.silent.Store(false)
				w.until("either way", func() error { w.check(); return w.settled() })
				return
			}
			w.until("the force to be heard", func() error { return w.a.do(takeBack(true)) })
			l := w.a.vm().record().Lineage
			if !l.MayServe() || !l.Forced || l.Generation == before || !w.a.hyper.runs() {
				t.Fatalf("after the force: %+v, running %t", l, w.a.hyper.runs())
			}
			w.b.silent.Store(false)
			if o := w.rest(); o != w.a {
				t.Fatal("A does not own the VM")
			}
		})
	}
}

// The link is cut in the middle of a planned failover, the replica's operator
// forces a promotion, the link comes back: the primary must not start its guest.
func TestAPlannedFailoverOvertakenByAForcedOneDoesNotStartTheGuest(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"final", "promote"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			if step == "promote" {
				w.inject("A/Failover-promote", lostRequest)
				w.a.mu.Lock()
				w.a.crashAt = "planned/promote/begun"
				w.a.mu.Unlock()
				if err := w.a.do(planned); !errors.Is(err, errCrashed) {
					t.Fatal(err)
				}
				w.a.silent.Store(true)
				w.a.restart()
			} else {
				w.a.silent.Store(true)
				w.write(w.a, 2)
				go func() { _ = w.a.do(planned) }()
			}
			w.a.waitStep(step)
			w.lossy.Store(true)
			w.forced.Store(true)
			must(t, w.b.do(unplanned(true)))
			w.write(w.b, 2)
			w.lossy.Store(false)
			w.a.silent.Store(false)
			w.until("A to give up its plan", func() error {
				if w.a.hyper.runs() {
					w.violation("A started its guest although B was promoted")
					w.check()
				}
				if w.a.step() != "" {
					return errors.New("the plan runs")
				}
				if w.a.vm().record().Lineage.State == lineage.Replica {
					return nil
				}
				return w.primaryHeld()
			})
			w.forced.Store(false)
			w.b.until(reverse, func(v *VM) bool { return !v.record().NoReverse })
			if o := w.rest(); o != w.b {
				t.Fatal("B does not own the VM")
			}
		})
	}
}

func TestAReturnAfterAPlannedFailoverWithoutReversalIsJustStarted(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error {
		return v.Planned(ctx, PlannedOptions{NoReverse: true, Request: "no-reverse"}, nil)
	}))
	w.write(w.b, 2)
	must(t, w.b.do(reverse))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	if n := w.b.vm().session().Status().Stats.SentBytes; n > diskSize/2 {
		t.Fatalf("%d bytes were sent for a few writes", n)
	}
}

// libvirt answers only long after the daemon has started.
func TestAGuestIsStartedAfterABootWhenLibvirtComesLate(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.a.kill()
	w.a.hyper.On(libvirttest.Rule{Op: "DomainState", Times: 12, Err: &libvirt.Error{Op: "DomainState", Kind: libvirt.KindUnavailable, Msg: "not yet"}})
	w.a.reboot()
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}

func TestBothHostsLosePowerAndTheGuestRunsOnce(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.a.kill()
	w.b.reboot()
	w.a.reboot()
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}

// The copy of an ended relationship, or anything else, lies where a new
// replica's image would be.
func TestAnImageThatExistsIsNeverOverwritten(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	file := filepath.Join(imageDir(w.b.root, testVM), "vda.raw")
	must(t, os.MkdirAll(filepath.Dir(file), 0o700))
	must(t, os.WriteFile(file, []byte("precious"), 0o600))
	err := w.a.do(func(ctx context.Context, m *Manager, _ *VM) error {
		_, err := m.Enable(ctx, EnableOptions{Name: "web", Peer: w.b.host, Interval: time.Second, Request: "enable"}, nil)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), file) {
		t.Fatalf("enabling over a file: %v", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Fatalf("the file holds %q, %v", b, err)
	}
	if w.a.vm() != nil || w.b.vm() != nil {
		t.Fatal("something was left behind")
	}
}

// The daemon dies between the durable commit of the first epoch of a new
// generation and the record that follows it; then the primary is lost.
func TestACommitThatTheRecordDoesNotKnowYetCanBePromoted(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error {
		return v.Planned(ctx, PlannedOptions{NoReverse: true, Request: "there"}, nil)
	}))
	w.write(w.b, 2)
	g := w.b.vm().record().Lineage.Generation
	st, err := w.a.vm().store()
	must(t, err)
	w.a.refuseWrites(func(name string) error {
		if strings.HasSuffix(name, recordFile) && st.Committed().Generation == g {
			return errors.New("no space left on device")
		}
		return nil
	})
	must(t, w.b.do(reverse))
	w.until("the commit", func() error {
		if st.Committed().Generation != g {
			return errors.New("nothing committed")
		}
		return nil
	})
	w.b.kill()
	w.b.hyper.halt()
	w.b.hyper.SetState(string(testVM), libvirt.StateOff, libvirt.ReasonNone)
	w.a.restart()
	w.lossy.Store(true)
	w.forced.Store(true)
	w.until("the promotion", func() error { return w.a.do(unplanned(true)) })
	if !w.a.hyper.runs() {
		t.Fatal("the guest does not run")
	}
	w.check()
}

// An epoch arrives while the operator fails over by force.
func TestNothingIsAcknowledgedBehindAPromotionsBack(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = w.a.hyper.write()
			}
		}
	}()
	w.lossy.Store(true)
	w.forced.Store(true)
	must(t, w.b.do(unplanned(true)))
	v := w.b.vm()
	at := v.record().Lineage.Parent()
	close(stop)
	<-done
	acked := w.a.vm().session().Status().Committed
	if acked.Generation == at.Generation && acked.Epoch > at.Epoch {
		t.Fatalf("the primary was told %v, the promotion stands at %v", acked, at)
	}
	w.check()
}

func TestEndingProtectionWithASilentPeerAsksForForceFirst(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.b.silent.Store(true)
	end := func(force bool) error {
		return w.a.do(func(ctx context.Context, m *Manager, v *VM) error {
			return m.Disable(ctx, v, DisableOptions{Force: force, Request: "disable"}, nil)
		})
	}
	if err := end(false); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Fatalf("unforced: %v", err)
	}
	w.b.silent.Store(false)
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
	w.b.silent.Store(true)
	must(t, end(true))
	if w.a.vm() != nil {
		t.Fatal("the relationship is still there")
	}
}

// The old primary's own changes are not known, so everything counts as changed:
// it is compared, and only what differs travels.
func TestAReturnOfAnUnprovenOldPrimaryComparesAndSendsLittle(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	const big = 2 << 20
	noise := make([]byte, big)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(noise)
	before := w.a.vm().session().Status().Committed.Epoch
	w.a.hyper.mu.Lock()
	_, err := w.a.hyper.disk.WriteAt(noise, diskSize-big)
	err = errors.Join(err, w.a.hyper.disk.Sync())
	w.a.hyper.mu.Unlock()
	must(t, err)
	w.until("the noise to be copied", func() error {
		if st := w.a.vm().session().Status(); st.Committed.Epoch < before+2 || st.Stats.RawBytes < big {
			_ = w.a.hyper.write()
			return fmt.Errorf("committed %v", st.Committed)
		}
		return w.copied(w.a, w.b)
	})
	w.losePrimary()
	w.a.reboot()
	w.until("A to learn of the promotion", w.primaryHeld)
	w.forced.Store(false)
	w.inject("B/Failover-release", lostReply) // asked again, A cannot say any more what it changed
	if err := w.b.do(reverse); err == nil {
		t.Fatal("no answer was lost")
	}
	must(t, w.b.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.Settle(ctx, false, false) }))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	st := w.b.vm().session().Status().Stats
	if st.SentBytes > big/4 {
		t.Fatalf("%d bytes were sent although both hosts held nearly the same: %+v", st.SentBytes, st)
	}
	image, err := os.ReadFile(filepath.Join(w.a.dir, "..", "web.raw"))
	must(t, err)
	if !bytes.Equal(image[diskSize-big:], noise) {
		t.Fatal("the old primary's image does not hold what both had")
	}
}

func TestAHostTakesNoMoreVMsThanItsLimit(t *testing.T) {
	t.Parallel()
	for _, full := range []string{"A", "B"} {
		w := newPair(t)
		w.protect()
		for _, s := range []*side{w.a, w.b} {
			s.kill()
			s.full = s.name == full
			s.start()
		}
		image := filepath.Join(w.a.dir, "..", "db.raw")
		must(t, os.WriteFile(image, make([]byte, diskSize), 0o600))
		_, err := w.a.hyper.Define(t.Context(), domainDoc("db", "deadbeef-0000-4000-8000-0000000000bb", image))
		must(t, err)
		err = w.a.do(func(ctx context.Context, m *Manager, _ *VM) error {
			_, err := m.Enable(ctx, EnableOptions{Name: "db", Peer: w.b.host, Interval: time.Second, Request: "enable"}, nil)
			return err
		})
		if err == nil || !strings.Contains(err.Error(), full+" holds 1 VM,") {
			t.Fatalf("%s is full: %v", full, err)
		}
		if len(w.a.manager().All()) != 1 || len(w.b.manager().All()) != 1 {
			t.Fatal("something was left behind")
		}
		w.rest()
	}
}

// A dead host swallows the question; a person who is sure does not wait long,
// and not three times.
func TestAForcedFailoverDoesNotWaitForADeadPrimary(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	ask := func(force bool) time.Duration {
		t.Helper()
		w.inject("B/Status", hangs)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if !force {
			time.AfterFunc(100*time.Millisecond, cancel)
		}
		l, err := w.b.vm().Loss(ctx, "", force)
		must(t, err)
		if l.Primary.Result != wire.Unknown {
			t.Fatalf("%+v", l.Primary)
		}
		return time.Duration(w.waited.Load())
	}
	if d := ask(false); d > peerTimeout || d < peerTimeout/2 {
		t.Errorf("without force it would wait %v", d)
	}
	w.b.vm().facts.unanswered = time.Time{}
	if d := ask(true); d > forcedAsk {
		t.Errorf("with force it would wait %v", d)
	}
	if d := ask(true); d > repeatedAsk {
		t.Errorf("the second time it would wait %v", d)
	}
}

// The line stood still in the middle of an epoch when the old primary was given
// up: what that epoch holds was changed there, too.
func TestAReleaseNamesTheBlocksOfAnEpochUnderWay(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	w.inject("A/PutEpoch", hangs)
	w.write(w.a, 1)
	w.until("an epoch to be under way", func() error {
		c, err := w.a.vm().plane()
		if err != nil {
			return err
		}
		if st, err := c.Status(t.Context()); err != nil || st.Frozen == nil {
			return fmt.Errorf("frozen: %+v, %w", st.Frozen, err)
		}
		return nil
	})
	w.a.hyper.halt()
	w.a.hyper.SetState(string(testVM), libvirt.StateOff, libvirt.ReasonNone)
	var reply wire.FailoverReply
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error {
		if _, tracked, why := v.ownChanges(ctx, &reply); !tracked || why != "" {
			return fmt.Errorf("tracked %t, %s", tracked, why)
		}
		return nil
	}))
	if len(reply.Dirty["vda"]) == 0 {
		t.Fatal("the blocks of the frozen epoch are not named")
	}
}
