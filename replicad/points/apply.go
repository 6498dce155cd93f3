package points

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// Step does one bounded piece of background work: begin a new undo segment,
// apply a batch, drop or thin points. did is false when there was nothing to
// do. After an error other than ErrFailed it may be called again.
func (s *Store) Step(ctx context.Context) (did bool, err error) {
	s.maint.Lock()
	defer s.maint.Unlock()
	return s.step(ctx)
}

func (s *Store) step(ctx context.Context) (bool, error) {
	s.mu.Lock()
	err := s.receiving()
	s.mu.Unlock()
	if err != nil {
		return false, err
	}
	if err := s.ensureSegment(); err != nil {
		return false, err
	}
	s.letGoBases()
	did, err := s.makePoint()
	if !did && err == nil {
		did, err = s.applyBatch(ctx)
	}
	if !did && err == nil {
		did, err = s.thin(ctx)
	}
	if err = s.fail(err); err != nil && !errors.Is(err, ErrFailed) {
		return s.relieve(err)
	}
	return did, err
}

// Run steps until ctx ends, waiting when there is nothing to do. It returns
// ctx's cause, or the error of a step.
func (s *Store) Run(ctx context.Context) error {
	for {
		did, err := s.Step(ctx)
		if err != nil {
			return err
		}
		if did {
			continue
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wake:
		}
	}
}

// ApplyAll applies everything that is committed when it is called.
func (s *Store) ApplyAll(ctx context.Context) error {
	s.mu.Lock()
	goal := s.committed.ordinal
	s.mu.Unlock()
	for idle := 0; ; {
		s.mu.Lock()
		at := s.sup.applied.ordinal
		s.mu.Unlock()
		if at >= goal {
			return nil
		}
		did, err := s.Step(ctx)
		if err != nil {
			return fmt.Errorf("apply: %w", err)
		}
		if idle++; did {
			idle = 0
		}
		if idle > 8 { // one idle step is a view opened in between
			return fmt.Errorf("apply: commit %d of %d: %w: nothing moves", at, goal, ErrState)
		}
	}
}

// due reports whether the state m is to become a recovery point; s.mu is held.
func (s *Store) due(m mark) bool {
	if s.pins[m.ordinal] > 0 {
		return true
	}
	return m.app && len(s.policy.Grid) > 0 || s.policy.due(s.segs[len(s.segs)-1].start.at, m.at)
}

// makePoint closes the open segment when the applied state is due, and opens
// the next one. It never does so while a batch is half applied.
func (s *Store) makePoint() (bool, error) {
	s.mu.Lock()
	applied, n := s.sup.applied, len(s.segs)
	if s.lost || n == 0 || s.must > applied.ordinal {
		s.mu.Unlock()
		return false, nil
	}
	g := s.segs[n-1]
	due := g.closed || (g.start.ordinal < applied.ordinal && s.due(applied))
	s.mu.Unlock()
	if !due {
		return false, nil
	}
	if !g.closed {
		if err := g.close(applied); err != nil {
			return false, err
		}
		s.mu.Lock()
		g.closed, g.stop = true, applied.ordinal
		s.mu.Unlock()
	}
	return true, s.newSegment(g.hi + 1)
}

// newSegment opens segment lo at the applied state.
func (s *Store) newSegment(lo uint64) error {
	g, err := createSegment(s.cfg.FS, s.sup.store, lo, s.sup.applied, sizes(s.sup.diskList(), nil))
	if err != nil {
		return err
	}
	if err := s.beginUndo(); err != nil {
		return errors.Join(err, g.file.Close())
	}
	s.mu.Lock()
	s.segs = append(s.segs, g)
	s.lost, s.nextSegment = false, lo+1
	s.mu.Unlock()
	return nil
}

// batch chooses the epochs to apply together: up to the next point, or all.
// From then on no point is made before its end.
func (s *Store) batch() []*epoch {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.epochs) == 0 {
		return nil
	}
	undo := !s.lost && len(s.segs) > 0
	if at := s.sup.applied.ordinal; s.must <= at && s.pins[at] > 0 && (!undo || s.segs[len(s.segs)-1].start.ordinal < at) {
		s.signal() // a view of exactly this state was opened: a point first
		return nil
	}
	n := len(s.epochs)
	for i, e := range s.epochs {
		if e.ordinal >= s.must && (s.pins[e.ordinal] > 0 || undo && s.due(e.mark)) {
			n = i + 1
			break
		}
	}
	todo := s.epochs[:n:n]
	s.must = max(s.must, todo[n-1].ordinal)
	if !undo {
		s.floor = s.must // what is before is overwritten for good
	}
	for _, e := range todo {
		e.refs++
	}
	return todo
}

