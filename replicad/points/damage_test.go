package points_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// aged is a machine whose process died with everything a store can have: three
// closed segments, an open one, a merged one, two committed epochs, a partial.
func aged(t testing.TB, p *primary, clean bool) *blocktest.Host {
	t.Helper()
	h := blocktest.NewHost()
	*p = *newPrimary(21)
	s, err := p.create(h)
	must(t, err)
	must(t, s.Close())
	cfg := p.config(h)
	cfg.Policy.Grid = []points.Row{{Every: 0, For: 40 * time.Second}, {Every: 40 * time.Second, For: time.Hour}}
	s, err = points.Open(cfg)
	must(t, err)
	p.blob = []byte("variables")
	must(t, p.epochs(s, 8, 20*time.Second, true))
	p.blob = nil
	must(t, s.Pin(s.Points()[0].Pos))
	must(t, p.epochs(s, 1, time.Second, true))
	must(t, p.epochs(s, 2, time.Second, false))
	b := p.copy().cut(p.copy().touch(5))
	hd, err := delta.ParseHeader(b.Header)
	must(t, err)
	r, err := s.Begin(hd)
	must(t, err)
	must(t, r.Chunk(b.Chunks[0]))
	if clean {
		must(t, s.Close())
	}
	return h.Kill(fsxtest.Newest)
}

// judge looks at damaged copies of one machine, cheaply: there are hundreds of
// thousands.
type judge struct {
	p     *primary
	buf   []byte
	later map[delta.Pos]*sequel
}

// sequel is what the primary sends on top of a position: always the same, so
// that it is encoded once.
type sequel struct {
	p      *primary
	epochs []*delta.Built
}

func (j *judge) sequel(c delta.Pos) *sequel {
	if j.later[c] == nil {
		q := j.p.copy()
		q.rng = rand.New(rand.NewPCG(5, 6))
		q.adopt(c)
		q.epoch = j.p.epoch + 100 // burnt numbers are not used again
		n := &sequel{p: q}
		for range 3 {
			q.now = q.now.Add(20 * time.Second)
			b := q.cut(q.touch(4))
			q.parent = b.Pos
			n.epochs = append(n.epochs, b)
		}
		j.later[c] = n
	}
	return j.later[c]
}

// honest opens a damaged store and fails only when wrong bytes are read or
// something acknowledged is missing without a word.
func (j *judge) honest(h *blocktest.Host) (detected bool, err error) {
	p := j.p
	cfg := p.config(h)
	now := p.now
	cfg.Now, cfg.Rand = func() time.Time { return now }, detRand{rand.New(rand.NewPCG(7, 8))}
	s, err := points.Open(cfg)
	if err != nil {
		return true, nil
	}
	defer func() { _ = s.Close() }()
	if err := j.views(s, p.cuts); err != nil {
		return false, err
	}
	c := s.Committed()
	detected = len(s.Status().Damage) > 0 || c != p.acked
	if err := settle(s); err != nil {
		return true, j.views(s, p.cuts)
	}
	if s.Committed() != c {
		return detected, fmt.Errorf("apply moved the committed position")
	}
	if err := j.views(s, p.cuts); err != nil {
		return detected, fmt.Errorf("after apply: %w", err)
	}
	if len(s.Status().Damage) > 0 && s.Status().State == points.Damaged {
		return true, nil
	}
	q := j.sequel(c)
	for _, b := range q.epochs {
		now = now.Add(20 * time.Second)
		if pos, err := receive(s, b, 0); err != nil {
			return true, nil
		} else if pos != b.Pos {
			return detected, fmt.Errorf("acknowledged %v instead of %v", pos, b.Pos)
		}
		if err := settle(s); err != nil {
			return true, nil
		}
	}
	if err := j.views(s, q.p.cuts); err != nil {
		return detected, fmt.Errorf("after more epochs: %w", err)
	}
	if err := q.p.exact(s, s.Committed()); err != nil {
		return detected, fmt.Errorf("newest state: %w", err)
	}
	return detected, nil
}

