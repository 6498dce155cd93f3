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

	"kvmreplica/nbd"
	"kvmreplica/replicad/wire"
)

// The old primary's guest wrote what never arrived. The return keeps it: every
// block that differed is in the patch as the old primary had it.
func TestAReturnKeepsWhatTheOldPrimaryHad(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	old, _ := w.point()
	w.synced()
	w.b.silent.Store(true)
	w.write(w.a, 6) // nobody but A has these
	w.powerCutA()
	must(t, w.b.do(failoverTo(nameOf(old), UnplannedOptions{})))
	w.lossy.Store(false)
	w.write(w.b, 2)
	w.b.silent.Store(false)
	w.a.reboot()
	w.until("A to learn of the promotion", w.primaryHeld)
	w.forced.Store(false)
	lost := w.a.image()
	must(t, w.b.do(func(ctx context.Context, _ *Manager, v *VM) error {
		p, err := v.PlanReverse(ctx)
		if err == nil && (p.Compare || p.Theirs == 0 || p.Own == 0 || p.Between != -1) {
			err = fmt.Errorf("the plan: %+v", p)
		}
		return err
	}))
	w.b.mu.Lock()
	w.b.atPoint = map[string]func(){"reverse/release/acted": func() { w.write(w.b, 20) }} // after the patch, before the first cut
	w.b.mu.Unlock()
	must(t, w.b.do(reverse))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	now := w.a.image()
	all, err := w.a.vm().Patches()
	must(t, err)
	if len(all) != 1 || all[0].Damage != "" || all[0].Bytes == 0 || all[0].Bytes > diskSize/4 {
		t.Fatalf("patches: %+v", all)
	}
	dir := filepath.Join(t.TempDir(), "out")
	if _, err := w.a.vm().ExportPatch(t.Context(), all[0].ID, dir); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "vda.raw"))
	must(t, err)
	ranges, err := os.ReadFile(filepath.Join(dir, "vda.map"))
	must(t, err)
	in := make([]bool, diskSize/4096)
	for line := range strings.Lines(string(ranges)) {
		var off, n int
		if _, err := fmt.Sscan(line, &off, &n); err != nil {
			t.Fatal(err)
		}
		for g := off / 4096; g*4096 < off+n; g++ {
			in[g] = true
		}
	}
	for g := range in {
		was := lost[g*4096 : g*4096+4096]
		switch {
		case in[g] && !bytes.Equal(raw[g*4096:g*4096+4096], was):
			t.Fatalf("block %d of the patch is not what A had", g)
		case !in[g] && g > 64 && !bytes.Equal(now[g*4096:g*4096+4096], was):
			t.Fatalf("block %d was replaced and is not in the patch", g)
		}
	}
	if !in[0] {
		t.Fatal("the guest's counter is not in the patch")
	}
	w.patchShows(all[0], lost)
	if _, err := w.a.vm().ExportPatch(t.Context(), all[0].ID, dir); !errors.Is(err, os.ErrExist) {
		t.Fatalf("exported over an earlier export: %v", err)
	}
	must(t, w.a.vm().DeletePatch(all[0].ID))
	if all, err := w.a.vm().Patches(); err != nil || len(all) != 0 {
		t.Fatalf("after the deletion: %v %v", all, err)
	}
}

