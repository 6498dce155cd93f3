package points

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// Receive is one epoch on its way in. A later Begin ends it. Not safe for
// concurrent use.
type Receive struct {
	s     *Store
	token uint64
	e     *epoch
	dup   *mark // the epoch is the committed one
	first func([]Replaced) error
}

// Replaced is what the first epoch of all will overwrite of a disk: Ranges
// ascend; Image is the disk as it is until then, for reading.
type Replaced struct {
	Disk   string
	Ranges []block.Range
	Image  block.Device
}

// First has f called just before the first epoch of a store is committed: no
// undo is kept of what it overwrites. An error refuses the commit, and
// everything received stays. f may be called again for the same epoch, and must
// not use the store. Of later epochs it is not called.
func (r *Receive) First(f func([]Replaced) error) { r.first = f }

// Begin starts or resumes receiving the epoch that h opens. Another partial
// epoch is dropped. A parent other than the committed position is refused with
// *delta.PosMismatchError; the committed epoch itself may come again. Another
// set of disks is up to Config.Set.
func (s *Store) Begin(h delta.Header) (*Receive, error) {
	if s.strange(&h) { // it goes into the superblock
		s.maint.Lock()
		defer s.maint.Unlock()
	}
	s.recv.Lock()
	defer s.recv.Unlock()
	r, err := s.begin(h)
	if err != nil {
		return nil, fmt.Errorf("receive epoch %d: %w", h.Epoch, err)
	}
	return r, nil
}

func (s *Store) begin(h delta.Header) (*Receive, error) {
	if err := h.Validate(); err != nil {
		return nil, err
	}
	dup, err := s.acceptable(&h)
	if err != nil {
		return nil, err
	}
	if dup == nil {
		if err := s.admit(h.Disks); err != nil {
			return nil, err
		}
	}
	s.token++
	r := &Receive{s: s, token: s.token, dup: dup}
	if dup != nil {
		return r, nil
	}
	if s.partial != nil && s.partial.disks == nil {
		s.dropPartial() // its disks were not known when it was found
	}
	if s.partial != nil && sameHeader(&s.partial.head, &h) && s.partial.ordinal == s.committedOrdinal()+1 {
		r.e = s.partial
		return r, nil
	}
	s.dropPartial()
	e, err := s.newPartial(h)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.partial = e
	s.mu.Unlock()
	r.e = e
	return r, nil
}

func (s *Store) committedOrdinal() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.committed.ordinal
}

// acceptable decides whether an epoch may start; it returns the committed mark
// when the epoch is that one again.
func (s *Store) acceptable(h *delta.Header) (dup *mark, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.receiving(); err != nil {
		return nil, err
	}
	switch {
	case h.Seed:
		return nil, fmt.Errorf("%w: a seed stream", ErrState)
	case h.VM != s.sup.vm:
		return nil, fmt.Errorf("%w: an epoch of vm %v, the store is of %v", ErrState, h.VM, s.sup.vm)
	}
	c := s.committed
	if !c.pos.IsZero() && h.Generation == c.pos.Generation && h.Epoch == c.pos.Epoch {
		return &c, nil
	}
	if h.Parent != c.pos {
		return nil, &delta.PosMismatchError{Have: c.pos, Want: h.Parent}
	}
	if !sameSet(s.disks(), h.Disks) && (s.cfg.Set == nil || c.pos.IsZero()) {
		return nil, fmt.Errorf("%w: have %v, the epoch %v", ErrDisks, s.disks(), h.Disks)
	}
	if c.pos.IsZero() {
		for _, d := range s.sup.disks {
			if d.cursor < d.size {
				return nil, fmt.Errorf("%w: disk %s is at %d of %d bytes", ErrSeeding, d.name, d.cursor, d.size)
			}
		}
		// A disk may have another size by now: what lies behind the one that was
		// seeded is in the epoch, whole.
	}
	return nil, nil
}

// sizes are the disks' sizes in the order given by to (nil: as they are).
func sizes(disks []delta.Disk, to []int) []int64 {
	out := make([]int64, len(disks))
	for i, d := range disks {
		if to != nil {
			out[to[i]] = d.Size
		} else {
			out[i] = d.Size
		}
	}
	return out
}

func sameHeader(a, b *delta.Header) bool { return a.Digest() == b.Digest() }

// dropPartial makes the partial epoch's slot the next one to be used, so that
// two slots never hold whole epochs of one ordinal.
func (s *Store) dropPartial() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.partial != nil {
		s.reuse, s.partial = s.partial.slot, nil
	}
}