// views compares every state that can be seen with its cut.
func (j *judge) views(s *points.Store, cuts map[delta.Pos][][]byte) error {
	listed := map[delta.Pos]bool{s.Committed(): true, s.Status().Applied: true}
	for _, pt := range s.Points() {
		listed[pt.Pos] = true
	}
	for pos, want := range cuts {
		v, err := s.View(pos)
		if err != nil {
			continue
		}
		err = j.same(v, want)
		if cerr := v.Close(); err == nil {
			err = cerr
		}
		if errors.Is(err, errDiffers) {
			return err
		}
		if err == nil && !listed[pos] {
			return fmt.Errorf("%v can be viewed but is not listed", pos)
		}
		if fw, ferr := s.Firmware(pos); err == nil && ferr == nil && j.p.blob == nil && len(fw) == 1 && string(fw[0].Data) != "variables" {
			return fmt.Errorf("firmware at %v: %q", pos, fw[0].Data)
		}
	}
	return nil
}

func (j *judge) same(v *points.View, want [][]byte) error {
	for i, d := range j.p.disks {
		dev, err := v.Disk(d.Name)
		if err != nil {
			return err
		}
		if _, err := dev.ReadAt(j.buf[:dev.Size()], 0); err != nil {
			return err
		}
		if err := sameBytes(j.buf[:dev.Size()], want[i]); err != nil {
			return fmt.Errorf("%v disk %s: %w", v.Pos(), d.Name, err)
		}
	}
	return nil
}

// reads plays the undamaged machine and returns which bytes of its files are
// looked at before they are written. A run that never looks at a byte is the
// same run whatever the byte is: its damage is harmless, and proven to be.
func (j *judge) reads(t *testing.T, h *blocktest.Host) map[string][]bool {
	t.Helper()
	seen, written := map[string][]bool{}, map[string][]bool{}
	for _, name := range h.FS.Files() {
		b, err := h.FS.Content(name)
		must(t, err)
		seen[name], written[name] = make([]bool, len(b)), make([]bool, len(b))
	}
	whole := h.Kill(fsxtest.Newest)
	whole.Power.SetHook(func(o fsxtest.Op) error {
		at := seen[o.Path]
		switch o.Kind {
		case fsxtest.Read:
			for i := o.Off; i < min(o.Off+o.Len, int64(len(at))); i++ {
				at[i] = at[i] || !written[o.Path][i]
			}
		case fsxtest.Write:
			for i := o.Off; i < min(o.Off+o.Len, int64(len(at))); i++ {
				written[o.Path][i] = true
			}
		case fsxtest.Rename, fsxtest.Truncate: // who is who from here on?
			for _, w := range written {
				clear(w)
			}
		}
		return nil
	})
	if detected, err := j.honest(whole); detected || err != nil {
		t.Fatalf("the undamaged machine: detected %v, %v", detected, err)
	}
	return seen
}

// damage is one case; at is the byte that changes, -1 when there are more.
type damage struct {
	at int64
	do func(m *fsxtest.Mem) error
}

// damageRun applies each damage to a fresh copy of the machine.
func damageRun(t *testing.T, every int, damages func(h *blocktest.Host, name string) []damage) {
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	for _, clean := range []bool{false, true} {
		p := &primary{}
		h := aged(t, p, clean)
		j := &judge{p: p, buf: make([]byte, max(sizeA, sizeB)), later: map[delta.Pos]*sequel{}}
		looked := j.reads(t, h)
		share := fsxtest.Share(every)
		kinds := map[string]*[3]int{} // cases, detected and never looked at, by kind of file
		all := 0
		for _, name := range h.FS.Files() {
			kind, _, _ := strings.Cut(name, "/")
			if kinds[kind] == nil {
				kinds[kind] = new([3]int)
			}
			for i, d := range damages(h, name) {
				if all++; !share(i) {
					continue
				}
				kinds[kind][0]++
				if d.at >= 0 && !looked[name][d.at] {
					kinds[kind][2]++
					continue
				}
				hurt := h.Kill(fsxtest.Newest)
				must(t, d.do(hurt.FS))
				det, err := j.honest(hurt)
				if err != nil {
					t.Errorf("%s, damage %d (clean %v): %v", name, i, clean, err)
				}
				if det {
					kinds[kind][1]++
				}
			}
		}
		for kind, n := range kinds {
			t.Logf("clean %v, %s: %d cases, %d detected, the rest harmless: %d of a byte nobody looks at", clean, kind, n[0], n[1], n[2])
		}
		t.Logf("clean %v: there are %d cases", clean, all)
	}
}

func stride(t *testing.T, long, short int) int {
	if testing.Short() {
		return short
	}
	return long
}

func TestDamagedBytesAreDetectedOrHarmless(t *testing.T) {
	damageRun(t, stride(t, 397, 3989), func(h *blocktest.Host, name string) []damage {
		b, err := h.FS.Content(name)
		must(t, err)
		var out []damage
		for off := range int64(len(b)) {
			out = append(out, damage{off, func(m *fsxtest.Mem) error {
				return m.SetByte(name, off, func(c byte) byte { return c ^ byte(1<<(off%8)) })
			}})
		}
		return out
	})
}

