// Package overlaytest plays a guest whose disks it knows better than anybody:
// tests of overlays compare with it what a crash left.
//
// It guarantees that after any prefix of its acts Allowed accepts exactly what
// a disk may show. The caller gives every act the device of the disk it names,
// and repeats nothing that failed.
package overlaytest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

const sector = 512

// Guest writes, zeros and flushes at random, from a seed, and knows, by disk
// and sector, every value a read may show after a power cut: the one that was
// flushed and all that came later.
type Guest struct {
	rng    *rand.Rand
	disks  []delta.Disk
	now    map[string][]byte
	values map[string][][][]byte // by disk and sector, the flushed first; nil = anything
}

// NewGuest begins with the content given, which is flushed.
func NewGuest(seed uint64, disks []delta.Disk, content map[string][]byte) *Guest {
	g := &Guest{rng: rand.New(rand.NewPCG(seed, 1)), disks: disks, now: map[string][]byte{}, values: map[string][][][]byte{}}
	for _, d := range disks {
		g.now[d.Name] = bytes.Clone(content[d.Name])
		g.flushed(d.Name)
	}
	return g
}

// Random is content for a disk, from a seed.
func Random(seed uint64, n int64) []byte {
	r := rand.New(rand.NewPCG(seed, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// Now is what a disk reads as to the guest.
func (g *Guest) Now(disk string) []byte { return g.now[disk] }

func (g *Guest) flushed(disk string) {
	b := g.now[disk]
	var out [][][]byte
	for at := 0; at < len(b); at += sector {
		out = append(out, [][]byte{bytes.Clone(b[at : at+sector])})
	}
	g.values[disk] = out
}

func (g *Guest) put(disk string, p []byte, off int64) {
	copy(g.now[disk][off:], p)
	for s := off / sector; s*sector < off+int64(len(p)); s++ {
		g.values[disk][s] = append(g.values[disk][s], bytes.Clone(g.now[disk][s*sector:(s+1)*sector]))
	}
}

// Act does one random thing to one disk.
func (g *Guest) Act(device func(disk string) block.Device) error {
	disk := g.disks[g.rng.IntN(len(g.disks))]
	d := device(disk.Name)
	sectors := int(disk.Size / sector)
	first := g.rng.IntN(sectors)
	p := make([]byte, (1+g.rng.IntN(min(24, sectors-first)))*sector)
	off := int64(first) * sector
	var err error
	switch g.rng.IntN(8) {
	case 0, 1:
		if err := d.Sync(); err != nil {
			return err
		}
		g.flushed(disk.Name)
		return nil
	case 2, 3:
		g.put(disk.Name, p, off) // possible from now on
		err = d.ZeroAt(off, int64(len(p)), g.rng.IntN(2) == 0)
	default:
		for i := range p {
			p[i] = byte(g.rng.Uint32())
		}
		g.put(disk.Name, p, off)
		_, err = d.WriteAt(p, off)
	}
	if err != nil { // it may have stopped within a sector
		for s := first; int64(s)*sector < off+int64(len(p)); s++ {
			g.values[disk.Name][s] = nil
		}
	}
	return err
}

// Strict is the guest after the death of a process on a host that lives: only
// what was answered, or the request under way, may be seen.
func (g *Guest) Strict() *Guest {
	out := &Guest{disks: g.disks, now: g.now, values: map[string][][][]byte{}}
	for disk, ss := range g.values {
		for _, vs := range ss {
			if vs != nil {
				vs = vs[max(0, len(vs)-2):]
			}
			out.values[disk] = append(out.values[disk], vs)
		}
	}
	return out
}

// Allowed holds what a disk reads as against what its sectors may be.
func (g *Guest) Allowed(disk string, got []byte) error {
	for s, vs := range g.values[disk] {
		have := got[s*sector : (s+1)*sector]
		if vs != nil && !slices.ContainsFunc(vs, func(v []byte) bool { return bytes.Equal(v, have) }) {
			return fmt.Errorf("disk %s sector %d holds none of %d possible values", disk, s, len(vs))
		}
	}
	return nil
}

// ReadAll reads a whole device.
func ReadAll(d block.Device) ([]byte, error) {
	b := make([]byte, d.Size())
	_, err := d.ReadAt(b, 0)
	return b, err
}
