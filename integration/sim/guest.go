package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"kvmreplica/integration/oracle"
	"kvmreplica/internal/block"
	"kvmreplica/replicad/dataplane"
)

// guest is the VM while it runs: a stamped load on the exports.
type guest struct {
	h          *host
	generation string
}

// startGuest boots the VM here.
func (h *host) startGuest() error {
	switch {
	case h.guest != nil:
		return nil
	case !h.rec.Lineage.MayServe():
		return fmt.Errorf("this host is %s", h.rec.Lineage.State)
	case h.held != "":
		return errors.New(h.held)
	}
	if err := h.openPlane(); err != nil {
		return err
	}
	ctx := context.Background()
	if err := h.client.Refuse(ctx, ""); err != nil {
		return err
	}
	if err := h.client.Export(ctx, dataplane.ExportRequest{On: true}); err != nil {
		return err
	}
	if err := h.update(func(r *record) { r.WantRunning = true }); err != nil {
		return err
	}
	w := h.w
	if o := h.other(); o.guest != nil && !w.forced {
		return w.fail(fmt.Errorf("%w: the guest starts on %s while it runs on %s and nobody forced that", oracle.ErrViolation, h.name, o.name))
	}
	if h.hist == nil {
		w.guests++
		h.hist = oracle.NewHistory(w.guests, h.content())
	}
	h.guest = &guest{h: h, generation: h.rec.Lineage.Generation.String()}
	w.roles.Opened(h.name, h.guest.generation)
	w.count("guest started")
	return nil
}

// stopGuest shuts it down; its last writes are in the images.
func (h *host) stopGuest() {
	if g := h.guest; g != nil {
		h.guest = nil
		h.w.roles.Closed(h.name, g.generation)
	}
}

// step makes one operation of the guest, if its disks answer.
func (g *guest) step(r *rand.Rand) error {
	h := g.h
	if h.doubt {
		return nil // its disk failed: it stands until the machine was restarted
	}
	load := oracle.Load{History: h.hist}
	for _, d := range disks() {
		if h.plane == nil {
			return nil
		}
		dev := h.plane.Guest(d.name)
		if dev == nil {
			return nil // the guest waits
		}
		load.Disks = append(load.Disks, dev)
	}
	was := h.w.busy
	h.w.busy = true // it does one thing at a time
	defer func() { h.w.busy = was }()
	k := r.IntN(20)
	disk, lba, n := place(r)
	if h.w.opt.Small {
		n = min(n, 2)
	}
	var err error
	switch {
	case k < 13:
		err = load.Write(0, disk, lba, n)
	case k < 15:
		err = load.Zero(0, disk, lba, n, k == 14)
	case k < 18:
		err = load.Flush(0)
	default:
		if err = load.Read(disk, lba, n); errors.Is(err, oracle.ErrViolation) {
			return h.w.fail(err)
		}
	}
	switch {
	case err != nil:
		h.w.count("guest got an error")
	case k < 15:
		h.w.roles.Wrote(h.name, g.generation, h.w.highest[h.rec.Lineage.Generation])
	}
	return nil
}

// place is where the next operation goes: at edges and hot spots more often.
func place(r *rand.Rand) (disk int, lba, n uint64) {
	if r.IntN(4) == 0 {
		disk = 1
	}
	total := uint64(disks()[disk].size / oracle.SectorSize)
	n = 1 + r.Uint64N(20)
	switch r.IntN(5) {
	case 0: // the last sectors
		return disk, total - n, n
	case 1: // across the border of two regions
		if disk == 0 {
			return disk, 1<<20/oracle.SectorSize - r.Uint64N(n+1), n
		}
	case 2: // whole granules of a hot spot
		return disk, r.Uint64N(8) * 8, (n + 7) / 8 * 8
	}
	return disk, r.Uint64N(total - n + 1), n
}

// disturbed is an image under the data plane. While an epoch, a comparison or
// a seed is read from it the guest may write in between.
type disturbed struct {
	dev    block.Device
	h      *host
	disk   string
	failed error
}

var (
	_ block.Device     = (*disturbed)(nil)
	_ block.FastZeroer = (*disturbed)(nil)
)

// ReadAt implements block.Device.
func (d *disturbed) ReadAt(p []byte, off int64) (int, error) {
	d.h.disturb()
	return d.dev.ReadAt(p, off)
}

// disturb lets the guest make its next operation now, if one waits for that.
func (h *host) disturb() {
	w := h.w
	if w.restless == 0 || w.busy || h.guest == nil {
		return
	}
	w.busy = true
	w.restless--
	w.count("guest wrote during a read")
	// In a goroutine of its own, as the guest's requests are: a write that is
	// held for good must not hold the read as well.
	g, done := h.guest, make(chan struct{})
	go func() {
		defer close(done)
		_ = g.step(w.restlessRand)
	}()
	select {
	case <-done:
		w.busy = false
	case <-h.heldNow:
		h.straggler, w.restless = done, 0
	}
}

// WriteAt implements block.Device.
func (d *disturbed) WriteAt(p []byte, off int64) (int, error) { return d.dev.WriteAt(p, off) }

// ZeroAt implements block.Device.
func (d *disturbed) ZeroAt(off, n int64, punch bool) error { return d.dev.ZeroAt(off, n, punch) }

// Sync implements block.Device. As with the product's files an error is final
// until the image is opened again; what was written since the last good sync
// is unknown from then on, also to the oracle.
func (d *disturbed) Sync() error {
	if d.failed != nil {
		return d.failed
	}
	err := d.dev.Sync()
	if err != nil {
		d.failed = err
		d.h.doubt = true
		d.h.w.count("image sync failed")
	}
	return err
}

// Size implements block.Device.
func (d *disturbed) Size() int64 { return d.dev.Size() }

// Close implements block.Device.
func (d *disturbed) Close() error { return d.dev.Close() }

// FastZero implements block.FastZeroer.
func (d *disturbed) FastZero() bool { return true }
