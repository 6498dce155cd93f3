package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// A disk's size has no plan of its own. To grow, the image becomes longer first,
// then the tracker, which marks what is new, then the record; whoever finds an
// image that is longer than the record says takes that up: the tracker marks
// what is new. To shrink, the record is first, so that a crash leaves nothing
// but an image that is longer. The replica's host follows the epochs: each
// carries the sizes.

// ResizeOptions are a person's choices.
type ResizeOptions struct {
	Disk wire.DiskName
	// Size in bytes, a multiple of 512; 0 = what the image has by now.
	Size int64
	// Shrink lets the disk become shorter: what lies behind is cut off.
	Shrink  bool
	DryRun  bool
	Request string
}

// Resized is what became of it.
type Resized struct {
	Was, Size int64
	// Notes are lines for people.
	Notes []string
}

func (r *Resized) note(format string, a ...any) { r.Notes = append(r.Notes, fmt.Sprintf(format, a...)) }

// Resize gives a protected disk another size: image, tracking and guest here,
// the copy with the next epoch. Growing needs no stop.
func (v *VM) Resize(ctx context.Context, o ResizeOptions) (Resized, error) {
	unlock, err := v.lockAsked(ctx, "resize a disk")
	if err != nil {
		return Resized{}, err
	}
	defer unlock()
	return v.resize(ctx, o)
}

// resize is Resize with the plan token held.
func (v *VM) resize(ctx context.Context, o ResizeOptions) (Resized, error) {
	out, err := v.mayResize(ctx, o)
	if err != nil || o.DryRun || out.Size == out.Was {
		return out, err
	}
	shipped := v.session() != nil
	v.stopShipping()
	defer func() {
		if shipped {
			v.startShipping()
		}
	}()
	if err := v.plainPlane(ctx); err != nil {
		return out, err
	}
	if out.Size < out.Was {
		err = v.shrink(ctx, o.Disk, out.Size)
	} else {
		err = v.grow(ctx, o.Disk, out.Size)
	}
	v.audit(o.Request, "operator", "resize", fmt.Sprintf("disk %s from %d to %d bytes: %v", o.Disk, out.Was, out.Size, err))
	if err != nil {
		return out, err
	}
	out.note("disk %s has %s now, it had %s", o.Disk, status.Bytes(out.Size), status.Bytes(out.Was))
	if v.guestRuns() {
		v.showSize(ctx, o.Disk, &out)
	}
	return out, nil
}

// mayResize checks what can be checked without changing anything.
func (v *VM) mayResize(ctx context.Context, o ResizeOptions) (Resized, error) {
	r := v.record()
	refuse := func(hint, format string, a ...any) (Resized, error) {
		return Resized{}, &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf(format, a...), Hint: hint}
	}
	if !r.Lineage.MayServe() {
		return refuse("run the command on the host where the VM runs", "this host is %s for the VM", r.Lineage.State)
	}
	if err := errors.Join(v.imagesOnly(ctx), v.notJoining()); err != nil {
		return Resized{}, err
	}
	c, err := v.plane()
	if err != nil {
		return Resized{}, err
	}
	st, err := c.Status(ctx)
	if err != nil {
		return Resized{}, fmt.Errorf("ask the data plane: %w", err)
	}
	i := slices.IndexFunc(st.Disks, func(d dataplane.DiskStatus) bool { return d.Name == o.Disk })
	if i < 0 {
		return Resized{}, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("VM %s has no protected disk %q", r.Name, o.Disk), Hint: "replicactl vm status " + r.Name}
	}
	out := Resized{Was: st.Disks[i].Size, Size: o.Size}
	if have := out.Was + st.Disks[i].Grown; o.Size == 0 {
		out.Size = have
	}
	switch {
	case out.Size < 0 || out.Size%512 != 0 || out.Size > wire.MaxDiskSize:
		return Resized{}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("a disk of %d bytes", out.Size), Hint: fmt.Sprintf("a multiple of 512 up to %d", int64(wire.MaxDiskSize))}
	case out.Size == out.Was:
		out.note("disk %s has %s already", o.Disk, status.Bytes(out.Was))
		return out, nil
	case out.Size < out.Was && !o.Shrink:
		return refuse("to cut them off: --shrink, with the guest off", "disk %s has %s: %d bytes would be cut off", o.Disk, status.Bytes(out.Was), out.Was-out.Size)
	case out.Size < out.Was && v.guestRuns():
		return refuse("shut it down first", "the guest runs; a disk is made shorter only while it is off")
	case out.Size < out.Was:
		out.note("The last %d bytes of disk %s are CUT OFF. Recovery points made before keep them.", out.Was-out.Size, o.Disk)
	}
	return out, v.askResize(ctx, o.Disk, &out)
}