// newPartial takes a slot and writes its header.
func (s *Store) newPartial(h delta.Header) (*epoch, error) {
	sl, err := s.takeSlot()
	if err != nil {
		return nil, err
	}
	var use [8]byte
	if _, err = io.ReadFull(s.cfg.Rand, use[:]); err == nil {
		s.mu.Lock()
		head := slotHead{store: s.sup.store, number: sl.number, ordinal: s.committed.ordinal + 1, use: binary.LittleEndian.Uint64(use[:]), head: h}
		e := s.newEpoch(sl, head)
		s.mu.Unlock()
		var b []byte
		if b, err = head.encode(); err == nil {
			err = sl.reserve(slotBlock, s.limits.SpoolStep)
		}
		if err == nil {
			if _, err = sl.file.WriteAt(b, 0); err == nil {
				return e, nil
			}
			err = noSpace("write spool", err)
		}
	}
	s.mu.Lock()
	s.reuse = sl
	s.mu.Unlock()
	return nil, err
}

func (s *Store) takeSlot() (*slot, error) {
	s.mu.Lock()
	if sl := s.reuse; sl != nil {
		s.reuse = nil
		s.mu.Unlock()
		return sl, nil
	}
	if n := len(s.free); n > 0 {
		sl := s.free[n-1]
		s.free = s.free[:n-1]
		s.mu.Unlock()
		return sl, nil
	}
	number := s.nextSlot
	s.mu.Unlock()
	sl, err := createSlot(s.cfg.FS, number)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.nextSlot = number + 1
	s.mu.Unlock()
	return sl, nil
}

// current refuses calls on a Receive that a later Begin or Forget ended;
// s.recv is held.
func (r *Receive) current() error {
	if r.token != r.s.token || (r.dup == nil && r.e != r.s.partial) {
		return fmt.Errorf("%w: this receive was superseded", ErrState)
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.s.receiving()
}

// Next is the first chunk wanted; chunks before it are verified and kept.
func (r *Receive) Next() uint32 {
	if r.dup != nil {
		return r.dup.chunks
	}
	r.s.recv.Lock()
	defer r.s.recv.Unlock()
	return r.e.tally.Len()
}

// Chunk verifies and keeps one chunk frame; it must be number Next, or one
// that is kept already, with the same content.
func (r *Receive) Chunk(frame []byte) error {
	s := r.s
	s.recv.Lock()
	defer s.recv.Unlock()
	if err := r.current(); err != nil {
		return err
	}
	c, err := s.dec.Decode(frame)
	if err != nil {
		return fmt.Errorf("receive chunk: %w", err)
	}
	if r.dup != nil {
		return nil // judged by the manifest
	}
	e := r.e
	if err := c.Check(&e.head); err != nil {
		return fmt.Errorf("receive chunk: %w", err)
	}
	if c.Index < e.tally.Len() {
		return e.tally.Add(c.Index, c.Digest, 0)
	}
	if c.Index > e.tally.Len() {
		return fmt.Errorf("receive chunk %d, expected %d: %w", c.Index, e.tally.Len(), delta.ErrOrder)
	}
	rec := record{typ: delta.FrameChunk, index: c.Index, off: e.end, len: len(frame)}
	if err := s.put(e, rec, frame); err != nil {
		return fmt.Errorf("receive chunk %d: %w", c.Index, err)
	}
	if err := e.add(&c, rec); err != nil {
		return fmt.Errorf("receive chunk %d: %w", c.Index, err)
	}
	return nil
}

// put writes a record with its frame at its place.
func (s *Store) put(e *epoch, rec record, frame []byte) error {
	if limit := s.limits.SpoolBytes; limit > 0 && rec.end() > limit {
		return fmt.Errorf("epoch %d exceeds the spool limit of %d bytes: %w", e.head.Epoch, limit, ErrNoSpace)
	}
	if err := e.slot.reserve(rec.end(), s.limits.SpoolStep); err != nil {
		return err
	}
	s.buf = append(rec.appendHead(s.buf[:0], e.use), frame...)
	if _, err := e.slot.file.WriteAt(s.buf, rec.off); err != nil {
		return noSpace("write spool", err)
	}
	return nil
}

// Commit verifies a manifest frame against what was received and makes the
// epoch durable with one sync; the manifest in the spool is the commit record.
// ErrBusy and ErrNoSpace leave everything received in place. Committing the
// committed epoch again returns its position.
func (r *Receive) Commit(frame []byte) (delta.Pos, error) {
	s := r.s
	s.recv.Lock()
	defer s.recv.Unlock()
	if err := r.current(); err != nil {
		return delta.Pos{}, err
	}
	m, err := delta.ParseManifest(frame)
	if err != nil {
		return delta.Pos{}, fmt.Errorf("commit: %w", err)
	}
	if r.dup != nil {
		if p := m.Pos(); p != r.dup.pos {
			return delta.Pos{}, &ForkError{Have: r.dup.pos, Other: p}
		}
		return r.dup.pos, nil
	}
	pos, err := s.commit(r, &m, frame)
	if err != nil {
		return delta.Pos{}, fmt.Errorf("commit epoch %d: %w", m.Epoch, err)
	}
	return pos, nil
}

func (s *Store) commit(r *Receive, m *delta.Manifest, frame []byte) (delta.Pos, error) {
	e := r.e
	if err := errors.Join(m.Matches(&e.head), e.tally.Check(m)); err != nil {
		return delta.Pos{}, err
	}
	now := s.cfg.Now()
	if err := s.busy(now, e.end); err != nil {
		return delta.Pos{}, err
	}
	if err := s.room(); err != nil {
		return delta.Pos{}, err
	}
	if err := r.tellFirst(); err != nil {
		return delta.Pos{}, err
	}
	rec := record{typ: delta.FrameManifest, index: m.Chunks, at: now, off: e.end, len: len(frame)}
	if err := s.put(e, rec, frame); err != nil {
		return delta.Pos{}, err
	}
	if err := s.cfg.Sync(e.slot.file); err != nil {
		return delta.Pos{}, s.fail(&syncError{what: "spool", err: err})
	}
	s.mu.Lock()
	e.seal(m, rec)
	s.commitMark(e)
	s.partial = nil
	pos, bytes, backlog := s.committed.pos, e.bytes, len(s.epochs)
	s.mu.Unlock()
	s.signal()
	s.log.Debug("epoch committed", "pos", pos, "bytes", bytes, "backlog", backlog)
	return pos, nil
}

// tellFirst calls the caller's function before the first commit.
func (r *Receive) tellFirst() error {
	s := r.s
	if r.first == nil || s.committedOrdinal() > 0 {
		return nil
	}
	var all []Replaced
	_, done, err := s.seedBase(0) // keeps all of them open
	if err != nil {
		return err
	}
	defer done()
	for i := range s.sup.disks {
		x := Replaced{Disk: s.sup.disks[i].name, Image: s.bases[i]}
		for _, k := range r.e.index[i] {
			x.Ranges = append(x.Ranges, block.Range{Off: k.off, Len: int64(k.len)})
		}
		all = append(all, x)
	}
	return r.first(all)
}

// busy refuses a commit that would exceed the backlog's limits. One epoch may
// always be committed, however large.
func (s *Store) busy(now time.Time, more int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.epochs) == 0 {
		return nil
	}
	bytes, age := s.backlog(now)
	if bytes+more > s.limits.BacklogBytes || age > s.limits.BacklogAge {
		s.signal()
		return &BusyError{Bytes: bytes, Age: age}
	}
	return nil
}

