package points_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// B3: the commit record must not be durable before the data is, so nothing may
// be acknowledged before one sync of the spool, which follows all its writes.
func TestB3CommitIsOneSyncAfterAllWrites(t *testing.T) {
	p, h, s := started(t, 51)
	must(t, p.epochs(s, 2, time.Second, true)) // from now on slots are recycled
	b := p.cut(p.touch(4))
	var ops []fsxtest.Op
	h.Power.SetTrace(func(op fsxtest.Op) {
		if op.Kind.Persists() {
			ops = append(ops, op)
		}
	})
	must(t, p.send(s, b))
	h.Power.SetTrace(nil)
	for i, op := range ops {
		last := i == len(ops)-1
		if !strings.HasPrefix(op.Path, "spool/") || (op.Kind == fsxtest.Sync) != last || (!last && op.Kind != fsxtest.Write) {
			t.Errorf("operation %d of %d of a commit is %v", i, len(ops), op)
		}
	}
	if len(ops) != len(b.Chunks)+3 { // slot header, chunks, manifest, sync
		t.Errorf("%d operations for %d chunks", len(ops), len(b.Chunks))
	}
}

// B20: zeros over data must be there as zeros at every later point, and the
// data at every earlier one.
func TestB20ZeroedRangesReadAsZerosAtEveryPoint(t *testing.T) {
	p, h, s := started(t, 52)
	all := func(fill byte) *delta.Built {
		var ch [][]block.Range
		for i, d := range p.disks {
			copy(p.content[i], bytes.Repeat([]byte{fill}, int(d.Size)))
			ch = append(ch, []block.Range{{Off: 0, Len: d.Size}})
		}
		p.now = p.now.Add(20 * time.Second)
		return p.cut(ch)
	}
	for _, fill := range []byte{5, 0, 6, 0, 0, 7} {
		must(t, p.send(s, all(fill)))
		must(t, p.sound(s))
		must(t, settle(s))
		must(t, p.sound(s))
		must(t, p.basesAre(h, s.Committed()))
	}
}

// B22: what a view looks at is not pruned under it, however hard the policy.
func TestB22ViewedAndPinnedPointsAreNotPruned(t *testing.T) {
	p, h, s := started(t, 53)
	must(t, s.Close())
	cfg := p.config(h)
	cfg.Policy.Max = 1
	s, err := points.Open(cfg)
	must(t, err)
	must(t, p.epochs(s, 3, 20*time.Second, false))
	v, err := s.View(s.Committed())
	must(t, err)
	must(t, p.epochs(s, 20, 20*time.Second, true))
	must(t, p.same(v))
	if len(s.Points()) > 2 {
		t.Errorf("%d points stay", len(s.Points()))
	}
	must(t, v.Close())
	must(t, settle(s))
	must(t, p.epochs(s, 1, 20*time.Second, true))
	if len(s.Points()) != 1 {
		t.Errorf("%d points stay", len(s.Points()))
	}
	must(t, s.Close())
}

// B27: a spool of the right length with zeros in it is not an epoch.
func TestB27SpoolLengthWithoutDataIsNotCommitted(t *testing.T) {
	p, h, s := started(t, 54)
	must(t, p.epochs(s, 1, time.Second, true))
	before := p.acked
	b := p.cut(p.touch(5))
	must(t, p.send(s, b))
	cut := h.Kill(fsxtest.Newest)
	for _, f := range cut.FS.Files() {
		if strings.HasPrefix(f, "spool/") {
			must(t, cut.FS.Damage(f, func(c []byte) []byte { clear(c[8192:12288]); return c }))
		}
	}
	s, err := points.Open(p.config(cut))
	must(t, err)
	if s.Committed() != before {
		t.Errorf("committed %v", s.Committed())
	}
	must(t, p.exact(s, before))
	must(t, s.Close())
}

