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

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/testcopy"
	"kvmreplica/replicad/wire"
)

// wideSize is a second disk that joins in two slices; the first is sliceOne.
const (
	wideSize = 80<<20 + 512
	sliceOne = 64 << 20
)

// half is a pair whose replica has the first slice of a second disk: replication
// is paused and the link is whole.
func half(t *testing.T) *pair {
	t.Helper()
	w := newPair(t)
	image := w.attach()
	content := make([]byte, wideSize)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content) // never fails
	must(t, os.WriteFile(image, content, 0o600))
	w.protectVda()
	w.shipped(w.b)
	w.onCommit(func() {
		if w.has(w.b) > 0 {
			w.a.silent.Store(true)
		}
	})
	must(t, w.a.do(setDisk(false)))
	w.until("the first slice", func() error {
		if !w.a.silent.Load() {
			return errors.New("it is not there")
		}
		return nil
	})
	w.onCommit(nil)
	must(t, w.a.do(pausing))
	w.a.silent.Store(false)
	w.carried.Store(0)
	if n := w.has(w.b); n != sliceOne || w.a.second() != "joining" || w.b.second() != "joining" {
		t.Fatalf("B has %d bytes of the disk, which is %s on A and %s on B", n, w.a.second(), w.b.second())
	}
	return w
}

func pausing(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }

func resuming(_ context.Context, _ *Manager, v *VM) error { return v.Resume() }

// has is how much of the second disk the newest state on s has.
func (w *pair) has(s *side) int64 {
	st, err := s.vm().store()
	if err != nil {
		return 0
	}
	for _, d := range st.Disks() {
		if d.Name == "vdb" {
			return d.Size
		}
	}
	return 0
}

// whole resumes, waits until the second disk is a member and holds the replica
// against what A's guest reads.
func (w *pair) whole() {
	w.t.Helper()
	w.until("replication to go on", func() error { return w.a.do(resuming) })
	w.write(w.a, 3)
	w.secondIs("member", "member")
	w.shipped(w.b)
	w.alike()
}

// alike holds the second disk on B against A's.
func (w *pair) alike() {
	w.t.Helper()
	want, got := make([]byte, wideSize), make([]byte, wideSize)
	c := w.nbd("nbd+unix:///vdb?socket="+w.a.socket(), true)
	_, err := c.ReadAt(want, 0)
	must(w.t, errors.Join(err, c.Close()))
	st, err := w.b.vm().store()
	must(w.t, err)
	v, err := st.View(st.Committed())
	must(w.t, err)
	d, err := v.Disk("vdb")
	if err == nil {
		_, err = d.ReadAt(got, 0)
	}
	must(w.t, errors.Join(err, v.Close()))
	if !bytes.Equal(got, want) {
		w.t.Error("the replica's second disk differs")
	}
}

// scribble writes over a part of the second disk in each slice.
func (w *pair) scribble(mark string) {
	w.t.Helper()
	c := w.nbd("nbd+unix:///vdb?socket="+w.a.socket(), false)
	b := bytes.Repeat([]byte(mark), 4096/len(mark))
	_, one := c.WriteAt(b, 5<<20)
	_, two := c.WriteAt(b, 70<<20)
	must(w.t, errors.Join(one, two, c.Sync(), c.Close()))
}

// A comparison of everything while a disk joins reads what the replica has of it,
// and the disk goes on from there: nothing that is equal is sent again.
func TestAComparisonOfEverythingWhileADiskJoinsLosesNothing(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]ResyncOptions{
		"no cut meanwhile": {Request: "now"}, "between the cuts": {Background: true, Rate: 1 << 30, Request: "behind"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := half(t)
			w.scribble("mark")
			must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.Resync(ctx, o) }))
			w.whole()
			if sent := w.carried.Load(); sent > wideSize-sliceOne+(4<<20) {
				t.Errorf("%d bytes were sent for the %d that were missing", sent, wideSize-sliceOne)
			}
		})
	}
}

