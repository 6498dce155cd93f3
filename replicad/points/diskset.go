package points

import (
	"fmt"
	"slices"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// The set of disks is a fact of each state, as their sizes are: a disk that an
// epoch does not list has size 0 in it and is absent. The superblock's list only
// grows, and a disk keeps its index for ever, because undo keys, spools and
// sizes go by it. What is older than a disk has shorter lists.

// sizeOf is the size of disk i in a list that may be older than the disk.
func sizeOf(sizes []int64, i int) int64 {
	if i >= len(sizes) {
		return 0
	}
	return sizes[i]
}

// present are the disks that are there, given the sizes.
func (s *super) present(sizes []int64) []delta.Disk {
	out := make([]delta.Disk, 0, len(s.disks))
	for i, d := range s.disks {
		if n := sizeOf(sizes, i); n > 0 {
			out = append(out, delta.Disk{Name: d.name, Size: n})
		}
	}
	return out
}

// absent are the names of the others.
func (s *super) absent(sizes []int64) []string {
	var out []string
	for i, d := range s.disks {
		if sizeOf(sizes, i) == 0 {
			out = append(out, d.name)
		}
	}
	return out
}

func sameSet(a, b []delta.Disk) bool {
	names := func(ds []delta.Disk) []string {
		out := make([]string, len(ds))
		for i, d := range ds {
			out[i] = d.Name
		}
		slices.Sort(out)
		return out
	}
	return slices.Equal(names(a), names(b))
}

// disksFor maps a header's disks to the store's, nil when it names one that
// the store does not know.
func (s *Store) disksFor(disks []delta.Disk) []int {
	out := make([]int, len(disks))
	for i, d := range disks {
		if out[i] = s.diskIndex(d.Name); out[i] < 0 {
			return nil
		}
	}
	return out
}

// strange says whether a header names a disk that the store never had.
func (s *Store) strange(h *delta.Header) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sup.role == roleReplica && s.cfg.Set != nil && s.disksFor(h.Disks) == nil
}

// admit asks whether the set of disks may change to that of an epoch, and makes
// new names durable before anything of the epoch is written: recovery of the
// spool finds them in the superblock. s.recv is held, and maint for a strange one.
func (s *Store) admit(disks []delta.Disk) error {
	s.mu.Lock()
	have := s.disks()
	known := s.sup.diskList()
	var fresh []string
	s.asked = nil
	for _, d := range disks {
		s.asked = append(s.asked, d.Name) // from here on Absent does not name it
		if s.diskIndex(d.Name) < 0 {
			fresh = append(fresh, d.Name)
		}
	}
	s.mu.Unlock()
	if sameSet(have, disks) {
		return nil
	}
	if n := len(known) + len(fresh); n > delta.MaxDisks {
		return fmt.Errorf("%w: with those that were removed this replica has had %d disks, %d are possible; end the protection and begin it anew: replicactl vm disable, then replicactl vm enable", ErrDisks, n, delta.MaxDisks)
	}
	if err := s.cfg.Set(slices.Clone(disks)); err != nil {
		return fmt.Errorf("%w: have %v, the epoch %v: %w", ErrDisks, have, disks, err)
	}
	return s.declare(fresh)
}

// declare adds disks that are absent so far.
func (s *Store) declare(names []string) error {
	if len(names) == 0 {
		return nil
	}
	sup := s.sup.clone()
	for _, n := range names {
		sup.disks = append(sup.disks, superDiskInfo{name: n})
	}
	s.grow.Lock()
	s.mu.Lock()
	s.bases = append(s.bases, make([]block.Device, len(names))...)
	s.mu.Unlock()
	s.grow.Unlock()
	s.log.Info("disks are new to the replica store", "disks", names)
	return s.putSuper(sup)
}

