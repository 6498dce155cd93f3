package points

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/zeebo/blake3"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// seeding says whether seed data may be taken; s.mu is held.
func (s *Store) seeding() error {
	if err := s.usable(); err != nil {
		return err
	}
	if s.sup.role != roleSeeding || !s.committed.pos.IsZero() {
		return ErrNotSeeding
	}
	if s.sup.flags&superSuspect != 0 {
		return ErrSuspect
	}
	return nil
}

func (s *Store) checkSeeding() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seeding()
}

// SeedChunk writes one chunk frame of a seed stream, which h opened, straight
// into the image. The chunks of a disk come in ascending order and may not
// start beyond what was received of it; ranges left out are taken as they are.
// Nothing counts before SeedFlush.
func (s *Store) SeedChunk(h *delta.Header, frame []byte) error {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	if err := s.seedChunk(h, frame); err != nil {
		return fmt.Errorf("seed: %w", err)
	}
	return nil
}

func (s *Store) seedChunk(h *delta.Header, frame []byte) error {
	if err := s.checkSeeding(); err != nil {
		return err
	}
	if err := h.Validate(); err != nil {
		return err
	}
	if !h.Seed || h.VM != s.sup.vm {
		return fmt.Errorf("%w: not a seed stream of this vm", ErrState)
	}
	c, err := s.dec.Decode(frame)
	if err != nil {
		return err
	}
	if err := c.Check(h); err != nil {
		return err
	}
	name := h.Disks[c.Disk].Name
	disk := s.diskIndex(name)
	if disk < 0 || h.Disks[c.Disk].Size != s.sup.disks[disk].size {
		return fmt.Errorf("%w: disk %s", ErrDisks, name)
	}
	cursor, ok := s.seeded[disk]
	if !ok {
		cursor = s.sup.disks[disk].cursor
	}
	if off := c.Extents[0].Off; off > cursor {
		return fmt.Errorf("%w: chunk at %d, disk %s is seeded up to %d", delta.ErrOrder, off, name, cursor)
	}
	dev := s.bases[disk]
	err = c.Each(func(x delta.Extent, data []byte) error {
		if data == nil {
			return dev.ZeroAt(x.Off, x.Len, x.Kind == delta.KindDiscard)
		}
		_, err := dev.WriteAt(data, x.Off)
		return err
	})
	if err != nil {
		return noSpace(fmt.Sprintf("write disk %s", name), err)
	}
	s.seeded[disk] = max(cursor, c.Extents[len(c.Extents)-1].End())
	if s.unsync += c.Covered(); s.unsync >= s.limits.SeedStep {
		_, err = s.seedFlush()
	}
	return err
}

// SeedFlush makes everything seeded durable and returns the cursors by disk.
func (s *Store) SeedFlush() (map[string]int64, error) {
	s.maint.Lock()
	defer s.maint.Unlock()
	if err := s.checkSeeding(); err != nil {
		return nil, fmt.Errorf("seed: %w", err)
	}
	m, err := s.seedFlush()
	if err != nil {
		return nil, fmt.Errorf("seed: %w", err)
	}
	return m, nil
}

func (s *Store) seedFlush() (map[string]int64, error) {
	sup := s.sup.clone()
	for i, cursor := range s.seeded {
		if err := s.bases[i].Sync(); err != nil {
			return nil, s.fail(&syncError{what: "image of disk " + sup.disks[i].name, err: err})
		}
		sup.disks[i].cursor = cursor
	}
	if len(s.seeded) > 0 {
		if err := s.putSuper(sup); err != nil {
			return nil, err
		}
	}
	clear(s.seeded)
	s.unsync = 0
	out := map[string]int64{}
	for _, d := range sup.disks {
		out[d.name] = d.cursor
	}
	return out, nil
}

// SeedCursor is the durable cursor of a disk.
func (s *Store) SeedCursor(disk string) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.diskIndex(disk)
	if i < 0 {
		return 0, fmt.Errorf("seed: %w: no disk %s", ErrDisks, disk)
	}
	return s.sup.disks[i].cursor, nil
}

// SeedAssume declares an image's content to be a good seed as it is; the
// caller compares it by Digests with a zero position and ships what differs in
// the first epoch.
func (s *Store) SeedAssume(disk string) error {
	s.maint.Lock()
	defer s.maint.Unlock()
	if err := s.checkSeeding(); err != nil {
		return fmt.Errorf("seed: %w", err)
	}
	i := s.diskIndex(disk)
	if i < 0 {
		return fmt.Errorf("seed: %w: no disk %s", ErrDisks, disk)
	}
	s.seeded[i] = s.sup.disks[i].size
	_, err := s.seedFlush()
	return err
}

