package overlay_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/overlay"
)

func scratch(t *testing.T, base block.Device, quota int64) *overlay.Scratch {
	t.Helper()
	s, err := overlay.CreateScratch(t.TempDir(), base, quota, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() }) // most tests closed it
	return s
}

func TestScratchConforms(t *testing.T) {
	blocktest.Run(t, func(t *testing.T, size int64) block.Device { return scratch(t, block.NewMem(size), 0) })
}

func filled(t *testing.T, size int64, seed uint64) (*block.Mem, []byte) {
	t.Helper()
	want := make([]byte, size)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range want {
		want[i] = byte(r.Uint32()) | 1
	}
	m := block.NewMem(size)
	if _, err := m.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	return m, want
}

func read(t *testing.T, d block.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestScratchReadsLikeADiskThatWasCopiedFirst compares random operations over a
// full device with a buffer, and the device below with what it was.
func TestScratchReadsLikeADiskThatWasCopiedFirst(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	base, orig := filled(t, 3<<20+1536, seed)
	s := scratch(t, base, 0)
	want := bytes.Clone(orig)
	for i := range 3000 {
		off := r.Int64N(s.Size())
		n := min(1+r.Int64N(20000), s.Size()-off)
		switch r.IntN(4) {
		case 0, 1:
			p := bytes.Repeat([]byte{byte(i)}, int(n))
			if _, err := s.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			copy(want[off:], p)
		case 2:
			if err := s.ZeroAt(off, n, r.IntN(2) == 0); err != nil {
				t.Fatal(err)
			}
			clear(want[off : off+n])
		case 3:
			mapped(t, s, want, off, n)
		}
	}
	if !bytes.Equal(read(t, s), want) {
		t.Fatal("the overlay reads differently")
	}
	if !bytes.Equal(read(t, base), orig) {
		t.Fatal("the device below was changed")
	}
}

// mapped checks that what Map calls zeros are, and that it covers the range.
func mapped(t *testing.T, s *overlay.Scratch, want []byte, off, n int64) {
	t.Helper()
	at := off
	err := s.Map(off, n, func(e block.Extent) bool {
		if e.Off != at {
			t.Fatalf("extent at %d, want %d", e.Off, at)
		}
		at = e.End()
		if e.Zero && len(bytes.Trim(want[e.Off:e.End()], "\x00")) > 0 {
			t.Fatalf("extent %v is not zero", e)
		}
		return true
	})
	if err != nil || at != off+n {
		t.Fatalf("map ended at %d of %d: %v", at, off+n, err)
	}
}

func TestAWriteBeyondTheQuotaIsRefusedAndLeavesWhatWasThere(t *testing.T) {
	base, orig := filled(t, 1<<20, 7)
	s := scratch(t, base, 8<<10)
	one := bytes.Repeat([]byte{9}, 4096)
	for _, off := range []int64{0, 100} { // whole, then into two granules: three in all
		_, err := s.WriteAt(one, off+8192*(off/100))
		if off == 0 && err != nil {
			t.Fatal(err)
		}
		if off == 100 && (!errors.Is(err, overlay.ErrQuota) || !errors.Is(err, syscall.ENOSPC)) {
			t.Fatalf("beyond the quota: %v", err)
		}
	}
	copy(orig, one)
	if !bytes.Equal(read(t, s), orig) {
		t.Fatal("a refused write changed something")
	}
	if _, err := s.WriteAt([]byte("again"), 10); err != nil {
		t.Fatalf("writing where there is data takes no quota: %v", err)
	}
	if err := s.ZeroAt(4096, 64<<10, false); err != nil {
		t.Fatalf("zeroing whole granules takes no quota: %v", err)
	}
	if err := s.ZeroAt(0, 4096, true); err != nil || s.Used() != 0 {
		t.Fatalf("zeroing gives the quota back: used %d, %v", s.Used(), err)
	}
	if _, err := s.WriteAt(bytes.Repeat([]byte{3}, 8192), 512<<10); err != nil || s.Used() != 8192 {
		t.Fatalf("the freed quota is used again: used %d, %v", s.Used(), err)
	}
}

func TestAReadErrorBelowFailsTheWriteAndChangesNothing(t *testing.T) {
	base, orig := filled(t, 64<<10, 3)
	f := blocktest.NewFaulty(base, "base")
	s := scratch(t, f, 0)
	f.SetHook(func(op fsxtest.Op) error { return syscall.EIO })
	if _, err := s.WriteAt([]byte("part"), 5000); !errors.Is(err, syscall.EIO) {
		t.Fatalf("part of a granule over a broken device: %v", err)
	}
	if err := s.ZeroAt(5000, 10, false); !errors.Is(err, syscall.EIO) {
		t.Fatalf("zero part of a granule over a broken device: %v", err)
	}
	f.SetHook(nil)
	if !bytes.Equal(read(t, s), orig) || s.Used() != 0 {
		t.Fatalf("a failed write left something, used %d", s.Used())
	}
}

func TestScratchLeavesNoFile(t *testing.T) {
	dir := t.TempDir()
	s, err := overlay.CreateScratch(dir, block.NewMem(1<<20), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Fatalf("files %v, %v", left, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// A reserve stays free whatever the quota allows; what was written stays.
func TestAScratchOverlayLeavesTheReserveFree(t *testing.T) {
	s, err := overlay.CreateScratch(t.TempDir(), block.NewMem(1<<20), 0, 1<<60)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.ZeroAt(0, 4096, true); err != nil { // takes no room
		t.Errorf("zeros: %v", err)
	}
	if _, err := s.WriteAt(bytes.Repeat([]byte{1}, 4096), 4096); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("beyond the reserve: %v", err)
	}
	if _, err := s.ReadAt(make([]byte, 8192), 0); err != nil {
		t.Errorf("reading: %v", err)
	}
}
