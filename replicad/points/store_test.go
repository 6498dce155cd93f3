package points_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func started(t testing.TB, seed uint64) (*primary, *blocktest.Host, *points.Store) {
	t.Helper()
	p, h := newPrimary(seed), blocktest.NewHost()
	s, err := p.create(h)
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return p, h, s
}

func TestSeedingRefusesViewsEpochsAndPromotion(t *testing.T) {
	p, h := newPrimary(1), blocktest.NewHost()
	s, err := points.Create(p.config(h), p.disks)
	must(t, err)
	if err := p.send(s, p.cut(p.touch(3))); !errors.Is(err, points.ErrSeeding) {
		t.Errorf("first epoch before the seed is complete: %v", err)
	}
	if _, err := s.View(delta.Pos{}); !errors.Is(err, points.ErrSeeding) {
		t.Errorf("view: %v", err)
	}
	if _, err := s.Promote(delta.Generation{9}, true); !errors.Is(err, points.ErrSeeding) {
		t.Errorf("promote: %v", err)
	}
	must(t, p.seed(s))
	must(t, p.send(s, p.cut(p.touch(3))))
	if err := p.seed(s); !errors.Is(err, points.ErrNotSeeding) {
		t.Errorf("seed after the first epoch: %v", err)
	}
	must(t, p.sound(s))
}

func TestEveryStateStaysExactWhileEpochsAreApplied(t *testing.T) {
	p, h, s := started(t, 2)
	must(t, p.send(s, p.cut(make([][]block.Range, 2)))) // empty first epoch
	for i := range 12 {
		p.now = p.now.Add(time.Duration(i%3) * 9 * time.Second)
		must(t, p.send(s, p.cut(p.touch(5))))
		must(t, p.sound(s))
		if i%2 == 0 {
			must(t, settle(s))
			must(t, p.basesAre(h, s.Committed()))
		}
		must(t, p.sound(s))
	}
	if n := len(s.Points()); n < 4 {
		t.Errorf("%d points", n)
	}
	must(t, s.Close())
	s, err := points.Open(p.config(h))
	must(t, err)
	must(t, p.sound(s))
	must(t, s.Close())
}

func TestViewStaysExactWhileLaterEpochsAreApplied(t *testing.T) {
	p, _, s := started(t, 3)
	must(t, p.epochs(s, 3, time.Second, true))
	var views []*points.View
	for i := range 8 {
		v, err := s.View(s.Committed())
		must(t, err)
		views = append(views, v)
		must(t, p.epochs(s, 1, time.Second, i%2 == 0))
		for _, v := range views {
			must(t, p.same(v))
		}
	}
	must(t, settle(s))
	for _, v := range views {
		must(t, p.same(v))
		must(t, v.Close())
	}
	must(t, p.sound(s))
}

func TestDuplicateForkGapAndForeignEpochs(t *testing.T) {
	p, _, s := started(t, 4)
	b := p.cut(p.touch(4))
	must(t, p.send(s, b))
	for range 2 { // before and after it is applied
		pos, err := receive(s, b, 0)
		if err != nil || pos != b.Pos {
			t.Errorf("duplicate: %v %v", pos, err)
		}
		must(t, settle(s))
	}
	fork := p.copy()
	fork.parent, fork.epoch = delta.Pos{}, p.epoch-1
	if _, err := receive(s, fork.cut(fork.touch(2)), 0); !errors.Is(err, points.ErrFork) {
		t.Errorf("fork: %v", err)
	}
	gap := p.copy()
	gap.parent = delta.Pos{Generation: p.gen, Epoch: p.epoch + 1, Digest: delta.Digest{5}}
	gap.epoch++
	var mismatch *delta.PosMismatchError
	if _, err := receive(s, gap.cut(gap.touch(2)), 0); !errors.As(err, &mismatch) || mismatch.Have != b.Pos {
		t.Errorf("gap: %v", err)
	}
	other := p.copy()
	other.vm = delta.VM{9}
	if _, err := receive(s, other.cut(other.touch(2)), 0); !errors.Is(err, points.ErrState) {
		t.Errorf("other vm: %v", err)
	}
	must(t, p.epochs(s, 2, time.Second, true))
	must(t, p.sound(s))
}