// askResize asks the replica's host whether it will follow. One that cannot be
// asked is told by the next epoch.
func (v *VM) askResize(ctx context.Context, disk wire.DiskName, out *Resized) error {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	p, err := v.peer()
	if err == nil {
		o := v.offering("resize")
		o.Try = true
		for i := range o.Disks {
			if o.Disks[i].Name == disk {
				o.Disks[i].Size = out.Size
			}
		}
		_, err = p.Offer(ctx, o)
	}
	var w *wire.Error
	if errors.As(err, &w) && w.Kind != wire.KindUnavailable {
		return fmt.Errorf("the replica's host does not take the new size: %w", err)
	}
	if err != nil {
		out.note("the replica's host could not be asked (%s); it follows when it is back, or says why it cannot", said(err))
	}
	return nil
}

// plainPlane starts a data plane anew that still has the overlay of a failover
// which has ended: below it lies what has to be resized. The guest waits.
func (v *VM) plainPlane(ctx context.Context) error {
	c, err := v.plane()
	if err != nil {
		return err
	}
	if st, err := c.Status(ctx); err != nil || st.Overlay == nil {
		return err
	}
	if err := v.stopPlane(ctx); err != nil {
		return err
	}
	return v.startPlane(ctx) // the exports that were open are
}

func (v *VM) grow(ctx context.Context, disk wire.DiskName, size int64) error {
	c, err := v.plane()
	if err != nil {
		return err
	}
	if _, err := c.Resize(ctx, dataplane.ResizeRequest{Disk: disk, Size: size}); err != nil {
		return err
	}
	return v.setSizes(map[wire.DiskName]int64{disk: size})
}

func (v *VM) shrink(ctx context.Context, disk wire.DiskName, size int64) error {
	c, err := v.plane()
	if err == nil {
		err = v.setSizes(map[wire.DiskName]int64{disk: size})
	}
	if err != nil {
		return err
	}
	v.mu.Lock()
	before := v.held
	v.mu.Unlock()
	v.hold("a disk is being made shorter")
	defer v.hold(before)
	if isOff, err := v.guestIsOff(ctx); err != nil || !isOff { // somebody was quicker
		return errors.Join(err, v.followPlane(ctx, c), &wire.Error{Kind: wire.KindUnavailable, Text: "the guest was started meanwhile"})
	}
	if _, err := c.Resize(ctx, dataplane.ResizeRequest{Disk: disk, Size: size, Shrink: true}); err != nil {
		return errors.Join(err, v.followPlane(ctx, c))
	}
	return nil
}

