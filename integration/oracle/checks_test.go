package oracle

import (
	"errors"
	"strings"
	"sync"
	"testing"
)

func wantViolation(t *testing.T, name string, err error, text string) {
	t.Helper()
	if !errors.Is(err, ErrViolation) || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: %v, want a violation with %q", name, err, text)
	}
}

func wantNil(t *testing.T, name string, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", name, err)
	}
}

func TestStampDecodesEveryKindOfContent(t *testing.T) {
	s := Stamp{VM: 1, Disk: 2, Writer: 3, LBA: 4, Seq: 5}
	b := make([]byte, SectorSize)
	if got := DecodeSector(b, 1, 2, 4); got.Content != Zeros {
		t.Errorf("zeros: %v", got)
	}
	s.Put(b)
	if got := DecodeSector(b, 1, 2, 4); got.Content != Written || got.Stamp != s {
		t.Errorf("stamp: %v", got)
	}
	for _, p := range [][3]uint64{{2, 2, 4}, {1, 1, 4}, {1, 2, 5}} {
		if got := DecodeSector(b, p[0], uint32(p[1]), p[2]); got.Content != Misplaced {
			t.Errorf("at %v: %v", p, got)
		}
	}
	for i := range b {
		b[i] ^= 0x10
		if got := DecodeSector(b, 1, 2, 4); got.Content != Garbage {
			t.Errorf("byte %d changed: %v", i, got)
		}
		b[i] ^= 0x10
	}
}

func TestDurabilityChecker(t *testing.T) {
	s := newScript(1, 8)
	s.do(OpWrite, 0, 0, 4)
	old := s.copy()
	s.do(OpWrite, 0, 0, 4)
	wantNil(t, "unflushed write lost", CheckDurable(s.h, old))
	wantNil(t, "everything lost", CheckDurable(s.h, s.h.Base))
	f := s.issue(OpFlush, 0, 0, 0)
	s.h.Done(f.Seq, errors.New("io"))
	wantNil(t, "failed flush covers nothing", CheckDurable(s.h, old))
	s.do(OpFlush, 0, 0, 0)
	wantNil(t, "flushed write there", CheckDurable(s.h, s.copy()))
	wantViolation(t, "flushed write lost", CheckDurable(s.h, old), "was flushed")
	wantViolation(t, "flushed write lost for zeros", CheckDurable(s.h, s.h.Base), "was flushed")
	s.do(OpWrite, 0, 0, 4)
	torn := s.copy()
	clear(torn[0][100:200])
	wantViolation(t, "garbage", CheckDurable(s.h, torn), "nobody wrote")
	wantViolation(t, "another shape", CheckDurable(s.h, nil), "disks")
	o := s.issue(OpWrite, 0, 0, 2)
	s.apply(o, 0, 1)
	s.h.GiveUp()
	wantNil(t, "part of an unanswered write", CheckDurable(s.h, s.copy()))
}

func TestVisibilityChecker(t *testing.T) {
	s := newScript(1, 8)
	s.do(OpWrite, 0, 0, 4)
	old := s.copy()
	s.do(OpWrite, 0, 0, 4)
	wantNil(t, "last write shows", CheckVisible(s.h, s.copy()))
	wantViolation(t, "older write shows", CheckVisible(s.h, old), "came later")
}

