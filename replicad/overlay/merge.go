package overlay

import (
	"context"
	"errors"
	"fmt"

	"kvmreplica/internal/block"
)

// ErrPhase: the overlay is not where the call wants it.
var ErrPhase = errors.New("not possible in the overlay's phase")

// SetBelow replaces the disk below: reads of what is not in the overlay come
// from dev from then on. Both must hold the same at this moment.
func (o *Durable) SetBelow(name string, dev block.Device) error {
	d := o.Disk(name)
	if d == nil {
		return fmt.Errorf("no disk %s in the overlay", name)
	}
	defer d.still()()
	if d.mode.Load() != modeOver {
		return fmt.Errorf("replace what is below disk %s: %w", name, ErrPhase)
	}
	d.below = dev
	return nil
}

// Merge writes what is in the overlay into the disks below, which must be
// writable and hold the state the overlay began with, while the guest goes on.
// It ends with the phase Done: the disks below are all there is. It may be
// interrupted and repeated, also by another process. pace is called with every
// piece written and may wait.
func (o *Durable) Merge(ctx context.Context, pace func(ctx context.Context, n int64) error) error {
	switch o.Phase() {
	case Running:
		return fmt.Errorf("merge the overlay: %w", ErrPhase)
	case Done:
		return nil
	}
	for _, d := range o.disks {
		unlock := d.still()
		d.mode.Store(modeMerge)
		unlock()
	}
	for _, d := range o.disks {
		if err := d.merge(ctx, pace); err != nil {
			return fmt.Errorf("merge disk %s: %w", d.name, err)
		}
	}
	return o.finish()
}

// mergePiece is how much is held still at a time.
const mergePiece = 256 << 10

// merge brings the disk below to what the guest sees; writes that come
// meanwhile go to both.
func (d *Disk) merge(ctx context.Context, pace func(context.Context, int64) error) error {
	buf := make([]byte, mergePiece)
	for off := int64(0); off < d.size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		next, n, err := d.mergeAt(off, buf)
		if err != nil {
			return err
		}
		if n > 0 && pace != nil {
			if err := pace(ctx, n); err != nil {
				return err
			}
		}
		off = next
	}
	return d.Sync() // the long part of it, while the guest still goes on
}

// mergeAt handles the first run at or behind off.
func (d *Disk) mergeAt(off int64, buf []byte) (next, n int64, err error) {
	for r := range d.in.runs(off, d.size-off) {
		if r.state == below {
			off = r.End()
			continue
		}
		off = r.Off
		break
	}
	if off >= d.size {
		return d.size, 0, nil
	}
	n = min(int64(len(buf)), d.size-off)
	leave, err := d.enter(off, n, true)
	if err != nil {
		return 0, 0, err
	}
	defer leave()
	var wrote int64
	for r := range d.in.runs(off, n) {
		switch r.state {
		case zeroed:
			err = d.below.ZeroAt(r.Off, r.Len, true)
		case present:
			p := buf[r.Off-off : r.End()-off]
			if _, err = d.data.ReadAt(p, r.Off); err == nil {
				_, err = d.below.WriteAt(p, r.Off)
			}
			wrote += r.Len
		}
		if err != nil {
			return 0, 0, err
		}
	}
	return off + n, max(wrote, 1), nil
}

// finish makes the disks below durable and then all there is, between two
// requests of the guest.
func (o *Durable) finish() error {
	for _, d := range o.disks {
		defer d.still()()
		if d.shut.Load() {
			return block.ErrClosed
		}
		if err := d.below.Sync(); err != nil {
			return fmt.Errorf("sync disk %s: %w", d.name, err)
		}
	}
	if err := o.enter(Done); err != nil {
		return err
	}
	for _, d := range o.disks {
		d.mode.Store(modePlain)
	}
	return nil
}