// B28: every file a durable structure points to is durable before it. Sweeps
// prove the rest; here the renames and creations are checked one by one.
func TestB28NamesAreDurableBeforeWhatPointsToThem(t *testing.T) {
	p, h := newPrimary(55), blocktest.NewHost()
	dirty := map[string]bool{} // directories with names not yet durable
	h.Power.SetTrace(func(op fsxtest.Op) {
		dir, _, ok := strings.Cut(op.Path, "/")
		switch {
		case op.Kind == fsxtest.Create && ok, op.Kind == fsxtest.Rename && ok:
			dirty[dir] = true
		case op.Kind == fsxtest.SyncDir:
			delete(dirty, op.Path)
		case op.Kind == fsxtest.Sync && op.Path == "super" && len(dirty) > 0:
			t.Errorf("superblock written while names in %v are not durable", dirty)
		}
	})
	s, err := p.create(h)
	must(t, err)
	p.blob = []byte("x")
	must(t, p.epochs(s, 3, 20*time.Second, true))
	must(t, s.Close())
	h.Power.SetTrace(nil)
}

func TestFullDiskRefusesBeforeCommitAndLosesNothing(t *testing.T) {
	p, h, s := started(t, 56)
	must(t, p.epochs(s, 3, 20*time.Second, true))
	full := true
	h.Power.SetHook(func(op fsxtest.Op) error {
		if full && (op.Kind == fsxtest.Allocate || op.Kind == fsxtest.Create) {
			return syscall.ENOSPC
		}
		return nil
	})
	b := p.cut(p.touch(20))
	if err := p.send(s, b); !errors.Is(err, points.ErrNoSpace) {
		t.Fatalf("full disk: %v", err)
	}
	must(t, p.sound(s))
	full = false
	must(t, p.send(s, b))
	h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Write && strings.HasPrefix(op.Path, "undo/") {
			return syscall.ENOSPC
		}
		return nil
	})
	// Older points are given up for it, one after the other, never the newest.
	newest := s.Points()[len(s.Points())-1].Pos
	if err := settle(s); !errors.Is(err, points.ErrNoSpace) {
		t.Errorf("undo on a full disk: %v", err)
	}
	if ps := s.Points(); len(ps) != 1 || ps[0].Pos != newest || s.Status().Sacrificed == 0 {
		t.Errorf("points %v stay, %d were given up; want the newest alone", ps, s.Status().Sacrificed)
	}
	must(t, p.sound(s))
	h.Power.SetHook(nil)
	must(t, settle(s))
	must(t, p.sound(s))
	must(t, p.basesAre(h, p.acked))
}

func TestSuspectReplicaAppliesNothingUntilDiscarded(t *testing.T) {
	p, h, s := started(t, 57)
	must(t, p.epochs(s, 3, 20*time.Second, true))
	must(t, p.epochs(s, 1, time.Second, false))
	must(t, s.Close())
	state := "a"
	cfg := p.config(h)
	cfg.Identity = func(disk string) (points.Identity, error) { return points.Identity{File: disk, State: state}, nil }
	s, err := points.Open(cfg)
	must(t, err)
	must(t, s.Close())
	state = "b"
	for range 2 {
		s, err = points.Open(cfg)
		must(t, err)
		if s.Status().State != points.Suspect {
			t.Fatalf("state %s", s.Status().State)
		}
		if _, err := s.Step(t.Context()); !errors.Is(err, points.ErrSuspect) {
			t.Errorf("step: %v", err)
		}
		if _, err := s.View(p.acked); !errors.Is(err, points.ErrSuspect) {
			t.Errorf("view: %v", err)
		}
		if _, err := s.Promote(delta.Generation{9}, true); !errors.Is(err, points.ErrSuspect) {
			t.Errorf("promote: %v", err)
		}
		must(t, s.Close())
	}
	s, err = points.Open(cfg)
	must(t, err)
	must(t, s.Discard())
	if st := s.Status(); st.State != points.Replica || st.VerifyAll == "" || st.Points != 0 {
		t.Errorf("status %+v", st)
	}
	must(t, p.epochs(s, 3, 20*time.Second, true))
	must(t, p.sound(s))
	must(t, s.Close())
	s, err = points.Open(cfg)
	must(t, err)
	if st := s.Status(); st.State != points.Replica || st.VerifyAll == "" {
		t.Errorf("status %+v", st)
	}
	must(t, s.Close())
}

