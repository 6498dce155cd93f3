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

	"kvmreplica/libvirt"
	"kvmreplica/replicad/wire"
)

const secondSize = 3<<20 + 512

// attach gives the domain a second disk and returns its image; the guest is off.
func (w *pair) attach() string {
	w.t.Helper()
	image := filepath.Join(filepath.Dir(w.a.dir), "second.raw")
	must(w.t, os.WriteFile(image, bytes.Repeat([]byte("old!"), secondSize/4), 0o600))
	doc := strings.Replace(string(w.doc()), "</disk>", "</disk><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='"+
		image+"'/><target dev='vdb' bus='virtio'/></disk>", 1)
	_, err := w.a.hyper.Define(w.t.Context(), []byte(doc))
	must(w.t, err)
	return image
}

// protectFirst protects only the first of two disks; the guest runs.
func (w *pair) protectFirst() (image string) {
	w.t.Helper()
	image = w.attach()
	w.protectVda()
	return image
}

// protectVda protects the first disk and starts the guest.
func (w *pair) protectVda() {
	w.t.Helper()
	must(w.t, w.a.do(func(ctx context.Context, m *Manager, _ *VM) error {
		_, err := m.Enable(ctx, EnableOptions{Name: "web", Peer: w.b.host, Interval: testInterval, Disks: []string{"vda"}, Request: "enable"}, nil)
		return err
	}))
	w.until("a complete copy", func() error { return w.copied(w.a, w.b) })
	must(w.t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }))
	w.write(w.a, 3)
}

func setDisk(remove bool) action {
	return func(ctx context.Context, _ *Manager, v *VM) error {
		return v.SetDisk(ctx, DiskOptions{Disk: "vdb", Remove: remove, Request: "disk"}, nil)
	}
}

// states says how a host's record has the second disk.
func (s *side) second() string {
	r := s.vm().record()
	d, ok := r.disk("vdb")
	switch {
	case !ok:
		return "unknown"
	case d.Out:
		return "out"
	case d.State == member:
		return "member"
	}
	return string(d.State)
}

func (w *pair) secondIs(a, b string) {
	w.t.Helper()
	w.until(fmt.Sprintf("the second disk to be %s on A and %s on B", a, b), func() error {
		if x, y := w.a.second(), w.b.second(); x != a || y != b {
			return fmt.Errorf("it is %s and %s", x, y)
		}
		return nil
	})
}

// forgotten waits until neither host knows the second disk.
func (w *pair) forgotten() {
	w.t.Helper()
	w.until("both to have forgotten the disk", func() error {
		w.a.vm().look(w.t.Context())
		w.b.vm().look(w.t.Context())
		if x, y := w.a.second(), w.b.second(); x != "unknown" || y != "unknown" {
			return fmt.Errorf("it is %s and %s", x, y)
		}
		return nil
	})
}

// fill writes a mark over the whole second disk through the export.
func (w *pair) fill(s *side, mark string) {
	w.t.Helper()
	c := w.nbd("nbd+unix:///vdb?socket="+s.socket(), false)
	_, err := c.WriteAt(bytes.Repeat([]byte(mark), secondSize/len(mark)), 0)
	must(w.t, errors.Join(err, c.Sync(), c.Close()))
}

// holds waits until the newest state on s has the mark all over the second disk.
func (w *pair) holds(s *side, mark string) {
	w.t.Helper()
	w.until("the second disk's content in the newest state", func() error {
		st, err := s.vm().store()
		if err != nil {
			return err
		}
		v, err := st.View(st.Committed())
		if err != nil {
			return err
		}
		got := make([]byte, secondSize)
		d, err := v.Disk("vdb")
		if err == nil && d.Size() != secondSize {
			err = fmt.Errorf("it has %d bytes", d.Size())
		}
		if err == nil {
			_, err = d.ReadAt(got, 0)
		}
		if want := bytes.Repeat([]byte(mark), secondSize/len(mark)); err == nil && !bytes.Equal(got, want) {
			err = fmt.Errorf("it holds %.8q", got)
		}
		return errors.Join(err, v.Close())
	})
}

// mounted lists the disks of a point, and what the second one begins with.
func (w *pair) mounted(s *side, point string) (names, begins string) {
	w.t.Helper()
	m := w.mount(s, MountOptions{Point: point})
	for _, d := range m.Disks {
		names += string(d.Name)
		if d.Name == "vdb" {
			c := w.nbd(d.URI, true)
			b := make([]byte, 4)
			_, err := c.ReadAt(b, secondSize-512)
			must(w.t, errors.Join(err, c.Close()))
			begins = string(b)
		}
	}
	must(w.t, s.do(func(_ context.Context, _ *Manager, v *VM) error { _, err := v.UnmountPoint(m.ID, true); return err }))
	return names, begins
}