// SeedResize follows disks that the primary gave another size before the first
// epoch. What was received stays; images become longer, never shorter.
func (s *Store) SeedResize(disks []delta.Disk) error {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	if err := s.seedResize(disks); err != nil {
		return fmt.Errorf("resize while seeding: %w", err)
	}
	return nil
}

func (s *Store) seedResize(disks []delta.Disk) error {
	if err := s.checkSeeding(); err != nil {
		return err
	}
	to := s.disksFor(disks)
	if to == nil || !sameSet(disks, s.sup.diskList()) {
		return fmt.Errorf("%w: have %v, the primary %v", ErrDisks, s.sup.diskList(), disks)
	}
	want := sizes(disks, to)
	if slices.Equal(want, sizes(s.sup.diskList(), nil)) {
		return nil
	}
	if _, err := s.seedFlush(); err != nil {
		return err
	}
	s.dropPartial()
	if err := s.growBases(want); err != nil {
		return s.fail(err)
	}
	sup := s.sup.clone()
	for i := range sup.disks {
		d := &sup.disks[i]
		if d.cursor = min(d.cursor, want[i]); d.cursor == d.size {
			d.cursor = want[i] // the rest is in the first epoch, whole
		}
		d.size = want[i]
	}
	if err := s.identify(sup); err != nil {
		return err
	}
	return s.putSuper(sup)
}

// maxDigestRange bounds one range of Digests.
const maxDigestRange = 1 << 20

// Digests hashes ranges of a disk at pos, which must be the committed
// position (zero while seeding): BLAKE3 keyed, the first 16 bytes of each. Of a
// range that ends behind the disk, or of a disk that is absent, it is zero, which
// no content has.
func (s *Store) Digests(ctx context.Context, pos delta.Pos, disk string, key [32]byte, ranges []block.Range) ([][16]byte, error) {
	dev, done, err := s.digestSource(pos, disk)
	if err != nil {
		return nil, fmt.Errorf("digests at %v: %w", pos, err)
	}
	defer done()
	for _, r := range ranges {
		if r.Len > maxDigestRange || block.Check(r.Off, r.Len, math.MaxInt64) != nil {
			return nil, fmt.Errorf("digests of disk %s [%d,+%d): %w", disk, r.Off, r.Len, block.ErrRange)
		}
	}
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		return nil, fmt.Errorf("digests: %w", err)
	}
	out := make([][16]byte, len(ranges))
	buf := make([]byte, maxDigestRange)
	for i, r := range ranges {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if block.Check(r.Off, r.Len, dev.Size()) != nil {
			continue // the primary's disk is longer by now: what is not here equals nothing
		}
		p := buf[:r.Len]
		if err := readFull(dev, p, r.Off); err != nil {
			return nil, fmt.Errorf("digests of disk %s: %w", disk, err)
		}
		h.Reset()
		_, _ = h.Write(p) // a hash never fails
		var sum [32]byte
		h.Sum(sum[:0])
		copy(out[i][:], sum[:])
	}
	return out, nil
}

// digestSource is what Digests reads: a view, or the image while seeding.
func (s *Store) digestSource(pos delta.Pos, disk string) (block.Device, func(), error) {
	s.mu.Lock()
	have := s.committed.pos
	seeding := s.sup.role == roleSeeding && have.IsZero()
	i := s.diskIndex(disk)
	s.mu.Unlock()
	switch {
	case i < 0:
		return nil, nil, fmt.Errorf("%w: no disk %s", ErrDisks, disk)
	case pos != have:
		return nil, nil, &delta.PosMismatchError{Have: have, Want: pos}
	case seeding:
		return s.seedBase(i)
	}
	v, err := s.view(pos)
	if err != nil {
		return nil, nil, err
	}
	return &viewDisk{v: v, disk: i, size: sizeOf(v.sizes, i)}, func() { _ = v.Close() }, nil // closing a view cannot fail
}

// seedBase is an image that is being seeded; it stays open until done is called.
func (s *Store) seedBase(i int) (dev block.Device, done func(), err error) {
	s.grow.RLock() // Close marks the store closed before it waits for this
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		s.grow.RUnlock()
		return nil, nil, fmt.Errorf("%w: the store is closed", ErrState)
	}
	return s.bases[i], s.grow.RUnlock, nil // all are there while seeding
}
