package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/internal/breakglass"
	"kvmreplica/replicad/health"

	"kvmreplica/libvirt"

	"kvmreplica/libvirt/libvirttest"
	"kvmreplica/nbd"
	"kvmreplica/replicad/wire"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/status"
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

// A cycle that is asked for while nothing may be shipped, or cannot be, is
// refused with its reason; the asker does not wait for ever.
func TestACycleThatCannotBeIsRefused(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.shipped(w.b)
	syncNow := func(ctx context.Context, _ *Manager, v *VM) error { return v.SyncNow(ctx) }
	refused := func(word string) {
		t.Helper()
		if err := w.a.do(syncNow); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("want %q: %v", word, err)
		}
	}
	must(t, w.a.do(pausing))
	refused("paused")
	must(t, w.a.do(resuming))
	must(t, w.a.do(syncNow))
	w.a.silent.Store(true)
	refused("tried again by itself")
	w.a.silent.Store(false)
	must(t, w.a.do(syncNow))
}

func TestAScheduledInitialCopyBeginsInItsTimeAlsoAfterARestart(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	var ahead atomic.Int64 // how far the clock of A was moved
	w.a.kill()
	w.a.now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	w.a.start()
	enable := func(in time.Duration) error {
		return w.a.do(func(ctx context.Context, m *Manager, _ *VM) error {
			_, err := m.Enable(ctx, EnableOptions{Name: "web", Peer: w.b.host, Interval: 20 * time.Millisecond, StartAt: w.a.now().Add(in), Request: "enable"}, nil)
			return err
		})
	}
	for _, in := range []time.Duration{-time.Second, MaxStartDelay + time.Minute} {
		if err := enable(in); err == nil || !strings.Contains(err.Error(), "seven days") {
			t.Fatalf("in %v: %v", in, err)
		}
	}
	must(t, enable(8*time.Hour))
	scheduled := func() error {
		st := w.a.vm().Status(t.Context(), "B")
		if st.State != status.Seeding || !strings.Contains(st.Reason, "initial copy begins at") {
			return fmt.Errorf("%s: %s", st.State, st.Reason)
		}
		return nil
	}
	w.until("it to say so", scheduled)
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }))
	w.write(w.a, 3)
	w.a.restart()
	w.until("it to say so after a restart", scheduled)
	if err := w.copied(w.a, w.b); err == nil {
		t.Fatal("copied before its time")
	}
	ahead.Store(int64(8*time.Hour + time.Second))
	w.rest()
	if at := w.a.vm().record().StartAt; !at.IsZero() {
		t.Fatalf("still scheduled for %v", at)
	}
}

func TestExistingImagesAreComparedAndOnlyWhatDiffersIsSent(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	content := make([]byte, diskSize)
	_, _ = rand.NewChaCha8([32]byte{9}).Read(content)
	must(t, os.WriteFile(filepath.Join(w.a.dir, "..", "web.raw"), content, 0o600))
	dir := filepath.Join(w.b.root, string(testVM))
	enable := func() error {
		return w.a.do(func(ctx context.Context, m *Manager, _ *VM) error {
			_, err := m.Enable(ctx, EnableOptions{Name: "web", Peer: w.b.host, Interval: 20 * time.Millisecond, Existing: true, Request: "enable"}, nil)
			return err
		})
	}
	image := filepath.Join(dir, "existing", "vda.raw")
	refused := func(why string) {
		t.Helper()
		var we *wire.Error
		if err := enable(); !errors.As(err, &we) || !strings.Contains(we.Hint, image) {
			t.Fatalf("%s: %v", why, err)
		}
		if len(w.a.manager().All())+len(w.b.manager().All()) != 0 {
			t.Fatalf("%s: something was left behind", why)
		}
	}
	refused("nothing lies ready")
	must(t, os.MkdirAll(filepath.Dir(image), 0o700))
	must(t, os.WriteFile(image, content[:diskSize-4096], 0o600))
	refused("too short")
	must(t, os.Remove(image))
	must(t, os.Symlink("/etc/passwd", image))
	refused("a link")
	must(t, os.Remove(image))
	old := bytes.Clone(content)
	copy(old[1<<20:], make([]byte, 64<<10)) // what differs
	must(t, os.WriteFile(image, old, 0o600))

	// The definition fails on B after the images were taken over: they are given back.
	w.b.hyper.On(libvirttest.Rule{Op: "Define", Err: errors.New("no")})
	if err := enable(); err == nil {
		t.Fatal("defined")
	}
	w.b.hyper.Clear()
	if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, old) {
		t.Fatalf("not given back: %v", err)
	}

	must(t, enable())
	w.b.restart() // somewhere in the comparison
	w.until("a complete copy", func() error { return w.copied(w.a, w.b) })
	st := w.a.vm().session().Status().Stats
	if st.SentBytes > 512<<10 {
		t.Fatalf("%d bytes were sent for 64 KiB that differ", st.SentBytes)
	}
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }))
	w.write(w.a, 3)
	w.rest()
	if w.b.vm().record().Existing {
		t.Fatal("it still counts as given")
	}
	must(t, w.a.do(planned))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	got := make([]byte, diskSize)
	c, err := nbd.Dial(t.Context(), "unix", w.b.socket(), nbd.ClientOptions{Export: "vda", ReadOnly: true})
	if err != nil {
		t.Log("a second client is refused:", err)
		got, err = os.ReadFile(filepath.Join(dir, "vda.raw"))
		must(t, err)
	} else {
		_, err = c.ReadAt(got, 0)
		must(t, errors.Join(err, c.Close()))
	}
	// The guest writes its counter to the first 256 KiB only.
	if !bytes.Equal(got[256<<10:], content[256<<10:]) {
		t.Fatal("the replica does not hold what the primary had")
	}
}

