package vm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"kvmreplica/nbd"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// counterAt reads the guest's counter through NBD.
func (w *pair) counterAt(uri string, readOnly bool) uint64 {
	w.t.Helper()
	c := w.nbd(uri, readOnly)
	var b [512]byte
	if _, err := c.ReadAt(b[:], 0); err != nil {
		w.t.Fatal(err)
	}
	must(w.t, c.Close())
	return binary.LittleEndian.Uint64(b[:])
}

// shipped waits until the newest state on s holds what the guest wrote last.
func (w *pair) shipped(s *side) {
	w.t.Helper()
	w.rest()
	w.until("the last write to be in the newest state", func() error {
		st, err := s.vm().store()
		if err != nil {
			return err
		}
		v, err := st.View(st.Committed())
		if err != nil {
			return err
		}
		d, err := v.Disk("vda")
		var b [8]byte
		if err == nil {
			_, err = d.ReadAt(b[:], 0)
		}
		if n, want := binary.LittleEndian.Uint64(b[:]), w.counter.Load(); err == nil && n != want {
			err = fmt.Errorf("it holds %d, want %d", n, want)
		}
		return errors.Join(err, v.Close())
	})
}

func (w *pair) nbd(uri string, readOnly bool) *nbd.Client {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	c, err := nbd.DialURI(ctx, uri, nbd.ClientOptions{ReadOnly: readOnly, AllowUnsafe: true})
	must(w.t, err)
	return c
}

func (w *pair) mount(s *side, o MountOptions) (m status.Mount) {
	w.t.Helper()
	must(w.t, s.do(func(_ context.Context, _ *Manager, v *VM) (err error) {
		m, err = v.MountPoint(o)
		return err
	}))
	return m
}

func TestAMountedPointStaysAsItIsWhileTheGuestGoesOn(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.shipped(w.b)
	at := w.counter.Load()
	ro, rw := w.mount(w.b, MountOptions{}), w.mount(w.b, MountOptions{Writable: true, Quota: 1 << 20})
	if r := w.list(w.b); r.Points[len(r.Points)-1].Mounted+r.Points[0].Mounted < 2 {
		t.Errorf("the list does not show the mounts: %+v", r.Points)
	}
	c := w.nbd(rw.Disks[0].URI, false)
	scribble := bytes.Repeat([]byte{0xee}, 4096)
	_, err := c.WriteAt(scribble, 0)
	must(t, err)
	for range 3 {
		w.shipped(w.b)
		if got := w.counterAt(ro.Disks[0].URI, true); got != at {
			t.Fatalf("the mount shows %d, it was made at %d", got, at)
		}
	}
	got := make([]byte, 4096)
	if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, scribble) {
		t.Errorf("what was written to the mount is not there: %v", err)
	}
	end := func(id string, force bool) error {
		return w.b.do(func(_ context.Context, _ *Manager, v *VM) error { _, err := v.UnmountPoint(id, force); return err })
	}
	if err := end(rw.ID, false); !kindIs(err, wire.KindConflict) {
		t.Errorf("a mount in use is ended: %v", err)
	}
	must(t, errors.Join(end(rw.ID, true), end(rw.ID, false), c.Close()))
	if ms := w.b.vm().Mounts(); len(ms) != 1 || ms[0].ID != ro.ID {
		t.Errorf("mounts are %+v", ms)
	}
	if err := w.a.do(func(_ context.Context, _ *Manager, v *VM) error { _, err := v.MountPoint(MountOptions{}); return err }); !kindIs(err, wire.KindRefused) {
		t.Errorf("the primary mounts: %v", err)
	}
	w.b.restart() // ends it, and leaves nothing
	w.rest()
	if ms := w.b.vm().Mounts(); len(ms) != 0 {
		t.Errorf("after a restart: %+v", ms)
	}
	if left, err := os.ReadDir(filepath.Join(w.b.dir, "run", "mounts")); err == nil && len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestAPromotionEndsMounts(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	m := w.mount(w.b, MountOptions{})
	must(t, w.a.do(planned))
	w.rest()
	if ms := w.b.vm().Mounts(); len(ms) != 0 {
		t.Errorf("mounts after the promotion: %+v", ms)
	}
	if _, err := nbd.DialURI(t.Context(), m.Disks[0].URI, nbd.ClientOptions{ReadOnly: true}); err == nil {
		t.Error("the mount still answers")
	}
}

func TestAnExportIsThePointOrNothing(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.shipped(w.b)
	dir := t.TempDir()
	export := func(to, format string) ([]string, error) {
		var files []string
		err := w.b.do(func(ctx context.Context, _ *Manager, v *VM) (err error) {
			files, err = v.ExportPoint(ctx, ExportOptions{To: to, Format: format}, nil)
			return err
		})
		return files, err
	}
	at := w.counter.Load()
	files, err := export(dir, "raw")
	must(t, err)
	b, err := os.ReadFile(files[0])
	must(t, err)
	if len(b) != diskSize || binary.LittleEndian.Uint64(b) != at {
		t.Errorf("%d bytes, counter %d, want %d", len(b), binary.LittleEndian.Uint64(b), at)
	}
	if _, err := export(dir, "raw"); !kindIs(err, wire.KindInvalid) {
		t.Errorf("a second export over the first: %v", err)
	}
	for _, to := range []string{"relative", filepath.Join(dir, "no", "such", "file"), files[0]} {
		if _, err := export(to, ""); !kindIs(err, wire.KindInvalid) {
			t.Errorf("to %s: %v", to, err)
		}
	}
	if _, err := export(filepath.Join(dir, "x"), "vmdk"); !kindIs(err, wire.KindInvalid) {
		t.Errorf("an unknown format: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "one.raw.replica-part"), []byte("of a killed export"), 0o600))
	_, err = export(filepath.Join(dir, "one.raw"), "raw")
	must(t, err)
	if again, err := os.ReadFile(filepath.Join(dir, "one.raw")); err != nil || !bytes.Equal(again, b) {
		t.Errorf("over the leftover of another export: %d bytes, %v", len(again), err)
	}
	if _, err := os.Stat(filepath.Join(dir, "one.raw.replica-part")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the part is left over: %v", err)
	}
	if ms := w.b.vm().mountedAt(); len(ms) != 0 {
		t.Errorf("an export leaves a mount: %v", ms)
	}
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("no qemu-img: ", err)
	}
	q := filepath.Join(dir, "one.qcow2")
	_, err = export(q, "qcow2")
	must(t, err)
	out, err := exec.Command(tool, "compare", "-f", "raw", "-F", "qcow2", files[0], q).CombinedOutput()
	if err != nil {
		t.Errorf("qemu-img compare: %v: %s", err, out)
	}
}
