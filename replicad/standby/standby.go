// Package standby serves a promoted replica before it is decided that the
// promotion stays: the state the guest began with is a view of the replica
// store, the guest's writes lie on a durable overlay above it. Whatever the
// size of the disks and the length of the history, it is there at once.
//
// It guarantees that nothing of the store is lost until Commit: without it the
// overlay can be dropped and the store is the replica it was. After Commit,
// Flatten brings the images to what the guest sees while the guest goes on; a
// crash anywhere is continued by opening again, and no flushed write is lost.
//
// The caller holds the images and their locks, opens nothing else on them or
// on the store meanwhile, and creates the overlay (overlay.Create) itself: one
// that is missing is an error, never begun anew.
package standby

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
)

// Config is what a standby stands on.
type Config struct {
	// Store is the replica store. Its Bases is ignored: Image is used.
	Store points.Config
	// Overlay is the overlay; its Below is ignored.
	Overlay overlay.Config
	// Image is a disk's image, open for writing. It is the caller's.
	Image func(disk string) (block.Device, error)
}

// Standby is one VM's disks. Its methods are safe for concurrent use.
type Standby struct {
	cfg  Config
	over *overlay.Durable

	flat  sync.RWMutex  // held by whoever commits, flattens or closes; shared by who looks at the store
	store *points.Store // nil once the images hold the state; guarded by flat
	view  *points.View  // guarded by flat

	copying sync.Mutex // held by KeepPoints

	moved atomic.Int64 // bytes written into the images
}

// Open opens the overlay over what it began with.
func Open(cfg Config) (_ *Standby, err error) {
	s := &Standby{cfg: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open the disks of a failed-over VM: %w", err), s.letGo())
		}
	}()
	info, err := overlay.Read(cfg.Overlay.FS)
	if err != nil {
		return nil, err
	}
	o := cfg.Overlay
	o.Below = cfg.Image
	if info.Phase != overlay.Done {
		if err := s.openStore(info.Head); err != nil {
			return nil, err
		}
	}
	if s.view != nil {
		o.Below = s.view.Disk
	}
	if s.over, err = overlay.Open(o); err != nil {
		return nil, err
	}
	return s, nil
}

// openStore opens the store unless it has been sealed: then the images hold
// the state.
func (s *Standby) openStore(h overlay.Head) error {
	c := s.cfg.Store
	c.Policy = points.KeepAll() // what is kept was decided before, and may be kept still
	c.Bases = func(disk string, size int64) (block.Device, error) {
		dev, err := s.cfg.Image(disk)
		if err == nil && dev.Size() < size {
			err = resize(dev, size) // an epoch that is not applied yet made it longer
		}
		return borrowed{dev}, err
	}
	st, err := points.Open(c)
	if err != nil {
		return err
	}
	if seal := st.Status().Seal; seal != nil {
		if seal.At != h.At || seal.Generation != h.Generation {
			err = fmt.Errorf("%w: the store was promoted at %v, the overlay began at %v", overlay.ErrOther, seal.At, h.At)
		}
		return errors.Join(err, st.Close())
	}
	s.store = st
	s.view, err = st.View(h.At)
	return err
}

var errFixed = errors.New("its size cannot be changed from here")

// resize gives an image its disk's size.
func resize(dev block.Device, size int64) error {
	r, ok := dev.(interface{ Resize(size int64) error })
	if !ok {
		return fmt.Errorf("the image has %d bytes, the disk %d: %w", dev.Size(), size, errFixed)
	}
	return r.Resize(size)
}

// trim cuts off what the images have behind the disks: the store kept it for
// points that have ended. What cannot become shorter stays as it is.
func (s *Standby) trim() error {
	for _, d := range s.over.Head().Disks {
		dev, err := s.cfg.Image(d.Name)
		if err == nil && dev.Size() > d.Size {
			err = resize(dev, d.Size)
		}
		if err != nil && !errors.Is(err, errFixed) {
			return fmt.Errorf("trim the image of disk %s: %w", d.Name, err)
		}
	}
	return nil
}

// borrowed is an image that the store must not close.
type borrowed struct{ dev block.Device }

var _ block.Device = borrowed{}

// ReadAt implements block.Device.
func (b borrowed) ReadAt(p []byte, off int64) (int, error) { return b.dev.ReadAt(p, off) }

// WriteAt implements block.Device.
func (b borrowed) WriteAt(p []byte, off int64) (int, error) { return b.dev.WriteAt(p, off) }

// ZeroAt implements block.Device.
func (b borrowed) ZeroAt(off, n int64, punch bool) error { return b.dev.ZeroAt(off, n, punch) }

// Sync implements block.Device.
func (b borrowed) Sync() error { return b.dev.Sync() }

// Size implements block.Device.
func (b borrowed) Size() int64 { return b.dev.Size() }

// Close implements block.Device; the image stays open.
func (b borrowed) Close() error { return nil }

// Clone lets a copy share the image's blocks, where the image can.
func (b borrowed) Clone(dst *os.File) error {
	if c, ok := b.dev.(interface{ Clone(dst *os.File) error }); ok {
		return c.Clone(dst)
	}
	return block.ErrNoClone
}