func TestReadChecker(t *testing.T) {
	s := newScript(1, 8)
	a := s.do(OpWrite, 0, 0, 2)
	w := Window{s.h.Mark("read", 0), s.h.Mark("read", 0)}
	wantNil(t, "last write", CheckRead(s.h, 0, 0, s.h.Fill(a), w))
	wantViolation(t, "zeros", CheckRead(s.h, 0, 0, make([]byte, 1024), w), "had been answered")
	b := s.do(OpWrite, 0, 0, 2)
	wantViolation(t, "the future", CheckRead(s.h, 0, 0, s.h.Fill(b), w), "nobody had written")
	late := Window{s.h.Mark("read", 0), s.h.Mark("read", 0)}
	wantViolation(t, "stale", CheckRead(s.h, 0, 0, s.h.Fill(a), late), "had been answered")
	c := s.issue(OpWrite, 0, 0, 2)
	during := Window{s.h.Mark("read", 0), s.h.Mark("read", 0)}
	wantNil(t, "old while a write runs", CheckRead(s.h, 0, 0, s.h.Fill(b), during))
	wantNil(t, "new while a write runs", CheckRead(s.h, 0, 0, s.h.Fill(c), during))
	both := s.h.Fill(c)
	copy(both[:200], s.h.Fill(b))
	wantViolation(t, "both while a write runs", CheckRead(s.h, 0, 0, both, during), "garbage")
	wantNil(t, "both while a write into a file runs", CheckTornRead(s.h, 0, 0, both, during))
	wantViolation(t, "old after a write into a file", CheckTornRead(s.h, 0, 0, s.h.Fill(a), late), "had been answered")
	s.h.Done(c.Seq, nil)
	after := Window{s.h.Mark("read", 0), s.h.Mark("read", 0)}
	wantViolation(t, "both while no write runs", CheckTornRead(s.h, 0, 0, both, after), "garbage")
}

func TestSupersetChecker(t *testing.T) {
	p, r := Images{make([]byte, 10000)}, Images{make([]byte, 10000)}
	p[0][5000], p[0][9999] = 1, 1
	dirty := map[int64]bool{4096: true, 8192: true}
	is := func(_ int, off, _ int64) bool { return dirty[off] }
	wantNil(t, "all differences dirty", CheckSuperset(p, r, 4096, is))
	delete(dirty, 8192)
	wantViolation(t, "last granule missed", CheckSuperset(p, r, 4096, is), "bytes 8192..9999")
	wantViolation(t, "resized", CheckSuperset(p, Images{make([]byte, 9999)}, 4096, is), "bytes and")
}

func TestPointsChecker(t *testing.T) {
	p := NewPoints()
	state := Images{{1, 2, 3}}
	wantNil(t, "keep", p.Keep("a", state))
	wantNil(t, "keep b", p.Keep("b", state))
	state[0][0] = 9
	wantNil(t, "check against the copy", p.Check("a", Images{{1, 2, 3}}))
	wantViolation(t, "changed content", p.Check("a", state), "differs")
	wantViolation(t, "name used twice", p.Keep("a", state), "used again")
	wantViolation(t, "unknown point", p.Check("c", state), "never committed")
	wantNil(t, "list", p.CheckList([]string{"a", "b"}))
	wantViolation(t, "unknown point listed", p.CheckList([]string{"a", "b", "c"}), "never committed")
	wantViolation(t, "point missing", p.CheckList([]string{"a"}), "missing")
	p.Drop("b")
	wantNil(t, "pruned point missing", p.CheckList([]string{"a"}))
}

func TestAcksChecker(t *testing.T) {
	pos := func(e uint64, d string) Position { return Position{"g", e, d} }
	start := func() *Acks {
		a := NewAcks()
		wantNil(t, "commit 1", a.Committed(pos(1, "x"), Position{}))
		wantNil(t, "ack 1", a.Acked(pos(1, "x")))
		wantNil(t, "commit 2", a.Committed(pos(2, "y"), pos(1, "x")))
		return a
	}
	a := start()
	wantNil(t, "commit without ack is there", a.Check(pos(2, "y")))
	a = start()
	wantNil(t, "duplicate commit", a.Committed(pos(2, "y"), pos(1, "x")))
	wantNil(t, "commit without ack is gone", a.Check(pos(1, "x")))
	wantNil(t, "another epoch on what is left", a.Committed(pos(3, "z"), pos(1, "x")))
	wantViolation(t, "acked epoch missing", start().Check(Position{}), "is missing")
	wantViolation(t, "unknown content", start().Check(pos(2, "q")), "never committed with that content")
	wantViolation(t, "ack before commit", start().Acked(pos(3, "z")), "never committed")
	wantViolation(t, "number used again", start().Frozen(pos(2, "other")), "two contents")
	wantViolation(t, "younger epoch kept after its parent was abandoned", start().Committed(pos(4, "w"), pos(3, "z")), "the replica was at")
	wantViolation(t, "backwards", start().Committed(pos(1, "x2"), pos(2, "y")), "two contents")
	back := start()
	wantViolation(t, "older number", back.Committed(Position{"g", 0, "n"}, pos(2, "y")), "after")
}

