package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/nbd"
	"kvmreplica/replicad/wire"
)

func resizing(size int64, shrink bool) func(context.Context, *Manager, *VM) error {
	return func(ctx context.Context, _ *Manager, v *VM) error {
		_, err := v.Resize(ctx, ResizeOptions{Disk: "vda", Size: size, Shrink: shrink, Request: "resize"})
		return err
	}
}

// resize is resizing, when what the daemon does by itself has ended.
func (w *pair) resize(s *side, size int64) {
	w.t.Helper()
	w.until("the resize", func() error {
		err := s.do(resizing(size, false))
		if err != nil && !kindIs(err, wire.KindConflict) && !kindIs(err, wire.KindUnavailable) {
			w.t.Fatal(err)
		}
		return err
	})
}

// tail is what the test writes at the end of a disk of that size.
func tail(size int64) []byte { return bytes.Repeat([]byte(fmt.Sprintf("%8d", size)), 64) }

// writeTail writes it through the export, as a guest's second connection.
func (w *pair) writeTail(s *side, size int64) {
	w.t.Helper()
	c := w.nbd("nbd+unix:///vda?socket="+s.socket(), false)
	_, err := c.WriteAt(tail(size), size-512)
	must(w.t, errors.Join(err, c.Sync(), c.Close()))
}

// hasTail looks for it, and for the size.
func hasTail(c *nbd.Client, size int64) error {
	if c.Size() != size {
		return fmt.Errorf("the disk has %d bytes, want %d", c.Size(), size)
	}
	got := make([]byte, 512)
	if _, err := c.ReadAt(got, size-512); err != nil || !bytes.Equal(got, tail(size)) {
		return fmt.Errorf("the end of the disk holds %.16q: %w", got, err)
	}
	return nil
}

// shows mounts a point of s and checks the disk's size and end.
func (w *pair) shows(s *side, point string, size int64) {
	w.t.Helper()
	m := w.mount(s, MountOptions{Point: point})
	c := w.nbd(m.Disks[0].URI, true)
	if err := errors.Join(hasTail(c, size), c.Close()); err != nil {
		w.t.Errorf("point %s: %v", point, err)
	}
	must(w.t, s.do(func(_ context.Context, _ *Manager, v *VM) error { _, err := v.UnmountPoint(m.ID, true); return err }))
}

// sized waits until both hosts' records name a size.
func (w *pair) sized(size int64) {
	w.t.Helper()
	w.until("both records to name the size", func() error {
		for _, s := range []*side{w.a, w.b} {
			if n := s.vm().record().Disks[0].Size; n != size {
				return fmt.Errorf("%s says %d bytes, want %d", s.name, n, size)
			}
		}
		return nil
	})
}

// sameImages: both hosts' images hold the same, byte for byte, once nothing is
// written and everything is applied.
func (w *pair) sameImages(size int64) {
	w.t.Helper()
	w.until("equal images", func() error {
		a, b := w.a.image(), w.b.image()
		if int64(len(a)) < size || int64(len(b)) < size || !bytes.Equal(a[:size], b[:size]) {
			return fmt.Errorf("images of %d and %d bytes differ", len(a), len(b))
		}
		return nil
	})
}

// B4: a disk grows under the running guest, on either host; every point keeps
// its size; planned failovers and the restart of a daemon carry it on.
func TestADiskGrowsAndSurvivesPlannedFailovers(t *testing.T) {
	t.Parallel()
	const first, second = diskSize + 2<<20 + 512, diskSize + 5<<20
	w := newPair(t)
	w.protect()
	w.writeTail(w.a, diskSize)
	w.shipped(w.b)
	before := w.pin()
	must(t, w.a.do(resizing(first, false)))
	w.writeTail(w.a, first)
	w.shipped(w.b)
	w.sized(first)
	w.shows(w.b, "latest", first)
	w.shows(w.b, nameOf(before.Pos), diskSize)
	w.a.restart()
	w.b.restart()
	w.shipped(w.b)
	w.sized(first)
	must(t, w.a.do(planned))
	w.shipped(w.a)
	must(t, w.b.do(resizing(second, false)))
	w.writeTail(w.b, second)
	w.shipped(w.a)
	w.sized(second)
	must(t, w.b.do(planned))
	w.shipped(w.b)
	w.sized(second)
	c := w.nbd("nbd+unix:///vda?socket="+w.a.socket(), true)
	must(t, errors.Join(hasTail(c, second), c.Close()))
	w.sameImages(second)
}

// B4: after a failover to a point before a growth the disk has its old size, and
// the way back brings the old primary to it; cancelled, nothing has changed.
func TestAFailoverToAPointBeforeAGrowthHasTheOldSize(t *testing.T) {
	t.Parallel()
	const grown, again = diskSize + 3<<20, diskSize + 1<<20
	w := newPair(t)
	w.protect()
	w.writeTail(w.a, diskSize)
	old, n := w.point()
	must(t, w.a.do(resizing(grown, false)))
	w.writeTail(w.a, grown)
	w.shipped(w.b)
	w.sized(grown)
	w.powerCutA()
	must(t, w.b.do(failoverTo(nameOf(old), UnplannedOptions{})))
	c := w.nbd("nbd+unix:///vda?socket="+w.b.socket(), true)
	must(t, errors.Join(hasTail(c, diskSize), c.Close()))
	must(t, w.b.do(cancel))
	if got := w.b.vm().record().Disks[0].Size; got != grown {
		t.Errorf("after the cancel the disk has %d bytes", got)
	}
	w.shows(w.b, "latest", grown)
	must(t, w.b.do(failoverTo(nameOf(old), UnplannedOptions{})))
	w.counter.Store(n)
	w.write(w.b, 3)
	must(t, w.b.do(commit))
	w.until("the images to be all there is", w.b.flattened)
	if got := len(w.b.image()); got != diskSize {
		t.Errorf("the image has %d bytes", got)
	}
	w.a.start()
	w.until("A to know", w.primaryHeld)
	must(t, w.b.do(reverse))
	w.lossy.Store(false)
	w.shipped(w.a)
	w.sized(diskSize)
	w.resize(w.b, again)
	w.writeTail(w.b, again)
	w.shipped(w.a)
	w.sized(again)
	w.shows(w.a, "latest", again)
	must(t, w.b.do(planned))
	w.shipped(w.b)
	c = w.nbd("nbd+unix:///vda?socket="+w.a.socket(), true)
	must(t, errors.Join(hasTail(c, again), c.Close()))
	if got := len(w.a.image()); got != again {
		t.Errorf("A's image has %d bytes", got)
	}
	w.sameImages(again)
}