// Disk is a disk as the guest sees it, nil if there is none.
func (s *Standby) Disk(name string) block.Device {
	d := s.over.Disk(name)
	if d == nil {
		return nil
	}
	return d
}

// Status is how far the promotion has come.
type Status struct {
	Head  overlay.Head
	Phase overlay.Phase
	// Bytes are in the overlay, Moved were written into the images since Open.
	Bytes, Moved int64
}

// Status is a snapshot.
func (s *Standby) Status() Status {
	return Status{Head: s.over.Head(), Phase: s.over.Phase(), Bytes: s.over.Bytes(), Moved: s.moved.Load()}
}

// ErrEnded: the recovery points have ended; the promotion stays.
var ErrEnded = errors.New("the recovery points have ended")

// History is what Commit will end.
type History struct {
	Points, Pinned int
	// Since is the time of the oldest, as people are shown it; "" without one.
	Since string
	// Undo is what the points take in bytes, Spool what is committed and not in
	// the images yet, as it was received (compressed).
	Undo, Spool int64
}

// History looks at the recovery points; ErrEnded when there are none any more.
func (s *Standby) History() (History, error) {
	s.flat.RLock()
	defer s.flat.RUnlock()
	if s.store == nil || s.over.Phase() != overlay.Running {
		return History{}, ErrEnded
	}
	st := s.store.Status()
	h := History{Undo: st.Undo, Spool: st.Spool}
	for _, p := range s.store.Points() {
		if h.Points++; h.Since == "" {
			h.Since = p.TimeText()
		}
		if p.Pinned {
			h.Pinned++
		}
	}
	return h, nil
}

// KeepPoints applies what is left and copies the store, images and all, into
// dir, which must not exist: see points.Store.CopyTo. The guest goes on. It
// waits for an earlier call; with an empty dir it does only that. ErrEnded after
// Commit; when ctx ends the half copy is removed.
func (s *Standby) KeepPoints(ctx context.Context, dir string) (points.Copied, error) {
	s.copying.Lock()
	defer s.copying.Unlock()
	if dir == "" {
		return points.Copied{}, nil
	}
	s.flat.RLock()
	defer s.flat.RUnlock()
	if s.store == nil || s.over.Phase() != overlay.Running {
		return points.Copied{}, ErrEnded
	}
	if err := ctx.Err(); err != nil {
		return points.Copied{}, fmt.Errorf("keep the recovery points: %w", err)
	}
	if err := s.store.ApplyAll(ctx); err != nil {
		return points.Copied{}, fmt.Errorf("keep the recovery points: %w", err)
	}
	c, err := s.store.CopyTo(ctx, dir)
	if err != nil {
		return points.Copied{}, fmt.Errorf("keep the recovery points: %w", err)
	}
	return c, nil
}

// Commit makes it durable that the promotion stays, and which blocks of the
// images it rolls back. The store's points cannot be had back from then on.
func (s *Standby) Commit() error {
	s.flat.Lock()
	defer s.flat.Unlock()
	if err := s.over.Commit(); err != nil {
		return err
	}
	if s.store == nil {
		return nil
	}
	h := s.over.Head()
	return s.store.BeginPromote(h.At, h.Generation)
}

// Flatten brings the images to what the guest sees, seals the store on the way
// and ends with the images alone. pace is told of every piece written and may
// wait. After an error, or in another process, it may be called again.
func (s *Standby) Flatten(ctx context.Context, pace points.Pace) error {
	s.flat.Lock()
	defer s.flat.Unlock()
	if s.over.Phase() == overlay.Running {
		return fmt.Errorf("flatten: %w: not committed", overlay.ErrPhase)
	}
	count := func(ctx context.Context, n int64) error {
		s.moved.Add(n)
		if pace == nil {
			return nil
		}
		return pace(ctx, n)
	}
	if s.store != nil {
		h := s.over.Head()
		if _, err := s.store.PromoteUnder(ctx, h.At, h.Generation, count, s.handOver); err != nil {
			return err
		}
		if err := s.closeStore(); err != nil {
			return err
		}
	}
	if s.over.Phase() != overlay.Done {
		if err := s.trim(); err != nil {
			return err
		}
	}
	return s.over.Merge(ctx, count)
}

// handOver makes the images what lies below the overlay: they hold the state.
func (s *Standby) handOver() error {
	for _, d := range s.over.Head().Disks {
		dev, err := s.cfg.Image(d.Name)
		if err == nil {
			err = s.over.SetBelow(d.Name, dev)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Standby) closeStore() error {
	st, v := s.store, s.view
	s.store, s.view = nil, nil
	var err error
	if v != nil {
		err = v.Close()
	}
	if st != nil {
		err = errors.Join(err, st.Close())
	}
	return err
}

// Close lets go of the overlay and the store, in the order that leaves them
// clean; it does not imply Sync. Nothing may be in flight.
func (s *Standby) Close() error {
	s.flat.Lock()
	defer s.flat.Unlock()
	return s.letGo()
}

func (s *Standby) letGo() error {
	var err error
	if s.over != nil {
		err = s.over.Close()
	}
	return errors.Join(err, s.closeStore())
}
