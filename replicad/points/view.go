package points

import (
	"errors"
	"fmt"
	"sync"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// View is a committed state as read-only devices: unapplied spools, newest
// first, over undo as of the state, over the images. It stays exact while
// epochs are applied, points are made, dropped and thinned.
type View struct {
	s     *Store
	at    mark
	sizes []int64

	mu     sync.Mutex
	reads  chan *chunkReader // idle readers; one per concurrent read
	closed bool
}

// viewReaders bounds the chunk readers a view keeps (4 MiB each).
const viewReaders = 4

// View opens the state at pos: the committed position, a point's, or the
// applied one unless a batch is under way. Apply will make a point of it when it gets there, so that it can be kept apart
// from what follows.
func (s *Store) View(pos delta.Pos) (*View, error) {
	v, err := s.view(pos)
	if err != nil {
		return nil, fmt.Errorf("view %v: %w", pos, err)
	}
	return v, nil
}

func (s *Store) view(pos delta.Pos) (*View, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, size, err := s.viewable(pos)
	if err != nil {
		return nil, err
	}
	s.pins[at.ordinal]++
	s.signal() // the state becomes a point, if it is none
	return &View{s: s, at: at, sizes: size, reads: make(chan *chunkReader, viewReaders)}, nil
}

// viewable finds a state that can be read exactly, now and later; s.mu is held.
func (s *Store) viewable(pos delta.Pos) (mark, []int64, error) {
	switch {
	case s.closed:
		return mark{}, nil, fmt.Errorf("%w: the store is closed", ErrState)
	case s.sup.role == rolePromoted || s.sup.role == roleRolling && pos != s.sup.seal:
		return mark{}, nil, ErrPromoted
	case s.sup.flags&superSuspect != 0:
		return mark{}, nil, ErrSuspect
	case s.sup.role != roleRolling && s.committed.pos.IsZero():
		return mark{}, nil, ErrSeeding
	}
	none := ErrNoPoint
	for i := range s.segs {
		g := s.segs[i]
		switch {
		case g.leaving || g.start.pos != pos:
			continue
		case g.damage != nil:
			none = g.damage // unless the images or the spool have it
			continue
		}
		if err := s.readable(i); err != nil {
			return mark{}, nil, err
		}
		return g.start, g.sizes, nil
	}
	switch {
	case pos == s.committed.pos && len(s.epochs) > 0:
		return s.committed, s.latest(), nil
	case pos == s.sup.applied.pos && s.must <= s.sup.applied.ordinal:
		// The images are exactly there; apply makes a point of it first.
		return s.sup.applied, sizes(s.sup.diskList(), nil), nil
	case pos == s.sup.applied.pos:
		return mark{}, nil, fmt.Errorf("%w: the images are half way to a later state", ErrNoPoint)
	}
	return mark{}, nil, none
}

// DisksAt are the disks there were at pos, with the sizes they had; pos must be
// viewable.
func (s *Store) DisksAt(pos delta.Pos) ([]delta.Disk, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, sizes, err := s.viewable(pos)
	if err != nil {
		return nil, err
	}
	return s.sup.present(sizes), nil
}

// readable reports the damage that keeps the point before segment i from being
// read; s.mu is held.
func (s *Store) readable(i int) error {
	for _, g := range s.segs[i:] {
		if g.damage != nil {
			return g.damage
		}
	}
	if s.lost || s.segs[i].start.ordinal < s.floor {
		return fmt.Errorf("%w: the undo after it is lost", ErrDamaged)
	}
	return nil
}

// Pos is the viewed position.
func (v *View) Pos() delta.Pos { return v.at.pos }

// Disks are the disks there were then.
func (v *View) Disks() []delta.Disk {
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	return v.s.sup.present(v.sizes)
}

// Close lets go of the state. Reads under way end with their data.
func (v *View) Close() error {
	v.mu.Lock()
	if v.closed {
		v.mu.Unlock()
		return nil
	}
	v.closed = true
	v.mu.Unlock()
	for {
		select {
		case r := <-v.reads:
			r.close()
			continue
		default:
		}
		break
	}
	s := v.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pins[v.at.ordinal]--; s.pins[v.at.ordinal] == 0 {
		delete(s.pins, v.at.ordinal)
	}
	if len(s.pins) == 0 {
		for _, g := range s.segs {
			if g.closed {
				g.unload()
			}
		}
	}
	s.signal()
	return nil
}

// Disk is one disk of the view, read-only; closing it does nothing.
func (v *View) Disk(name string) (block.Device, error) {
	v.s.mu.Lock()
	i := v.s.diskIndex(name)
	v.s.mu.Unlock()
	if i < 0 || sizeOf(v.sizes, i) == 0 {
		return nil, fmt.Errorf("view %v: %w: no disk %s", v.at.pos, ErrDisks, name)
	}
	return &viewDisk{v: v, disk: i, size: v.sizes[i]}, nil
}

func (v *View) reader() (*chunkReader, error) {
	select {
	case r := <-v.reads:
		return r, nil
	default:
		return newChunkReader(2)
	}
}

func (v *View) release(r *chunkReader) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.closed {
		select {
		case v.reads <- r:
			return
		default:
		}
	}
	r.close()
}

// viewDisk is one disk of a view.
type viewDisk struct {
	v    *View
	disk int
	size int64
}

var _ block.Device = (*viewDisk)(nil)

