package standby_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
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

var (
	disks = []delta.Disk{{Name: "vda", Size: 24 * 4096}, {Name: "vdb", Size: 5*4096 + 1536}}
	oldGn = delta.Generation{7}
	newGn = delta.Generation{8}
)

// history is a replica with points and a copy of each.
type history struct {
	cuts map[delta.Pos]map[string][]byte
	pos  []delta.Pos // committed, oldest first
	now  time.Time
}

func (y *history) store(h *blocktest.Host) points.Config {
	return points.Config{
		FS: fsx.Sub(h.FS, "store"), VM: delta.VM{1}, Limits: points.Limits{SpoolStep: 8192},
		Bases: func(disk string, size int64) (block.Device, error) { return h.Disk(disk, size), nil },
		Now:   func() time.Time { return y.now },
	}
}

// make seeds a store and commits n epochs, one point each; the last ones are
// not applied.
func (y *history) make(h *blocktest.Host, n, unapplied int) error {
	*y = history{cuts: map[delta.Pos]map[string][]byte{}, now: time.Unix(1_700_000_000, 0)}
	if err := h.FS.MkdirAll("store"); err != nil {
		return err
	}
	s, err := points.Create(y.store(h), disks)
	if err != nil {
		return err
	}
	defer s.Close()
	content := map[string][]byte{}
	for i, d := range disks {
		content[d.Name] = overlaytest.Random(uint64(100+i), d.Size)
		if err := s.SeedAssume(d.Name); err != nil {
			return err
		}
	}
	var parent delta.Pos
	for e := range n {
		y.now = y.now.Add(20 * time.Second)
		if parent, err = y.epoch(s, content, parent, uint64(e+1)); err != nil {
			return err
		}
		if e < n-unapplied {
			if err := s.ApplyAll(context.Background()); err != nil {
				return err
			}
			for did := true; did; {
				if did, err = s.Step(context.Background()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// epoch changes some granules, the first epoch all of them, and commits it.
func (y *history) epoch(s *points.Store, content map[string][]byte, parent delta.Pos, e uint64) (delta.Pos, error) {
	spec := delta.Spec{
		Header: delta.Header{VM: delta.VM{1}, Generation: oldGn, Epoch: e, Nonce: e, Parent: parent, Disks: disks},
		Info:   delta.ManifestInfo{Cut: y.now},
	}
	for i, d := range disks {
		rs := []block.Range{{Off: 0, Len: d.Size}}
		if e > 1 {
			rs = []block.Range{{Off: int64(e%5) * 4096, Len: 4096}}
			copy(content[d.Name][rs[0].Off:rs[0].End()], overlaytest.Random(e*10+uint64(i), 4096))
		}
		spec.Changed = append(spec.Changed, rs)
		spec.Content = append(spec.Content, content[d.Name])
	}
	b, err := spec.Build()
	if err != nil {
		return delta.Pos{}, err
	}
	hd, err := delta.ParseHeader(b.Header)
	if err != nil {
		return delta.Pos{}, err
	}
	r, err := s.Begin(hd)
	if err != nil {
		return delta.Pos{}, err
	}
	for _, c := range b.Chunks {
		if err := r.Chunk(c); err != nil {
			return delta.Pos{}, err
		}
	}
	pos, err := r.Commit(b.Manifest)
	y.pos = append(y.pos, pos)
	y.cuts[pos] = map[string][]byte{}
	for n, c := range content {
		y.cuts[pos][n] = bytes.Clone(c)
	}
	return pos, err
}

// run is a failover to one of the states and what became of it.
type run struct {
	y                  history
	g                  *overlaytest.Guest
	at                 delta.Pos
	made, commit, done bool
}

func (r *run) config(h *blocktest.Host, shared bool) standby.Config {
	c := standby.Config{
		Store: r.y.store(h),
		Overlay: overlay.Config{
			FS:   fsx.Sub(h.FS, "over"),
			Data: func(disk string, size int64) (block.Device, error) { return h.Disk(disk+".over", size), nil },
		},
		Image: func(disk string) (block.Device, error) {
			for _, d := range disks {
				if d.Name == disk {
					return h.Disk(disk, d.Size), nil
				}
			}
			return nil, fmt.Errorf("no disk %s", disk)
		},
	}
	if shared {
		c.Overlay.Shared, c.Overlay.BootID = fsx.Sub(h.FS, "shm"), "boot-1"
	}
	return c
}

// life fails over to a state, works, commits, and flattens while the guest
// goes on. back counts from the newest state.
func (r *run) life(h *blocktest.Host, seed uint64, back, unapplied int, shared bool) error {
	*r = run{}
	err := h.Setup(func() error {
		return errors.Join(r.y.make(h, 5, unapplied), h.FS.MkdirAll("over"), h.FS.MkdirAll("shm"))
	})
	if err != nil {
		return err
	}
	r.at = r.y.pos[len(r.y.pos)-1-back]
	r.g = overlaytest.NewGuest(seed, disks, r.y.cuts[r.at])
	head := overlay.Head{VM: delta.VM{1}, Generation: newGn, At: r.at, Disks: disks, Created: r.y.now}
	if err := overlay.Create(fsx.Sub(h.FS, "over"), head); err != nil {
		return err
	}
	r.made = true
	s, err := standby.Open(r.config(h, shared))
	if err != nil {
		return err
	}
	defer s.Close()
	for range 8 {
		if err := r.g.Act(s.Disk); err != nil {
			return err
		}
	}
	if err := s.Commit(); err != nil {
		return err
	}
	r.commit = true
	n := 0
	err = s.Flatten(context.Background(), func(context.Context, int64) error {
		if n++; n%3 != 0 {
			return nil
		}
		return r.g.Act(s.Disk)
	})
	if err != nil {
		return err
	}
	r.done = true
	return nil
}

// recheck opens what a crash left. What was not committed is cancelled, every
// state of the replica is still there; else it is flattened to what was seen.
func (r *run) recheck(h *blocktest.Host, g *overlaytest.Guest, shared bool) error {
	info, err := overlay.Read(fsx.Sub(h.FS, "over"))
	if errors.Is(err, fs.ErrNotExist) && !r.made {
		return r.cancelled(h)
	}
	if err != nil {
		return err
	}
	if r.commit && info.Phase == overlay.Running || r.done && info.Phase != overlay.Done {
		return fmt.Errorf("the overlay is %s", info.Phase)
	}
	s, err := standby.Open(r.config(h, shared))
	if err != nil {
		return err
	}
	seen := map[string][]byte{}
	for _, d := range disks {
		if seen[d.Name], err = overlaytest.ReadAll(s.Disk(d.Name)); err == nil {
			err = g.Allowed(d.Name, seen[d.Name])
		}
		if err != nil {
			return errors.Join(fmt.Errorf("phase %s: %w", info.Phase, err), s.Close())
		}
	}
	if info.Phase == overlay.Running {
		if err := errors.Join(s.Close(), overlay.Remove(fsx.Sub(h.FS, "over"))); err != nil {
			return err
		}
		return r.cancelled(h)
	}
	if err := errors.Join(s.Flatten(context.Background(), nil), s.Close()); err != nil {
		return err
	}
	for _, d := range disks {
		if !bytes.Equal(h.Disk(d.Name, d.Size).Content(), seen[d.Name]) {
			return fmt.Errorf("disk %s is not what the guest saw after the flattening", d.Name)
		}
	}
	return r.sealed(h)
}

// cancelled: the replica is what it was.
func (r *run) cancelled(h *blocktest.Host) error {
	s, err := points.Open(r.y.store(h))
	if err != nil {
		return err
	}
	defer s.Close()
	if c := s.Committed(); c != r.y.pos[len(r.y.pos)-1] {
		return fmt.Errorf("the replica stands at %v after the cancel", c)
	}
	if err := s.ApplyAll(context.Background()); err != nil {
		return err
	}
	found := 0
	for _, p := range r.y.pos {
		v, err := s.View(p)
		if errors.Is(err, points.ErrNoPoint) {
			continue
		}
		if err != nil {
			return err
		}
		found++
		for _, d := range disks {
			dev, err := v.Disk(d.Name)
			if err != nil {
				return err
			}
			got, err := overlaytest.ReadAll(dev)
			if err != nil || !bytes.Equal(got, r.y.cuts[p][d.Name]) {
				return fmt.Errorf("state %v is not what was committed: %w", p, errors.Join(err, errors.New("differs")))
			}
		}
		if err := v.Close(); err != nil {
			return err
		}
	}
	if found < 3 {
		return fmt.Errorf("only %d states are left", found)
	}
	return nil
}

// sealed: no state of before can be read, and what was rolled back is known.
func (r *run) sealed(h *blocktest.Host) error {
	s, err := points.Open(r.y.store(h))
	if err != nil {
		return err
	}
	defer s.Close()
	if st := s.Status(); st.State != points.Promoted || st.Seal.At != r.at || st.Seal.Generation != newGn {
		return fmt.Errorf("the store is %s, seal %+v", st.State, st.Seal)
	}
	for _, p := range r.y.pos {
		if _, err := s.View(p); !errors.Is(err, points.ErrPromoted) {
			return fmt.Errorf("state %v can be viewed after the promotion: %w", p, err)
		}
	}
	ranges, err := points.RolledBack(fsx.Sub(h.FS, "store"), r.at)
	if err != nil {
		return err
	}
	last := r.y.pos[len(r.y.pos)-1]
	for _, d := range disks {
		for off := int64(0); off < d.Size; off++ {
			if r.y.cuts[r.at][d.Name][off] != r.y.cuts[last][d.Name][off] && !covers(ranges[d.Name], off) {
				return fmt.Errorf("disk %s byte %d was rolled back and is not listed", d.Name, off)
			}
		}
	}
	return nil
}

func covers(rs []block.Range, off int64) bool {
	for _, r := range rs {
		if off >= r.Off && off < r.End() {
			return true
		}
	}
	return false
}

type choice struct {
	name            string
	back, unapplied int
}

func choices() []choice {
	return []choice{{"the newest state", 0, 0}, {"the newest state with a backlog", 0, 2}, {"an older point", 3, 0}, {"an older point below a backlog", 3, 1}}
}

// every is how many crash points are left out; KVMREPLICA_MODEL tries them all.
func every(n int) int {
	switch {
	case os.Getenv("KVMREPLICA_MODEL") != "":
		return 1
	case testing.Short():
		return 9 * n
	}
	return n
}

func TestAPowerCutAnywhereInAFailoverItsCommitOrTheFlattening(t *testing.T) {
	for i, c := range choices() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := &run{}
			blocktest.SweepWith(t, blocktest.Options{MaxAll: 4, Random: 3, Every: every(3), NoKill: true}, func(h *blocktest.Host) error {
				return r.life(h, uint64(i+1), c.back, c.unapplied, false)
			}, func(h *blocktest.Host) error { return r.recheck(h, r.g, false) })
		})
	}
}

func TestADeathOfTheProcessAnywhereInAFailoverItsCommitOrTheFlattening(t *testing.T) {
	for i, c := range choices() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := &run{}
			blocktest.SweepWith(t, blocktest.Options{MaxAll: 2, Random: 1, Every: every(4), NoCut: true}, func(h *blocktest.Host) error {
				return r.life(h, uint64(i+1), c.back, c.unapplied, true)
			}, func(h *blocktest.Host) error {
				if r.g == nil {
					return r.recheck(h, nil, true)
				}
				return r.recheck(h, r.g.Strict(), true)
			})
		})
	}
}
