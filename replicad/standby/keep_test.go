package standby_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/overlay/overlaytest"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/standby"
)

// states reads every state of a copied store and compares it with what was
// committed.
func (y *history) states(dir string) (int, error) {
	var cfg points.Config
	if err := (&points.Dir{Path: dir, ReadOnly: true}).Configure(&cfg); err != nil {
		return 0, err
	}
	s, err := points.Open(cfg)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	all, err := append([]points.Point{{Pos: s.Committed()}}, s.Points()...), error(nil)
	for _, p := range all {
		v, verr := s.View(p.Pos)
		if verr != nil {
			return 0, verr
		}
		for _, d := range disks {
			dev, derr := v.Disk(d.Name)
			if derr != nil {
				return 0, derr
			}
			got, rerr := overlaytest.ReadAll(dev)
			if rerr != nil || !bytes.Equal(got, y.cuts[p.Pos][d.Name]) {
				err = errors.Join(err, rerr, fmt.Errorf("disk %s at %v is not what was committed", d.Name, p.Pos))
			}
		}
		err = errors.Join(err, v.Close())
	}
	return len(all) - 1, err
}

// begun is a failover that is on trial.
func (r *run) begun(h *blocktest.Host, back, unapplied int) (*standby.Standby, error) {
	*r = run{}
	if err := errors.Join(r.y.make(h, 5, unapplied), h.FS.MkdirAll("over"), h.FS.MkdirAll("shm")); err != nil {
		return nil, err
	}
	r.at = r.y.pos[len(r.y.pos)-1-back]
	r.g = overlaytest.NewGuest(3, disks, r.y.cuts[r.at])
	err := overlay.Create(fsx.Sub(h.FS, "over"), overlay.Head{VM: delta.VM{1}, Generation: newGn, At: r.at, Disks: disks, Created: r.y.now})
	if err != nil {
		return nil, err
	}
	return standby.Open(r.config(h, false))
}

// The points are copied under a guest that writes, whatever is not applied yet
// and however old they are; the copy is what was committed, also after the
// originals have ended.
func TestPointsAreKeptBeforeTheCommitUnderTheGuest(t *testing.T) {
	for _, c := range append(choices(), choice{"the applied state below a backlog", 2, 2}) {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r, h, dir := &run{}, blocktest.NewHost(), filepath.Join(t.TempDir(), "kept")
			s, err := r.begun(h, c.back, c.unapplied)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			r.y.now = r.y.now.Add(100 * 24 * time.Hour) // the default policy keeps none of them
			act := func() {
				t.Helper()
				if err := r.g.Act(s.Disk); err != nil {
					t.Fatal(err)
				}
			}
			act()
			before, err := s.History()
			if err != nil || before.Points == 0 || before.Since == "" || c.unapplied > 0 && before.Spool == 0 {
				t.Fatalf("the history: %+v, %v", before, err)
			}
			k, err := s.KeepPoints(context.Background(), dir)
			if err != nil {
				t.Fatal(err)
			}
			if k.Points < before.Points {
				t.Errorf("%d points were kept of %d", k.Points, before.Points)
			}
			act()
			if _, err := s.KeepPoints(context.Background(), dir); !errors.Is(err, fs.ErrExist) {
				t.Errorf("a copy was written over: %v", err)
			}
			if err := errors.Join(s.Commit(), s.Flatten(context.Background(), nil)); err != nil {
				t.Fatal(err)
			}
			act()
			if _, err := s.KeepPoints(context.Background(), dir+"2"); !errors.Is(err, standby.ErrEnded) {
				t.Errorf("after the commit: %v", err)
			}
			if _, err := s.History(); !errors.Is(err, standby.ErrEnded) {
				t.Errorf("after the commit: %v", err)
			}
			for _, d := range disks {
				got, err := overlaytest.ReadAll(s.Disk(d.Name))
				if err = errors.Join(err, r.g.Allowed(d.Name, got)); err != nil {
					t.Error(err)
				}
			}
			n, err := r.y.states(dir)
			if err != nil || n != k.Points {
				t.Errorf("%d of %d points can be read: %v", n, k.Points, err)
			}
		})
	}
}

// Who wants a copy goes away: nothing is left of it, and the trial can be ended
// either way.
func TestACopyThatNobodyWaitsForLeavesNothing(t *testing.T) {
	t.Parallel()
	r, h, dir := &run{}, blocktest.NewHost(), filepath.Join(t.TempDir(), "kept")
	s, err := r.begun(h, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	gone, leave := context.WithCancel(context.Background())
	leave()
	if _, err := s.KeepPoints(gone, dir); !errors.Is(err, context.Canceled) {
		t.Fatalf("nobody waits: %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left over: %v", err)
	}
	if err := errors.Join(s.Close(), overlay.Remove(fsx.Sub(h.FS, "over")), r.cancelled(h)); err != nil {
		t.Fatal(err)
	}
}

// sharing is an image on a file system that shares blocks.
type sharing struct{ block.Device }

func (c sharing) Clone(dst *os.File) error {
	return block.Copy(context.Background(), dst, c.Device, nil)
}

// Where the file system can, the copy shares the images' blocks.
func TestKeptImagesShareTheirBlocksWhereTheyCan(t *testing.T) {
	t.Parallel()
	r, h := &run{}, blocktest.NewHost()
	first, err := r.begun(h, 1, 0)
	if err := errors.Join(err, first.Close()); err != nil {
		t.Fatal(err)
	}
	c := r.config(h, false)
	plain := c.Image
	c.Image = func(disk string) (block.Device, error) {
		dev, err := plain(disk)
		return sharing{dev}, err
	}
	s, err := standby.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	dir := filepath.Join(t.TempDir(), "kept")
	k, err := s.KeepPoints(context.Background(), dir)
	if err != nil || !k.Shared {
		t.Fatalf("copied: %+v, %v", k, err)
	}
	if _, err := r.y.states(dir); err != nil {
		t.Error(err)
	}
}

// The process that serves a trial is not the one who decides what is kept: all
// points there are, and those that what is left to apply makes, can be copied
// and are there after a cancel, whatever its own policy would say.
func TestATrialDropsNoPointWhateverItsPolicy(t *testing.T) {
	t.Parallel()
	r, h, dir := &run{}, blocktest.NewHost(), filepath.Join(t.TempDir(), "kept")
	s, err := r.begun(h, 3, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c := r.config(h, false)
	c.Store.Policy = points.Policy{Grid: []points.Row{}} // none
	if s, err = standby.Open(c); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	before, err := s.History()
	if err != nil {
		t.Fatal(err)
	}
	k, err := s.KeepPoints(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := r.y.states(dir); err != nil || n != k.Points || k.Points <= before.Points || k.Points != len(r.y.pos)-1 {
		t.Errorf("%d of %d points can be read, there were %d and 3 epochs to apply: %v", n, k.Points, before.Points, err)
	}
	if err := errors.Join(s.Close(), overlay.Remove(fsx.Sub(h.FS, "over")), r.cancelled(h)); err != nil {
		t.Fatal(err)
	}
}
