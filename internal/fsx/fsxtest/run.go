package fsxtest

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"

	"kvmreplica/internal/fsx"
)

// Run is the conformance suite of fsx.FS. open returns an empty file system.
func Run(t *testing.T, open func(t *testing.T) fsx.FS) {
	t.Helper()
	for _, c := range []struct {
		name string
		run  func(t *testing.T, f fsx.FS)
	}{
		{"names that leave the tree are refused", badNames},
		{"open obeys its flags", openFlags},
		{"content grows and reads back", content},
		{"allocate and truncate", lengths},
		{"rename replaces", rename},
		{"remove", remove},
		{"directories", directories},
		{"closed files", closed},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, open(t)) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func write(t *testing.T, f fsx.FS, name, data string) {
	t.Helper()
	w, err := f.Open(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	must(t, err)
	_, err = w.WriteAt([]byte(data), 0)
	must(t, err)
	must(t, w.Sync())
	must(t, w.Close())
}

func read(t *testing.T, f fsx.FS, name string) string {
	t.Helper()
	b, err := fsx.ReadFile(f, name, 1<<20)
	must(t, err)
	return string(b)
}

func badNames(t *testing.T, f fsx.FS) {
	write(t, f, "good", "x")
	for _, name := range []string{"", "..", "../x", "a/../../x", "/etc/passwd", "a\x00b", "a//b", "a/", "./a", "a/./b", strings.Repeat("n", 256)} {
		_, err := f.Open(name, os.O_RDWR|os.O_CREATE)
		wantErr(t, "open "+name, err, fsx.ErrName)
		wantErr(t, "remove "+name, f.Remove(name), fsx.ErrName)
		wantErr(t, "rename from "+name, f.Rename(name, "x"), fsx.ErrName)
		wantErr(t, "rename to "+name, f.Rename("good", name), fsx.ErrName)
		wantErr(t, "mkdir "+name, f.MkdirAll(name), fsx.ErrName)
		wantErr(t, "syncdir "+name, f.SyncDir(name), fsx.ErrName)
		_, err = f.List(name)
		wantErr(t, "list "+name, err, fsx.ErrName)
	}
	_, err := f.Open(".", os.O_RDONLY)
	wantErr(t, "open .", err, fsx.ErrName)
}

func openFlags(t *testing.T, f fsx.FS) {
	_, err := f.Open("a", os.O_RDWR)
	wantErr(t, "open what is not there", err, fs.ErrNotExist)
	_, err = f.Open("no/such", os.O_RDWR|os.O_CREATE)
	wantErr(t, "create in a missing directory", err, fs.ErrNotExist)
	write(t, f, "a", "hello")
	_, err = f.Open("a", os.O_RDWR|os.O_CREATE|os.O_EXCL)
	wantErr(t, "exclusive create of an existing file", err, fs.ErrExist)
	r, err := f.Open("a", os.O_RDONLY)
	must(t, err)
	if _, err := r.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a file opened for reading took a write")
	}
	must(t, r.Close())
	w, err := f.Open("a", os.O_RDWR|os.O_CREATE)
	must(t, err)
	must(t, w.Close())
	if got := read(t, f, "a"); got != "hello" {
		t.Errorf("O_CREATE of an existing file left %q", got)
	}
	w, err = f.Open("a", os.O_RDWR|os.O_TRUNC)
	must(t, err)
	must(t, w.Close())
	if got := read(t, f, "a"); got != "" {
		t.Errorf("O_TRUNC left %q", got)
	}
}

func content(t *testing.T, f fsx.FS) {
	w, err := f.Open("a", os.O_RDWR|os.O_CREATE)
	must(t, err)
	_, err = w.WriteAt([]byte("tail"), 10000)
	must(t, err)
	_, err = w.WriteAt([]byte("head"), 0)
	must(t, err)
	if n, err := w.Size(); n != 10004 || err != nil {
		t.Errorf("Size() = %d, %v", n, err)
	}
	b := make([]byte, 10010)
	n, err := w.ReadAt(b, 0)
	if n != 10004 || !errors.Is(err, io.EOF) {
		t.Errorf("read past the end: %d, %v, want 10004 and EOF", n, err)
	}
	if string(b[:4]) != "head" || string(b[10000:10004]) != "tail" || strings.Trim(string(b[4:10000]), "\x00") != "" {
		t.Error("content is wrong")
	}
	if n, err := w.ReadAt(b[:1], 20000); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read behind the end: %d, %v", n, err)
	}
	if _, err := w.ReadAt(b[:1], -1); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read at -1: %v", err)
	}
	if _, err := w.WriteAt(b[:1], -1); err == nil {
		t.Error("write at -1 was taken")
	}
	must(t, w.Sync())
	must(t, w.Sync())
	must(t, w.Close())
}