// setSizes makes sizes durable, for the data plane's next start, too.
func (v *VM) setSizes(sizes map[wire.DiskName]int64) error {
	r := v.record()
	changed := slices.ContainsFunc(r.Disks, func(d Disk) bool { n, ok := sizes[d.Name]; return ok && n != d.Size })
	if !changed {
		return nil
	}
	err := v.update(func(r *Record) error {
		r.Disks = slices.Clone(r.Disks)
		for i, d := range r.Disks {
			if n, ok := sizes[d.Name]; ok {
				r.Disks[i].Size = n
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	cfg := v.planeConfig()
	v.mu.Lock()
	serving := v.ship != nil
	if serving {
		v.ship.cfg = cfg
	}
	v.mu.Unlock()
	if !serving {
		return nil
	}
	return dataplane.Reconfigure(cfg)
}

// followPlane takes up what a data plane found when it started: an image that
// had become longer.
func (v *VM) followPlane(ctx context.Context, c *dataplane.Client) error {
	if v.record().Overlay != nil {
		return nil
	}
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	return v.followStatus(st)
}

func (v *VM) followStatus(st dataplane.Status) error {
	r := v.record()
	if r.Overlay != nil || !st.Tracker || st.Sealed {
		return nil
	}
	sizes := map[wire.DiskName]int64{}
	for _, d := range st.Disks {
		if k, ok := r.disk(d.Name); ok && k.Size != d.Size {
			v.log.Warn("a disk has another size by now; what is new is sent", "disk", string(d.Name), "was", k.Size, "size", d.Size)
			sizes[d.Name] = d.Size
		}
	}
	return v.setSizes(sizes)
}

// tendSizes takes up what an image has become longer by, while the guest is off.
func (v *VM) tendSizes(ctx context.Context, isOff bool) {
	c, err := v.plane()
	if err != nil || v.busy() {
		return
	}
	st, err := c.Status(ctx)
	if err == nil {
		err = v.followStatus(st)
	}
	if err != nil || !isOff {
		return // it is asked again soon
	}
	for _, d := range st.Disks {
		if d.Grown == 0 {
			continue
		}
		out, err := v.takeUp(ctx, d.Name)
		if err != nil {
			v.mu.Lock()
			news := v.facts.growth != err.Error()
			v.facts.growth = err.Error()
			v.mu.Unlock()
			if news && !busy(err) {
				v.log.Warn("take up an image that has become longer", "disk", string(d.Name), "err", err)
			}
			continue
		}
		v.log.Warn("an image has become longer; what is new is sent", "disk", string(d.Name), "was", out.Was, "size", out.Size)
	}
}

func (v *VM) takeUp(ctx context.Context, disk wire.DiskName) (Resized, error) {
	unlock, err := v.lockOwn("take up an image that has become longer")
	if err != nil {
		return Resized{}, err
	}
	defer unlock()
	return v.resize(ctx, ResizeOptions{Disk: disk, Request: "grown"})
}

// showSize lets a running guest see a disk's new size.
func (v *VM) showSize(ctx context.Context, disk wire.DiskName, out *Resized) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	err := v.deps.Hyper.ResizeDisk(ctx, string(v.id), string(disk), v.exports()[string(disk)], out.Size)
	if err != nil {
		v.log.Warn("show the guest its disk's new size", "disk", string(disk), "err", err)
		out.note("the guest sees it at its next start: %s", said(err))
		return
	}
	out.note("the guest sees it now")
}

// followSizes keeps the record of a replica at the sizes of its newest epoch.
func (v *VM) followSizes(disks []delta.Disk) error {
	sizes := map[wire.DiskName]int64{}
	for _, d := range disks {
		sizes[wire.DiskName(d.Name)] = d.Size
	}
	return v.setSizes(sizes)
}

// trimImages cuts off what replica images have behind their disks: the store
// kept it for recovery points that have ended.
func (v *VM) trimImages() error {
	for _, d := range v.serving() {
		if d.Kind != diskRaw {
			continue
		}
		if err := trimImage(d.Path, d.Size); err != nil {
			return fmt.Errorf("trim the image of disk %s: %w", d.Name, err)
		}
	}
	return nil
}

func trimImage(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil && st.Mode().IsRegular() && st.Size() > size {
		err = errors.Join(f.Truncate(size), f.Sync())
	}
	return errors.Join(err, f.Close())
}

// sizes are this host's disks.
func (v *VM) sizes() map[wire.DiskName]int64 {
	out := map[wire.DiskName]int64{}
	for _, d := range v.serving() {
		out[d.Name] = d.Size
	}
	return out
}

// sizesDiffer lists what this host's disks have behind the ends of the other's.
func (v *VM) sizesDiffer(theirs map[wire.DiskName]int64) map[wire.DiskName][]wire.Range {
	out := map[wire.DiskName][]wire.Range{}
	for disk, size := range v.sizes() {
		if n, ok := theirs[disk]; ok && n != size {
			out[disk] = []wire.Range{behind(min(n, size-1), size)} // no cut is empty that has a new size
		}
	}
	return out
}
