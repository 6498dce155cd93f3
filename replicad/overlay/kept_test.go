package overlay_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/replicad/overlay"
)

func kept(t *testing.T, path string, base block.Device, quota int64, room func() error) *overlay.Scratch {
	t.Helper()
	s, err := overlay.OpenKept(path, base, quota, room)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // most tests closed it
	return s
}

func TestKeptConforms(t *testing.T) {
	blocktest.Run(t, func(t *testing.T, size int64) block.Device {
		return kept(t, filepath.Join(t.TempDir(), "vda"), block.NewMem(size), 0, nil)
	})
}

// Writes, zeros and what was left alone are found again, and the quota counts on.
func TestAKeptOverlayIsFoundAgainAsItWasLeft(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 3))
	const size = 1<<20 + 512
	base, want := filled(t, size, seed)
	path := filepath.Join(t.TempDir(), "vda")
	for range 4 {
		s := kept(t, path, base, 0, nil)
		if got := read(t, s); !bytes.Equal(got, want) {
			t.Fatal("it reads otherwise than it was left")
		}
		for range 20 {
			off := r.Int64N(size - 20000)
			b := make([]byte, 1+r.IntN(20000))
			if r.IntN(3) == 0 {
				if err := s.ZeroAt(off, int64(len(b)), true); err != nil {
					t.Fatal(err)
				}
			} else {
				for i := range b {
					b[i] = byte(r.Uint32())
				}
				if _, err := s.WriteAt(b, off); err != nil {
					t.Fatal(err)
				}
			}
			copy(want[off:], b)
		}
		used := s.Used()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		again := kept(t, path, base, 0, nil)
		if again.Used() != used {
			t.Errorf("%d bytes are used, %d were", again.Used(), used)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := overlay.RemoveKept(path); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
		t.Fatalf("left behind: %v, %v", left, err)
	}
}

func TestAKeptOverlayStopsGrowingWhenThereIsNoRoom(t *testing.T) {
	full := error(nil)
	s := kept(t, filepath.Join(t.TempDir(), "vda"), block.NewMem(1<<20), 0, func() error { return full })
	b := make([]byte, 4096)
	if _, err := s.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	full = syscall.ENOSPC
	if _, err := s.WriteAt(b, 0); err != nil {
		t.Errorf("what needs no room failed: %v", err)
	}
	if _, err := s.WriteAt(b, 8192); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("without room: %v", err)
	}
}

func TestAKeptOverlayOfAnotherSizeIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vda")
	if err := kept(t, path, block.NewMem(1<<20), 0, nil).Close(); err != nil {
		t.Fatal(err)
	}
	if s, err := overlay.OpenKept(path, block.NewMem(2<<20), 0, nil); err == nil {
		t.Errorf("opened (%v)", s.Close())
	}
}
