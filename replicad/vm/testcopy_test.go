package vm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/nbd"
	"kvmreplica/replicad/isolate"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/testcopy"
	"kvmreplica/replicad/wire"
)

// copyHost is a side's hypervisor for test copies: a copy's guest reads the
// counter when it runs first, and writes beside it.
type copyHost struct {
	*guestHost
	run string

	mu     sync.Mutex
	guests map[string]*nbd.Client // guarded by mu
	found  map[string]uint64      // guarded by mu; what each guest read
}

func (h *copyHost) Start(ctx context.Context, id string, o libvirt.StartOptions) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, err := nbd.Dial(ctx, "unix", filepath.Join(h.run, "vm", id, "nbd.sock"), nbd.ClientOptions{Export: "vda"})
	if err != nil {
		return err
	}
	if err := h.Fake.Start(ctx, id, o); err != nil {
		return errors.Join(err, c.Close())
	}
	h.guests[id] = c
	return nil
}

func (h *copyHost) Resume(ctx context.Context, id string) error {
	if err := h.Fake.Resume(ctx, id); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	var b [512]byte
	if _, err := h.guests[id].ReadAt(b[:], 0); err != nil {
		return err
	}
	h.found[id] = binary.LittleEndian.Uint64(b[:])
	return nil
}

func (h *copyHost) Destroy(ctx context.Context, id string, graceful bool) error {
	err := h.Fake.Destroy(ctx, id, graceful)
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.guests[id]; c != nil {
		_ = c.Close() // the end of the QEMU process
		delete(h.guests, id)
	}
	return err
}

// copies is the test copies of one side.
type copies struct {
	t    *testing.T
	s    *side
	hyp  *copyHost
	boot string
	dead *atomic.Bool
	// leak is what isolate.Prove finds; failpoint is the plans'.
	leak      atomic.Pointer[error]
	failpoint func(string)
	quota     int64

	m    *testcopy.Manager
	stop func()
}

func newCopies(t *testing.T, s *side) *copies {
	t.Helper()
	c := &copies{t: t, s: s, boot: "one", hyp: &copyHost{guestHost: s.hyper, run: filepath.Join(s.dir, "run"), guests: map[string]*nbd.Client{}, found: map[string]uint64{}}}
	c.start()
	t.Cleanup(func() { c.kill() })
	return c
}

