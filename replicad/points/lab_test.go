package points_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

const (
	sizeA = 24 * 4096
	sizeB = 9*4096 + 1536 // the last granule is short
)

var disksAB = []delta.Disk{{Name: "vda", Size: sizeA}, {Name: "vdb", Size: sizeB}}

// primary plays the sending side and keeps a copy of every cut.
type primary struct {
	rng     *rand.Rand
	vm      delta.VM
	gen     delta.Generation
	epoch   uint64
	disks   []delta.Disk
	content [][]byte
	parent  delta.Pos
	cuts    map[delta.Pos][][]byte
	sets    map[delta.Pos][]delta.Disk // the disks of each cut
	sent    []delta.Pos                // in order
	acked   delta.Pos
	now     time.Time
	blob    []byte
	blobs   map[delta.Pos][]byte

	// What a sweep's scenario was told before the crash.
	created          int
	distance         time.Duration // between points, 0 = 15 s
	seeded           map[string]int64
	promoted, sealed bool
	target           delta.Pos
	app              bool // the next cuts are application-consistent
	apps             map[delta.Pos]bool
	pinned           delta.Pos // was acknowledged as pinned
	room             int64     // the images have at least so many bytes
	mixed            bool      // the set of disks may change
}

func newPrimary(seed uint64) *primary {
	p := &primary{
		rng: rand.New(rand.NewPCG(seed, 9)), vm: delta.VM{1}, gen: delta.Generation{7}, disks: slices.Clone(disksAB),
		cuts: map[delta.Pos][][]byte{}, sets: map[delta.Pos][]delta.Disk{}, blobs: map[delta.Pos][]byte{}, apps: map[delta.Pos]bool{}, now: time.Unix(1_700_000_000, 0).UTC(),
	}
	for _, d := range p.disks {
		b := make([]byte, d.Size)
		p.fill(b)
		p.content = append(p.content, b)
	}
	return p
}

func (p *primary) fill(b []byte) {
	for i := range b {
		b[i] = byte(p.rng.Uint32())
	}
}

// copy is a primary with content of its own.
func (p *primary) copy() *primary {
	c := *p
	c.content, c.disks = nil, slices.Clone(p.disks)
	// What the copy goes on to cut is forgotten with it: a sweep makes thousands.
	c.cuts, c.blobs, c.apps = maps.Clone(p.cuts), maps.Clone(p.blobs), maps.Clone(p.apps)
	c.sets = maps.Clone(p.sets)
	for _, b := range p.content {
		c.content = append(c.content, bytes.Clone(b))
	}
	return &c
}

// touch changes n random granules, some to zeros, and returns the ranges.
func (p *primary) touch(n int) [][]block.Range {
	out := make([][]block.Range, len(p.disks))
	for d := range p.disks {
		marks := make([]bool, (len(p.content[d])+4095)/4096)
		for range n {
			marks[p.rng.IntN(len(marks))] = true
		}
		for g, m := range marks {
			if !m {
				continue
			}
			lo, hi := g*4096, min((g+1)*4096, len(p.content[d]))
			if p.rng.IntN(4) == 0 {
				clear(p.content[d][lo:hi])
			} else {
				p.fill(p.content[d][lo:hi])
			}
			out[d] = append(out[d], block.Range{Off: int64(lo), Len: int64(hi - lo)})
		}
	}
	return out
}

// cut encodes an epoch of the given changes on the last acknowledged parent.
func (p *primary) cut(changed [][]block.Range) *delta.Built {
	p.epoch++
	spec := delta.Spec{
		Header:  delta.Header{VM: p.vm, Generation: p.gen, Epoch: p.epoch, Nonce: p.rng.Uint64(), Parent: p.parent, Disks: p.disks},
		Changed: changed, Content: p.content, Info: delta.ManifestInfo{Cut: p.now, App: p.app},
	}
	if p.blob != nil {
		spec.Info.Firmware = []delta.Blob{{Kind: delta.BlobNVRAM, Data: p.blob}}
	}
	b, err := spec.Build()
	if err != nil {
		panic(err)
	}
	kept := make([][]byte, len(p.content))
	for i := range kept {
		kept[i] = bytes.Clone(p.content[i])
	}
	p.cuts[b.Pos] = kept
	p.sets[b.Pos] = slices.Clone(p.disks)
	p.blobs[b.Pos] = p.blob
	p.apps[b.Pos] = p.app
	p.sent = append(p.sent, b.Pos)
	return b
}