func TestDamagedHeadersAreDetectedOrHarmless(t *testing.T) {
	damageRun(t, stride(t, 3, 29), func(h *blocktest.Host, name string) []damage {
		b, err := h.FS.Content(name)
		must(t, err)
		var out []damage
		for block := int64(0); block < int64(len(b)); block += 4096 {
			for _, off := range []int64{0, 4, 5, 8, 24, 40, 50, 100, 4056, 4095} {
				if block+off < int64(len(b)) {
					out = append(out, damage{block + off, func(m *fsxtest.Mem) error {
						return m.SetByte(name, block+off, func(c byte) byte { return ^c })
					}})
				}
			}
		}
		return out
	})
}

func TestLostSwappedAndStaleBlocksAreDetectedOrHarmless(t *testing.T) {
	damageRun(t, stride(t, 1, 17), func(h *blocktest.Host, name string) []damage {
		b, err := h.FS.Content(name)
		must(t, err)
		n := int64(len(b)+4095) / 4096
		var out []damage
		for i := range n {
			out = append(out, damage{-1, func(m *fsxtest.Mem) error { return m.ZeroBlock(name, i) }})
			if i+1 < n && int64(len(b)) >= (i+2)*4096 {
				out = append(out,
					damage{-1, func(m *fsxtest.Mem) error { return m.SwapBlocks(name, i, i+1) }},
					damage{-1, func(m *fsxtest.Mem) error { return m.CopyBlock(name, i, i+1) }})
			}
		}
		return out
	})
}

func TestTruncatedFilesAreDetectedOrHarmless(t *testing.T) {
	damageRun(t, stride(t, 2, 23), func(h *blocktest.Host, name string) []damage {
		b, err := h.FS.Content(name)
		must(t, err)
		var out []damage
		step := int64(1361)
		if fsxtest.Full() {
			step = 1
		}
		for n := int64(0); n < int64(len(b)); n += step {
			out = append(out, damage{-1, func(m *fsxtest.Mem) error { return m.TruncateAt(name, n) }})
		}
		out = append(out, damage{-1, func(m *fsxtest.Mem) error { return m.Remove(name) }})
		return out
	})
}

// What was rolled back decides which blocks travel on the way back.
func TestADamagedListOfRolledBackGranulesIsDetectedOrHarmless(t *testing.T) {
	p, h, s := started(t, 33)
	must(t, p.epochs(s, 6, 20*time.Second, true))
	to := s.Points()[1].Pos
	_, err := s.PromoteAt(t.Context(), to, delta.Generation{8})
	must(t, err)
	want, err := s.ChangedSince(to)
	must(t, err)
	must(t, s.Close())
	const name = "rolled-back"
	whole, err := h.FS.Content(name)
	must(t, err)
	share := fsxtest.Share(11)
	i, refused := 0, 0
	for what, damaged := range fsxtest.Damages(whole) {
		if i++; !share(i) {
			continue
		}
		hurt := h.Kill(fsxtest.Newest)
		must(t, hurt.FS.Damage(name, func([]byte) []byte { return damaged }))
		s, err := points.Open(p.config(hurt))
		if err != nil {
			refused++
			continue
		}
		got, err := s.ChangedSince(to)
		must(t, s.Close())
		if err != nil {
			refused++
			continue
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s is believed: %s", what, d)
		}
	}
	t.Logf("%d bytes: %d damages refused", len(whole), refused)
}

