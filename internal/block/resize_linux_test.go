package block_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"kvmreplica/internal/block"
)

func TestAnImageIsMadeLongerAndShorter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "img")
	if err := os.WriteFile(path, make([]byte, 4096+100), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 8192); !errors.Is(err, block.ErrRange) {
		t.Errorf("behind the end: %v", err)
	}
	for _, size := range []int64{16384, 4096, 8704} {
		if err := f.Resize(size); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Size() != size || f.Size() != size {
			t.Errorf("%d bytes, the device says %d, want %d: %v", st.Size(), f.Size(), size, err)
		}
		if _, ok := f.ReadFD(); !ok {
			t.Error("the file still has a virtual tail")
		}
		b := []byte{7}
		if _, err := f.ReadAt(b, size-1); err != nil || b[0] != 0 {
			t.Errorf("the last byte is %d: %v", b[0], err)
		}
		if _, err := f.WriteAt([]byte{9}, size-1); err != nil {
			t.Error(err)
		}
		if _, err := f.WriteAt([]byte{9}, size); !errors.Is(err, block.ErrRange) {
			t.Errorf("behind the end: %v", err)
		}
	}
	for _, size := range []int64{0, -512, 1000} {
		if err := f.Resize(size); !errors.Is(err, block.ErrRange) {
			t.Errorf("to %d bytes: %v", size, err)
		}
	}
}