// send ships one epoch; the position counts only after the acknowledgement.
func (p *primary) send(s *points.Store, b *delta.Built) error {
	pos, err := receive(s, b, 0)
	if err != nil {
		return err
	}
	if pos != b.Pos {
		return fmt.Errorf("acknowledged %v instead of %v", pos, b.Pos)
	}
	p.parent, p.acked = pos, pos
	return nil
}

func receive(s *points.Store, b *delta.Built, _ int) (delta.Pos, error) {
	h, err := delta.ParseHeader(b.Header)
	if err != nil {
		return delta.Pos{}, err
	}
	r, err := s.Begin(h)
	if err != nil {
		return delta.Pos{}, err
	}
	for k := int(r.Next()); k < len(b.Chunks); k++ {
		if err := r.Chunk(b.Chunks[k]); err != nil {
			return delta.Pos{}, err
		}
	}
	return r.Commit(b.Manifest)
}

// detRand is a deterministic source of store and use numbers.
type detRand struct{ r *rand.Rand }

func (d detRand) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(d.r.Uint32())
	}
	return len(p), nil
}

func (p *primary) config(h *blocktest.Host) points.Config {
	seed := p.rng.Uint64()
	var set func([]delta.Disk) error
	if p.mixed {
		set = func([]delta.Disk) error { return nil }
	}
	return points.Config{
		Set:    set,
		FS:     h.FS,
		Bases:  func(disk string, size int64) (block.Device, error) { return h.Disk(disk, max(size, p.room)), nil },
		VM:     p.vm,
		Policy: points.Policy{MinDistance: cmp.Or(p.distance, 15*time.Second)},
		Limits: points.Limits{SpoolStep: 8192},
		Now:    func() time.Time { return p.now },
		Rand:   detRand{rand.New(rand.NewPCG(seed, 3))},
	}
}

// create makes a store and seeds it with p's content.
func (p *primary) create(h *blocktest.Host) (*points.Store, error) {
	s, err := points.Create(p.config(h), p.disks)
	if err != nil {
		return nil, err
	}
	return s, p.seed(s)
}

func (p *primary) seed(s *points.Store) error {
	spec := delta.Spec{Header: delta.Header{VM: p.vm, Generation: p.gen, Disks: p.disks, Seed: true}, Content: p.content}
	for _, d := range p.disks {
		spec.Changed = append(spec.Changed, []block.Range{{Off: 0, Len: d.Size}})
	}
	b, err := spec.Build()
	if err != nil {
		return err
	}
	for _, c := range b.Chunks {
		if err := s.SeedChunk(&spec.Header, c); err != nil {
			return err
		}
	}
	_, err = s.SeedFlush()
	return err
}

// epochs sends n epochs, dist apart, and steps the store after each.
func (p *primary) epochs(s *points.Store, n int, dist time.Duration, step bool) error {
	for range n {
		p.now = p.now.Add(dist)
		if err := p.send(s, p.cut(p.touch(4))); err != nil {
			return err
		}
		if step {
			if err := settle(s); err != nil {
				return err
			}
		}
	}
	return nil
}

// settle steps until there is nothing to do.
func settle(s *points.Store) error {
	for {
		if did, err := s.Step(context.Background()); err != nil || !did {
			return err
		}
	}
}

// exact compares a view with the kept copy.
func (p *primary) exact(s *points.Store, pos delta.Pos) error {
	v, err := s.View(pos)
	if err != nil {
		return err
	}
	return errors.Join(p.same(v), v.Close())
}