// A pin that is lost lets go of the point somebody relies on.
func TestNoDamageOfThePinsLetsGoOfAPinnedPoint(t *testing.T) {
	p, h, s := started(t, 34)
	must(t, p.epochs(s, 6, 20*time.Second, true))
	want := s.Points()[1].Pos
	must(t, s.Pin(want))
	must(t, s.Close())
	const name = "pins.json"
	whole, err := h.FS.Content(name)
	must(t, err)
	refused := 0
	for what, damaged := range fsxtest.Damages(whole) {
		hurt := h.Kill(fsxtest.Newest)
		must(t, hurt.FS.Damage(name, func([]byte) []byte { return damaged }))
		s, err := points.Open(p.config(hurt))
		must(t, err)
		kept := 0
		for _, pt := range s.Points() {
			if pt.Pinned {
				kept++
			} else if pt.Pos == want {
				t.Errorf("%s: the pin is gone", what)
			}
		}
		bad := len(s.Status().Damage) > 0
		if bad {
			refused++
		}
		if (kept > 1) != bad {
			t.Errorf("%s: %d points are pinned, damage said: %v", what, kept, bad)
		}
		must(t, s.Close())
	}
	t.Logf("%d bytes: %d damages refused", len(whole), refused)
	// Letting go of one writes the list anew.
	must(t, h.FS.SetByte(name, 30, func(b byte) byte { return ^b }))
	s, err = points.Open(p.config(h))
	must(t, err)
	must(t, s.Unpin(s.Points()[0].Pos))
	must(t, s.Close())
	s, err = points.Open(p.config(h))
	must(t, err)
	if st := s.Status(); len(st.Damage) > 0 || s.Points()[0].Pinned || !s.Points()[1].Pinned {
		t.Errorf("after unpin: %v %+v", st.Damage, s.Points())
	}
	must(t, s.Close())
}

func TestB24DamagedMiddleSegmentRefusesItsPointsOnly(t *testing.T) {
	p, h, s := started(t, 31)
	must(t, p.epochs(s, 6, 20*time.Second, true))
	pts := s.Points()
	must(t, s.Close())
	var segs []string
	for _, f := range h.FS.Files() {
		if strings.HasPrefix(f, "undo/") {
			segs = append(segs, f)
		}
	}
	must(t, h.FS.SetByte(segs[2], 8192+100, func(b byte) byte { return ^b })) // data of a granule
	s, err := points.Open(p.config(h))
	must(t, err)
	defer s.Close() //nolint:errcheck // test
	for i, pt := range pts {
		err := p.exact(s, pt.Pos)
		switch {
		case i > 2 && err != nil:
			t.Errorf("point %d: %v", i, err)
		case i == 2 && !errors.Is(err, points.ErrDamaged):
			t.Errorf("point %d over the damage: %v", i, err)
		case errors.Is(err, errDiffers):
			t.Errorf("point %d: %v", i, err)
		}
	}
	must(t, s.Check(context.Background(), func(error) {}))
	if bad := s.Points(); bad[0].Damage == nil || bad[2].Damage == nil || bad[3].Damage != nil {
		t.Errorf("after a check: %v %v %v", bad[0].Damage, bad[2].Damage, bad[3].Damage)
	}
}

func TestDamagedCommittedEpochStopsEverythingUntilDropped(t *testing.T) {
	p, h, s := started(t, 32)
	must(t, p.epochs(s, 2, time.Second, true))
	good := p.acked
	must(t, p.epochs(s, 3, time.Second, false))
	h2 := h.Kill(fsxtest.Newest)
	hit := 0
	for _, f := range h2.FS.Files() {
		if !strings.HasPrefix(f, "spool/") {
			continue
		}
		b, err := h2.FS.Content(f)
		must(t, err)
		if len(b) > 64+4096+8 && int(b[24]) == 4 { // ordinal 4: the third epoch has 3
			must(t, h2.FS.SetByte(f, 4096+200, func(b byte) byte { return ^b }))
			hit++
		}
	}
	if hit != 1 {
		t.Fatalf("%d spools hit", hit)
	}
	s, err := points.Open(p.config(h2))
	must(t, err)
	st := s.Status()
	if st.State != points.Damaged || st.Committed.Epoch != good.Epoch+1 {
		t.Fatalf("status %+v", st)
	}
	must(t, p.exact(s, st.Committed))
	if err := p.send(s, p.copy().cut(p.copy().touch(1))); !errors.Is(err, points.ErrDamaged) {
		t.Errorf("epoch: %v", err)
	}
	if _, err := s.Promote(delta.Generation{8}, true); !errors.Is(err, points.ErrDamaged) {
		t.Errorf("promote: %v", err)
	}
	must(t, s.DropDamaged())
	if st := s.Status(); st.State != points.Replica || st.VerifyAll == "" {
		t.Errorf("status %+v", st)
	}
	q := p.copy()
	q.adopt(s.Committed())
	must(t, q.epochs(s, 3, 20*time.Second, true))
	must(t, q.exact(s, s.Committed()))
	must(t, s.Verified())
	must(t, s.Close())
	s, err = points.Open(p.config(h2))
	must(t, err)
	if st := s.Status(); st.VerifyAll != "" || len(st.Damage) > 0 {
		t.Errorf("status %+v", st)
	}
	must(t, s.Close())
}
