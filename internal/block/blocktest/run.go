package blocktest

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"kvmreplica/internal/block"
)

// Run is the conformance suite of block.Device. open returns a new device that
// reads as zeros and has size bytes, or up to 511 more where the device rounds
// up to whole sectors. Run closes what it opens.
func Run(t *testing.T, open func(t *testing.T, size int64) block.Device) {
	t.Helper()
	for _, size := range []int64{512, 4096, 1 << 20, 1<<20 + 512, 3*4096 + 1536, 1<<20 + 4095} {
		t.Run(fmt.Sprintf("size %d", size), func(t *testing.T) {
			runSize(t, size, open)
		})
	}
	t.Run("random operations equal a plain buffer", func(t *testing.T) { randomOps(t, open(t, 300<<10+512)) })
	t.Run("concurrent writers to own ranges", func(t *testing.T) { ownRanges(t, open(t, 1<<20)) })
	t.Run("overlapping writers leave whole sectors of one", func(t *testing.T) { overlapping(t, open(t, 64<<10)) })
	t.Run("zero of a huge device", func(t *testing.T) { hugeZero(t, open) })
	t.Run("after close", func(t *testing.T) { afterClose(t, open(t, 1<<20)) })
}

func runSize(t *testing.T, size int64, open func(t *testing.T, size int64) block.Device) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, d block.Device)
	}{
		{"size is as asked and new content is zero", func(t *testing.T, d block.Device) {
			if got := d.Size(); got < size || got > size+511 || got != size && got%512 != 0 {
				t.Fatalf("Size() = %d, asked for %d", got, size)
			}
			expect(t, d, make([]byte, d.Size()))
		}},
		{"what lies outside is refused and changes nothing", outside},
		{"writes at every edge", edges},
		{"zero and punch", zeroes},
		{"sync twice", func(t *testing.T, d block.Device) {
			must(t, d.Sync())
			_, err := d.WriteAt([]byte("x"), 0)
			must(t, err)
			must(t, d.Sync())
			must(t, d.Sync())
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := open(t, size)
			c.run(t, d)
			must(t, d.Close())
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// expect reads the whole device and names the first byte that differs.
func expect(t *testing.T, d block.Device, want []byte) {
	t.Helper()
	got := bytes.Repeat([]byte{0xa5}, len(want))
	if n, err := d.ReadAt(got, 0); err != nil || n != len(got) {
		t.Fatalf("read everything: %d, %v", n, err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
		}
	}
}

func outside(t *testing.T, d block.Device) {
	size := d.Size()
	want := pattern(1, int(size))
	_, err := d.WriteAt(want, 0)
	must(t, err)
	for _, r := range []block.Range{
		{Off: size, Len: 1},
		{Off: size - 1, Len: 2},
		{Off: -1, Len: 1},
		{Off: -1, Len: 2},
		{Off: 0, Len: size + 1},
		{Off: math.MaxInt64, Len: 1},
		{Off: math.MaxInt64 - 1, Len: 4096},
		{Off: math.MinInt64, Len: 1},
		{Off: size + 1, Len: 0},
	} {
		buf := make([]byte, r.Len)
		if n, err := d.WriteAt(buf, r.Off); !errors.Is(err, block.ErrRange) || n != 0 {
			t.Errorf("WriteAt(%d bytes, %d) = %d, %v; want ErrRange", r.Len, r.Off, n, err)
		}
		if n, err := d.ReadAt(buf, r.Off); !errors.Is(err, block.ErrRange) || n != 0 {
			t.Errorf("ReadAt(%d bytes, %d) = %d, %v; want ErrRange", r.Len, r.Off, n, err)
		}
		for _, punch := range []bool{false, true} {
			if err := d.ZeroAt(r.Off, r.Len, punch); !errors.Is(err, block.ErrRange) {
				t.Errorf("ZeroAt(%d, %d, %v) = %v; want ErrRange", r.Off, r.Len, punch, err)
			}
		}
	}
	for _, r := range []block.Range{{Off: 0, Len: math.MaxInt64}, {Off: 1, Len: math.MaxInt64}, {Off: 0, Len: -1}, {Off: 1, Len: math.MinInt64}} {
		if err := d.ZeroAt(r.Off, r.Len, true); !errors.Is(err, block.ErrRange) {
			t.Errorf("ZeroAt(%d, %d) = %v; want ErrRange", r.Off, r.Len, err)
		}
	}
	for _, off := range []int64{0, size} { // nothing, at both edges, is allowed
		if n, err := d.WriteAt(nil, off); n != 0 || err != nil {
			t.Errorf("WriteAt(nothing, %d) = %d, %v", off, n, err)
		}
		if n, err := d.ReadAt(nil, off); n != 0 || err != nil {
			t.Errorf("ReadAt(nothing, %d) = %d, %v", off, n, err)
		}
		if err := d.ZeroAt(off, 0, true); err != nil {
			t.Errorf("ZeroAt(%d, 0) = %v", off, err)
		}
	}
	expect(t, d, want)
}

// cuts are offsets where off-by-one mistakes live, within size.
func cuts(size int64) []int64 {
	var out []int64
	for _, base := range []int64{0, 512, 4096, 8192, 32 << 10, 64 << 10, 1 << 20, size} {
		for _, d := range []int64{-513, -512, -1, 0, 1, 511, 512} {
			if at := base + d; at >= 0 && at <= size {
				out = append(out, at)
			}
		}
	}
	return out
}

func edges(t *testing.T, d block.Device) {
	want := make([]byte, d.Size())
	at := cuts(d.Size())
	seed := byte(0)
	for _, off := range at {
		for _, n := range []int64{1, 2, 511, 512, 513, 4095, 4096, 4097} {
			if off+n > d.Size() {
				n = d.Size() - off
			}
			seed++
			p := pattern(seed, int(n))
			if m, err := d.WriteAt(p, off); err != nil || int64(m) != n {
				t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", n, off, m, err)
			}
			copy(want[off:], p)
			around := block.Range{Off: max(0, off-600), Len: min(d.Size(), off+n+600) - max(0, off-600)}
			got := make([]byte, around.Len)
			_, err := d.ReadAt(got, around.Off)
			must(t, err)
			if !bytes.Equal(got, want[around.Off:around.End()]) {
				t.Fatalf("after a write of %d bytes at %d its surroundings are wrong", n, off)
			}
		}
	}
	expect(t, d, want)
}

func zeroes(t *testing.T, d block.Device) {
	size := d.Size()
	for _, punch := range []bool{false, true} {
		want := pattern(9, int(size))
		_, err := d.WriteAt(want, 0)
		must(t, err)
		at := cuts(size)
		for i, off := range at {
			n := []int64{1, 511, 512, 4096, 4097, size}[i%6]
			n = min(n, size-off)
			if i%6 == 5 {
				n /= 16
			}
			must(t, d.ZeroAt(off, n, punch))
			clear(want[off : off+n])
		}
		expect(t, d, want)
		must(t, d.ZeroAt(0, size, punch))
		expect(t, d, make([]byte, size))
		must(t, d.ZeroAt(0, size, punch)) // zeros again
		_, err = d.WriteAt([]byte{1}, size-1)
		must(t, err)
		b := make([]byte, 1)
		_, err = d.ReadAt(b, size-1)
		must(t, err)
		if b[0] != 1 {
			t.Fatalf("a write after zeroing (punch %v) was lost", punch)
		}
	}
}

func randomOps(t *testing.T, d block.Device) {
	const seed = 1
	r := rand.New(rand.NewPCG(seed, 2))
	want := make([]byte, d.Size())
	for i := range 2000 {
		off := r.Int64N(d.Size())
		n := min(1+r.Int64N(20000), d.Size()-off)
		switch r.IntN(5) {
		case 0, 1:
			p := pattern(byte(i), int(n))
			_, err := d.WriteAt(p, off)
			must(t, err)
			copy(want[off:], p)
		case 2:
			must(t, d.ZeroAt(off, n, r.IntN(2) == 0))
			clear(want[off : off+n])
		case 3:
			got := make([]byte, n)
			_, err := d.ReadAt(got, off)
			must(t, err)
			if !bytes.Equal(got, want[off:off+n]) {
				t.Fatalf("seed %d, operation %d: read of %d bytes at %d is wrong", seed, i, n, off)
			}
		case 4:
			if r.IntN(50) == 0 {
				must(t, d.Sync())
			}
		}
	}
	expect(t, d, want)
	must(t, d.Close())
}

func ownRanges(t *testing.T, d block.Device) {
	const workers, stripe = 8, 3000 // neighbours share sectors and granules
	want := make([]byte, d.Size())
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for w := range workers {
		p := pattern(byte(w), stripe)
		for at := int64(w) * stripe; at+stripe <= d.Size(); at += workers * stripe {
			copy(want[at:], p)
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			got := make([]byte, stripe)
			for at := int64(w) * stripe; at+stripe <= d.Size(); at += workers * stripe {
				_, err := d.WriteAt(p, at)
				if err == nil {
					_, err = d.ReadAt(got, at)
				}
				if err == nil && !bytes.Equal(got, p) {
					err = fmt.Errorf("writer %d does not read what it wrote at %d", w, at)
				}
				if err == nil && at%(16*stripe) == 0 {
					err = d.Sync()
				}
				if err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	expect(t, d, want)
	must(t, d.Close())
}

func overlapping(t *testing.T, d block.Device) {
	const workers, rounds, n = 4, 50, 8 << 10
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range rounds {
				off := int64((w*7+i*13)%14) * 4096
				var err error
				if w == 3 {
					err = d.ZeroAt(off, n, i%2 == 0)
				} else {
					_, err = d.WriteAt(bytes.Repeat([]byte{byte(w + 1)}, n), off)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		}()
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	got := make([]byte, d.Size())
	_, err := d.ReadAt(got, 0)
	must(t, err)
	for s := 0; s < len(got); s += 512 {
		if sec := got[s : s+512]; !bytes.Equal(sec, bytes.Repeat(sec[:1], 512)) || sec[0] > 3 {
			t.Fatalf("the sector at %d is a mixture", s)
		}
	}
	must(t, d.Close())
}

// hugeZero: an implementation whose zeroing costs memory or time by length
// would not get through 8 GiB here.
func hugeZero(t *testing.T, open func(t *testing.T, size int64) block.Device) {
	const size = 8 << 30
	d := open(t, size)
	for range 2 {
		_, err := d.WriteAt([]byte("far"), size-3)
		must(t, err)
		must(t, d.ZeroAt(0, size, true))
		b := make([]byte, 3)
		_, err = d.ReadAt(b, size-3)
		must(t, err)
		if !bytes.Equal(b, make([]byte, 3)) {
			t.Fatal("the end of the device is not zero")
		}
	}
	must(t, d.Close())
}

func afterClose(t *testing.T, d block.Device) {
	must(t, d.Close())
	b := make([]byte, 512)
	if _, err := d.ReadAt(b, 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("ReadAt after Close: %v, want ErrClosed", err)
	}
	if _, err := d.WriteAt(b, 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("WriteAt after Close: %v, want ErrClosed", err)
	}
	if err := d.ZeroAt(0, 512, false); !errors.Is(err, block.ErrClosed) {
		t.Errorf("ZeroAt after Close: %v, want ErrClosed", err)
	}
	if err := d.Sync(); !errors.Is(err, block.ErrClosed) {
		t.Errorf("Sync after Close: %v, want ErrClosed", err)
	}
	if err := d.Close(); err != nil && !errors.Is(err, block.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
}

func pattern(seed byte, n int) []byte {
	p := make([]byte, n)
	x := uint32(seed)*2654435761 + 1
	for i := range p {
		x = x*1664525 + 1013904223
		p[i] = byte(x>>24) | 1 // never zero
	}
	return p
}
