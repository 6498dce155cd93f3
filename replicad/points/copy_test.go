package points_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// openDir opens the store in dir as p's, creating it when there is none.
func (p *primary) openDir(t *testing.T, d *points.Dir) *points.Store {
	t.Helper()
	cfg := points.Config{VM: p.vm, Now: func() time.Time { return p.now }, Policy: points.Policy{MinDistance: 15 * time.Second}, Limits: points.Limits{SpoolStep: 8192}}
	if err := d.Configure(&cfg); err != nil {
		t.Fatal(err)
	}
	s, err := points.Open(cfg)
	if errors.Is(err, os.ErrNotExist) {
		s, err = points.Create(cfg, p.disks)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A copy has every recovery point, the newest state, the pins and the firmware
// of its origin, bit for bit, also after that was promoted and written over; it
// is a replica's store as any other: nothing looks touched from outside, and it
// can be promoted itself.
func TestACopyOfTheStoreOutlivesIt(t *testing.T) {
	p := newPrimary(77)
	p.blob = []byte("firmware")
	d := &points.Dir{Path: t.TempDir()}
	s := p.openDir(t, d)
	if err := p.seed(s); err != nil {
		t.Fatal(err)
	}
	if err := p.epochs(s, 6, time.Minute, true); err != nil {
		t.Fatal(err)
	}
	if err := s.Pin(s.Points()[1].Pos); err != nil {
		t.Fatal(err)
	}
	want := s.Points()
	kept := filepath.Join(t.TempDir(), "kept")
	c, err := s.CopyTo(t.Context(), kept)
	if err != nil {
		t.Fatal(err)
	}
	if c.Points != len(want) || c.Points < 5 || c.Shared != shares(t, d.ImagePath("vda"), filepath.Dir(kept)) {
		t.Errorf("%d points, %+v", len(want), c)
	}
	if _, err := s.CopyTo(t.Context(), kept); !errors.Is(err, os.ErrExist) {
		t.Errorf("a copy over a copy: %v", err)
	}
	if _, err := s.Promote(delta.Generation{9}, false); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, k := range p.disks { // the guest of the new generation
		if err := os.WriteFile(d.ImagePath(k.Name), bytes.Repeat([]byte{0xEE}, int(k.Size)), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	for _, readOnly := range []bool{true, false, true} { // as it was left, used, and after that
		k := p.openDir(t, &points.Dir{Path: kept, ReadOnly: readOnly})
		if st := k.Status(); st.State != points.Replica || st.Committed != p.acked {
			t.Fatalf("the copy is %s at %v: %v", st.State, st.Committed, st.Damage)
		}
		got := k.Points()
		if len(got) != len(want) {
			t.Errorf("%d points in the copy, %d before", len(got), len(want))
		}
		for i, q := range got {
			if q.Pos != want[i].Pos || q.Pinned != want[i].Pinned || q.Damage != nil {
				t.Errorf("point %d: %+v, it was %+v", i, q, want[i])
			}
		}
		if err := p.sound(k); err != nil {
			t.Error(err)
		}
		if b, err := k.Firmware(want[0].Pos); err != nil || len(b) != 1 || string(b[0].Data) != "firmware" {
			t.Errorf("the firmware state: %v, %v", b, err)
		}
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
	}
	k := p.openDir(t, &points.Dir{Path: kept})
	if _, err := k.PromoteAt(t.Context(), want[0].Pos, delta.Generation{8}); err != nil {
		t.Errorf("promote the copy: %v", err)
	}
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
}

// shares says whether files in two directories can share blocks here.
func shares(t *testing.T, file, dir string) bool {
	t.Helper()
	src, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.CreateTemp(dir, "share")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(dst.Name())
	defer dst.Close()
	err = block.CloneFD(int(dst.Fd()), int(src.Fd()))
	if err != nil && !errors.Is(err, block.ErrNoClone) {
		t.Fatal(err)
	}
	return err == nil
}

// A copy that fails half-way leaves nothing; one of a store with epochs that
// are not applied is refused.
func TestACopyThatFailsLeavesNothing(t *testing.T) {
	p := newPrimary(78)
	d := &points.Dir{Path: t.TempDir()}
	s := p.openDir(t, d)
	defer s.Close()
	if err := p.seed(s); err != nil {
		t.Fatal(err)
	}
	if err := p.epochs(s, 3, time.Minute, true); err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(t.TempDir(), "kept")
	gone, err := fsx.OS(d.Path)
	if err != nil {
		t.Fatal(err)
	}
	names, err := gone.List("undo")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	if err := gone.Remove("undo/" + names[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CopyTo(t.Context(), kept); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a copy without one segment: %v", err)
	}
	if _, err := os.Stat(kept); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is left: %v", err)
	}
	if err := p.epochs(s, 1, time.Minute, false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.CopyTo(t.Context(), kept); !errors.Is(err, points.ErrState) {
		t.Errorf("a copy of what is not applied: %v", err)
	}
}

// Nothing is ordered by the clock: after one that was put back, new states
// become recovery points as before, behind the older ones.
func TestAClockThatIsPutBackStopsNoRecoveryPoints(t *testing.T) {
	p := newPrimary(78)
	s := p.openDir(t, &points.Dir{Path: t.TempDir()})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(p.seed(s))
	must(p.epochs(s, 3, time.Minute, true))
	before := s.Points()
	p.now = p.now.Add(-10 * time.Hour)
	must(p.epochs(s, 3, time.Minute, true))
	after := s.Points()
	if len(after) != len(before)+3 {
		t.Fatalf("%d points before, %d after", len(before), len(after))
	}
	for i := 1; i < len(after); i++ {
		if after[i].Ordinal <= after[i-1].Ordinal || after[i].Pos.Epoch <= after[i-1].Pos.Epoch {
			t.Errorf("point %d stands behind %d", after[i].Pos.Epoch, after[i-1].Pos.Epoch)
		}
	}
	if latest, err := s.Choose("latest"); err != nil || latest.Pos != s.Committed() {
		t.Errorf("latest is %v, %v; committed is %v", latest.Pos, err, s.Committed())
	}
	must(s.Close())
}