// start opens a manager of copies on what the directories hold.
func (c *copies) start() {
	c.t.Helper()
	base, err := fsx.OS(filepath.Join(c.s.dir, "state"))
	if err != nil {
		c.t.Fatal(err)
	}
	c.dead = new(atomic.Bool)
	mortal := &mortalFS{FS: base, dead: c.dead, refuse: new(atomic.Pointer[func(string) error])}
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("VM_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	c.m, err = testcopy.Open(mortal, testcopy.Deps{
		StateDir: filepath.Join(c.s.dir, "state"), RunDir: filepath.Join(c.s.dir, "run"), BootID: c.boot, Hyper: c.hyp, Quota: c.quota,
		Find: func(id wire.VMID) (testcopy.Subject, bool) {
			for { // both are one daemon: neither lives without the other
				if m := c.s.manager(); m != nil {
					v, ok := m.Find(id)
					return v, ok
				}
				runtime.Gosched()
			}
		},
		Named: func(string) (testcopy.Subject, bool) { return nil, false },
		Prove: func([]isolate.Bridge) error {
			if e := c.leak.Load(); e != nil {
				return *e
			}
			return nil
		},
		Now: time.Now, Log: log,
		Failpoint: func(p string) {
			if c.failpoint != nil {
				c.failpoint(p)
			}
		},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	m := c.m
	go func() { defer close(done); _ = m.Run(ctx) }() // a dead daemon's end is full of errors
	c.stop = func() { cancel(); <-done }
}

// kill ends the daemon without a goodbye.
func (c *copies) kill() {
	c.dead.Store(true)
	c.stop()
}

// restart is the daemon's: its VMs are there before its copies are served.
func (c *copies) restart() {
	c.t.Helper()
	c.kill()
	c.s.restart()
	c.start()
}

func (c *copies) test(o testcopy.Options) (testcopy.Copy, error) {
	return c.m.Start(c.t.Context(), c.s.vm(), o, nil)
}

func (c *copies) must(o testcopy.Options) testcopy.Copy {
	c.t.Helper()
	r, err := c.test(o)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// left says what of any copy is still there.
func (c *copies) left() error {
	if tests, _ := c.m.Show(testVM); len(tests) > 0 {
		return fmt.Errorf("copies: %+v", tests)
	}
	ctx := context.Background()
	list, err := c.hyp.List(ctx)
	if err != nil {
		return err
	}
	for _, d := range list {
		if d.UUID != string(testVM) {
			return fmt.Errorf("domain %s", d.Name)
		}
	}
	nets, err := c.hyp.Networks(ctx)
	if err != nil {
		return err
	}
	for _, n := range nets {
		if n != "lan" {
			return fmt.Errorf("network %s", n)
		}
	}
	for _, dir := range []string{"state/tests", "run/vm"} {
		entries, err := os.ReadDir(filepath.Join(c.s.dir, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if e.Name() != "ended.json" && e.Name() != string(testVM) {
				return fmt.Errorf("%s in %s", e.Name(), dir)
			}
		}
	}
	st, err := c.s.vm().store()
	if err != nil {
		return err
	}
	for _, p := range st.Points() {
		if p.Pinned {
			return fmt.Errorf("point %d is pinned", p.Ordinal)
		}
	}
	if n := st.Status().Views; n > 0 {
		return fmt.Errorf("%d views are open", n)
	}
	return nil
}

func (c *copies) found(id string) uint64 {
	c.hyp.mu.Lock()
	defer c.hyp.mu.Unlock()
	return c.hyp.found[id]
}

func (c *copies) guest(id string) *nbd.Client {
	c.hyp.mu.Lock()
	defer c.hyp.mu.Unlock()
	return c.hyp.guests[id]
}

// tested is a pair with a complete copy on B, where copies are made.
func tested(t *testing.T) (*pair, *copies) {
	t.Helper()
	w := newPair(t)
	w.protect()
	w.sync()
	return w, newCopies(t, w.b)
}

// sync waits until everything that A's guest wrote is committed on B.
func (w *pair) sync() {
	w.t.Helper()
	w.rest()
	if err := w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.SyncNow(ctx) }); err != nil {
		w.t.Fatal(err)
	}
}

func TestACopyOfAPointStaysAsItIsWhileReplicationGoesOn(t *testing.T) {
	w, c := tested(t)
	at := w.counter.Load()
	one := c.must(testcopy.Options{Request: "one"})
	if got := c.found(one.UUID); got != at {
		t.Fatalf("the copy found %d, %d was committed", got, at)
	}
	w.write(w.a, 20)
	w.sync()
	if _, err := c.guest(one.UUID).WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	two := c.must(testcopy.Options{Point: fmt.Sprintf("%v/%d", one.At.Generation, one.At.Epoch), Request: "two"})
	if got := c.found(two.UUID); got != at {
		t.Errorf("a copy of the old point found %d, not %d", got, at)
	}
	three := c.must(testcopy.Options{Request: "three"})
	if got := c.found(three.UUID); got != w.counter.Load() {
		t.Errorf("a copy of the newest state found %d, not %d", got, w.counter.Load())
	}
	if one.Name != "web-test" || two.Name != "web-test-2" || one.UUID == two.UUID || one.NICs[0].MAC == two.NICs[0].MAC {
		t.Errorf("the copies are called %q and %q: %+v %+v", one.Name, two.Name, one, two)
	}
	if ended, err := c.m.Stop(t.Context(), testVM, "", nil); err != nil || len(ended) != 3 {
		t.Fatalf("ended %v, %v", ended, err)
	}
	if err := c.left(); err != nil {
		t.Error(err)
	}
	if ended, err := c.m.Stop(t.Context(), testVM, "", nil); err != nil || len(ended) != 0 {
		t.Errorf("again: %v, %v", ended, err)
	}
	w.rest()
}

// Pins have owners: a person's unpin leaves a copy its point, and a copy's end
// leaves a person theirs, over restarts of the daemon.
func TestAPersonAndACopyPinTheSamePointForThemselves(t *testing.T) {
	w, c := tested(t)
	one := c.must(testcopy.Options{Request: "one"})
	two := c.must(testcopy.Options{Point: one.At.String(), Request: "two"})
	owners := func(want ...string) {
		t.Helper()
		c.restart()
		w.until("the store to be open", func() error { _, err := w.b.vm().store(); return err })
		st, err := w.b.vm().store()
		must(t, err)
		var got []string
		for _, p := range st.Points() {
			if p.Pos == one.At {
				got = p.Owners
			} else if p.Pinned {
				t.Errorf("point %d is pinned, too", p.Ordinal)
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("the point is pinned by %q, not by %q", got, want)
		}
	}
	pin := func(on bool) (p points.Point) {
		t.Helper()
		must(t, w.b.do(func(ctx context.Context, _ *Manager, v *VM) (err error) {
			p, err = v.PinPoint(ctx, one.At.String(), on)
			return err
		}))
		return p
	}
	end := func(name string) {
		t.Helper()
		_, err := c.m.Stop(t.Context(), testVM, name, nil)
		must(t, err)
	}
	owners("test:"+one.ID, "test:"+two.ID)
	if p := pin(false); !p.Pinned {
		t.Error("a person let go of what the copies need, and is not told that they keep it")
	}
	owners("test:"+one.ID, "test:"+two.ID)
	pin(true)
	owners("", "test:"+one.ID, "test:"+two.ID)
	end(one.ID)
	owners("", "test:"+two.ID)
	end(two.ID)
	owners("")
	if p := pin(false); p.Pinned {
		t.Errorf("it is pinned still, by %q", p.Owners)
	}
	must(t, c.left())
}

func TestACopyKeepsWhatItWroteOverARestartOfTheDaemon(t *testing.T) {
	w, c := tested(t)
	one := c.must(testcopy.Options{Request: "one"})
	b := []byte(strings.Repeat("kept", 128))
	if _, err := c.guest(one.UUID).WriteAt(b, 1<<20); err != nil {
		t.Fatal(err)
	}
	c.restart()
	w.write(w.a, 5)
	w.rest()
	got := make([]byte, len(b))
	w.until("the disk to be served again", func() error {
		g, err := nbd.Dial(t.Context(), "unix", filepath.Join(c.hyp.run, "vm", one.UUID, "nbd.sock"), nbd.ClientOptions{Export: "vda"})
		if err != nil {
			return err
		}
		defer g.Close()
		if _, err := g.ReadAt(got, 1<<20); err != nil || string(got) != string(b) {
			return fmt.Errorf("it reads %.8q, %w", got, err)
		}
		var first [512]byte
		if _, err := g.ReadAt(first[:], 0); err != nil {
			return err
		}
		if n := binary.LittleEndian.Uint64(first[:]); n != c.found(one.UUID) {
			t.Fatalf("it shows %d now, it was %d", n, c.found(one.UUID))
		}
		return nil
	})
	if _, err := c.m.Stop(t.Context(), testVM, one.Name, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.left(); err != nil {
		t.Error(err)
	}
}

// The daemon dies at any point of a start or an end. Afterwards nothing is left
// of the copy, and a new one can be made.
func TestACrashAtAnyPointOfATestLeavesNothing(t *testing.T) {
	w, c := tested(t)
	var passed []string
	c.failpoint = func(p string) { passed = append(passed, p) }
	once := func() error {
		if _, err := c.test(testcopy.Options{Request: "once"}); err != nil {
			return err
		}
		_, err := c.m.Stop(context.Background(), testVM, "", nil)
		return err
	}
	if err := once(); err != nil {
		t.Fatal(err)
	}
	points := slices.Clone(passed)
	if len(points) < 24 {
		t.Fatalf("only %d points: %v", len(points), points)
	}
	t0 := time.Now()
	for _, p := range points {
		crashed := false
		c.failpoint = func(at string) {
			if at == p && !crashed {
				crashed = true
				c.dead.Store(true)
				panic(errCrashed)
			}
		}
		func() {
			defer func() {
				if r := recover(); r != nil && r != errCrashed {
					panic(r)
				}
			}()
			_ = once() // it crashes
		}()
		if !crashed {
			t.Fatalf("%s was not reached", p)
		}
		c.failpoint = nil
		c.dropConnections()
		c.start()
		if p == "test/resume/acted" { // its guest runs, and that is recorded: it stays
			if _, err := c.m.Stop(t.Context(), testVM, "", nil); err != nil {
				t.Fatal(err)
			}
		}
		w.until("nothing to be left after a crash at "+p, c.left)
		t.Log(p, time.Since(t0))
		t0 = time.Now()
	}
	if err := once(); err != nil {
		t.Fatal(err)
	}
	w.rest()
}

// dropConnections is what the death of the daemon does to its guests' disks;
// its own goroutines are ended, too.
func (c *copies) dropConnections() { c.stop() }

func TestACopyThatIsNotIsolatedDoesNotRunAndOneThatLeaksIsDestroyed(t *testing.T) {
	w, c := tested(t)
	leak := error(&isolate.LeakError{Bridge: "krt", What: []string{"eth0 is plugged into it"}})
	c.leak.Store(&leak)
	if _, err := c.test(testcopy.Options{Request: "one"}); err == nil || !strings.Contains(err.Error(), "eth0") {
		t.Fatalf("it started: %v", err)
	}
	if err := c.left(); err != nil {
		t.Error(err)
	}
	for _, call := range c.hyp.Calls() {
		if call.Op == "Resume" {
			t.Error("its guest was let run")
		}
	}
	c.leak.Store(nil)
	c.must(testcopy.Options{Request: "two"})
	c.leak.Store(&leak)
	w.until("the copy to be destroyed", c.left)
	if _, last := c.m.Show(testVM); last == nil || !strings.Contains(last.Reason, "eth0") || !last.Ran {
		t.Errorf("it is not remembered why: %+v", last)
	}
}

func TestACopyThatLostItsGroundIsTakenAway(t *testing.T) {
	for name, lose := range map[string]func(w *pair, c *copies, r testcopy.Copy){
		"the host was restarted": func(_ *pair, c *copies, r testcopy.Copy) {
			c.kill()
			_ = c.hyp.Destroy(context.Background(), r.UUID, false)
			_ = c.hyp.DestroyNetwork(context.Background(), r.NICs[0].Network)
			c.boot = "two"
			c.start()
		},
		"somebody removed its domain": func(_ *pair, c *copies, r testcopy.Copy) {
			_ = c.hyp.Destroy(context.Background(), r.UUID, false)
			_ = c.hyp.Undefine(context.Background(), r.UUID, libvirt.UndefineOptions{})
		},
		"its recovery points have ended": func(w *pair, _ *copies, _ testcopy.Copy) {
			if err := w.a.do(planned); err != nil {
				w.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, c := tested(t)
			r := c.must(testcopy.Options{Request: "one"})
			lose(w, c, r)
			w.until("the copy to be gone", func() error {
				if tests, _ := c.m.Show(testVM); len(tests) > 0 {
					return fmt.Errorf("%+v", tests)
				}
				return nil
			})
			if _, last := c.m.Show(testVM); last == nil || !strings.Contains(last.Reason, name) {
				t.Errorf("the reason is %+v", last)
			}
		})
	}
}

func TestACopyThatWroteItsQuotaIsStoppedAndNothingElseIs(t *testing.T) {
	w, c := tested(t)
	r := c.must(testcopy.Options{Request: "one", Quota: 1 << 20})
	g := c.guest(r.UUID)
	b := make([]byte, 256<<10)
	for i := range b {
		b[i] = byte(i) | 1
	}
	var err error
	for off := int64(0); off < 2<<20 && err == nil; off += int64(len(b)) {
		_, err = g.WriteAt(b, off)
	}
	if !errors.Is(err, nbd.ENOSPC) {
		t.Fatalf("the guest's disk says %v", err)
	}
	c.hyp.SetState(r.UUID, libvirt.StatePaused, libvirt.ReasonIOError)
	w.until("the trouble to be shown", func() error {
		if tests, _ := c.m.Show(testVM); len(tests) != 1 || !strings.Contains(tests[0].Trouble, "quota") {
			return fmt.Errorf("%+v", tests)
		}
		return nil
	})
	w.write(w.a, 3)
	w.rest()
	if _, err := c.m.Stop(t.Context(), testVM, r.ID, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.left(); err != nil {
		t.Error(err)
	}
}

func TestATestIsRefusedWhereItCannotBeMade(t *testing.T) {
	w, c := tested(t)
	for name, o := range map[string]testcopy.Options{
		"no such recovery":    {Point: "4711"},
		"no network":          {Network: "nowhere"},
		"either isolated or":  {Network: "lan", Isolated: true},
		"cannot be a domain":  {Name: "../x"},
		"called \"web\" alre": {Name: "web"},
		"quota":               {Quota: 17},
		"not name a recovery": {Point: "yesterday"},
	} {
		_, err := c.test(o)
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.m.Start(t.Context(), w.a.vm(), testcopy.Options{}, nil); err == nil || !strings.Contains(err.Error(), "holds no recovery points") {
		t.Errorf("on the primary: %v", err)
	}
	if err := c.left(); err != nil {
		t.Error(err)
	}
}