func TestRolesChecker(t *testing.T) {
	planned := func() *Roles {
		r := NewRoles()
		r.Created("A", "g1", "", 0, false)
		r.Opened("A", "g1")
		r.Wrote("A", "g1", 4)
		r.Closed("A", "g1")
		r.Created("B", "g2", "g1", 5, false)
		r.Opened("B", "g2")
		r.Wrote("B", "g2", 5)
		return r
	}
	forced := func() *Roles {
		r := NewRoles()
		r.Created("A", "g1", "", 0, false)
		r.Opened("A", "g1")
		r.Created("B", "g2", "g1", 5, true)
		r.Opened("B", "g2")
		r.Wrote("A", "g1", 5)
		return r
	}
	for _, c := range []struct {
		name, want string
		roles      *Roles
		then       func(r *Roles)
	}{
		{"planned", "", planned(), func(r *Roles) { r.Met("A", "B") }},
		{"split brain nobody can know of yet", "", forced(), func(*Roles) {}},
		{"split brain reported by both", "", forced(), func(r *Roles) { r.Met("A", "B"); r.Diverged("A"); r.Diverged("B") }},
		{"forced, old side wrote nothing more", "", NewRoles(), func(r *Roles) {
			r.Created("A", "g1", "", 0, false)
			r.Opened("A", "g1")
			r.Wrote("A", "g1", 4)
			r.Created("B", "g2", "g1", 5, true)
			r.Opened("B", "g2")
			r.Met("A", "B")
		}},
		{"split brain reported by one", "B does not report", forced(), func(r *Roles) { r.Met("A", "B"); r.Diverged("A") }},
		{"split brain reported by none", "does not report", forced(), func(r *Roles) { r.Met("A", "B") }},
		{"false alarm", "that is none", planned(), func(r *Roles) { r.Diverged("A") }},
		{"old side writable again", "writable again", planned(), func(r *Roles) { r.Opened("A", "g1") }},
		{"write without being writable", "without being writable", planned(), func(r *Roles) { r.Wrote("A", "g1", 5) }},
		{"two hosts in one generation", "which B created", planned(), func(r *Roles) { r.Opened("A", "g2") }},
		{"generation made twice", "created twice", planned(), func(r *Roles) { r.Created("A", "g2", "g1", 5, true) }},
		{"promotion not recorded", "nobody created", planned(), func(r *Roles) { r.Opened("A", "g3") }},
		{"hand-over while the old side is writable", "still writable", NewRoles(), func(r *Roles) {
			r.Created("A", "g1", "", 0, false)
			r.Opened("A", "g1")
			r.Created("B", "g2", "g1", 5, false)
		}},
		{"hand-over before the last write", "was written after that", NewRoles(), func(r *Roles) {
			r.Created("A", "g1", "", 0, false)
			r.Opened("A", "g1")
			r.Wrote("A", "g1", 5)
			r.Closed("A", "g1")
			r.Created("B", "g2", "g1", 5, false)
		}},
		{"two children of one parent", "does not report", planned(), func(r *Roles) {
			r.Created("C", "g3", "g1", 5, true)
			r.Met("B", "C")
		}},
	} {
		c.then(c.roles)
		if err := c.roles.Check(); c.want == "" {
			wantNil(t, c.name, err)
		} else {
			wantViolation(t, c.name, err, c.want)
		}
	}
}

