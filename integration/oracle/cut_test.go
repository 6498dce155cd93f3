package oracle

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
)

const testVM = 7

// script builds a history and the images that follow from applying operations
// in a given order, all of it by hand.
type script struct {
	h    *History
	disk Images
}

func newScript(disks, sectors int) *script {
	s := &script{}
	for range disks {
		s.disk = append(s.disk, make([]byte, sectors*SectorSize))
	}
	s.h = NewHistory(testVM, s.disk)
	return s
}

func (s *script) issue(kind OpKind, disk int, lba, n uint64) Op {
	return s.h.Issue(kind, 0, disk, lba, n)
}

// apply stores sectors [from, to) of o.
func (s *script) apply(o Op, from, to uint64) {
	part := s.disk[o.Disk][(o.LBA+from)*SectorSize : (o.LBA+to)*SectorSize]
	if o.Kind == OpZero {
		clear(part)
	} else {
		copy(part, s.h.Fill(o)[from*SectorSize:])
	}
}

func (s *script) do(kind OpKind, disk int, lba, n uint64) Op {
	o := s.issue(kind, disk, lba, n)
	s.apply(o, 0, n)
	s.h.Done(o.Seq, nil)
	return o
}

func (s *script) freeze() (Window, Images) {
	w, _ := s.h.During("freeze", 1, func() error { return nil })
	return w, s.copy()
}

func (s *script) copy() Images {
	var c Images
	for _, d := range s.disk {
		c = append(c, append([]byte(nil), d...))
	}
	return c
}

