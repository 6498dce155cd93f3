package testcopy

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// views is a recovery point that is opened again when its store was: the same
// position holds the same bytes for ever.
type views struct {
	subject Subject
	pos     delta.Pos
	ending  chan struct{} // closed when nobody needs it any more
	once    sync.Once

	mu   sync.Mutex
	view *points.View // guarded by mu; nil: to be opened
}

func openViews(s Subject, pos delta.Pos) (*views, error) {
	v := &views{subject: s, pos: pos, ending: make(chan struct{})}
	_, err := v.get(nil)
	return v, err
}

// get returns the open view; old is one that was found dead.
func (v *views) get(old *points.View) (*points.View, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.view != nil && v.view != old {
		return v.view, nil
	}
	if v.view != nil {
		if err := v.view.Close(); err != nil {
			return nil, err
		}
		v.view = nil
	}
	next, err := v.subject.OpenView(v.pos)
	if err != nil {
		return nil, err
	}
	v.view = next
	return next, nil
}

func (v *views) close() error {
	v.once.Do(func() { close(v.ending) })
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.view == nil {
		return nil
	}
	err := v.view.Close()
	v.view = nil
	return err
}

// read reads one disk; a store that is just being opened again is waited for.
func (v *views) read(disk string, p []byte, off int64) (int, error) {
	var dead *points.View
	until := time.NewTimer(viewWithin)
	defer until.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		n, used, err := v.readOnce(dead, disk, p, off)
		if err == nil {
			return n, nil
		}
		if used != nil && !errors.Is(err, block.ErrClosed) && !errors.Is(err, points.ErrGone) && !errors.Is(err, points.ErrFailed) {
			return n, err
		}
		if used != nil {
			dead = used
		}
		if errors.Is(err, points.ErrPromoted) || errors.Is(err, points.ErrNoPoint) || !v.subject.HoldsReplica() {
			return 0, fmt.Errorf("the recovery point ended: %w", err)
		}
		select {
		case <-v.ending:
			return 0, block.ErrClosed
		case <-until.C:
			return 0, err
		case <-tick.C:
		}
	}
}

func (v *views) readOnce(dead *points.View, disk string, p []byte, off int64) (int, *points.View, error) {
	view, err := v.get(dead)
	if err != nil {
		return 0, nil, err
	}
	d, err := view.Disk(disk)
	if err != nil {
		return 0, view, err
	}
	n, err := d.ReadAt(p, off)
	return n, view, err
}

// pointDisk is one disk of a recovery point, read-only.
type pointDisk struct {
	v    *views
	name string
	size int64
}

var _ block.Device = (*pointDisk)(nil)

func (v *views) disk(name string) (*pointDisk, error) {
	view, err := v.get(nil)
	if err != nil {
		return nil, err
	}
	d, err := view.Disk(name)
	if err != nil {
		return nil, err
	}
	return &pointDisk{v: v, name: name, size: d.Size()}, nil
}

// ReadAt implements block.Device.
func (d *pointDisk) ReadAt(p []byte, off int64) (int, error) {
	if err := block.Check(off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	return d.v.read(d.name, p, off)
}

// WriteAt implements block.Device.
func (d *pointDisk) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// ZeroAt implements block.Device.
func (d *pointDisk) ZeroAt(int64, int64, bool) error { return block.ErrReadOnly }

// Sync implements block.Device.
func (d *pointDisk) Sync() error { return nil }

// Size implements block.Device.
func (d *pointDisk) Size() int64 { return d.size }

// Close implements block.Device.
func (d *pointDisk) Close() error { return nil }