func lengths(t *testing.T, f fsx.FS) {
	w, err := f.Open("a", os.O_RDWR|os.O_CREATE)
	must(t, err)
	_, err = w.WriteAt([]byte("0123456789"), 0)
	must(t, err)
	must(t, w.Allocate(5, 5000))
	if n, _ := w.Size(); n != 5005 {
		t.Errorf("size after Allocate(5, 5000) is %d", n)
	}
	must(t, w.Allocate(0, 10))
	if n, _ := w.Size(); n != 5005 {
		t.Errorf("Allocate inside changed the size to %d", n)
	}
	must(t, w.Truncate(3))
	must(t, w.Truncate(6))
	if got := read(t, f, "a"); got != "012\x00\x00\x00" {
		t.Errorf("shrunk and grown: %q", got)
	}
	if err := w.Allocate(-1, 1); err == nil {
		t.Error("Allocate(-1, 1) was taken")
	}
	if err := w.Truncate(-1); err == nil {
		t.Error("Truncate(-1) was taken")
	}
	must(t, w.Close())
}

func rename(t *testing.T, f fsx.FS) {
	write(t, f, "a", "new")
	write(t, f, "b", "old")
	must(t, f.Rename("a", "b"))
	if got := read(t, f, "b"); got != "new" {
		t.Errorf("after rename b is %q", got)
	}
	_, err := f.Open("a", os.O_RDONLY)
	wantErr(t, "open the old name", err, fs.ErrNotExist)
	wantErr(t, "rename what is not there", f.Rename("a", "c"), fs.ErrNotExist)
	wantErr(t, "rename into a missing directory", f.Rename("b", "no/b"), fs.ErrNotExist)
	must(t, f.Rename("b", "b"))
	must(t, f.MkdirAll("d"))
	must(t, f.Rename("b", "d/b"))
	must(t, f.SyncDir("d"))
	must(t, f.SyncDir("."))
	if got := read(t, f, "d/b"); got != "new" {
		t.Errorf("moved file is %q", got)
	}
}

func remove(t *testing.T, f fsx.FS) {
	write(t, f, "a", "x")
	must(t, f.Remove("a"))
	wantErr(t, "remove twice", f.Remove("a"), fs.ErrNotExist)
	must(t, f.MkdirAll("d"))
	write(t, f, "d/a", "x")
	if err := f.Remove("d"); err == nil {
		t.Error("a directory that is not empty was removed")
	}
	must(t, f.Remove("d/a"))
	must(t, f.Remove("d"))
	_, err := f.List("d")
	wantErr(t, "list what was removed", err, fs.ErrNotExist)
}

func directories(t *testing.T, f fsx.FS) {
	must(t, f.MkdirAll("a/b/c"))
	must(t, f.MkdirAll("a/b/c"))
	must(t, f.MkdirAll("."))
	for _, n := range []string{"a/z", "a/m", "a/10", "a/9"} {
		write(t, f, n, "")
	}
	got, err := f.List("a")
	must(t, err)
	if want := []string{"10", "9", "b", "m", "z"}; !slices.Equal(got, want) {
		t.Errorf("List = %q, want %q", got, want)
	}
	if root, err := f.List("."); err != nil || !slices.Equal(root, []string{"a"}) {
		t.Errorf("List(.) = %q, %v", root, err)
	}
	if err := f.MkdirAll("a/z/q"); err == nil {
		t.Error("a directory was made below a file")
	}
	if _, err := f.List("a/z"); err == nil {
		t.Error("a file was listed")
	}
	wantErr(t, "syncdir of nothing", f.SyncDir("a/no"), fs.ErrNotExist)
	if _, err := f.Open("a/b", os.O_RDWR); err == nil {
		t.Error("a directory was opened as a file")
	}
}

func closed(t *testing.T, f fsx.FS) {
	w, err := f.Open("a", os.O_RDWR|os.O_CREATE)
	must(t, err)
	must(t, w.Close())
	_, err = w.WriteAt([]byte("x"), 0)
	wantErr(t, "write", err, fs.ErrClosed)
	_, err = w.ReadAt(make([]byte, 1), 0)
	wantErr(t, "read", err, fs.ErrClosed)
	wantErr(t, "sync", w.Sync(), fs.ErrClosed)
	wantErr(t, "truncate", w.Truncate(0), fs.ErrClosed)
	wantErr(t, "allocate", w.Allocate(0, 1), fs.ErrClosed)
	wantErr(t, "close", w.Close(), fs.ErrClosed)
	_, err = w.Size()
	wantErr(t, "size", err, fs.ErrClosed)
}