// ReadAt implements block.Device.
func (d *viewDisk) ReadAt(p []byte, off int64) (int, error) {
	if err := block.Check(off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	r, err := d.v.reader()
	if err != nil {
		return 0, err
	}
	defer d.v.release(r)
	done := 0
	for done < len(p) {
		n := min(len(p)-done, delta.MaxRaw)
		if err := d.v.s.readAt(d.v.at.ordinal, d.disk, p[done:done+n], off+int64(done), r); err != nil {
			return done, fmt.Errorf("read state %v: %w", d.v.at.pos, err)
		}
		done += n
	}
	return done, nil
}

// readAt reads the state at ordinal o. Where a spool up to o has the bytes,
// they are there, immutable. Elsewhere the image is read first and the undo
// index asked second: apply publishes undo before it overwrites, so bytes
// without undo were read before they changed.
func (s *Store) readAt(o uint64, disk int, p []byte, off int64, r *chunkReader) error {
	layers, err := s.layers(o)
	if err != nil {
		return err
	}
	defer s.unref(layers)
	end := off + int64(len(p))
	at := off
	for pc := range overlay(layers, disk, off, end) {
		if err := s.readBelow(o, disk, p[at-off:pc.Off-off], at); err != nil {
			return err
		}
		if err := r.read(pc, p[pc.Off-off:pc.End()-off]); err != nil {
			return err
		}
		at = pc.End()
	}
	return s.readBelow(o, disk, p[at-off:], at)
}

// layers takes references to the spools between the images and o.
func (s *Store) layers(o uint64) ([]*epoch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.alive(o); err != nil {
		return nil, err
	}
	var out []*epoch
	for _, e := range s.epochs {
		if e.ordinal <= o {
			e.refs++
			out = append(out, e)
		}
	}
	return out, nil
}

// alive reports whether a state can still be read; s.mu is held.
func (s *Store) alive(o uint64) error {
	switch {
	case s.closed:
		return block.ErrClosed
	case s.sup.role == rolePromoted || o < s.floor:
		return ErrGone
	case s.sup.role == roleRolling && o != s.rolling:
		return ErrGone // but the state that is being rolled back to
	}
	return nil
}

// readBelow reads what no spool has.
func (s *Store) readBelow(o uint64, disk int, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if err := s.readBase(o, disk, p, off); err != nil {
		return err
	}
	segs, err := s.undoSince(o)
	if err != nil {
		return err
	}
	defer s.unrefSegments(segs)
	return patch(segs, disk, p, off)
}

// readBase reads an image; what a later size adds to it reads as zeros.
func (s *Store) readBase(o uint64, disk int, p []byte, off int64) error {
	base, done, err := s.holdBase(disk)
	if err != nil {
		return err
	}
	defer done()
	s.mu.Lock()
	err = s.alive(o)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	have := int64(0)
	if base != nil {
		have = min(max(base.Size()-off, 0), int64(len(p)))
	}
	clear(p[have:])
	if have == 0 {
		return nil
	}
	return readFull(base, p[:have], off)
}

// undoSince takes references to the segments from the state o on, oldest first.
func (s *Store) undoSince(o uint64) ([]*segment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.alive(o); err != nil {
		return nil, err
	}
	var out []*segment
	for _, g := range s.segs {
		if g.start.ordinal < o { // also a damaged one: a view over it is refused
			continue
		}
		if g.damage != nil {
			return nil, g.damage
		}
		out = append(out, g)
	}
	for _, g := range out {
		g.refs++
	}
	return out, nil
}

// patch puts the saved granules of [off, off+len(p)) over p; the oldest
// segment that has one counts.
func patch(segs []*segment, disk int, p []byte, off int64) error {
	first, last := off/granule, (off+int64(len(p))-1)/granule
	var found []bool
	for _, g := range segs {
		hits, err := g.within(keyOf(disk, first), keyOf(disk, last+1))
		if err != nil {
			return err
		}
		for _, e := range hits {
			if found == nil {
				found = make([]bool, last-first+1)
			}
			i := e.key.granule() - first
			if found[i] {
				continue
			}
			found[i] = true
			if err := patchGranule(g, e, p, off); err != nil {
				return err
			}
		}
	}
	return nil
}

func patchGranule(g *segment, e undoEntry, p []byte, off int64) error {
	var b [granule]byte
	if err := g.read(e, b[:]); err != nil {
		return err
	}
	from := e.key.granule() * granule
	lo, hi := max(off, from), min(off+int64(len(p)), from+granule)
	copy(p[lo-off:hi-off], b[lo-from:hi-from])
	return nil
}

// unrefSegments lets go of segments and removes those that were dropped.
func (s *Store) unrefSegments(gs []*segment) {
	s.mu.Lock()
	var dead []*segment
	for _, g := range gs {
		if g.refs--; g.refs == 0 && g.dead {
			dead = append(dead, g)
		}
	}
	s.mu.Unlock()
	for _, g := range dead {
		s.removeSegment(g)
	}
}

// removeSegment deletes a segment that nothing refers to. A failure is no harm:
// a file covered by a merged one is found and removed at the next open, a
// dropped oldest one is a point more.
func (s *Store) removeSegment(g *segment) {
	if err := errors.Join(g.file.Close(), s.cfg.FS.Remove(g.name())); err != nil {
		s.log.Warn("undo segment not removed", "file", g.name(), "err", err)
	}
}

// WriteAt implements block.Device.
func (d *viewDisk) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// ZeroAt implements block.Device.
func (d *viewDisk) ZeroAt(int64, int64, bool) error { return block.ErrReadOnly }

// Sync implements block.Device.
func (d *viewDisk) Sync() error { return nil }

// Size implements block.Device.
func (d *viewDisk) Size() int64 { return d.size }

// Close implements block.Device.
func (d *viewDisk) Close() error { return nil }
