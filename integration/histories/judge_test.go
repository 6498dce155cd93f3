package histories_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// two is a book with two lives: the second went on from record 130 of the first,
// which had come to 140.
func two() *book {
	return &book{map[uint32]*life{
		1: {host: "A", high: 140},
		2: {host: "B", from: state{1, 130}, high: 135},
	}}
}

// disk is what a line of writers left, as a guest reads it.
func disk(b *book, s state) map[int]record {
	found := map[int]record{}
	for i := range slots {
		if n := newest(s.n, i); n > 0 {
			is := b.line(s, n)
			r := [3]uint32{magic, n, is.life}
			found[i] = record{r, r}
		}
	}
	return found
}

// What a line of writers left is taken for what it is, up to the one record that
// may be there without an answer; everything else is refused.
func TestOnlyWhatALineOfWritersLeftIsALegalDisk(t *testing.T) {
	b := two()
	for _, s := range []state{{}, {1, 1}, {1, 128}, {1, 140}, {1, 141}, {2, 131}, {2, 136}} {
		if got, err := b.judge(disk(b, s)); err != nil || got != s {
			t.Errorf("%v is taken for %v: %v", s, got, err)
		}
	}
	spoilt := map[string]func(d map[int]record){
		"missing":      func(d map[int]record) { delete(d, 5) },
		"older":        func(d map[int]record) { d[1] = record{[3]uint32{magic, 2, 1}, [3]uint32{magic, 2, 1}} },
		"other branch": func(d map[int]record) { d[2] = record{[3]uint32{magic, 131, 1}, [3]uint32{magic, 131, 1}} },
		"torn":         func(d map[int]record) { d[3] = record{d[3].head, [3]uint32{magic, 4, 1}} },
		"unknown life": func(d map[int]record) { d[3] = record{[3]uint32{magic, 132, 9}, [3]uint32{magic, 132, 9}} },
		"no record":    func(d map[int]record) { d[9] = record{[3]uint32{7, 10, 1}, [3]uint32{7, 10, 1}} },
		"too new":      func(d map[int]record) { d[8] = record{[3]uint32{magic, 137, 2}, [3]uint32{magic, 137, 2}} },
	}
	for what, spoil := range spoilt {
		d := disk(b, state{2, 135})
		spoil(d)
		if got, err := b.judge(d); err == nil {
			t.Errorf("a disk with a slot that is %s is taken for %v", what, got)
		}
	}
	for _, c := range []struct {
		s, old state
		want   bool
	}{
		{state{2, 135}, state{1, 130}, true},
		{state{2, 135}, state{1, 131}, false},
		{state{2, 135}, state{}, true},
		{state{1, 140}, state{2, 131}, false},
		{state{1, 129}, state{1, 130}, false},
	} {
		if got := b.holds(c.s, c.old); got != c.want {
			t.Errorf("%v holds %v: %t", c.s, c.old, got)
		}
	}
}

// A console is read as it grows; a line that a power cut has cut off is none.
func TestAConsoleIsReadAcrossPowerCuts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	c, b := &console{path: path, host: "A"}, &book{map[uint32]*life{}}
	text := "\nB\n\nR00000001 00000000 \nW00000001 00000001 \nW00000001 0000\nB\n" +
		"S00000000 44524352 00000001 00000001 44524352 00000001 00000001 \nR00000002 00000001 \nW00000002 00000002 \nP00000002 00000002 \n"
	var boots []boot
	for i := range len(text) {
		if err := os.WriteFile(path, []byte(text[:i+1]), 0o600); err != nil {
			t.Fatal(err)
		}
		nb, err := c.read(b)
		if err != nil {
			t.Fatal(err)
		}
		boots = append(boots, nb...)
	}
	if len(boots) != 2 || len(boots[1].found) != 1 || boots[1].says != 1 || b.lives[1].high != 1 || b.lives[2].high != 2 || !b.lives[2].over || !b.lives[1].over {
		t.Fatalf("%+v %+v %+v", boots, b.lives[1], b.lives[2])
	}
	if _, err := c.line(b, strings.TrimSpace("W00000002 00000009")+" "); err == nil {
		t.Error("a number that was left out is not seen")
	}
}