func TestSettles(t *testing.T) {
	n := 0
	cycle := func() (bool, bool, error) { n++; return n >= 2, n >= 2, nil }
	wantNil(t, "in the second cycle", Settles(2, cycle))
	n = 0
	wantViolation(t, "too late", Settles(1, cycle), "not settled")
	wantViolation(t, "healthy and different", Settles(3, func() (bool, bool, error) { return true, false, nil }), "equal false")
}

// plain is a correct disk; wrong breaks it.
type plain struct {
	mu    sync.Mutex
	b     []byte
	wrong func(op string, n int) bool
	ops   int
}

func (d *plain) broken(op string) bool {
	d.ops++
	return d.wrong != nil && d.wrong(op, d.ops)
}

func (d *plain) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken("read") {
		return len(p), nil
	}
	return copy(p, d.b[off:]), nil
}

func (d *plain) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.broken("write") {
		return len(p), nil
	}
	return copy(d.b[off:], p), nil
}

func (d *plain) ZeroAt(off, n int64, _ bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.broken("zero") {
		clear(d.b[off : off+n])
	}
	return nil
}

func (d *plain) Sync() error { return nil }

func newLoad(wrong func(string, int) bool) (*Load, []*plain) {
	disks := []*plain{{b: make([]byte, 128<<10), wrong: wrong}, {b: make([]byte, 64<<10)}}
	l := &Load{History: NewHistory(testVM, Images{disks[0].b, disks[1].b})}
	for _, d := range disks {
		l.Disks = append(l.Disks, d)
	}
	return l, disks
}

func TestLoadOnACorrectDiskSatisfiesAllCheckers(t *testing.T) {
	l, d := newLoad(nil)
	wantNil(t, "load", l.Run(1, 4, 400))
	w, _ := l.History.During("freeze", 1, func() error { return nil })
	img := Images{d[0].b, d[1].b}
	wantNil(t, "cut", CheckCut(l.History, img, w))
	wantNil(t, "visible", CheckVisible(l.History, img))
	wantNil(t, "durable", CheckDurable(l.History, img))
	next := l.History.Restart(img)
	l.History = next
	wantNil(t, "load after restart", l.Run(2, 1, 100))
	wantNil(t, "visible after restart", CheckVisible(l.History, img))
	if ops := next.Ops(); len(ops) == 0 || ops[0].Seq <= 1000 {
		t.Errorf("numbers start again after a restart: %v", ops[:min(1, len(ops))])
	}
}

func TestLoadFindsADiskThatLies(t *testing.T) {
	for _, op := range []string{"read", "write", "zero"} {
		l, d := newLoad(func(o string, n int) bool { return o == op && n > 100 })
		err := l.Run(1, 1, 600)
		if err == nil {
			err = CheckVisible(l.History, Images{d[0].b, d[1].b})
		}
		wantViolation(t, op+" ignored", err, "")
	}
}

func TestHistorySavesOneLinePerEvent(t *testing.T) {
	s := newScript(1, 8)
	s.do(OpWrite, 0, 0, 1)
	s.freeze()
	var b strings.Builder
	wantNil(t, "save", s.h.Save(&b))
	if got := strings.Count(b.String(), "\n"); got != 3 {
		t.Errorf("%d lines, want 3:\n%s", got, b.String())
	}
}

func BenchmarkCheckCut(b *testing.B) {
	const size = 16 << 20
	d := &plain{b: make([]byte, size)}
	l := &Load{History: NewHistory(testVM, Images{d.b}), Disks: []Disk{d}}
	if err := l.Run(1, 4, 3000); err != nil {
		b.Fatal(err)
	}
	w, _ := l.History.During("freeze", 1, func() error { return nil })
	b.SetBytes(size)
	for b.Loop() {
		if err := CheckCut(l.History, Images{d.b}, w); err != nil {
			b.Fatal(err)
		}
	}
}