// B4: the old primary had grown and nothing of that was shipped: its disk is
// longer than the one that replaces it, and then shorter.
func TestTheWayBackBringsTheOldPrimaryToTheSurvivorsSize(t *testing.T) {
	t.Parallel()
	for _, longer := range []bool{true, false} {
		t.Run(fmt.Sprintf("longer=%t", longer), func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.writeTail(w.a, diskSize)
			w.shipped(w.b)
			size := int64(diskSize)
			if longer {
				must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
				must(t, w.a.do(resizing(diskSize+1<<20, false)))
				w.writeTail(w.a, diskSize+1<<20)
			}
			w.losePrimary()
			if !longer {
				must(t, w.b.do(commit))
				w.until("the images to be all there is", w.b.flattened)
				size += 2 << 20
				w.resize(w.b, size)
				w.writeTail(w.b, size)
			}
			w.a.start()
			if longer {
				w.until("A to go on", func() error {
					err := w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Resume() })
					if w.a.vm().record().Superseded != "" {
						return nil
					}
					return err
				})
			}
			w.until("A to know", w.primaryHeld)
			must(t, w.b.do(reverse))
			w.shipped(w.a)
			w.sized(size)
			w.shows(w.a, "latest", size)
		})
	}
}

// An image that somebody made longer while the guest was off is taken up.
func TestAnImageGrownWhileTheGuestIsOffIsTakenUp(t *testing.T) {
	t.Parallel()
	const size = diskSize + 1<<20
	w := newPair(t)
	w.protect()
	w.shipped(w.b)
	must(t, w.a.hyper.Destroy(t.Context(), string(testVM), true))
	must(t, os.Truncate(w.a.vm().record().Disks[0].Path, size))
	w.until("the growth to be taken up", func() error {
		w.a.vm().look(t.Context())
		if n := w.a.vm().record().Disks[0].Size; n != size {
			return fmt.Errorf("%d bytes", n)
		}
		return nil
	})
	w.writeTail(w.a, size)
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }))
	w.shipped(w.b)
	w.sized(size)
	w.shows(w.b, "latest", size)
}

// What cannot be resized is refused, with the way out, and changes nothing.
func TestAResizeThatCannotBeIsRefused(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.shipped(w.b)
	for _, c := range []struct {
		s      *side
		disk   wire.DiskName
		size   int64
		shrink bool
		want   wire.Kind
	}{
		{w.b, "vda", diskSize * 2, false, wire.KindRefused},
		{w.a, "vdz", diskSize * 2, false, wire.KindNotFound},
		{w.a, "vda", diskSize + 1, false, wire.KindInvalid},
		{w.a, "vda", diskSize / 2, false, wire.KindRefused},
		{w.a, "vda", diskSize / 2, true, wire.KindRefused}, // the guest runs
	} {
		err := c.s.do(func(ctx context.Context, _ *Manager, v *VM) error {
			_, err := v.Resize(ctx, ResizeOptions{Disk: c.disk, Size: c.size, Shrink: c.shrink})
			return err
		})
		if !kindIs(err, c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	w.b.grant.MaxBytes = diskSize + 4096
	if err := w.a.do(resizing(diskSize*2, false)); !kindIs(err, wire.KindNoSpace) {
		t.Errorf("beyond what the replica's host grants: %v", err)
	}
	w.sized(diskSize)
	if n := len(w.a.image()); n != diskSize {
		t.Errorf("the image has %d bytes", n)
	}
}

// F18: a disk is made shorter while the guest is off; older points keep their
// end, also when it grows again.
func TestADiskIsMadeShorterAndPointsKeepTheirEnd(t *testing.T) {
	t.Parallel()
	const small, again = diskSize - 1<<20, diskSize + 4096
	w := newPair(t)
	w.protect()
	w.writeTail(w.a, diskSize)
	w.shipped(w.b)
	old := w.pin()
	must(t, w.a.hyper.Shutdown(t.Context(), string(testVM), libvirt.ShutdownOptions{}))
	must(t, w.a.do(resizing(small, true)))
	w.sized(small)
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }))
	w.writeTail(w.a, small)
	w.shipped(w.b)
	mid := w.pin()
	w.shows(w.b, nameOf(old.Pos), diskSize)
	must(t, w.a.do(resizing(again, false)))
	w.writeTail(w.a, again)
	w.shipped(w.b)
	w.sized(again)
	w.shows(w.b, nameOf(old.Pos), diskSize)
	w.shows(w.b, nameOf(mid.Pos), small)
	w.shows(w.b, "latest", again)
	must(t, w.a.do(planned))
	w.shipped(w.a)
	w.sameImages(again)
	if n := len(w.b.image()); n != again {
		t.Errorf("B's image has %d bytes", n)
	}
}