func TestResumeAfterCutAtEveryFrame(t *testing.T) {
	for _, reopen := range []bool{false, true} {
		p, h, s := started(t, 5)
		must(t, p.epochs(s, 1, time.Second, true))
		for cut := 0; ; cut++ {
			b := p.cut(p.touch(6))
			hd, err := delta.ParseHeader(b.Header)
			must(t, err)
			r, err := s.Begin(hd)
			must(t, err)
			if cut > len(b.Chunks) {
				break
			}
			for _, c := range b.Chunks[:cut] {
				must(t, r.Chunk(c))
			}
			if reopen {
				_ = s.Close()
				s, err = points.Open(p.config(h))
				must(t, err)
			}
			if n := s.Progress(hd.Generation, hd.Epoch, hd.Nonce); int(n) != cut {
				t.Fatalf("progress %d after %d chunks (reopened: %v)", n, cut, reopen)
			}
			r2, err := s.Begin(hd)
			must(t, err)
			if int(r2.Next()) != cut {
				t.Fatalf("next %d after %d chunks", r2.Next(), cut)
			}
			if err := r.Chunk(b.Chunks[0]); !reopen && !errors.Is(err, points.ErrState) {
				t.Fatalf("superseded receive: %v", err)
			}
			must(t, p.send(s, b))
			must(t, p.sound(s))
		}
	}
}

// The commit record of an epoch whose chunks are not all there is refused, also
// when only the last one is missing; with them it is taken.
func TestNoEpochIsCommittedBeforeAllOfItIsThere(t *testing.T) {
	p, _, s := started(t, 5)
	must(t, p.epochs(s, 1, time.Second, true))
	before := s.Committed()
	b := p.cut(p.touch(6))
	hd, err := delta.ParseHeader(b.Header)
	must(t, err)
	if len(b.Chunks) == 0 {
		t.Fatal("nothing can be missing")
	}
	for n := range b.Chunks {
		r, err := s.Begin(hd)
		must(t, err)
		for i := int(r.Next()); i < n; i++ {
			must(t, r.Chunk(b.Chunks[i]))
		}
		if pos, err := r.Commit(b.Manifest); err == nil {
			t.Fatalf("committed %v with %d of %d chunks", pos, n, len(b.Chunks))
		}
		if s.Committed() != before {
			t.Fatalf("with %d of %d chunks %v is committed", n, len(b.Chunks), s.Committed())
		}
	}
	must(t, p.send(s, b))
	must(t, p.sound(s))
}

func TestPromoteEndsPointsForGood(t *testing.T) {
	p, h, s := started(t, 6)
	must(t, p.epochs(s, 4, 20*time.Second, true))
	must(t, p.epochs(s, 1, time.Second, false))
	old := s.Points()[0].Pos
	v, err := s.View(old)
	must(t, err)
	g := delta.Generation{8}
	if _, err := s.Promote(g, false); !errors.Is(err, points.ErrState) {
		t.Fatalf("promote with unapplied epochs: %v", err)
	}
	must(t, s.ApplyAll(t.Context()))
	seal, err := s.Promote(g, false)
	must(t, err)
	if seal.At != p.acked || seal.Generation != g || seal.Points != 4 {
		t.Errorf("seal %+v", seal)
	}
	if err := p.same(v); !errors.Is(err, points.ErrGone) {
		t.Errorf("old view: %v", err)
	}
	for range 2 {
		if _, err := s.View(old); !errors.Is(err, points.ErrPromoted) {
			t.Errorf("view: %v", err)
		}
		if len(s.Points()) != 0 || s.Status().State != points.Promoted {
			t.Errorf("status %+v", s.Status())
		}
		if err := p.copy().send(s, p.cut(make([][]block.Range, 2))); !errors.Is(err, points.ErrPromoted) {
			t.Errorf("epoch: %v", err)
		}
		if again, err := s.Promote(g, false); err != nil || again.At != seal.At {
			t.Errorf("repeated: %+v %v", again, err)
		}
		if _, err := s.Promote(delta.Generation{1}, false); !errors.Is(err, points.ErrPromoted) {
			t.Errorf("other generation: %v", err)
		}
		must(t, p.basesAre(h, seal.At))
		must(t, s.Close())
		s, err = points.Open(p.config(h))
		must(t, err)
	}
	must(t, s.Close())
	// The other way round: the images become a replica's again without a copy.
	s, err = points.CreateAt(p.config(h), p.acked, p.disks)
	must(t, err)
	must(t, p.epochs(s, 3, 20*time.Second, true))
	must(t, p.sound(s))
	must(t, s.Close())
}

