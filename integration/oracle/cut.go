package oracle

import (
	"errors"
	"fmt"
)

// ErrViolation is wrapped by every verdict of a checker.
var ErrViolation = errors.New("violation")

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrViolation, fmt.Sprintf(format, args...))
}

// CheckCut decides whether images are the state of all disks at one cut that
// was made within w: there is a set of operations such that
//
//   - everything answered before w began is in it,
//   - nothing issued after w ended is in it,
//   - with each operation, everything answered before that was issued is in it,
//     over all disks,
//   - each sector shows an operation of the set that no other of the set
//     overwrote (one issued after that was answered), or what it held before.
//
// An operation is in the set as a whole, so a torn one is found, unless the
// rest of it was overwritten by a concurrent one. Failed operations may be
// there in part or not at all.
func CheckCut(h *History, images Images, w Window) error {
	if len(images) != len(h.Base) {
		return violation("%d disks, the VM has %d", len(images), len(h.Base))
	}
	c := &cutSearch{table: h.table(), w: w, in: map[*Op]bool{}}
	for d, img := range images {
		if len(img) != len(h.Base[d]) {
			return violation("disk %d has %d bytes instead of %d", d, len(img), len(h.Base[d]))
		}
		for lba := range len(img) / SectorSize {
			if err := c.see(place{d, uint64(lba)}, img[lba*SectorSize:][:SectorSize]); err != nil {
				return err
			}
		}
	}
	for _, o := range c.ops {
		if o.Done < w.Begin && !o.Failed {
			c.add(o)
		}
	}
	return c.solve()
}

// shown is one sector of the image and the operations that may explain it; nil
// among them is the content before the first operation.
type shown struct {
	at    place
	is    Sector
	could []*Op
}

type cutSearch struct {
	*table
	w     Window
	in    map[*Op]bool
	upTo  Time // everything answered before it is in, too
	seen  []shown
	steps int
}

// add puts o and all that precedes it into the set.
func (c *cutSearch) add(o *Op) {
	c.in[o] = true
	c.upTo = max(c.upTo, o.Issued)
}

func (c *cutSearch) has(o *Op) bool { return !o.Failed && (c.in[o] || o.Done < c.upTo) }

// see lists what explains a sector and puts what must be in into the set.
func (c *cutSearch) see(p place, b []byte) error {
	s := DecodeSector(b, c.h.VM, uint32(p.disk), p.lba)
	v := shown{at: p, is: s}
	late := false
	for _, o := range c.explain(p, b, s) {
		if o != nil && o.Issued > c.w.End {
			late = true
		} else {
			v.could = append(v.could, o)
		}
	}
	switch {
	case len(v.could) == 0 && late:
		return violation("disk %d sector %d shows %v, which was issued after the cut", p.disk, p.lba, s)
	case len(v.could) == 0:
		return violation("disk %d sector %d shows %v, which nobody wrote there", p.disk, p.lba, s)
	case len(v.could) == 1 && v.could[0] != nil:
		c.add(v.could[0])
	}
	c.seen = append(c.seen, v)
	return nil
}

// overwritten returns an operation of the set that came after o at p.
func (c *cutSearch) overwritten(o *Op, p place) *Op {
	for _, later := range c.covered[p] {
		if later != o && c.has(later) && (o == nil || o.before(later)) {
			return later
		}
	}
	return nil
}

// solve decides the sectors that more than one operation explains (zeros), the
// least demanding explanation first; a bigger set never makes an explanation
// possible that was not, except of the sectors it itself explains.
func (c *cutSearch) solve() error {
	if c.steps++; c.steps > 20000 {
		return errors.New("cut not decided: too many ways to explain the zeros; use fewer overlapping zeroing operations")
	}
	var open *shown
	var options []*Op
	for i := range c.seen {
		v := &c.seen[i]
		settled := false
		var can []*Op
		var by *Op
		for _, o := range v.could {
			if x := c.overwritten(o, v.at); x != nil {
				by = x
				continue
			}
			can = append(can, o)
			settled = settled || o == nil || c.in[o] || c.has(o)
		}
		if len(can) == 0 {
			return violation("disk %d sector %d shows %v although write %d, which is in the cut, came later", v.at.disk, v.at.lba, v.is, by.Seq)
		}
		if !settled && open == nil {
			open, options = v, can
		}
	}
	if open == nil {
		return nil
	}
	var first error
	for _, o := range options { // in order of issue
		in, upTo := make(map[*Op]bool, len(c.in)), c.upTo
		for k := range c.in {
			in[k] = true
		}
		c.add(o)
		err := c.solve()
		if err == nil || !errors.Is(err, ErrViolation) {
			return err
		}
		if first == nil {
			first = err
		}
		c.in, c.upTo = in, upTo
	}
	return first
}