// An upgrade of the data plane while a disk joins, between two slices and within
// one: the disk goes on from what the replica has.
func TestAnUpgradeWhileADiskJoinsGoesOnFromWhatTheReplicaHas(t *testing.T) {
	t.Parallel()
	upgrade := func(ctx context.Context, _ *Manager, v *VM) error {
		u, err := v.Upgrade(ctx, false, true)
		if err == nil && !u.Done {
			err = fmt.Errorf("it was not upgraded: %+v", u)
		}
		return err
	}
	w := half(t)
	w.scribble("mark")
	must(t, w.a.do(upgrade))
	w.scribble("more")
	w.inject("A/PutEpoch", lostRequest) // the epoch is held meanwhile
	must(t, w.a.do(resuming))
	w.until("a slice to be held", func() error {
		c, err := w.a.vm().plane()
		if err != nil {
			return err
		}
		st, err := c.Status(t.Context())
		if err == nil && st.Frozen == nil {
			err = errors.New("none is")
		}
		return err
	})
	must(t, w.a.do(upgrade))
	w.whole()
	if sent := w.carried.Load(); sent > 2*(wideSize-sliceOne)+(4<<20) {
		t.Errorf("%d bytes were sent for the %d that were missing", sent, wideSize-sliceOne)
	}
}

// Whatever dies while a disk joins: a failover is refused with a clear word until
// the disk is whole, which it becomes by itself, and no point has a part of it.
func TestADeathWhileADiskJoinsLeavesNothingThatLies(t *testing.T) {
	t.Parallel()
	for name, die := range map[string]func(w *pair){
		"A's daemon":     func(w *pair) { w.a.restart() },
		"B's daemon":     func(w *pair) { w.b.restart() },
		"A's data plane": func(w *pair) { w.a.kill(); w.a.stopPlane(); w.a.start() },
		"host A":         func(w *pair) { w.a.reboot() },
		"host B":         func(w *pair) { w.b.reboot() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := half(t)
			w.scribble("mark")
			die(w)
			w.until("both to serve", func() error {
				if w.a.vm().session() == nil {
					return errors.New("A does not ship")
				}
				_, err := w.b.vm().store()
				return err
			})
			var err error
			w.until("no other operation", func() error { // A is coming up
				if err = w.a.do(planned); err != nil && strings.Contains(err.Error(), "another operation") {
					return err
				}
				return nil
			})
			if !kindIs(err, wire.KindRefused) || !strings.Contains(err.Error(), "still being added") {
				t.Errorf("a planned failover: %v", err)
			}
			if names, _ := w.mounted(w.b, "latest"); names != "vda" {
				t.Errorf("the newest state shows the disks %s", names)
			}
			if !w.a.hyper.runs() {
				w.until("the guest to run", func() error {
					return w.a.do(func(ctx context.Context, _ *Manager, v *VM) error {
						if w.a.hyper.runs() {
							return nil
						}
						return v.StartGuest(ctx, StartOptions{})
					})
				})
			}
			w.whole()
		})
	}
}

// A test copy and an unplanned failover while a disk joins go without it, and say
// so first; cancelled, the disk goes on joining.
func TestFailoversWhileADiskJoinsGoWithoutItAndSaySo(t *testing.T) {
	t.Parallel()
	w := half(t)
	c := newCopies(t, w.b)
	one := c.must(testcopy.Options{Request: "one"})
	if doc, err := c.hyp.XML(t.Context(), one.UUID, 0); err == nil && strings.Contains(string(doc), "vdb") {
		t.Errorf("the copy has a disk that is not there:\n%s", doc)
	}
	if _, err := c.m.Stop(t.Context(), testVM, "", nil); err != nil {
		t.Fatal(err)
	}
	w.powerCutA()
	l, err := w.b.vm().Loss(t.Context(), "latest", true)
	if err != nil || len(l.Without) != 1 || l.Without[0] != "vdb" {
		t.Errorf("it was not said that the disk will be missing: %v %v", l.Without, err)
	}
	must(t, w.b.do(failoverTo("latest", UnplannedOptions{})))
	if k := w.b.on(); k.Target != "" {
		t.Errorf("the domain has %+v", k)
	}
	w.write(w.b, 3)
	must(t, w.b.do(cancel))
	w.a.start()
	w.until("the guest to run on A", func() error {
		if w.a.hyper.runs() {
			return nil
		}
		return w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) })
	})
	w.forced.Store(false)
	w.whole()
}