// Absent lists disks that were removed and that nothing has any more: neither
// the committed nor the applied state, no recovery point, no view, no epoch that
// is being received. Their images are closed and may be deleted; should such a
// disk come back, Config.Bases makes a new one. Whoever deletes images on this
// word keeps Config.Set from returning until that is done. It waits for nothing
// and may be called from Config.Set.
func (s *Store) Absent() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.damage) > 0 { // what cannot be read may have them
		return nil
	}
	var out []string
	for i, d := range s.sup.disks {
		if !s.needed(i) && (i >= len(s.bases) || s.bases[i] == nil) {
			out = append(out, d.name)
		}
	}
	return out
}

// needed says whether any state has disk i, or is about to; s.mu is held. What
// is viewed is a point, or in the backlog.
func (s *Store) needed(i int) bool {
	name := s.sup.disks[i].name
	if s.sup.disks[i].size > 0 || slices.Contains(s.asked, name) {
		return true
	}
	for _, e := range s.epochs {
		if sizeOf(e.sizes, i) > 0 {
			return true
		}
	}
	if p := s.partial; p != nil && slices.ContainsFunc(p.head.Disks, func(d delta.Disk) bool { return d.Name == name }) {
		return true
	}
	return s.undoSize(i) > 0
}

// undoSize is the largest size that a point has of disk i; s.mu is held.
func (s *Store) undoSize(i int) (n int64) {
	for _, g := range s.segs {
		n = max(n, sizeOf(g.sizes, i))
	}
	return n
}

// holdBase returns the image of a disk, which is not replaced before done is
// called; nil when there is none. The image of a removed disk is opened when a
// point is first read in it.
func (s *Store) holdBase(i int) (dev block.Device, done func(), err error) {
	s.grow.RLock()
	if i < len(s.bases) && s.bases[i] != nil {
		return s.bases[i], s.grow.RUnlock, nil
	}
	s.grow.RUnlock()
	if err := s.openLeft(i); err != nil {
		return nil, nil, err
	}
	s.grow.RLock()
	if i < len(s.bases) {
		dev = s.bases[i]
	}
	return dev, s.grow.RUnlock, nil
}

// openLeft opens the image that a removed disk left to points, if it did.
func (s *Store) openLeft(i int) error {
	s.grow.Lock()
	defer s.grow.Unlock()
	s.mu.Lock()
	closed, size, name := s.closed, s.undoSize(i), s.sup.disks[i].name
	s.mu.Unlock()
	switch {
	case closed:
		return block.ErrClosed
	case size == 0 || i >= len(s.bases) || s.bases[i] != nil:
		return nil
	}
	dev, err := s.cfg.Bases(name, size)
	if err != nil {
		return fmt.Errorf("open image of disk %s, which was removed and is in recovery points: %w", name, err)
	}
	s.setBase(i, dev)
	return nil
}

// setBase replaces an image; s.grow is held.
func (s *Store) setBase(i int, dev block.Device) {
	s.mu.Lock()
	s.bases[i] = dev
	s.mu.Unlock()
}

// base is holdBase for whoever holds maint: only that replaces open images.
func (s *Store) base(i int) (block.Device, error) {
	dev, done, err := s.holdBase(i)
	if err != nil {
		return nil, err
	}
	done()
	return dev, nil
}

// syncBases makes everything written into images durable.
func (s *Store) syncBases() error {
	s.grow.RLock()
	defer s.grow.RUnlock()
	for i, dev := range s.bases {
		if dev == nil {
			continue
		}
		if err := dev.Sync(); err != nil {
			return &syncError{what: "image of disk " + s.sup.disks[i].name, err: err}
		}
	}
	return nil
}

// letGoBases closes the images of removed disks that nothing has any more.
func (s *Store) letGoBases() {
	for i := range s.sup.disks {
		s.mu.Lock()
		idle := s.bases[i] != nil && !s.needed(i)
		s.mu.Unlock()
		if !idle {
			continue
		}
		s.grow.Lock() // readers under way end
		dev := s.bases[i]
		s.setBase(i, nil)
		s.grow.Unlock()
		if err := dev.Close(); err != nil { // what was written was synced, and nobody reads it again
			s.log.Warn("image of a removed disk not closed", "disk", s.sup.disks[i].name, "err", err)
		}
		s.log.Info("nothing needs the image of a removed disk any more", "disk", s.sup.disks[i].name)
	}
}
