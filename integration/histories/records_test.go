package histories_test

import "fmt"

// What testdata/recorder.S does; keep them equal.
const (
	slots      = 128
	firstLBA   = 7
	slotStride = 128
	sector     = 512
	diskSize   = 10 << 20
	magic      = 0x44524352
)

// state is what a disk holds: all records up to number n of the line of lives
// that ends with this one. The zero state is the blank disk.
type state struct{ life, n uint32 }

func (s state) String() string {
	if s == (state{}) {
		return "nothing"
	}
	return fmt.Sprintf("%08x/%d", s.life, s.n)
}

// life is one run of the guest, from a boot to its end.
type life struct {
	host string
	from state  // what it found
	high uint32 // the last record that was answered
	over bool   // its console shows that it was followed by another one, or switched itself off
}

// book knows all lives of a VM, on whichever host.
type book struct{ lives map[uint32]*life }

// now is the last answered state of a life.
func (b *book) now(id uint32) state {
	l := b.lives[id]
	switch {
	case l == nil:
		return state{}
	case l.high == l.from.n:
		return l.from
	}
	return state{id, l.high}
}

// line is where record n of a disk in state s comes from.
func (b *book) line(s state, n uint32) state {
	for s.life != 0 {
		l := b.lives[s.life]
		if l == nil {
			break
		}
		if n > l.from.n {
			return state{s.life, n}
		}
		s = l.from
	}
	return state{}
}

// holds reports whether everything of old is in s.
func (b *book) holds(s, old state) bool {
	return old == (state{}) || old.n <= s.n && b.line(s, old.n) == old
}

// record is what a slot shows: its first and its second sector.
type record struct{ head, tail [3]uint32 }

func (r record) state() state { return state{life: r.head[2], n: r.head[1]} }

// judge says which state a scan of all slots shows, or why it is none that a
// line of writers has ever left.
func (b *book) judge(found map[int]record) (state, error) {
	var top state
	for i, r := range found {
		switch {
		case r.head[0] != magic || r.tail[0] != magic:
			return top, fmt.Errorf("slot %d holds %x %x: no record", i, r.head, r.tail)
		case r.head != r.tail:
			return top, fmt.Errorf("slot %d is torn: %x %x", i, r.head, r.tail)
		case b.lives[r.head[2]] == nil:
			return top, fmt.Errorf("slot %d shows %v, which nobody has written", i, r.state())
		}
		if r.head[1] > top.n {
			top = r.state()
		}
	}
	if l := b.lives[top.life]; l != nil && top.n > l.high+1 {
		return top, fmt.Errorf("the disk shows %v, that guest had come to %d", top, l.high)
	}
	for i := range slots {
		want := state{}
		if n := newest(top.n, i); n > 0 {
			want = b.line(top, n)
		}
		if got := found[i].state(); got != want {
			return top, fmt.Errorf("the disk is at %v and shows %v in slot %d, where %v belongs", top, got, i, want)
		}
	}
	return top, nil
}

// newest is the highest number up to n that belongs into a slot; 0 = none.
func newest(n uint32, slot int) uint32 {
	if n < uint32(slot)+1 {
		return 0
	}
	return n - (n-1-uint32(slot))%slots
}