func TestPromoteAtOlderPointListsWhatWasRolledBack(t *testing.T) {
	p, h, s := started(t, 7)
	must(t, p.epochs(s, 6, 20*time.Second, true))
	must(t, p.epochs(s, 2, time.Second, false))
	to := s.Points()[1].Pos
	want, err := s.ChangedSince(to)
	must(t, err)
	before := p.cuts[p.acked]
	seal, err := s.PromoteAt(t.Context(), to, delta.Generation{8})
	must(t, err)
	if seal.At != to || seal.Ended != p.acked {
		t.Errorf("seal %+v", seal)
	}
	must(t, p.basesAre(h, to))
	got, err := s.ChangedSince(to)
	must(t, err)
	for i, d := range p.disks {
		if len(got[d.Name]) != len(want[d.Name]) {
			t.Errorf("disk %s: rolled back %v, changed %v", d.Name, got[d.Name], want[d.Name])
		}
		// M1: copying these ranges from the point over the newest content
		// must give the point.
		mix := append([]byte(nil), before[i]...)
		for _, r := range got[d.Name] {
			copy(mix[r.Off:r.End()], p.cuts[to][i][r.Off:r.End()])
		}
		must(t, sameBytes(mix, p.cuts[to][i]))
	}
	must(t, s.Close())
}

func TestDigestsAreOfTheCommittedContent(t *testing.T) {
	p, _, s := started(t, 8)
	must(t, p.epochs(s, 2, time.Second, false))
	key := [32]byte{1}
	r := []block.Range{{Off: 0, Len: 8192}, {Off: 4096, Len: 100}}
	a, err := s.Digests(t.Context(), s.Committed(), "vda", key, r)
	must(t, err)
	must(t, settle(s))
	b, err := s.Digests(t.Context(), s.Committed(), "vda", key, r)
	must(t, err)
	if a[0] != b[0] || a[1] != b[1] || a[0] == a[1] {
		t.Errorf("digests %x %x", a, b)
	}
	if _, err := s.Digests(t.Context(), delta.Pos{}, "vda", key, r); err == nil {
		t.Error("digests at another position")
	}
}

func TestFirmwareIsKeptPerPoint(t *testing.T) {
	p, h, s := started(t, 9)
	for i := range 6 {
		p.blob = nil
		if i%2 == 0 {
			p.blob = []byte{byte(i), 1, 2}
		}
		must(t, p.epochs(s, 1, 20*time.Second, i != 5))
		if p.blob == nil {
			p.blobs[p.acked] = []byte{byte(i - 1), 1, 2}
		}
	}
	for range 2 {
		for _, pos := range append([]delta.Pos{s.Committed()}, pointPositions(s)...) {
			fw, err := s.Firmware(pos)
			must(t, err)
			if len(fw) != 1 || string(fw[0].Data) != string(p.blobs[pos]) {
				t.Errorf("firmware at %v: %v, want %v", pos, fw, p.blobs[pos])
			}
		}
		must(t, settle(s))
		must(t, s.Close())
		var err error
		s, err = points.Open(p.config(h))
		must(t, err)
	}
	must(t, s.Close())
}

func pointPositions(s *points.Store) []delta.Pos {
	var out []delta.Pos
	for _, p := range s.Points() {
		out = append(out, p.Pos)
	}
	return out
}