// backlog is what is committed and not applied; s.mu is held.
func (s *Store) backlog(now time.Time) (bytes int64, age time.Duration) {
	for _, e := range s.epochs {
		bytes += e.bytes
	}
	if len(s.epochs) > 0 {
		age = max(0, now.Sub(s.epochs[0].mark.at))
	}
	return bytes, age
}

// CommitWait is Commit that waits while the backlog is at its limit. Somebody
// must be stepping the store.
func (r *Receive) CommitWait(ctx context.Context, frame []byte) (delta.Pos, error) {
	for {
		r.s.mu.Lock()
		applied := r.s.done
		r.s.mu.Unlock()
		pos, err := r.Commit(frame)
		if !errors.Is(err, ErrBusy) {
			return pos, err
		}
		select {
		case <-ctx.Done():
			return delta.Pos{}, fmt.Errorf("%w: %w", err, context.Cause(ctx))
		case <-applied:
		}
	}
}

// Stream feeds the rest of a stream whose header was read from d, and commits
// it. Chunks received before an error are kept.
func (r *Receive) Stream(ctx context.Context, d *delta.Decoder) (delta.Pos, error) {
	for {
		frame, t, err := d.Next()
		if err == nil {
			err = ctx.Err()
		}
		switch {
		case errors.Is(err, io.EOF):
			return delta.Pos{}, io.ErrUnexpectedEOF
		case err != nil:
			return delta.Pos{}, fmt.Errorf("receive: %w", err)
		case t == delta.FrameManifest:
			frame = slices.Clone(frame)
			if _, _, err := d.Next(); !errors.Is(err, io.EOF) || errors.Is(err, delta.ErrFormat) {
				return delta.Pos{}, fmt.Errorf("receive: %w", errors.Join(delta.ErrFormat, err))
			}
			return r.CommitWait(ctx, frame)
		}
		if err := r.Chunk(frame); err != nil {
			return delta.Pos{}, err
		}
	}
}

// Progress is the number of verified chunks kept of an epoch, 0 if unknown.
func (s *Store) Progress(g delta.Generation, epoch, nonce uint64) uint32 {
	s.recv.Lock()
	defer s.recv.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.partial; p != nil && p.head.Generation == g && p.head.Epoch == epoch && p.head.Nonce == nonce {
		return p.tally.Len()
	}
	if c := s.committed; c.pos.Generation == g && c.pos.Epoch == epoch {
		return c.chunks
	}
	return 0
}

// Forget drops the partial epoch, if any, and ends its Receive.
func (s *Store) Forget() error {
	s.recv.Lock()
	defer s.recv.Unlock()
	s.token++
	s.dropPartial()
	s.mu.Lock()
	s.asked = nil
	s.mu.Unlock()
	s.signal()
	return nil
}