// patchShows mounts the patch on A: the old disk, block for block, whatever B's
// guest wrote since; it may be written to, and nothing stays.
func (w *pair) patchShows(p Patch, lost []byte) {
	w.t.Helper()
	a := w.a.vm()
	for _, writable := range []bool{false, true} {
		m, err := a.MountPatch(p.ID, MountOptions{Writable: writable})
		must(w.t, err)
		if m.Patch != p.ID || m.Number != firstOrdinal || len(m.Disks) != 1 || len(a.Mounts()) != 1 {
			w.t.Fatalf("the mount: %+v", m)
		}
		c, err := nbd.DialURI(w.t.Context(), m.Disks[0].URI, nbd.ClientOptions{ReadOnly: !writable})
		must(w.t, err)
		got := make([]byte, diskSize)
		_, err = c.ReadAt(got, 0)
		must(w.t, err)
		for g := range lost[:len(lost)/4096] {
			if !bytes.Equal(got[g*4096:g*4096+4096], lost[g*4096:g*4096+4096]) {
				w.t.Errorf("block %d of the mounted patch is not what A had", g)
			}
		}
		_, err = c.WriteAt(make([]byte, 4096), 0)
		if (err == nil) != writable {
			w.t.Fatalf("writable %t: %v", writable, err)
		}
		must(w.t, c.Close())
		if n, err := a.UnmountPoint(m.ID, true); err != nil || n != 1 {
			w.t.Fatalf("unmount: %d, %v", n, err)
		}
	}
	if left, _ := os.ReadDir(a.scratchDir()); len(left) > 0 {
		w.t.Errorf("left over: %v", left)
	}
	if _, err := a.MountPatch("nonsense", MountOptions{}); !kindIs(err, wire.KindNotFound) {
		w.t.Errorf("an unknown patch: %v", err)
	}
	if _, err := w.b.vm().MountPatch(p.ID, MountOptions{}); err == nil {
		w.t.Error("mounted on the host that does not have it")
	}
	must(w.t, a.update(func(r *Record) error { r.Given = ""; return nil })) // as after two more failovers
	if _, err := a.MountPatch(p.ID, MountOptions{}); !kindIs(err, wire.KindNotFound) {
		w.t.Errorf("over a point it does not belong to: %v", err)
	}
	m, err := a.MountPatch(p.ID, MountOptions{Point: "latest"})
	must(w.t, err)
	_, err = a.UnmountPoint(m.ID, true)
	must(w.t, err)
	a.deps.Store.Reserve = 1 << 60
	if _, err := a.MountPatch(p.ID, MountOptions{Point: "latest"}); !kindIs(err, wire.KindNoSpace) {
		w.t.Errorf("without room: %v", err)
	}
	a.deps.Store.Reserve = 0
}

// A patch that cannot be written keeps the old primary as it is.
func TestAReturnWithoutRoomForThePatchGivesNothingUp(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.losePrimary()
	w.a.reboot()
	w.until("A to learn of the promotion", w.primaryHeld)
	w.forced.Store(false)
	full := true
	w.a.refuseWrites(func(name string) error {
		if full && strings.HasSuffix(name, patchSuffix) {
			return errors.New("no space left on device")
		}
		return nil
	})
	before := w.a.image()
	if err := w.b.do(reverse); err == nil {
		t.Fatal("the return went on without a patch")
	}
	if !bytes.Equal(before, w.a.image()) || w.a.vm().record().Incomplete {
		t.Fatal("something was given up")
	}
	w.a.refuseWrites(nil)
	w.until("the return", func() error {
		if !w.b.vm().record().NoReverse {
			return nil
		}
		if w.b.planOpen() {
			return errors.New("it goes on")
		}
		return errors.Join(w.b.do(reverse), errors.New("not yet"))
	})
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
}

// The patch cannot be completed with what the first epoch overwrites, or the
// daemon dies there: the epoch is refused, the images stay what they were, and
// once it can be the patch is the old disk all the same.
func TestAPatchThatCannotBeCompletedHoldsTheFirstEpochUp(t *testing.T) {
	for name, crash := range map[string]bool{"no room": false, "a crash": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.losePrimary()
			w.a.reboot()
			w.until("A to learn of the promotion", w.primaryHeld)
			w.forced.Store(false)
			lost := w.a.image()
			dead := w.a.fs.dead
			refused := make(chan struct{}, 1)
			w.b.mu.Lock()
			w.b.atPoint = map[string]func(){"reverse/release/acted": func() {
				w.write(w.b, 20)
				w.a.refuseWrites(func(name string) error {
					if !strings.HasSuffix(name, patchSuffix) {
						return nil
					}
					select {
					case refused <- struct{}{}:
					default:
					}
					if crash {
						dead.Store(true)
					}
					return errors.New("no space left on device")
				})
			}}
			w.b.mu.Unlock()
			must(t, w.b.do(reverse))
			w.until("the first epoch to be refused", func() error {
				select {
				case <-refused:
					return nil
				default:
					return errors.New("not yet")
				}
			})
			if !bytes.Equal(w.a.image(), lost) || !w.a.vm().record().Incomplete {
				t.Fatal("the first epoch was taken without what it overwrites")
			}
			w.a.refuseWrites(nil)
			if crash {
				w.a.restart()
			}
			if o := w.rest(); o != w.b {
				t.Fatal("B does not own the VM")
			}
			all, err := w.a.vm().Patches()
			must(t, err)
			if len(all) != 1 {
				t.Fatalf("patches: %+v", all)
			}
			w.patchShows(all[0], lost)
		})
	}
}
