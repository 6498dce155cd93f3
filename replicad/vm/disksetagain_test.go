package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// A disk taken out while it joins and added again with another size, before the
// replica saw an epoch between, must become whole on both hosts.
func TestADiskAddedAgainWithAnotherSizeWhileItJoinedBecomesWhole(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	image := w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("joining", "joining")
	must(t, w.a.do(setDisk(true)))
	must(t, os.WriteFile(image, bytes.Repeat([]byte("big!"), 2<<20), 0o600))
	must(t, w.a.do(setDisk(false)))
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Resume() }))
	w.write(w.a, 3)
	w.secondIs("member", "member")
}

// Taken out and added again, changed meanwhile, with no epoch between.
func TestADiskRemovedChangedAndAddedAgainHasTheNewContent(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	image := w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(setDisk(false)))
	w.secondIs("member", "member")
	w.holds(w.b, "old!")
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(true)))
	must(t, os.WriteFile(image, bytes.Repeat([]byte("new!"), secondSize/4), 0o600))
	must(t, w.a.do(setDisk(false)))
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Resume() }))
	w.write(w.a, 3)
	w.secondIs("member", "member")
	w.holds(w.b, "new!")
}

// The replica's own record counts, whatever its primary believes.
func TestAReplicaThatLacksADiskDeclinesAPlannedFailover(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("joining", "joining")
	if why := w.b.vm().mayPromote(w.b.vm().keepStore(t).Committed()); !strings.Contains(why, "still being added") {
		t.Fatalf("it would take over without the disk: %q", why)
	}
}

// The primary dies while a disk is being added: the other host goes on without
// it, and the old primary, when it returns, gives the addition up and keeps the
// disk on its own image.
func TestAPrimaryThatDiesWhileItAddsADiskReturnsWithoutIt(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	image := w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("joining", "joining")
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
	must(t, w.b.do(commit))
	w.until("the images to be all there is", w.b.flattened)
	w.a.start()
	w.until("A to go on", func() error {
		err := w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Resume() })
		if w.a.vm().record().Superseded != "" {
			return nil
		}
		return err
	})
	w.until("A to know", w.primaryHeld)
	must(t, w.b.do(reverse))
	w.lossy.Store(false)
	w.shipped(w.a)
	w.forgotten()
	if k := w.a.on(); k.Kind != libvirt.SourceFile || k.Path != image {
		t.Errorf("A's definition has it on %+v", k)
	}
	must(t, w.b.do(planned))
	w.shipped(w.b)
	var e *wire.Error
	if err := w.a.do(setDisk(false)); !errors.As(err, &e) || !strings.Contains(e.Text, "never overwritten") || !strings.Contains(e.Hint, "move it away") {
		t.Errorf("what B has of it would be lost: %v", err) // nobody knows what it is worth
	}
	must(t, os.Remove(filepath.Join(filepath.Dir(w.b.vm().record().Disks[0].Path), "vdb.raw")))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("member", "member")
	w.holds(w.b, "old!")
}

// A planned failover right behind a removal, before any epoch told of it.
func TestAPlannedFailoverBehindARemovalGoesWithoutTheDisk(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(setDisk(false)))
	w.secondIs("member", "member")
	w.holds(w.b, "old!")
	must(t, w.a.do(setDisk(true)))
	w.until("the planned failover", func() error {
		err := w.a.do(planned)
		if err != nil && !kindIs(err, wire.KindConflict) && !kindIs(err, wire.KindUnavailable) {
			w.t.Fatal(err)
		}
		return err
	})
	w.shipped(w.a)
	if k := w.b.on(); k.Target != "" {
		t.Errorf("the domain has %+v", k)
	}
}

// Ending the protection while a disk is being added leaves nothing.
func TestDisableWhileADiskIsBeingAddedLeavesNothing(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	before := w.a.on()
	w.shipped(w.b)
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("joining", "joining")
	must(t, w.a.do(disable(DisableOptions{})))
	if now := w.a.on(); now.Path != before.Path || now.Kind != before.Kind {
		t.Errorf("the disk is on %+v, it was on %+v", now, before)
	}
	must(t, w.b.do(disable(DisableOptions{Delete: true})))
	if left := w.b.images(); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// A primary that offers ever other disks makes the replica's host remember no
// more of them, and make no more files, than a VM may have.
func TestAHostilePrimarysDisksAreBounded(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	o := w.a.vm().offering("hostile")
	refused := false
	for n := range 3 * delta.MaxDisks {
		next := o
		next.Disks = append(slices.Clone(o.Disks), wire.Disk{Name: wire.DiskName(fmt.Sprintf("vd%d", n)), Size: 1 << 20, Format: "raw", Joining: true})
		_, err := w.b.manager().Offer(w.as(w.a.host), next)
		refused = refused || kindIs(err, wire.KindConflict)
		if got := len(w.b.vm().record().Disks); got > delta.MaxDisks {
			t.Fatalf("it remembers %d disks", got)
		}
		if got := len(w.b.images()); got > delta.MaxDisks {
			t.Fatalf("it has made %d files", got)
		}
	}
	if !refused {
		t.Error("nothing was refused") // the watcher forgets some every two seconds
	}
	_, err := w.b.manager().Offer(w.as(w.a.host), o)
	must(t, err)
	w.until("they are forgotten", func() error {
		w.b.vm().look(t.Context())
		if got := w.b.images(); len(got) != 1 {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
}

// While a disk goes under the guest, or away from it, the watcher does not take
// it for one whose writes pass the tracker: everything would be compared.
func TestADiskOnItsWayIsNoBypass(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	w.shipped(w.b)
	seen := 0
	look := func() {
		v := w.a.vm()
		v.look(t.Context())
		if b := v.bypassed(); b != "" {
			t.Errorf("disk %s is said to pass the tracker", b)
		}
		seen++
	}
	w.a.mu.Lock()
	w.a.atPoint = map[string]func(){"add-disk/insert/begun": look, "take-disk/define/begun": look}
	w.a.mu.Unlock()
	must(t, w.a.do(setDisk(false)))
	w.secondIs("member", "member")
	must(t, w.a.do(setDisk(true)))
	if seen != 2 {
		t.Errorf("looked %d times", seen)
	}
}

// A disk that left is forgotten before its image goes: a record that names a disk
// without an image would refuse every epoch, should the disk come back.
func TestADiskIsForgottenBeforeItsImageGoes(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(pausing))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("joining", "joining")
	var unlock func()
	w.until("the token of B's plans", func() (err error) { // as long as it is ours nothing is tended
		unlock, err = w.b.vm().lock("test")
		return err
	})
	must(t, w.a.do(setDisk(true)))
	must(t, w.a.do(resuming))
	w.secondIs("unknown", "left")
	w.shipped(w.b)
	tries := make(chan struct{}, 1)
	w.b.refuseWrites(func(name string) error {
		if strings.HasSuffix(name, recordFile) {
			select {
			case tries <- struct{}{}:
			default:
			}
			return errors.New("input/output error")
		}
		return nil
	})
	unlock()
	w.until("a try to forget the disk", func() error {
		w.b.vm().look(t.Context())
		select {
		case <-tries:
			return nil
		default:
			return errors.New("none")
		}
	})
	w.b.vm().look(t.Context())
	if left := w.b.images(); len(left) != 2 || w.b.second() != "left" {
		t.Errorf("the record could not be written, and B has %v; the disk is %s", left, w.b.second())
	}
	w.b.refuseWrites(nil)
	w.forgotten()
	w.until("the image to go", func() error {
		if left := w.b.images(); len(left) != 1 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
}