// After a boot the image's file system may stand on a device of another number;
// stores of earlier versions recorded that number.
func TestAnImageOnADeviceOfAnotherNumberIsTheSame(t *testing.T) {
	file := block.Identity{Kind: block.KindFile, Size: 1 << 20, Device: 45, Inode: 12, BirthTime: 13, MtimeNS: 14}
	p, h, s := started(t, 58)
	must(t, p.epochs(s, 3, 20*time.Second, true))
	must(t, s.Close())
	id := points.FileIdentity(file)
	cfg := p.config(h)
	cfg.Identity = func(string) (points.Identity, error) { return id, nil }
	state := func() string {
		t.Helper()
		s, err := points.Open(cfg)
		must(t, err)
		defer func() { must(t, s.Close()) }()
		return fmt.Sprint(s.Status().State)
	}
	want := fmt.Sprint(points.Replica)
	id.File = id.Numbered // as an earlier version
	if got := state(); got != want {
		t.Fatalf("at first: %s", got)
	}
	id = points.FileIdentity(file)
	if got := state(); got != want {
		t.Fatalf("after an upgrade: %s", got)
	}
	file.Device = 46
	id = points.FileIdentity(file)
	if got := state(); got != want {
		t.Fatalf("on a device of another number: %s", got)
	}
	file.Inode++
	id = points.FileIdentity(file)
	if got, bad := state(), fmt.Sprint(points.Suspect); got != bad {
		t.Fatalf("another file: %s", got)
	}
}

// growable is a set of disks that can become larger.
type growable struct {
	disks map[string][]byte
	opens map[string]int // devices that are open
}

func (g *growable) open(disk string, size int64) (block.Device, error) {
	b := g.disks[disk]
	if int64(len(b)) < size {
		b = append(b, make([]byte, size-int64(len(b)))...)
		g.disks[disk] = b
	}
	if g.opens == nil {
		g.opens = map[string]int{}
	}
	g.opens[disk]++
	m := block.NewMem(max(size, int64(len(b))))
	if _, err := m.WriteAt(b, 0); err != nil {
		return nil, err
	}
	return &growing{g: g, name: disk, m: m}, nil
}

// growing writes through to the growable's copy.
type growing struct {
	g    *growable
	name string
	m    *block.Mem
}

func (d *growing) ReadAt(p []byte, off int64) (int, error) { return d.m.ReadAt(p, off) }

func (d *growing) WriteAt(p []byte, off int64) (int, error) {
	copy(d.g.disks[d.name][off:], p)
	return d.m.WriteAt(p, off)
}

func (d *growing) ZeroAt(off, n int64, punch bool) error {
	clear(d.g.disks[d.name][off : off+n])
	return d.m.ZeroAt(off, n, punch)
}
func (d *growing) Sync() error { return d.m.Sync() }
func (d *growing) Size() int64 { return d.m.Size() }

func (d *growing) Close() error {
	d.g.opens[d.name]--
	return d.m.Close()
}

func TestGrownDiskKeepsOlderPointsAtTheirSize(t *testing.T) {
	p, h := newPrimary(58), blocktest.NewHost()
	g := &growable{disks: map[string][]byte{}}
	cfg := p.config(h)
	cfg.Bases = g.open
	s, err := points.Create(cfg, p.disks)
	must(t, err)
	must(t, p.seed(s))
	must(t, p.epochs(s, 2, 20*time.Second, true))
	old, err := s.View(s.Committed())
	must(t, err)
	p.disks = []delta.Disk{p.disks[0], {Name: "vdb", Size: sizeB + 3*4096 + 512}}
	was := len(p.content[1])
	p.content[1] = append(p.content[1], make([]byte, int(p.disks[1].Size)-was)...)
	p.fill(p.content[1][was:])
	p.now = p.now.Add(20 * time.Second)
	must(t, p.send(s, p.cut([][]block.Range{nil, {{Off: int64(was) / 4096 * 4096, Len: p.disks[1].Size - int64(was)/4096*4096}}})))
	for range 2 {
		must(t, p.same(old))
		must(t, p.sound(s))
		must(t, settle(s))
	}
	must(t, p.epochs(s, 3, 20*time.Second, true))
	must(t, p.same(old))
	must(t, old.Close())
	must(t, p.sound(s))
	must(t, s.Close())
	s, err = points.Open(cfg)
	must(t, err)
	must(t, p.sound(s))
	must(t, s.Close())
}

// resizeTo gives disk vdb another size and ships that; what is new is random.
func (p *primary) resizeTo(s *points.Store, size int64) error {
	was := int64(len(p.content[1]))
	p.disks = []delta.Disk{p.disks[0], {Name: "vdb", Size: size}}
	p.content[1] = append(bytes.Clone(p.content[1][:min(was, size)]), make([]byte, max(0, size-was))...)
	p.fill(p.content[1][min(was, size):])
	seam := (min(was, size) - 1) / 4096 * 4096
	p.now = p.now.Add(20 * time.Second)
	return p.send(s, p.cut([][]block.Range{nil, {{Off: seam, Len: size - seam}}}))
}