// applyBatch writes a batch into the images: undo first, synced; images,
// synced; the applied record; only then the spool is recycled. Any part of it
// may be repeated.
func (s *Store) applyBatch(ctx context.Context) (bool, error) {
	todo := s.batch()
	if len(todo) == 0 {
		return false, nil
	}
	defer s.unref(todo)
	last := todo[len(todo)-1]
	if err := s.growBases(last.sizes); err != nil {
		return false, err
	}
	if err := s.storeFirmware(todo, last.mark); err != nil {
		return false, err
	}
	sup := s.sup.clone()
	if s.undoWanted() {
		g := s.segs[len(s.segs)-1]
		if err := s.saveUndo(ctx, g, todo, last); err != nil {
			return false, fmt.Errorf("save undo: %w", err)
		}
		sup.undoLo, sup.undoEnd, sup.chain = g.lo, g.end, g.chain
	}
	if err := s.writeBases(ctx, todo, last); err != nil {
		return false, err
	}
	sup.role, sup.applied = roleReplica, last.mark
	if err := s.resize(sup, last.sizes); err != nil {
		return false, err
	}
	if err := s.putSuper(sup); err != nil {
		return false, err
	}
	s.applied(len(todo))
	if err := s.ensureSegment(); err != nil {
		return true, err
	}
	return true, nil
}

// resize records new sizes; the images' identities change with them.
func (s *Store) resize(sup *super, want []int64) error {
	grown := false
	for i := range sup.disks {
		size := sizeOf(want, i)
		grown = grown || sup.disks[i].size != size
		sup.disks[i].size = size
	}
	if grown {
		return s.identify(sup)
	}
	return nil
}

func (s *Store) undoWanted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.lost && len(s.segs) > 0
}

// applied takes the first n epochs out of the backlog.
func (s *Store) applied(n int) {
	s.mu.Lock()
	s.epochs = s.epochs[n:]
	close(s.done)
	s.done = make(chan struct{})
	s.mu.Unlock()
	s.log.Debug("epochs applied", "pos", s.sup.applied.pos, "epochs", n)
}

// unref lets go of epochs and recycles the slots of those applied.
func (s *Store) unref(es []*epoch) {
	s.mu.Lock()
	var free []*slot
	for _, e := range es {
		e.refs--
		if e.refs == 0 && e.ordinal <= s.sup.applied.ordinal {
			free = append(free, e.slot)
		}
	}
	var big []*slot
	for _, sl := range free {
		if sl.size > s.limits.KeepSpool || len(s.free) >= 4 {
			big = append(big, sl)
		} else {
			s.free = append(s.free, sl)
		}
	}
	s.mu.Unlock()
	for _, sl := range big {
		err := errors.Join(sl.file.Close(), s.cfg.FS.Remove(slotName(sl.number)))
		if err != nil { // found again, and freed, at the next open
			s.log.Warn("spool file not removed", "file", slotName(sl.number), "err", err)
		}
	}
}

// ensureSegment makes the first undo segment, or a new one after the undo was
// lost, once the images are exactly at the applied state.
func (s *Store) ensureSegment() error {
	s.mu.Lock()
	want := s.sup.role == roleReplica && (s.lost || len(s.segs) == 0) && s.must <= s.sup.applied.ordinal && !s.idle()
	lo := s.nextSegment
	s.mu.Unlock()
	if !want {
		return nil
	}
	return s.fail(s.newSegment(lo))
}

