package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	fileNames = 12
	fileLimit = 192 << 10
	fileWrite = 32 << 10
)

// tree is one worker's directory and what must be in it.
type tree struct {
	dir  string
	r    *rand.Rand
	want map[string][]byte
}

// files lets workers write, cut, rename, remove, sync and read files below dir,
// each in a directory of its own, and checks what they read; in the end
// everything, past the page cache.
func files(dir string, workers, n int, seed uint64) error {
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			t := &tree{filepath.Join(dir, fmt.Sprint(w)), rand.New(rand.NewPCG(seed, uint64(w))), map[string][]byte{}}
			if errs[w] = os.Mkdir(t.dir, 0o700); errs[w] != nil {
				return
			}
			for i := 0; i < n && errs[w] == nil; i++ {
				errs[w] = t.step()
			}
			for name := range t.want {
				errs[w] = errors.Join(errs[w], t.check(name, true))
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	fmt.Printf("%d operations on files\n", workers*n)
	return nil
}

func (t *tree) path(name string) string { return filepath.Join(t.dir, name) }

// step makes one operation.
func (t *tree) step() error {
	name := fmt.Sprint(t.r.IntN(fileNames))
	old, there := t.want[name]
	switch k := t.r.IntN(16); {
	case !there || k < 8:
		return t.write(name, old, k%3 == 0)
	case k < 10:
		return t.check(name, k == 9)
	case k < 12:
		n := t.r.IntN(len(old) + 1)
		t.want[name] = old[:n:n]
		return os.Truncate(t.path(name), int64(n))
	case k < 14:
		to := fmt.Sprint(t.r.IntN(fileNames))
		if to == name {
			return nil
		}
		t.want[to] = old
		delete(t.want, name)
		return os.Rename(t.path(name), t.path(to))
	default:
		delete(t.want, name)
		return os.Remove(t.path(name))
	}
}

// write puts random bytes somewhere into a file, or behind its end.
func (t *tree) write(name string, old []byte, sync bool) error {
	off := t.r.IntN(min(len(old)+fileWrite/2, fileLimit-fileWrite))
	b := make([]byte, 1+t.r.IntN(fileWrite))
	for i := range b {
		b[i] = byte(t.r.Uint32())
	}
	now := make([]byte, max(len(old), off+len(b)))
	copy(now, old)
	copy(now[off:], b)
	t.want[name] = now
	f, err := os.OpenFile(t.path(name), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, int64(off))
	if err == nil && sync {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// check reads a file; cold reads it from the device.
func (t *tree) check(name string, cold bool) error {
	f, err := os.Open(t.path(name))
	if err != nil {
		return err
	}
	defer f.Close()
	if cold {
		if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
			return err
		}
	}
	got := make([]byte, fileLimit+1)
	n, err := f.Read(got)
	if n == 0 && len(t.want[name]) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	if !bytes.Equal(got[:n], t.want[name]) {
		return fmt.Errorf("%s: wrong content (%d bytes read, %d written)", t.path(name), n, len(t.want[name]))
	}
	return nil
}
