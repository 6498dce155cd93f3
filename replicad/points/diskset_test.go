package points_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// disk is one disk of a set.
func disk(name string, size int64) delta.Disk { return delta.Disk{Name: name, Size: size} }

var onlyA = disk("vda", sizeA)

// alone leaves p with vda.
func (p *primary) alone() *primary {
	p.mixed, p.disks, p.content = true, []delta.Disk{onlyA}, p.content[:1]
	return p
}

// become gives p another set of disks, changes something of those that stay,
// and encodes it; what is new or longer is random.
func (p *primary) become(want ...delta.Disk) *delta.Built {
	changed := p.touch(2)
	var content [][]byte
	var ranges [][]block.Range
	for _, d := range want {
		i := slices.IndexFunc(p.disks, func(o delta.Disk) bool { return o.Name == d.Name })
		var old []byte
		var rs []block.Range
		if i >= 0 {
			old, rs = p.content[i], changed[i]
		}
		was := min(int64(len(old)), d.Size)
		b := append(bytes.Clone(old[:was]), make([]byte, d.Size-was)...)
		p.fill(b[was:])
		if int64(len(old)) != d.Size {
			seam := max(0, was-1) / 4096 * 4096
			rs = slices.DeleteFunc(rs, func(r block.Range) bool { return r.End() > seam })
			rs = append(rs, block.Range{Off: seam, Len: d.Size - seam})
		}
		content, ranges = append(content, b), append(ranges, rs)
	}
	p.disks, p.content = slices.Clone(want), content
	p.now = p.now.Add(20 * time.Second)
	return p.cut(ranges)
}

// absent checks what Absent says against the copies: no listed state has it,
// and what no state ever had or has is named, once nothing is being received.
func (p *primary) absent(s *points.Store) error {
	there := map[string]bool{}
	for _, pos := range append(pointPositions(s), s.Committed()) {
		for _, d := range p.set(pos) {
			there[d.Name] = true
		}
	}
	for _, n := range s.Absent() {
		if there[n] {
			return fmt.Errorf("the image of disk %s may be deleted, it is said, and a state has it", n)
		}
	}
	return nil
}

// setStep is an epoch with a set of disks, and whether it is applied at once.
type setStep struct {
	apply bool
	disks []delta.Disk
}

// setLife is the scripted life of a replica whose set of disks changes.
func setLife(p *primary) func(h *blocktest.Host) error {
	return func(h *blocktest.Host) error {
		*p = *newPrimary(91).alone()
		p.room = sizeA + 8*4096
		s, err := p.create(h)
		if err != nil {
			return err
		}
		p.created++
		defer func() { _ = s.Close() }()
		send := func(steps ...setStep) error {
			for _, x := range steps {
				if err := p.send(s, p.become(x.disks...)); err != nil {
					return err
				}
				if x.apply {
					if err := settle(s); err != nil {
						return err
					}
				}
			}
			return nil
		}
		if err := p.epochs(s, 2, 20*time.Second, true); err != nil {
			return err
		}
		err = send(
			setStep{true, []delta.Disk{onlyA, disk("vdb", 2*4096+512)}},
			setStep{false, []delta.Disk{onlyA, disk("vdb", 5*4096)}}, // the rest of a first copy comes in slices
			setStep{true, []delta.Disk{onlyA, disk("vdb", 9*4096)}},
		)
		if err != nil {
			return err
		}
		big := s.Committed()
		if err := s.Pin(big); err != nil {
			return err
		}
		p.pinned = big
		err = send(
			setStep{true, []delta.Disk{onlyA, disk("vdb", 3*4096)}},
			setStep{true, []delta.Disk{onlyA}},
			setStep{false, []delta.Disk{disk("vdb", 4096), onlyA}}, // in the backlog only
			setStep{false, []delta.Disk{onlyA}},
			setStep{true, []delta.Disk{onlyA, disk("vdc", 2*4096)}},
			setStep{true, []delta.Disk{onlyA, disk("vdc", 2*4096), disk("vdb", 6*4096)}}, // with other content
			setStep{true, []delta.Disk{onlyA, disk("vdc", 2*4096)}},
		)
		if err != nil {
			return err
		}
		p.pinned = delta.Pos{}
		if err := s.Unpin(big); err != nil {
			return err
		}
		s.SetPolicy(points.Policy{MinDistance: time.Second, Max: 1, Grid: []points.Row{{For: time.Second}}}, 0)
		if err := p.epochs(s, 1, time.Minute, true); err != nil {
			return err
		}
		if got := s.Absent(); !slices.Equal(got, []string{"vdb"}) {
			return fmt.Errorf("%w: the images of %v may be deleted at the end", errDiffers, got)
		}
		return nil
	}
}

// The primary's disks join, grow, shrink, leave and come back: whatever moment
// the power fails in, every state that is listed has its own disks, bit by bit.
func TestNoCrashWhileTheSetOfDisksChangesHarmsAPoint(t *testing.T) {
	p := &primary{}
	h := blocktest.NewHost()
	must(t, setLife(p)(h))
	must(t, p.recheck(h.Cut(fsxtest.Newest)))
	every := 2
	switch {
	case testing.Short():
		every = 9
	case fsxtest.Full():
		every = 1
	}
	blocktest.SweepWith(t, blocktest.Options{MaxAll: 8, Random: 4, Every: every}, setLife(p), p.recheck)
}