// The state directory's disk ate the tracker: the guest must run all the same,
// and what is not known any more is compared, never taken for equal.
func TestALostTrackerIsReplacedAndEverythingCompared(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(dir string) error{
		"cut short": func(dir string) error { return os.Truncate(filepath.Join(dir, "super"), 100) },
		"gone":      os.RemoveAll,
	} {
		w := newPair(t)
		w.protect()
		w.rest()
		rounds := 1
		if name == "cut short" {
			rounds = 2 // also above the epochs of the first replacement
		}
		for round := range rounds {
			w.a.kill()
			w.a.hyper.halt()
			w.a.hyper.SetState(string(testVM), libvirt.StateOff, libvirt.ReasonNone)
			w.a.stopPlane()
			// Written without anybody's knowledge.
			f, err := os.OpenFile(filepath.Join(w.a.dir, "..", "web.raw"), os.O_RDWR, 0)
			must(t, err)
			_, err = f.WriteAt([]byte{1, 2, 3, byte(round)}, 3<<20)
			must(t, errors.Join(err, f.Close()))
			must(t, os.RemoveAll(filepath.Join(w.a.dir, "run")))
			must(t, lose(filepath.Join(w.a.dir, "state", "vms", string(testVM), "track", "tracker")))
			w.a.start()
			w.until("the guest to run again", func() error {
				if !w.a.hyper.runs() {
					return errors.New("off")
				}
				return nil
			})
			if o := w.rest(); o != w.a {
				t.Fatalf("%s: A does not own the VM", name)
			}
			w.until("an epoch above all that were used", func() error {
				if e := w.a.vm().session().Status().Committed.Epoch; e <= uint64(round+1)*lostStep {
					return fmt.Errorf("%s: epoch %d", name, e)
				}
				return nil
			})
			if st := w.a.vm().session().Status(); st.Stats.SentBytes > 256<<10 {
				t.Fatalf("%s: %d bytes were sent", name, st.Stats.SentBytes)
			}
		}
		must(t, w.a.do(planned))
		if o := w.rest(); o != w.b {
			t.Fatalf("%s: B does not own the VM", name)
		}
		image, err := os.ReadFile(filepath.Join(w.b.root, string(testVM), "vda.raw"))
		must(t, err)
		if !bytes.Equal(image[3<<20:3<<20+4], []byte{1, 2, 3, byte(rounds - 1)}) {
			t.Fatalf("%s: the replica missed a change: %x", name, image[3<<20:3<<20+4])
		}
	}
}