// growBases opens images again that became larger, and those of disks that
// join. The old device is closed first, because it may hold a lock; readers wait
// meanwhile.
func (s *Store) growBases(want []int64) error {
	for i, d := range s.sup.disks {
		size := sizeOf(want, i)
		if size == 0 {
			continue
		}
		dev, err := s.base(i)
		if err != nil {
			return err
		}
		// What a removed disk left that no point has may be deleted by now.
		stale := d.size == 0 && s.undoLimit(i) == 0
		if dev != nil && dev.Size() >= size && !stale {
			continue
		}
		if err := s.growBase(i, d.name, size); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) growBase(i int, name string, want int64) error {
	s.grow.Lock()
	defer s.grow.Unlock()
	old := s.bases[i]
	if old != nil {
		err := old.Sync()
		if err == nil {
			err = old.Close()
		}
		if err != nil {
			return &syncError{what: "image of disk " + name, err: err}
		}
	}
	dev, err := s.cfg.Bases(name, want)
	if err != nil && old == nil {
		return noSpace("make the image of disk "+name, err)
	}
	if err != nil { // the image is closed: only opening the store again helps
		return &syncError{what: "image of disk " + name, err: noSpace("grow it", err)}
	}
	s.setBase(i, dev)
	if dev.Size() < want {
		return fmt.Errorf("grow disk %s to %d bytes: %w: the image has %d", name, want, block.ErrRange, dev.Size())
	}
	return nil
}

// saveUndo saves what the batch is about to overwrite and the open segment has
// not saved yet. The batch's target becomes durable with it.
func (s *Store) saveUndo(ctx context.Context, g *segment, todo []*epoch, last *epoch) error {
	w := newUndoWriter(g, last.ordinal)
	u := &undoReader{w: w, buf: make([]byte, 64*granule)}
	for disk, size := range last.sizes {
		limit := s.undoLimit(disk)
		if size == 0 || limit == 0 {
			continue
		}
		dev, err := s.base(disk)
		if err != nil {
			return err
		}
		u.dev, u.disk = dev, disk
		for p := range overlay(todo, disk, 0, size) {
			if err := ctx.Err(); err != nil {
				return err
			}
			for gr := p.Off / granule; gr*granule < min(p.End(), limit); gr++ {
				if g.has(keyOf(disk, gr)) {
					continue
				}
				if err := u.want(gr); err != nil {
					return err
				}
			}
		}
		if err := u.flush(); err != nil {
			return err
		}
	}
	if limit := s.limits.UndoBytes; limit > 0 && w.at > limit {
		return fmt.Errorf("undo of one point exceeds %d bytes: %w", limit, ErrNoSpace)
	}
	return w.done()
}

// undoLimit is up to where some point has a disk's content. It lies behind the
// size at the open segment's start when the disk was shrunk since an older
// point: that has its tail in the image, until the disk grows again.
func (s *Store) undoLimit(disk int) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.undoSize(disk)
}

// undoReader reads runs of granules together.
type undoReader struct {
	w     *undoWriter
	dev   block.Device
	disk  int
	first int64
	n     int
	buf   []byte
}

func (u *undoReader) want(g int64) error {
	if u.n > 0 && (g != u.first+int64(u.n) || u.n == len(u.buf)/granule) {
		if err := u.flush(); err != nil {
			return err
		}
	}
	if u.n == 0 {
		u.first = g
	}
	u.n++
	return nil
}

func (u *undoReader) flush() error {
	if u.n == 0 {
		return nil
	}
	off := u.first * granule
	p := u.buf[:min(int64(u.n)*granule, u.dev.Size()-off)]
	if err := readFull(u.dev, p, off); err != nil {
		return fmt.Errorf("read image of disk %d at %d: %w", u.disk, off, err)
	}
	for i := range u.n {
		at := i * granule
		if err := u.w.add(keyOf(u.disk, u.first+int64(i)), p[at:min(at+granule, len(p))]); err != nil {
			return err
		}
	}
	u.n = 0
	return nil
}

func readFull(dev block.Device, p []byte, off int64) error {
	n, err := dev.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = block.ErrRange
	}
	return err
}

// writeBases writes the newest content of everything the batch changed.
func (s *Store) writeBases(ctx context.Context, todo []*epoch, last *epoch) error {
	buf := make([]byte, delta.MaxRaw)
	for disk, size := range last.sizes {
		if size == 0 {
			continue
		}
		dev, err := s.base(disk)
		if err != nil {
			return err
		}
		for p := range overlay(todo, disk, 0, size) {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := s.writePiece(dev, p, buf); err != nil {
				return noSpace(fmt.Sprintf("apply epoch %d to disk %s at %d", p.epoch.head.Epoch, s.sup.disks[disk].name, p.Off), err)
			}
		}
	}
	return s.syncBases()
}

func (s *Store) writePiece(dev block.Device, p piece, buf []byte) error {
	if p.kind != delta.KindData {
		return dev.ZeroAt(p.Off, p.Len, p.kind == delta.KindDiscard)
	}
	b := buf[:p.Len]
	if err := s.reader.read(p, b); err != nil {
		return err
	}
	_, err := dev.WriteAt(b, p.Off)
	return err
}

// BacklogAge is how long the oldest unapplied epoch has waited.
func (s *Store) BacklogAge() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, age := s.backlog(s.cfg.Now())
	return age
}