func TestFailSweepWhileTheSetOfDisksChanges(t *testing.T) {
	p := &primary{}
	every := 7
	if testing.Short() {
		every = 61
	}
	blocktest.FailSweepWith(t, blocktest.Options{Every: every}, setLife(p), p.recheck)
}

// mixed is a store over images that grow, whose set of disks may change.
func mixed(t *testing.T, seed uint64) (*primary, *blocktest.Host, *growable, points.Config, *points.Store) {
	t.Helper()
	p, h := newPrimary(seed).alone(), blocktest.NewHost()
	g := &growable{disks: map[string][]byte{}}
	cfg := p.config(h)
	cfg.Bases = g.open
	s, err := points.Create(cfg, p.disks)
	must(t, err)
	must(t, p.seed(s))
	must(t, p.epochs(s, 2, 20*time.Second, true))
	return p, h, g, cfg, s
}

// A disk's images are closed and may go as soon as nothing has the disk, not
// before; it may come back afterwards, and each point can be promoted.
func TestARemovedDiskStaysAsLongAsAPointHasIt(t *testing.T) {
	p, h, g, cfg, s := mixed(t, 92)
	for _, set := range [][]delta.Disk{
		{onlyA, disk("vdb", 4096+512)}, {onlyA, disk("vdb", 7*4096)}, {onlyA, disk("vdb", 3*4096)}, {onlyA}, {onlyA}, {disk("vdc", 512), disk("vdb", 5*4096), onlyA}, {onlyA, disk("vdc", 512)},
	} {
		must(t, p.send(s, p.become(set...)))
		must(t, p.sound(s))
		must(t, settle(s))
		must(t, p.sound(s))
		if n := s.Absent(); n != nil {
			t.Fatalf("%v may be deleted", n)
		}
	}
	if got := s.Status().Absent; !slices.Equal(got, []string{"vdb"}) {
		t.Errorf("absent now: %v", got)
	}
	must(t, s.Close())
	s, err := points.Open(cfg)
	must(t, err)
	if g.opens["vdb"] != 0 || g.opens["vdc"] != 1 {
		t.Errorf("open: %v", g.opens)
	}
	must(t, p.sound(s))
	if g.opens["vdb"] != 1 {
		t.Errorf("open after the points were read: %v", g.opens)
	}
	for _, pos := range pointPositions(s) {
		must(t, p.promotable(h, g, pos))
	}
	v, err := s.View(oldestWith(p, s, "vdb"))
	must(t, err)
	prune := func() {
		t.Helper()
		s.SetPolicy(points.Policy{MinDistance: time.Second, Max: 1, Grid: []points.Row{{For: time.Second}}}, 0)
		must(t, p.epochs(s, 1, time.Minute, true))
	}
	prune()
	if n := s.Absent(); n != nil {
		t.Errorf("%v may be deleted under a view", n)
	}
	must(t, errors.Join(p.same(v), v.Close()))
	prune()
	if n := s.Absent(); !slices.Equal(n, []string{"vdb"}) || g.opens["vdb"] != 0 {
		t.Fatalf("%v may be deleted, open %v", n, g.opens)
	}
	delete(g.disks, "vdb")
	must(t, p.send(s, p.become(onlyA, disk("vdb", 2*4096))))
	must(t, settle(s))
	must(t, p.sound(s))
	if g.disks["vdb"] == nil || slices.Contains(s.Absent(), "vdb") {
		t.Errorf("it came back: %v", s.Absent())
	}
	must(t, s.Close())
}

// oldestWith is the oldest point that has a disk.
func oldestWith(p *primary, s *points.Store, name string) delta.Pos {
	for _, pos := range pointPositions(s) {
		if slices.ContainsFunc(p.set(pos), func(d delta.Disk) bool { return d.Name == name }) {
			return pos
		}
	}
	return delta.Pos{}
}

// promotable promotes at a point on a copy of everything.
func (p *primary) promotable(h *blocktest.Host, g *growable, pos delta.Pos) error {
	at, disks := h.Kill(fsxtest.Newest), &growable{disks: map[string][]byte{}}
	for n, b := range g.disks {
		disks.disks[n] = bytes.Clone(b)
	}
	cfg := p.config(at)
	cfg.Bases = disks.open
	s, err := points.Open(cfg)
	if err != nil {
		return err
	}
	defer s.Close() //nolint:errcheck // the test is about what is before
	if _, err = s.PromoteAt(context.Background(), pos, delta.Generation{9}); err != nil {
		return err
	}
	set, got := p.set(pos), s.Disks()
	if !sameDisks(got, set) {
		return fmt.Errorf("promoted at %v: disks %v, not %v", pos, got, set)
	}
	changed, err := s.ChangedSince(pos)
	if err != nil {
		return err
	}
	for n := range maps.Keys(changed) {
		if !slices.ContainsFunc(set, func(d delta.Disk) bool { return d.Name == n }) {
			return fmt.Errorf("promoted at %v: changes of disk %s, which is not there", pos, n)
		}
	}
	for i, d := range p.set(pos) {
		if !bytes.Equal(disks.disks[d.Name][:d.Size], p.cuts[pos][i]) {
			return fmt.Errorf("promoted at %v: the image of %s is not the point's", pos, d.Name)
		}
	}
	return nil
}
