package oracle

import (
	"errors"
	"slices"
)

// CheckDurable judges the primary's disks as found after a power cut (and
// GiveUp): a sector may have lost what no flush covers, never what was
// answered before a flush that was itself answered without error; nor may it
// show what nobody wrote there.
func CheckDurable(h *History, images Images) error {
	t := h.table()
	return t.each(images, func(p place, s Sector, could []*Op) error {
		var lost *Op
		for _, o := range could {
			if lost = t.covering(o, p, t.flushed); lost == nil {
				return nil
			}
		}
		return violation("disk %d sector %d shows %v although the later write %d was flushed", p.disk, p.lba, s, lost.Seq)
	})
}

// CheckVisible judges disks that lost no power, at a moment when no operation
// is open: each sector shows the last operation, or one concurrent with it.
func CheckVisible(h *History, images Images) error {
	t := h.table()
	done := func(o *Op) bool { return o.Done != Never && !o.Failed }
	return t.each(images, func(p place, s Sector, could []*Op) error {
		var lost *Op
		for _, o := range could {
			if lost = t.covering(o, p, done); lost == nil {
				return nil
			}
		}
		return violation("disk %d sector %d shows %v although write %d came later", p.disk, p.lba, s, lost.Seq)
	})
}

// CheckRead judges what a read that was issued and answered within w returned
// from sector lba on: never something overwritten before w began, never
// something issued after w ended.
func CheckRead(h *History, disk int, lba uint64, data []byte, w Window) error {
	return checkRead(h, disk, lba, data, w, false)
}

// CheckTornRead is CheckRead for a disk that lies in a file: Linux copies from
// and into the page cache without a lock between the two, so that a sector which
// is written during w may show a part of both.
func CheckTornRead(h *History, disk int, lba uint64, data []byte, w Window) error {
	return checkRead(h, disk, lba, data, w, true)
}

func checkRead(h *History, disk int, lba uint64, data []byte, w Window, torn bool) error {
	t := h.part(disk, lba, uint64(len(data)/SectorSize))
	answered := func(o *Op) bool { return o.Done < w.Begin && !o.Failed }
	for i := range uint64(len(data) / SectorSize) {
		p := place{disk, lba + i}
		b := data[i*SectorSize:][:SectorSize]
		s := DecodeSector(b, h.VM, uint32(disk), p.lba)
		err := violation("a read of disk %d sector %d showed %v, which nobody had written there", disk, p.lba, s)
		for _, o := range t.explain(p, b, s) {
			if o != nil && o.Issued > w.End {
				continue
			}
			lost := t.covering(o, p, answered)
			if lost == nil {
				err = nil
				break
			}
			err = violation("a read of disk %d sector %d showed %v although write %d had been answered", disk, p.lba, s, lost.Seq)
		}
		if err != nil && !(torn && s.Content == Garbage && t.written(p, w)) {
			return err
		}
	}
	return nil
}

// written reports whether an operation at p was under way within w.
func (t *table) written(p place, w Window) bool {
	return slices.ContainsFunc(t.covered[p], func(o *Op) bool { return o.Issued <= w.End && o.Done >= w.Begin })
}

// covering returns an operation at p that came after o and counts.
func (t *table) covering(o *Op, p place, counts func(*Op) bool) *Op {
	for _, later := range t.covered[p] {
		if later != o && (o == nil || o.before(later)) && counts(later) {
			return later
		}
	}
	return nil
}

// flushed reports whether an answered flush covers o.
func (t *table) flushed(o *Op) bool { return !o.Failed && o.Done < t.synced }

// each decodes all sectors and passes what can explain them.
func (t *table) each(images Images, fn func(p place, s Sector, could []*Op) error) error {
	if len(images) != len(t.h.Base) {
		return violation("%d disks, the VM has %d", len(images), len(t.h.Base))
	}
	for d, img := range images {
		if len(img) != len(t.h.Base[d]) {
			return violation("disk %d has %d bytes instead of %d", d, len(img), len(t.h.Base[d]))
		}
		for lba := range uint64(len(img) / SectorSize) {
			p := place{d, lba}
			b := img[lba*SectorSize:][:SectorSize]
			s := DecodeSector(b, t.h.VM, uint32(d), lba)
			could := t.explain(p, b, s)
			if len(could) == 0 {
				return violation("disk %d sector %d shows %v, which nobody wrote there", d, lba, s)
			}
			if err := fn(p, s, could); err != nil {
				return err
			}
		}
	}
	return nil
}

// CheckSuperset verifies that a tracker missed nothing: every granule in which
// primary and replica differ is dirty. dirty gets a disk and a byte range.
func CheckSuperset(primary, replica Images, granule int, dirty func(disk int, off, n int64) bool) error {
	if granule <= 0 {
		return errors.New("granule must be positive")
	}
	if err := sameShape(primary, replica); err != nil {
		return err
	}
	for d := range primary {
		p, r := primary[d], replica[d]
		for off := 0; off < len(p); off += granule {
			end := min(off+granule, len(p))
			if string(p[off:end]) != string(r[off:end]) && !dirty(d, int64(off), int64(end-off)) {
				return violation("disk %d differs in bytes %d..%d and the tracker says clean", d, off, end-1)
			}
		}
	}
	return nil
}

// CheckEqual verifies that two states are the same, byte for byte.
func CheckEqual(got, want Images) error {
	if err := sameShape(got, want); err != nil {
		return err
	}
	for d := range got {
		for i := range got[d] {
			if got[d][i] != want[d][i] {
				return violation("disk %d sector %d differs at byte %d", d, i/SectorSize, i)
			}
		}
	}
	return nil
}

func sameShape(a, b Images) error {
	if len(a) != len(b) {
		return violation("%d disks and %d disks", len(a), len(b))
	}
	for d := range a {
		if len(a[d]) != len(b[d]) {
			return violation("disk %d has %d bytes and %d bytes", d, len(a[d]), len(b[d]))
		}
	}
	return nil
}
