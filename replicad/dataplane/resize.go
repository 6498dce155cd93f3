package dataplane

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"kvmreplica/cbt"
	"kvmreplica/nbd"
	"kvmreplica/replicad/wire"
)

// size is what a disk has for its guest: what the tracker knows, where there is
// one. The image may be longer.
func (p *Plane) size(i *image) int64 {
	if g := p.group.Load(); g != nil {
		if d := g.Disk(string(i.cfg.Name)); d != nil {
			return d.Size()
		}
	}
	return i.dev.Size()
}

// resize gives a disk another size: to grow, the image first, then the tracker,
// which marks what is new before anybody can write there; to shrink, the other
// way round. A crash in between leaves an image that is longer than the disk,
// and what is longer is taken up when the tracker is opened.
func (p *Plane) resize(r ResizeRequest) (ResizeReply, error) {
	p.exportMu.Lock()
	defer p.exportMu.Unlock()
	p.epochMu.Lock()
	defer p.epochMu.Unlock()
	g, err := p.tracker()
	if err != nil {
		return ResizeReply{}, err
	}
	_, img, err := p.image(r.Disk)
	if err != nil {
		return ResizeReply{}, err
	}
	dev, ok := img.dev.(interface{ Resize(size int64) error })
	if !ok {
		return ResizeReply{}, &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("the image of disk %s is no file or block device, its size cannot be changed now", r.Disk), Hint: "shut the guest down, enlarge the disk on its server, start the guest"}
	}
	was := p.size(img)
	if r.Size == 0 {
		r.Size = was + img.grown(was)
	}
	a := ResizeReply{Was: was, Size: r.Size}
	if err := p.mayResize(img, r, was); err != nil || r.Size == was {
		return a, err
	}
	if err := p.dropHeld(); err != nil {
		return a, err
	}
	steps := []func() error{
		func() error { return dev.Resize(r.Size) },
		func() error { return g.Resize(string(r.Disk), r.Size) },
	}
	if r.Size < was {
		steps[0], steps[1] = steps[1], steps[0]
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return a, fmt.Errorf("resize disk %s: %w", r.Disk, err)
		}
	}
	p.log.Info("disk resized", "disk", string(r.Disk), "was", was, "size", r.Size)
	if err := p.server.Resized(string(r.Disk)); err != nil && !errors.Is(err, nbd.ErrUnknownExport) {
		return a, err
	}
	return a, nil
}

// mayResize refuses what would lose data unasked.
func (p *Plane) mayResize(img *image, r ResizeRequest, was int64) error {
	st, _ := p.server.Stats(string(r.Disk))
	switch have := was + img.grown(was); {
	case r.Size < 0 || r.Size%512 != 0:
		return invalid("resize disk %s to %d bytes: not a multiple of 512", r.Disk, r.Size)
	case r.Size > was && r.Size < have:
		return invalid("the image of disk %s has %d bytes already, %d were asked for", r.Disk, have, r.Size)
	case r.Size >= was:
		return nil
	case !r.Shrink:
		return invalid("disk %s has %d bytes, making it shorter was not asked for", r.Disk, was)
	case st.Connections > 0:
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("disk %s is in use", r.Disk), Hint: "shut the guest down first"}
	}
	return nil
}

// dropHeld gives the frozen epoch back; epochMu is held.
func (p *Plane) dropHeld() error {
	f := p.held.Load()
	if f == nil {
		return nil
	}
	f.end()
	if err := f.cut.Abandon(); err != nil {
		return err
	}
	p.held.Store(nil)
	return nil
}

// withTails adds what images have behind their configured sizes: the base of a
// new tracker does not have that.
func (p *Plane) withTails(dirty map[wire.DiskName][]wire.Range) map[wire.DiskName][]wire.Range {
	out := maps.Clone(dirty)
	for _, i := range p.images {
		n := i.dev.Size()
		if p.over != nil || i.cfg.Size == 0 || n <= i.cfg.Size {
			continue
		}
		if out == nil {
			out = map[wire.DiskName][]wire.Range{}
		}
		off := i.cfg.Size / cbt.GranuleSize * cbt.GranuleSize
		out[i.cfg.Name] = append(slices.Clone(out[i.cfg.Name]), wire.Range{Off: off, Len: n - off})
	}
	return out
}