func TestCutCheckerAcceptsWhatIsAllowed(t *testing.T) {
	for _, c := range []struct {
		name string
		run  func(s *script) error
	}{
		{"nothing written", func(s *script) error {
			w, img := s.freeze()
			return CheckCut(s.h, img, w)
		}},
		{"writes, zeroes and overwrites", func(s *script) error {
			s.do(OpWrite, 0, 0, 8)
			s.do(OpZero, 0, 2, 3)
			s.do(OpWrite, 0, 3, 1)
			s.do(OpZero, 1, 0, 16)
			w, img := s.freeze()
			return CheckCut(s.h, img, w)
		}},
		{"a concurrent write is in", func(s *script) error {
			o := s.issue(OpWrite, 0, 0, 4)
			s.apply(o, 0, 4)
			w, img := s.freeze()
			s.h.Done(o.Seq, nil)
			return CheckCut(s.h, img, w)
		}},
		{"a concurrent write is out", func(s *script) error {
			o := s.issue(OpWrite, 0, 0, 4)
			w, img := s.freeze()
			s.apply(o, 0, 4)
			s.h.Done(o.Seq, nil)
			return CheckCut(s.h, img, w)
		}},
		{"two concurrent overlapping writes mixed by sector", func(s *script) error {
			a, b := s.issue(OpWrite, 0, 0, 4), s.issue(OpWrite, 0, 0, 4)
			s.apply(a, 0, 4)
			s.apply(b, 1, 2)
			s.apply(b, 3, 4)
			s.h.Done(a.Seq, nil)
			s.h.Done(b.Seq, nil)
			w, img := s.freeze()
			return CheckCut(s.h, img, w)
		}},
		{"a failed write is there in part", func(s *script) error {
			s.do(OpWrite, 0, 0, 4)
			o := s.issue(OpWrite, 0, 0, 4)
			s.apply(o, 0, 2)
			s.h.Done(o.Seq, errors.New("io"))
			w, img := s.freeze()
			return CheckCut(s.h, img, w)
		}},
		{"old content of the disk shows where nothing was written", func(s *script) error {
			s.disk[0][5*SectorSize+9] = 1
			s.h = NewHistory(testVM, s.disk)
			s.do(OpWrite, 0, 0, 4)
			w, img := s.freeze()
			return CheckCut(s.h, img, w)
		}},
		{"zeros of one of several zeroing operations", func(s *script) error {
			s.do(OpWrite, 0, 0, 8)
			s.do(OpZero, 0, 0, 4)
			s.do(OpZero, 0, 2, 6)
			o := s.issue(OpZero, 0, 0, 8)
			w, img := s.freeze()
			s.h.Done(o.Seq, nil)
			return CheckCut(s.h, img, w)
		}},
	} {
		if err := c.run(newScript(2, 16)); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// fault is a wrong image for a history, or a wrong history for an image.
type fault struct {
	name, want string
	run        func(s *script) error
}

func TestCutCheckerFindsEachFault(t *testing.T) {
	for _, c := range append(faultsOfTheCut(), faultsOfTheContent()...) {
		err := c.run(newScript(2, 16))
		if !errors.Is(err, ErrViolation) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want a violation with %q", c.name, err, c.want)
		}
	}
}

func faultsOfTheCut() []fault {
	return []fault{
		{"an answered write is missing", "came later", func(s *script) error {
			o := s.issue(OpWrite, 0, 0, 4)
			s.h.Done(o.Seq, nil)
			w, img := s.freeze()
			return CheckCut(s.h, img, w)
		}},
		{"an answered zeroing is missing", "came later", func(s *script) error {
			s.do(OpWrite, 0, 0, 4)
			o := s.issue(OpZero, 0, 0, 4)
			s.h.Done(o.Seq, nil)
			w, img := s.freeze()
			return CheckCut(s.h, img, w)
		}},
		{"a write issued after the freeze", "issued after the cut", func(s *script) error {
			w, _ := s.freeze()
			s.do(OpWrite, 0, 0, 4)
			return CheckCut(s.h, s.copy(), w)
		}},
		{"a zeroing issued after the freeze", "came later", func(s *script) error {
			s.do(OpWrite, 0, 0, 4)
			w, _ := s.freeze()
			s.do(OpZero, 0, 0, 4)
			return CheckCut(s.h, s.copy(), w)
		}},
		{"cut per disk: the later of two dependent writes without the earlier", "came later", func(s *script) error {
			begin := s.h.Mark("freeze", 1)
			before := s.copy()
			s.do(OpWrite, 0, 0, 4)
			s.do(OpWrite, 1, 0, 4) // issued after the one on disk 0 was answered
			img := Images{before[0], s.copy()[1]}
			return CheckCut(s.h, img, Window{begin, s.h.Mark("frozen", 1)})
		}},
		{"a zeroing that proves a missing predecessor", "came later", func(s *script) error {
			s.do(OpWrite, 1, 0, 4)
			begin := s.h.Mark("freeze", 1)
			before := s.copy()
			s.do(OpWrite, 0, 0, 4)
			s.do(OpZero, 1, 0, 4)
			img := Images{before[0], s.copy()[1]}
			return CheckCut(s.h, img, Window{begin, s.h.Mark("frozen", 1)})
		}},
		{"a torn write under the freeze", "came later", func(s *script) error {
			s.do(OpWrite, 0, 0, 4)
			o := s.issue(OpWrite, 0, 0, 4)
			s.apply(o, 0, 2)
			w, img := s.freeze()
			s.h.Done(o.Seq, nil)
			return CheckCut(s.h, img, w)
		}},
		{"a torn write over a fresh disk", "came later", func(s *script) error {
			o := s.issue(OpWrite, 0, 0, 4)
			s.apply(o, 2, 4)
			w, img := s.freeze()
			s.h.Done(o.Seq, nil)
			return CheckCut(s.h, img, w)
		}},
		{"a request of a dead connection lands late", "came later", func(s *script) error {
			a := s.issue(OpWrite, 0, 0, 4)
			s.h.GiveUp()
			s.do(OpWrite, 0, 0, 4)
			s.apply(a, 0, 4)
			w, img := s.freeze()
			return CheckCut(s.h, img, w)
		}},
	}
}

func faultsOfTheContent() []fault {
	return []fault{
		{"half a sector", "garbage", func(s *script) error {
			s.do(OpWrite, 0, 0, 4)
			old := s.copy()
			s.do(OpWrite, 0, 0, 4)
			w, img := s.freeze()
			copy(img[0][:SectorSize/2], old[0][:SectorSize/2])
			return CheckCut(s.h, img, w)
		}},
		{"a chunk on the wrong disk", "disk 0 sector 0", func(s *script) error {
			s.do(OpWrite, 0, 0, 4)
			w, img := s.freeze()
			img[1], img[0] = img[0], img[1]
			return CheckCut(s.h, img, w)
		}},
		{"a sector in the wrong place", "nobody wrote", func(s *script) error {
			s.do(OpWrite, 0, 0, 2)
			w, img := s.freeze()
			copy(img[0][SectorSize:], img[0][:SectorSize])
			return CheckCut(s.h, img, w)
		}},
		{"zeros instead of data", "came later", func(s *script) error {
			s.do(OpWrite, 0, 0, 2)
			w, img := s.freeze()
			clear(img[0][SectorSize : 2*SectorSize])
			return CheckCut(s.h, img, w)
		}},
		{"a zeroing that was dropped", "came later", func(s *script) error {
			s.do(OpWrite, 0, 0, 2)
			old := s.copy()
			s.do(OpZero, 0, 0, 2)
			w, _ := s.freeze()
			return CheckCut(s.h, old, w)
		}},
		{"one flipped bit", "garbage", func(s *script) error {
			s.do(OpWrite, 0, 0, 2)
			w, img := s.freeze()
			img[0][700] ^= 4
			return CheckCut(s.h, img, w)
		}},
		{"bytes in a part never written", "nobody wrote", func(s *script) error {
			w, img := s.freeze()
			img[1][8*SectorSize] = 1
			return CheckCut(s.h, img, w)
		}},
		{"a disk too short", "bytes instead of", func(s *script) error {
			w, img := s.freeze()
			img[1] = img[1][:SectorSize]
			return CheckCut(s.h, img, w)
		}},
		{"a missing disk", "disks", func(s *script) error {
			w, img := s.freeze()
			return CheckCut(s.h, img[:1], w)
		}},
	}
}

// runRandom plays a concurrent history on a model whose operations take effect
// at one moment between issue and answer, freezing where told; it returns the
// image at the freeze and the one a per-disk freeze would have given.
func runRandom(seed uint64, sectors int) (h *History, w Window, cut, perDisk Images) {
	s := newScript(2, sectors)
	r := rand.New(rand.NewPCG(seed, 0))
	type running struct {
		o       Op
		applied bool
	}
	var open []*running
	var begin Time
	for i := range 300 {
		switch k := r.IntN(3); {
		case k == 0 && len(open) < 6:
			kind := OpWrite
			if r.IntN(4) == 0 {
				kind = OpZero
			}
			n := 1 + r.Uint64N(12)
			open = append(open, &running{o: s.issue(kind, r.IntN(2), r.Uint64N(uint64(sectors)-n), n)})
		case len(open) > 0:
			j := r.IntN(len(open))
			if o := open[j]; !o.applied {
				s.apply(o.o, 0, o.o.Sectors)
				o.applied = true
			} else {
				s.h.Done(o.o.Seq, nil)
				open = append(open[:j], open[j+1:]...)
			}
		}
		switch i {
		case 140:
			begin = s.h.Mark("freeze", 1)
			perDisk = s.copy()
		case 150:
			cut = s.copy()
		case 160:
			w = Window{begin, s.h.Mark("frozen", 1)}
			perDisk = Images{perDisk[0], s.copy()[1]}
		}
	}
	return s.h, w, cut, perDisk
}

func TestCutCheckerAcceptsEveryTrueCutOfRandomHistories(t *testing.T) {
	tornFound, skewFound := 0, 0
	const n = 300
	for seed := range uint64(n) {
		h, w, cut, perDisk := runRandom(seed, 48)
		if err := CheckCut(h, cut, w); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if CheckCut(h, perDisk, w) != nil {
			skewFound++
		}
		// Put one sector back to what it was before the last write to it.
		r := rand.New(rand.NewPCG(seed, 1))
		at := r.IntN(48) * SectorSize
		mutant := Images{append([]byte(nil), cut[0]...), cut[1]}
		other := r.IntN(48) * SectorSize
		copy(mutant[0][at:at+SectorSize], cut[0][other:other+SectorSize])
		if string(mutant[0]) != string(cut[0]) {
			if CheckCut(h, mutant, w) != nil {
				tornFound++
			}
		}
	}
	if skewFound < n/20 || tornFound < n/3 {
		t.Errorf("of %d histories %d per-disk cuts and %d exchanged sectors were found", n, skewFound, tornFound)
	}
	t.Logf("%d true cuts accepted, %d per-disk cuts and %d exchanged sectors refused", n, skewFound, tornFound)
}
