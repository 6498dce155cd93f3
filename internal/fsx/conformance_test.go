package fsx_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

func TestHostDirectoryConforms(t *testing.T) {
	fsxtest.Run(t, func(t *testing.T) fsx.FS { return hostFS(t, t.TempDir()) })
}

func TestMemConforms(t *testing.T) {
	fsxtest.Run(t, func(*testing.T) fsx.FS { return fsxtest.NewMem() })
}

func hostFS(t *testing.T, dir string) fsx.FS {
	t.Helper()
	f, err := fsx.OS(dir)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestHostDirectoryDoesNotFollowLinksOut(t *testing.T) {
	out := t.TempDir()
	if err := os.WriteFile(filepath.Join(out, "secret"), []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, to := range map[string]string{"abs": filepath.Join(out, "secret"), "rel": "../" + filepath.Base(out) + "/secret", "dir": out} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	f := hostFS(t, dir)
	for _, name := range []string{"abs", "rel", "dir/secret"} {
		if _, err := f.Open(name, os.O_RDWR|os.O_CREATE); err == nil {
			t.Errorf("%s was followed out of the tree", name)
		}
	}
	if err := f.MkdirAll("dir/made"); err == nil {
		t.Error("a directory was made outside the tree")
	}
	if err := f.SyncDir("dir"); err == nil {
		t.Error("a directory outside the tree was opened")
	}
	if names, err := os.ReadDir(out); err != nil || len(names) != 1 {
		t.Errorf("outside there is now %v, %v", names, err)
	}
}

func TestHostDirectoryOpensOnlyRegularFiles(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Skipf("no FIFO can be made here: %v", err)
	}
	if _, err := hostFS(t, dir).Open("fifo", os.O_RDONLY); err == nil {
		t.Error("a FIFO was opened")
	}
}

func TestHostDirectoryMakesPrivateFiles(t *testing.T) {
	dir := t.TempDir()
	f := hostFS(t, dir)
	if err := f.MkdirAll("d"); err != nil {
		t.Fatal(err)
	}
	if err := fsx.WriteAtomic(f, "d/f", []byte("x")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{"d": 0o700, "d/f": 0o600} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm()&^want != 0 {
			t.Errorf("%s has mode %v", name, st.Mode())
		}
	}
	if _, err := f.Open("d/f.tmp", os.O_RDONLY); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file is still there: %v", err)
	}
}

func TestHostDirectoryMustExist(t *testing.T) {
	if _, err := fsx.OS(filepath.Join(t.TempDir(), "no")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("OS of nothing: %v", err)
	}
}