func TestThinningMergesAndDropsWithoutChangingWhatStays(t *testing.T) {
	p, h, s := started(t, 10)
	must(t, s.Close())
	cfg := p.config(h)
	cfg.Policy.Grid = []points.Row{{Every: 0, For: time.Minute}, {Every: time.Minute, For: 5 * time.Minute}}
	s, err := points.Open(cfg)
	must(t, err)
	for range 60 {
		must(t, p.epochs(s, 1, 16*time.Second, true))
		must(t, p.sound(s))
	}
	pts := s.Points()
	if len(pts) < 7 || len(pts) > 20 {
		t.Errorf("%d points stay", len(pts))
	}
	must(t, s.Pin(pts[0].Pos))
	v, err := s.View(pts[1].Pos)
	must(t, err)
	must(t, p.epochs(s, 40, 16*time.Second, true))
	must(t, p.same(v))
	must(t, v.Close())
	must(t, p.exact(s, pts[0].Pos))
	must(t, s.Close())
	s, err = points.Open(cfg)
	must(t, err)
	must(t, p.exact(s, pts[0].Pos))
	must(t, s.Unpin(pts[0].Pos))
	must(t, settle(s))
	if err := p.exact(s, pts[0].Pos); !errors.Is(err, points.ErrNoPoint) {
		t.Errorf("unpinned old point: %v", err)
	}
	must(t, p.sound(s))
	must(t, s.Close())
}

func TestBacklogLimitDelaysTheCommit(t *testing.T) {
	p, h, s := started(t, 11)
	must(t, s.Close())
	cfg := p.config(h)
	cfg.Limits.BacklogBytes = 1
	s, err := points.Open(cfg)
	must(t, err)
	must(t, p.epochs(s, 1, time.Second, false))
	b := p.cut(p.touch(3))
	if err := p.send(s, b); !errors.Is(err, points.ErrBusy) {
		t.Fatalf("commit over the limit: %v", err)
	}
	hd, err := delta.ParseHeader(b.Header)
	must(t, err)
	r, err := s.Begin(hd)
	must(t, err)
	if int(r.Next()) != len(b.Chunks) {
		t.Errorf("chunks were lost: %d of %d", r.Next(), len(b.Chunks))
	}
	ctx, cancel := context.WithCancel(t.Context())
	run := make(chan error)
	go func() { run <- s.Run(ctx) }()
	pos, err := r.CommitWait(t.Context(), b.Manifest)
	must(t, err)
	cancel()
	<-run
	if pos != b.Pos {
		t.Errorf("position %v", pos)
	}
	p.acked = pos
	must(t, p.sound(s))
	must(t, s.Close())
}

// The newest state may pass on between its choice and its opening, without ever
// having become a recovery point: then the next newest one is taken. What was
// taken stays exact.
func TestTakingTheNewestStateIsNeverTooLate(t *testing.T) {
	p, _, s := started(t, 77)
	defer func() { must(t, s.Close()) }()
	must(t, p.epochs(s, 1, time.Second, true))
	done := make(chan error, 1)
	go func() { done <- p.epochs(s, 100, time.Second, true) }() // points lie 15 s apart
	var kept []*points.View
	var sendErr error
	n := 0
	for going := true; going; n++ {
		select {
		case sendErr = <-done:
			going = false
		default:
		}
		pt, v, err := s.Take("latest")
		if err != nil {
			t.Errorf("take %d: %v", n, err)
			if going {
				sendErr = <-done
			}
			break
		}
		if v.Pos() != pt.Pos {
			t.Errorf("chose %v, opened %v", pt.Pos, v.Pos())
		}
		if n%1000 == 0 && len(kept) < 8 {
			kept = append(kept, v)
		} else {
			must(t, v.Close())
		}
	}
	must(t, sendErr)
	for _, v := range kept {
		must(t, errors.Join(p.same(v), v.Close()))
	}
	t.Logf("%d takes", n)
	if _, _, err := s.Take("no such thing"); !errors.Is(err, points.ErrChoice) {
		t.Errorf("got %v", err)
	}
}