// A failover in place while a disk joins has no part of it.
func TestAFailoverInPlaceWhileADiskJoinsGoesWithoutIt(t *testing.T) {
	t.Parallel()
	w := half(t)
	w.powerCutA()
	must(t, w.b.do(failoverTo("latest", UnplannedOptions{InPlace: true})))
	w.without()
}

// without checks that B serves the VM without the second disk.
func (w *pair) without() {
	w.t.Helper()
	if k := w.b.on(); k.Target != "" || w.b.second() != "out" {
		w.t.Errorf("the domain has %+v, the record %s", k, w.b.second())
	}
	c, err := w.b.vm().plane()
	must(w.t, err)
	st, err := c.Status(w.t.Context())
	must(w.t, err)
	for _, d := range st.Disks {
		if d.Name == "vdb" {
			w.t.Errorf("the data plane serves %+v", d)
		}
	}
	w.write(w.b, 3)
}

// recoverOffline does what replicafsck recover --in-place does on B, whose daemon
// does not run, and starts that.
func (w *pair) recoverOffline(at delta.Pos) {
	w.t.Helper()
	r := w.b.vm().record()
	w.b.kill()
	dir := &points.Dir{Path: filepath.Join(w.b.dir, "state", "vms", string(testVM), "store"), Images: map[string]string{}}
	for _, d := range r.Disks {
		dir.Images[string(d.Name)] = d.Path
	}
	var cfg points.Config
	must(w.t, dir.Configure(&cfg))
	s, err := points.Open(cfg)
	must(w.t, err)
	must(w.t, s.ApplyAll(w.t.Context()))
	if at.IsZero() {
		at = s.Committed()
	}
	_, err = s.PromoteAt(w.t.Context(), at, delta.Generation{9})
	must(w.t, errors.Join(err, s.Close()))
	w.b.start()
	w.until("B to own the VM", func() error {
		if !w.b.vm().record().Lineage.MayServe() || w.b.planOpen() {
			return errors.New("it does not")
		}
		return w.b.do(func(ctx context.Context, _ *Manager, v *VM) error {
			if w.b.hyper.runs() {
				return nil
			}
			return v.StartGuest(ctx, StartOptions{Force: true})
		})
	})
}

// A replica that was recovered offline has the disks of the state it was
// recovered to: not one that was added later, nor a part of one.
func TestAReplicaRecoveredOfflineHasTheDisksOfItsState(t *testing.T) {
	t.Parallel()
	t.Run("while one joins", func(t *testing.T) {
		t.Parallel()
		w := half(t)
		w.powerCutA()
		w.recoverOffline(delta.Pos{})
		w.without()
	})
	t.Run("to a point before", func(t *testing.T) {
		t.Parallel()
		w := newPair(t)
		w.protectFirst()
		w.shipped(w.b)
		old, n := w.point()
		must(t, w.a.do(setDisk(false)))
		w.secondIs("member", "member")
		w.holds(w.b, "old!")
		w.powerCutA()
		w.counter.Store(n)
		w.recoverOffline(old)
		w.without()
	})
	t.Run("to a point while it joined", func(t *testing.T) {
		t.Parallel()
		w := half(t)
		part := w.pin()
		w.whole()
		w.powerCutA()
		w.recoverOffline(part.Pos)
		w.without()
	})
}