// on says where the second disk of a host's definition is.
func (s *side) on() libvirt.Disk {
	s.t.Helper()
	doc, err := s.hyper.XML(context.Background(), string(testVM), libvirt.XMLPersistent)
	must(s.t, err)
	d, err := libvirt.ParseDomain(doc)
	must(s.t, err)
	k, _ := d.Disk("vdb")
	return k
}

// B4: a disk is added while the others go on, fails over with them, and is taken
// out again; points have the disks they had; with the last of them the copy goes.
func TestADiskIsAddedFailsOverAndIsRemoved(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	image := w.protectFirst()
	w.shipped(w.b)
	before := w.pin()
	must(t, w.a.do(setDisk(false)))
	w.write(w.a, 3)
	w.secondIs("member", "member")
	w.holds(w.b, "old!")
	w.fill(w.a, "new!")
	w.holds(w.b, "new!")
	w.shipped(w.b)
	both := w.pin()
	if names, _ := w.mounted(w.b, nameOf(before.Pos)); names != "vda" {
		t.Errorf("the point from before has the disks %s", names)
	}
	w.until("B's definition to have the disk", func() error {
		if k := w.b.on(); k.Kind != libvirt.SourceNBD {
			return fmt.Errorf("%+v", k)
		}
		return nil
	})
	w.a.restart()
	w.b.restart()
	w.fill(w.a, "abcd")
	w.holds(w.b, "abcd")
	w.shipped(w.b)
	if names, begins := w.mounted(w.b, nameOf(both.Pos)); names != "vdavdb" || begins != "new!" {
		t.Errorf("the point with both has the disks %s, and in the second %q", names, begins)
	}
	must(t, w.a.do(planned))
	w.fill(w.b, "efgh")
	w.holds(w.a, "efgh")
	w.shipped(w.a)
	must(t, w.b.do(planned))
	w.shipped(w.b)
	w.fill(w.a, "ijkl")
	w.holds(w.b, "ijkl")
	last := w.pin()
	must(t, w.a.do(setDisk(true)))
	w.secondIs("unknown", "left")
	w.write(w.a, 3)
	w.shipped(w.b)
	if names, _ := w.mounted(w.b, "latest"); names != "vda" {
		t.Errorf("the newest state has the disks %s", names)
	}
	if names, begins := w.mounted(w.b, nameOf(last.Pos)); names != "vdavdb" || begins != "ijkl" {
		t.Errorf("the point with both has the disks %s, and in the second %q", names, begins)
	}
	if k := w.a.on(); k.Kind != libvirt.SourceFile || k.Path != image {
		t.Errorf("A's definition has it on %+v", k)
	}
	if got, err := os.ReadFile(image); err != nil || !bytes.HasPrefix(got, []byte("ijkl")) {
		t.Errorf("its image holds %.8q, %v", got, err)
	}
	copyOf := filepath.Join(filepath.Dir(w.b.vm().record().Disks[0].Path), "vdb.raw")
	if _, err := os.Stat(copyOf); err != nil {
		t.Errorf("a point needs the copy: %v", err)
	}
	must(t, w.b.do(func(ctx context.Context, _ *Manager, v *VM) error {
		_, err := v.PinPoint(ctx, nameOf(last.Pos), false)
		if err == nil {
			_, err = v.SetRetention(RetentionOptions{Retention: ptr("0")})
		}
		return err
	}))
	w.until("the copy of the disk to be deleted", func() error {
		w.write(w.a, 1)
		w.b.vm().look(t.Context())
		if _, err := os.Stat(copyOf); err == nil || w.b.second() != "unknown" {
			return fmt.Errorf("it is %s, %v", w.b.second(), err)
		}
		return nil
	})
}

// B4: a failover to a point before the addition runs without the disk; cancelled,
// the replica has it again; final, the old primary gives it up, too.
func TestAFailoverToAPointBeforeAnAdditionGoesWithoutTheDisk(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	image := w.protectFirst()
	w.shipped(w.b)
	old, n := w.point()
	must(t, w.a.do(setDisk(false)))
	w.secondIs("member", "member")
	w.fill(w.a, "new!")
	w.holds(w.b, "new!")
	w.shipped(w.b)
	w.powerCutA()
	must(t, w.b.do(failoverTo(nameOf(old), UnplannedOptions{})))
	if k := w.b.on(); k.Target != "" || w.b.second() != "out" {
		t.Errorf("the domain has %+v, the record %s", k, w.b.second())
	}
	must(t, w.b.do(cancel))
	w.holds(w.b, "new!")
	must(t, w.b.do(failoverTo("latest", UnplannedOptions{})))
	c := w.nbd("nbd+unix:///vdb?socket="+w.b.socket(), true)
	b := make([]byte, 4)
	_, err := c.ReadAt(b, 0)
	if must(t, errors.Join(err, c.Close())); string(b) != "new!" {
		t.Errorf("after the failover to the newest state the disk holds %q", b)
	}
	must(t, w.b.do(cancel))
	must(t, w.b.do(failoverTo(nameOf(old), UnplannedOptions{})))
	w.counter.Store(n)
	w.write(w.b, 3)
	must(t, w.b.do(commit))
	w.until("the images to be all there is", w.b.flattened)
	w.a.start()
	w.until("A to know", w.primaryHeld)
	must(t, w.b.do(reverse))
	w.lossy.Store(false)
	w.shipped(w.a)
	w.forgotten()
	if _, err := os.Stat(image); err != nil {
		t.Errorf("A's own image: %v", err)
	}
	must(t, w.b.do(planned))
	w.shipped(w.b)
	if k := w.a.on(); k.Kind != libvirt.SourceFile || k.Path != image {
		t.Errorf("A's definition has it on %+v", k)
	}
}

