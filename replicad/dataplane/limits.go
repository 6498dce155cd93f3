package dataplane

import (
	"maps"

	"kvmreplica/cbt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// A disk that is added to a protected VM is tracked whole from the start, all
// of it marked. Its content goes piece by piece: each epoch lists it with a
// size that grows and has what is marked below that, so that to the replica it
// is a disk that becomes longer. The changes of the other disks go with every
// epoch meanwhile.

// limits checks the limits of a freeze and makes none larger than its disk.
// epochMu is held, so no size changes.
func (p *Plane) limits(asked map[wire.DiskName]int64) (map[wire.DiskName]int64, error) {
	limits := maps.Clone(asked)
	listed := len(p.images)
	for name, n := range asked {
		_, img, err := p.image(name)
		if err != nil {
			return nil, err
		}
		size := p.size(img)
		if n < 0 || n%delta.Granule != 0 && n != size {
			return nil, invalid("%d bytes of disk %s: not a multiple of %d", n, name, delta.Granule)
		}
		if limits[name] = min(n, size); n == 0 {
			listed--
		}
	}
	if listed == 0 {
		return nil, invalid("an epoch lists at least one disk")
	}
	return limits, nil
}

// keepBack takes what lies behind the limits out of a cut.
func keepBack(cut *cbt.Epoch, limits map[wire.DiskName]int64) error {
	for name, n := range limits {
		if err := cut.Keep(string(name), n); err != nil {
			return err
		}
	}
	return nil
}

// header is the part of a stream's header that is the same for all.
func (p *Plane) header(limits map[wire.DiskName]int64) delta.Header {
	h := delta.Header{VM: p.vm}
	for _, i := range p.images {
		size := p.size(i)
		if n, limited := limits[i.cfg.Name]; limited {
			if size = n; n == 0 {
				continue
			}
		}
		h.Disks = append(h.Disks, delta.Disk{Name: string(i.cfg.Name), Size: size})
	}
	return h
}