// F18: a disk that is shrunk and grows again: every point has its own size and
// content, also the tail that was cut off, and can be promoted.
func TestAPointKeepsWhatAShrinkCutOff(t *testing.T) {
	p, h := newPrimary(61), blocktest.NewHost()
	g := &growable{disks: map[string][]byte{}}
	cfg := p.config(h)
	cfg.Bases = g.open
	s, err := points.Create(cfg, p.disks)
	must(t, err)
	must(t, p.seed(s))
	must(t, p.epochs(s, 2, 20*time.Second, true))
	sizes := map[delta.Pos]int64{s.Committed(): sizeB}
	for _, size := range []int64{5*4096 + 512, 3 * 4096, 7 * 4096, sizeB + 5*4096} {
		must(t, p.resizeTo(s, size))
		sizes[s.Committed()] = size
		must(t, p.sound(s))
		must(t, settle(s))
		must(t, p.epochs(s, 2, 20*time.Second, true))
		must(t, p.sound(s))
	}
	must(t, s.Close())
	s, err = points.Open(cfg)
	must(t, err)
	must(t, p.sound(s))
	for _, pt := range s.Points() {
		if want, ok := sizes[pt.Pos]; ok && pt.Disks[1].Size != want {
			t.Errorf("%v has %d bytes, not %d", pt.Pos, pt.Disks[1].Size, want)
		}
	}
	must(t, s.Close())
	for pos, size := range sizes { // each promoted on a copy of everything
		at, disks := h.Cut(fsxtest.Newest), &growable{disks: map[string][]byte{}}
		for n, b := range g.disks {
			disks.disks[n] = bytes.Clone(b)
		}
		cfg := p.config(at)
		cfg.Bases = disks.open
		s, err := points.Open(cfg)
		must(t, err)
		_, err = s.PromoteAt(t.Context(), pos, delta.Generation{9})
		must(t, err)
		if got := s.Status().Disks[1].Size; got != size {
			t.Errorf("promoted at %v: %d bytes, not %d", pos, got, size)
		}
		changed, err := s.ChangedSince(pos)
		must(t, err)
		for _, r := range changed["vdb"] {
			if r.Len <= 0 || r.End() > size {
				t.Errorf("changed %+v of %d bytes", r, size)
			}
		}
		must(t, s.Close())
		if !bytes.Equal(disks.disks["vdb"][:size], p.cuts[pos][1]) {
			t.Errorf("promoted at %v: the image is not the point's", pos)
		}
	}
}

// What the replica does not have yet equals nothing, not even zeros: an older
// end of the disk may lie there in the image.
func TestDigestsBehindTheEndOfADiskEqualNothing(t *testing.T) {
	p, _, s := started(t, 63)
	must(t, p.epochs(s, 1, time.Second, true))
	key := [32]byte{1}
	ds, err := s.Digests(t.Context(), s.Committed(), "vda", key, []block.Range{{Off: sizeA - 4096, Len: 4096}, {Off: sizeA - 4096, Len: 8192}, {Off: sizeA, Len: 4096}})
	must(t, err)
	if ds[0] == [16]byte{} || ds[1] != [16]byte{} || ds[2] != [16]byte{} {
		t.Errorf("digests %x", ds)
	}
	must(t, s.Close())
}

// A disk that is grown while it is seeded: what was received stays, the rest
// comes with the first epoch, whichever of the two hears of it first.
func TestADiskMayGrowWhileItIsSeeded(t *testing.T) {
	for _, told := range []bool{false, true} {
		p, h := newPrimary(62), blocktest.NewHost()
		g := &growable{disks: map[string][]byte{}}
		cfg := p.config(h)
		cfg.Bases = g.open
		s, err := points.Create(cfg, p.disks)
		must(t, err)
		must(t, p.seed(s))
		if told {
			must(t, s.SeedResize([]delta.Disk{p.disks[0], {Name: "vdb", Size: sizeB + 8192}}))
			if c, err := s.SeedCursor("vdb"); err != nil || c != sizeB+8192 {
				t.Errorf("cursor %d, %v", c, err)
			}
		}
		must(t, p.resizeTo(s, sizeB+8192))
		must(t, p.sound(s))
		must(t, settle(s))
		must(t, p.sound(s))
		must(t, s.Close())
	}
}