// What waits for the whole of every disk is refused while one is being added,
// and the addition can be taken back.
func TestWhileADiskIsBeingAddedNothingCountsOnIt(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("joining", "joining")
	for what, act := range map[string]action{"a planned failover": planned, "a resize": resizing(diskSize*2, false), "another addition": setDisk(false)} {
		if err := w.a.do(act); !kindIs(err, wire.KindRefused) && !kindIs(err, wire.KindConflict) || !strings.Contains(err.Error(), "still being added") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if k := w.b.on(); k.Target != "" {
		t.Errorf("B's definition has a disk that is not there: %+v", k)
	}
	must(t, w.a.do(setDisk(true)))
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Resume() }))
	w.forgotten()
	if left := w.b.images(); len(left) != 1 {
		t.Errorf("B has %v", left)
	}
	must(t, w.a.do(setDisk(false)))
	w.secondIs("member", "member")
	w.holds(w.b, "old!")
}

// What cannot be is refused with the way out, and changes nothing.
func TestAChangeOfTheSetThatCannotBeIsRefused(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	w.shipped(w.b)
	was := w.doc()
	set := func(disk wire.DiskName, remove bool) action {
		return func(ctx context.Context, _ *Manager, v *VM) error {
			return v.SetDisk(ctx, DiskOptions{Disk: disk, Remove: remove, Request: "disk"}, nil)
		}
	}
	for _, c := range []struct {
		what string
		s    *side
		act  action
		want wire.Kind
	}{
		{"on the replica", w.b, set("vdb", false), wire.KindRefused},
		{"a disk the domain does not have", w.a, set("vdz", false), wire.KindNotFound},
		{"one that is protected", w.a, set("vda", false), wire.KindConflict},
		{"removing one that is not", w.a, set("vdb", true), wire.KindNotFound},
		{"removing the only one", w.a, set("vda", true), wire.KindRefused},
	} {
		var e *wire.Error
		if err := c.s.do(c.act); !kindIs(err, c.want) || !errors.As(err, &e) || e.Hint == "" {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	w.b.mu.Lock()
	w.b.grant.MaxDisks = 1
	w.b.mu.Unlock()
	if err := w.a.do(set("vdb", false)); !kindIs(err, wire.KindRefused) || !strings.Contains(err.Error(), "may send 1 disk a VM") {
		t.Errorf("more disks than were granted: %v", err)
	}
	if now := w.doc(); !bytes.Equal(now, was) || w.a.second() != "unknown" || w.b.second() != "unknown" {
		t.Errorf("it changed something: %s, %s\n%s", w.a.second(), w.b.second(), now)
	}
	w.shipped(w.b)
}

func addingADisk(t *testing.T, w *pair) aPlan {
	return aPlan{
		prepare: func() { w.protectFirst(); w.shipped(w.b) },
		act:     func() (*side, action) { return w.a, setDisk(false) },
		through: func() error {
			if x, y := w.a.second(), w.b.second(); x != "member" || y != "member" {
				return fmt.Errorf("it is %s and %s", x, y)
			}
			return nil
		},
		end: func() {
			w.holds(w.b, "old!")
			w.fill(w.a, "new!")
			w.holds(w.b, "new!")
			w.shipped(w.b)
		},
	}
}

func removingADisk(t *testing.T, w *pair) aPlan {
	added := addingADisk(t, w)
	return aPlan{
		prepare: func() {
			added.prepare()
			must(t, w.a.do(setDisk(false)))
			w.until("the disk to be added", added.through)
		},
		act: func() (*side, action) { return w.a, setDisk(true) },
		through: func() error {
			if x, y := w.a.second(), w.b.second(); x != "unknown" || y != "left" && y != "unknown" {
				return fmt.Errorf("it is %s and %s", x, y)
			}
			return nil
		},
		end: func() {
			w.shipped(w.b)
			if k := w.a.on(); k.Kind != libvirt.SourceFile {
				t.Fatalf("A's definition has it on %+v", k)
			}
		},
	}
}
