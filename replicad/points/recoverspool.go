package points

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

func newDecoder() (*delta.ChunkDecoder, error) { return delta.NewChunkDecoder() }

// candidate is a slot that may hold an epoch after the applied one.
type candidate struct {
	*epoch
	whole bool // a verified manifest over verified chunks
}

// recoverSpool finds the committed epochs: from the applied position on, each
// one whole and the child of the one before. At most one partial epoch may
// follow. Anything newer proves that something committed is damaged.
func (s *Store) recoverSpool(clean bool) error {
	found, err := s.scanSlots()
	if err != nil {
		return err
	}
	for len(found) > 0 {
		c := found[0]
		if !c.whole || c.ordinal != s.committed.ordinal+1 || c.head.Parent != s.committed.pos || s.disksFor(c.head.Disks) == nil {
			break
		}
		s.commitMark(c.epoch)
		found = found[1:]
	}
	for _, c := range found {
		next := c.ordinal == s.committed.ordinal+1
		child := c.head.Parent == s.committed.pos
		switch {
		case next && child && !c.whole && s.partial == nil:
			s.partial = c.epoch
		case next && !c.whole:
			// Superseded by a later attempt in another slot: must never count.
			if err := s.invalidate(c.slot); err != nil {
				return err
			}
		default:
			s.damage = append(s.damage, &DamageError{
				File: slotName(c.number),
				Text: fmt.Sprintf("epoch %d (commit %d) is here, but commit %d after %v is not readable", c.head.Epoch, c.ordinal, s.committed.ordinal+1, s.committed.pos),
			})
			s.epochsBehind(c.epoch)
		}
	}
	if s.sup.role == roleSeeding {
		s.must = s.committed.ordinal // a first batch, which has no undo, may have begun
	}
	if clean || s.cfg.ReadOnly {
		return nil
	}
	for _, e := range s.epochs {
		if err := rewrite(e.slot.file, 0, e.end); err != nil {
			return err
		}
	}
	if s.partial != nil {
		return rewrite(s.partial.slot.file, 0, s.partial.end)
	}
	return nil
}

// epochsBehind keeps the slot of an unreachable epoch from being reused.
func (s *Store) epochsBehind(e *epoch) { s.stranded = append(s.stranded, e.slot) }

// scanSlots opens every slot; those without an epoch newer than the applied
// one become free. The others come sorted by ordinal.
func (s *Store) scanSlots() ([]candidate, error) {
	names, err := s.cfg.FS.List(spoolDir)
	if err != nil {
		return nil, fmt.Errorf("list spool: %w", err)
	}
	var found []candidate
	for _, name := range names {
		n, ok := parseSlotName(name)
		if !ok {
			continue
		}
		s.nextSlot = max(s.nextSlot, n+1)
		sl, err := openSlot(s.cfg.FS, n)
		if err != nil {
			return nil, err
		}
		c, err := s.scanSlot(sl)
		if err != nil {
			return nil, errors.Join(err, sl.file.Close())
		}
		if c.epoch == nil {
			s.free = append(s.free, sl)
			continue
		}
		found = append(found, c)
	}
	slices.SortFunc(found, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.ordinal, b.ordinal), cmp.Compare(a.number, b.number))
	})
	return found, nil
}

// scanSlot reads one slot and verifies every record of it.
func (s *Store) scanSlot(sl *slot) (candidate, error) {
	b := make([]byte, slotBlock)
	if n, err := sl.file.ReadAt(b, 0); n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			return candidate{}, nil
		}
		return candidate{}, fmt.Errorf("read spool: %w", err)
	}
	h := decodeSlotHead(b, s.sup.store, sl.number)
	if h == nil || h.ordinal <= s.sup.applied.ordinal {
		return candidate{}, nil
	}
	e := s.newEpoch(sl, *h)
	if e == nil {
		return candidate{epoch: &epoch{slot: sl, slotHead: *h}}, nil
	}
	for {
		r, frame, ok, err := sl.readRecord(e.use, e.end)
		if err != nil || !ok {
			return candidate{epoch: e}, err
		}
		if r.typ == delta.FrameManifest {
			m, err := delta.ParseManifest(frame)
			if err != nil || m.Matches(&e.head) != nil || e.tally.Check(&m) != nil {
				return candidate{epoch: e}, nil
			}
			e.seal(&m, r)
			return candidate{epoch: e, whole: true}, nil
		}
		c, err := s.dec.Decode(frame)
		if err != nil || c.Check(&e.head) != nil || c.Index != r.index || c.Index != e.tally.Len() || e.add(&c, r) != nil {
			return candidate{epoch: e}, nil
		}
	}
}

// newEpoch returns an empty epoch in a slot, nil when its disks are not ours.
func (s *Store) newEpoch(sl *slot, h slotHead) *epoch {
	disks := s.disksFor(h.head.Disks)
	if disks == nil {
		return nil
	}
	e := &epoch{slot: sl, slotHead: h, disks: disks, index: make([][]spoolExtent, len(s.sup.disks)), sizes: make([]int64, len(s.sup.disks)), end: slotBlock}
	for i, d := range disks {
		e.sizes[d] = h.head.Disks[i].Size
	}
	return e
}

// seal turns a partial epoch into a whole one.
func (e *epoch) seal(m *delta.Manifest, r record) {
	e.manifest, e.end = r, r.end()
	e.bytes = e.end
	e.mark = mark{pos: m.Pos(), ordinal: e.ordinal, at: r.at, cut: m.Cut, chunks: m.Chunks, app: m.App, config: m.Config}
	for _, b := range m.Firmware {
		switch b.Kind {
		case delta.BlobNVRAM:
			e.mark.nvram = b.Digest()
		case delta.BlobTPM:
			e.mark.tpm = b.Digest()
		}
	}
}

// commitMark makes e the newest committed epoch; firmware state that did not
// travel is the parent's.
func (s *Store) commitMark(e *epoch) {
	if e.mark.nvram.IsZero() {
		e.mark.nvram = s.committed.nvram
	}
	if e.mark.tpm.IsZero() {
		e.mark.tpm = s.committed.tpm
	}
	s.committed = e.mark
	s.epochs = append(s.epochs, e)
}

// invalidate makes a slot's header unreadable for good and frees it.
func (s *Store) invalidate(sl *slot) error {
	if s.cfg.ReadOnly {
		return nil
	}
	if _, err := sl.file.WriteAt(make([]byte, slotBlock), 0); err != nil {
		return fmt.Errorf("clear spool: %w", err)
	}
	if err := sl.file.Sync(); err != nil {
		return &syncError{what: "spool", err: err}
	}
	s.free = append(s.free, sl)
	return nil
}

// rewrite writes [from, to) of a file again and syncs it: after an earlier
// failed or missing sync the kernel may hold it clean in memory only.
func rewrite(f fsx.File, from, to int64) error {
	b := make([]byte, min(1<<20, max(0, to-from)))
	for off := from; off < to; off += int64(len(b)) {
		p := b[:min(int64(len(b)), to-off)]
		if n, err := f.ReadAt(p, off); n < len(p) {
			return fmt.Errorf("read again at %d: %w", off, errors.Join(err, io.ErrUnexpectedEOF))
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return noSpace("write again", err)
		}
	}
	if err := f.Sync(); err != nil {
		return &syncError{what: "again", err: err}
	}
	return nil
}