// set is the disks of a cut.
func (p *primary) set(pos delta.Pos) []delta.Disk {
	if d := p.sets[pos]; d != nil {
		return d
	}
	return p.disks
}

func (p *primary) same(v *points.View) error {
	want, ok := p.cuts[v.Pos()]
	if !ok {
		return fmt.Errorf("view of unknown position %v", v.Pos())
	}
	set := p.set(v.Pos())
	if got := v.Disks(); p.sets != nil && !sameDisks(got, set) {
		return fmt.Errorf("%v has the disks %v, not %v", v.Pos(), got, set)
	}
	for i, d := range set {
		dev, err := v.Disk(d.Name)
		if err != nil {
			return err
		}
		got := make([]byte, dev.Size())
		if _, err := dev.ReadAt(got, 0); err != nil {
			return err
		}
		if err := sameBytes(got, want[i]); err != nil {
			return fmt.Errorf("%v disk %s: %w", v.Pos(), d.Name, err)
		}
	}
	return nil
}

// sameDisks compares in whatever order.
func sameDisks(a, b []delta.Disk) bool {
	in := func(ds []delta.Disk) map[delta.Disk]bool {
		out := map[delta.Disk]bool{}
		for _, d := range ds {
			out[d] = true
		}
		return out
	}
	return len(a) == len(b) && maps.Equal(in(a), in(b))
}

var errDiffers = errors.New("content differs")

func sameBytes(got, want []byte) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes, want %d", len(got), len(want))
	}
	for g := 0; g*4096 < len(want); g++ {
		lo, hi := g*4096, min((g+1)*4096, len(want))
		if !bytes.Equal(got[lo:hi], want[lo:hi]) {
			return fmt.Errorf("granule %d: %w", g, errDiffers)
		}
	}
	return nil
}

// sound checks everything a store promises against p's copies.
func (p *primary) sound(s *points.Store) error {
	c := s.Committed()
	st := s.Status()
	if len(st.Damage) > 0 {
		return fmt.Errorf("damage reported: %v", st.Damage)
	}
	if c.IsZero() {
		if !p.acked.IsZero() {
			return fmt.Errorf("nothing committed, %v was acknowledged", p.acked)
		}
		return nil
	}
	if c.Epoch < p.acked.Epoch {
		return fmt.Errorf("committed %v, %v was acknowledged", c, p.acked)
	}
	if err := p.exact(s, c); err != nil {
		return fmt.Errorf("committed: %w", err)
	}
	pinned := p.pinned.IsZero()
	for _, pt := range s.Points() {
		pinned = pinned || pt.Pos == p.pinned && pt.Pinned
		if pt.App != p.apps[pt.Pos] {
			return fmt.Errorf("point %v: application-consistent %v", pt.Pos, pt.App)
		}
		if pt.Damage != nil {
			return fmt.Errorf("point %v: %w", pt.Pos, pt.Damage)
		}
		if err := p.exact(s, pt.Pos); err != nil {
			return fmt.Errorf("point: %w", err)
		}
		if got := pt.Disks; !sameDisks(got, p.set(pt.Pos)) {
			return fmt.Errorf("point %v is listed with the disks %v", pt.Pos, got)
		}
	}
	if err := p.absent(s); err != nil {
		return err
	}
	if !pinned {
		return fmt.Errorf("the pinned point %v is gone", p.pinned)
	}
	return nil
}

// bases compares the images with the applied position.
func (p *primary) basesAre(h *blocktest.Host, pos delta.Pos) error {
	for i, d := range p.set(pos) {
		want := p.cuts[pos][i]
		if err := sameBytes(h.Disk(d.Name, max(d.Size, p.room)).Content()[:len(want)], want); err != nil {
			return fmt.Errorf("image %s at %v: %w", d.Name, pos, err)
		}
	}
	return nil
}