func TestStatisticsSurviveARestartAndAResetHidesNoFault(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	before, err := w.a.vm().Statistics()
	must(t, err)
	if before.Window.Cycles == 0 || before.Name != "web" {
		t.Fatalf("%+v", before)
	}
	w.a.restart() // killed: what was not kept yet is missing
	w.rest()
	after, err := w.a.vm().Statistics()
	must(t, err)
	if after.Window.Cycles == 0 || !after.Window.From.Equal(before.Window.From) {
		t.Fatalf("before %+v, after %+v", before.Window, after.Window)
	}
	w.b.silent.Store(true)
	w.until("the fault to be seen", func() error {
		w.write(w.a, 1)
		if st := w.a.vm().Status(t.Context(), "B"); st.Health == health.Normal {
			return errors.New("normal")
		}
		return nil
	})
	must(t, w.a.vm().ResetStatistics())
	if m, err := w.a.vm().Statistics(); err != nil || m.Window.Cycles != 0 {
		t.Fatalf("%+v, %v", m, err)
	}
	if st := w.a.vm().Status(t.Context(), "B"); st.Health == health.Normal {
		t.Fatal("the reset hid a fault")
	}
	w.b.silent.Store(false)
}

// A guest that was shut down stays off when the daemon is restarted, also when
// the VM was protected after the host's boot: no boot is to be decided for it.
func TestARestartOfTheDaemonStartsNoGuest(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	for _, s := range []*side{w.a, w.b} {
		if _, err := os.Stat(s.vm().bootNote()); err != nil {
			t.Errorf("%s takes its next start for a boot of the host: %v", s.name, err)
		}
	}
	w.a.kill()
	if err := w.a.hyper.Destroy(t.Context(), string(testVM), false); err != nil {
		t.Fatal(err)
	}
	w.a.start()
	w.until("the guest may be started by hand", w.a.hook)
	w.until("replication goes on", func() error { return w.copied(w.a, w.b) })
	if w.a.hyper.runs() {
		t.Fatal("the guest was started")
	}
}

// While somebody else has the VM an interrupted plan is not settled: its role
// brought up then would serve disks that the plan had closed for good.
func TestNoRoleIsBroughtUpBeforeAnInterruptedPlanIsSettled(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	unlock, err := v.lock("test")
	must(t, err)
	err = v.settle(t.Context())
	unlock()
	if !busy(err) {
		t.Fatalf("settle says %v while somebody else has the VM", err)
	}
	must(t, v.settle(t.Context()))
}

// A mark of a release that cannot be read for a while does not end protection
// until the next start; one that stays unreadable does.
func TestAMarkThatCannotBeReadForAWhileEndsNothing(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	w.a.mu.Lock()
	disk := w.a.fs
	w.a.mu.Unlock()

	disk.unreadable.Store(breakglass.File)
	for range unreadLooks / 4 {
		if !v.noticeRelease() {
			t.Fatal("what cannot be read passes for not released")
		}
	}
	if v.outOfHands() {
		t.Fatal("protection ended")
	}
	disk.unreadable.Store("")
	if v.noticeRelease() {
		t.Fatal("there is no mark, and the VM is left alone all the same")
	}
	w.write(w.a, 3)
	w.until("replication goes on", func() error { return w.copied(w.a, w.b) })

	disk.unreadable.Store(breakglass.File)
	for range unreadLooks {
		v.noticeRelease()
	}
	if !v.outOfHands() {
		t.Fatal("a mark that stays unreadable counts for nothing")
	}
}

// A guest that a person shuts down stays off after the next boot. One that was
// ended because its host goes down is started then, although the daemon saw its
// end; and if the host stays up after all, it was a shutdown like any other.
func TestAGuestThatEndsWithItsHostIsStartedWithIt(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	w.a.stops.Store(true)
	v.look(t.Context())
	w.a.hyper.SetState(string(v.id), libvirt.StateOff, libvirt.ReasonShutdown)
	for range 3 {
		v.look(t.Context())
	}
	if !v.record().WantRunning {
		t.Fatal("the end of a guest whose host goes down is taken for a person's wish")
	}
	w.a.stops.Store(false)
	v.look(t.Context())
	if v.record().WantRunning {
		t.Fatal("a guest that was shut down would be started by the next boot")
	}
}

// bypassed is what the status would say of writes past the tracker.
func (v *VM) bypassed() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.bypass()
}