func TestStreamFromTheWireIsReceived(t *testing.T) {
	p, _, s := started(t, 59)
	b := p.cut(p.touch(8))
	for cut := 0; cut <= len(b.Chunks); cut++ {
		part := bytes.Join(append([][]byte{b.Header}, b.Chunks[:cut]...), nil)
		d := delta.NewDecoder(bytes.NewReader(part))
		h, err := d.Header()
		must(t, err)
		r, err := s.Begin(h)
		must(t, err)
		if _, err := r.Stream(t.Context(), d); err == nil {
			t.Fatal("a cut stream was committed")
		}
	}
	d := delta.NewDecoder(bytes.NewReader(b.From(uint32(len(b.Chunks)))))
	h, err := d.Header()
	must(t, err)
	r, err := s.Begin(h)
	must(t, err)
	pos, err := r.Stream(t.Context(), d)
	must(t, err)
	if pos != b.Pos {
		t.Errorf("position %v", pos)
	}
	p.acked = pos
	must(t, p.sound(s))
}

func TestForgottenEpochIsReceivedAnew(t *testing.T) {
	p, _, s := started(t, 60)
	b := p.cut(p.touch(8))
	h, err := delta.ParseHeader(b.Header)
	must(t, err)
	r, err := s.Begin(h)
	must(t, err)
	must(t, r.Chunk(b.Chunks[0]))
	must(t, s.Forget())
	if n := s.Progress(h.Generation, h.Epoch, h.Nonce); n != 0 {
		t.Errorf("progress %d", n)
	}
	if err := r.Chunk(b.Chunks[0]); !errors.Is(err, points.ErrState) {
		t.Errorf("forgotten receive: %v", err)
	}
	must(t, p.send(s, b))
	must(t, p.sound(s))
}

// A sync that fails while an epoch is received ends the store, although Run has
// nothing to do: Run returns, so that its caller opens the store again. It slept
// on, and no epoch was ever taken again until the daemon was restarted.
func TestAStoreThatFailedWhileReceivingEndsItsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, h, s := started(t, 54)
		must(t, p.epochs(s, 2, time.Second, true))
		must(t, settle(s))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		run := make(chan error, 1)
		go func() { run <- s.Run(ctx) }()
		synctest.Wait() // it sleeps
		h.Power.SetHook(func(op fsxtest.Op) error {
			if op.Kind == fsxtest.Sync && strings.HasPrefix(op.Path, "spool/") {
				return syscall.EIO
			}
			return nil
		})
		if err := p.send(s, p.cut(p.touch(4))); !errors.Is(err, points.ErrFailed) {
			t.Fatalf("an epoch whose sync failed: %v", err)
		}
		synctest.Wait()
		select {
		case err := <-run:
			if !errors.Is(err, points.ErrFailed) {
				t.Fatalf("run ended with: %v", err)
			}
		default:
			t.Fatal("run sleeps on")
		}
	})
}

// The limit of an epoch in the spool holds before its bytes are written, not
// after; once there is room the same epoch is received.
func TestNothingIsWrittenBehindTheLimitOfTheSpool(t *testing.T) {
	const limit = 64 << 10
	p, h, s := started(t, 61)
	must(t, s.Close())
	cfg := p.config(h)
	cfg.Limits.SpoolBytes = limit
	s, err := points.Open(cfg)
	must(t, err)
	behind := int64(0)
	h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Write && strings.HasPrefix(op.Path, "spool/") {
			behind = max(behind, op.Off+int64(op.Len))
		}
		return nil
	})
	b := p.cut(p.touch(200))
	if err := p.send(s, b); !errors.Is(err, points.ErrNoSpace) {
		t.Fatalf("an epoch above the limit: %v", err)
	}
	if behind == 0 || behind > limit {
		t.Errorf("written up to byte %d, the limit is %d", behind, limit)
	}
	must(t, s.Close())
	cfg.Limits.SpoolBytes = 0
	s, err = points.Open(cfg)
	must(t, err)
	must(t, p.send(s, b))
	must(t, settle(s))
	must(t, p.sound(s))
	must(t, s.Close())
}
