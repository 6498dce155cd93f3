package nbd_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/nbd"
)

// trying adds Try methods that fail as the plain ones do.
type trying struct{ *blocktest.Faulty }

func (d trying) TryReadAt(p []byte, off int64) (int, error)  { return d.ReadAt(p, off) }
func (d trying) TryWriteAt(p []byte, off int64) (int, error) { return d.WriteAt(p, off) }
func (d trying) FastZero() bool                              { return true }

func TestDeviceErrorsAreAnsweredAndTheConnectionLives(t *testing.T) {
	for _, c := range []struct {
		err  error
		want uint32
	}{
		{errors.New("anything"), errIO},
		{syscall.EIO, errIO},
		{syscall.EINVAL, errIO}, // the request was valid
		{&os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, errNoSpace},
		{syscall.EDQUOT, errNoSpace},
		{syscall.EROFS, errPerm},
		{block.ErrReadOnly, errPerm},
		{syscall.ENOMEM, 12},
		{syscall.EOPNOTSUPP, errNotSup},
		{block.ErrClosed, errShut},
		{context.Canceled, errShut},
		{fmt.Errorf("upstream: %w", &nbd.RequestError{Errno: nbd.ENOSPC}), errNoSpace},
		{fmt.Errorf("upstream: %w", nbd.ErrDisconnected), errIO},
	} {
		for _, inline := range []bool{true, false} {
			t.Run(fmt.Sprintf("%v inline=%v", c.err, inline), func(t *testing.T) {
				faulty := blocktest.NewFaulty(newFile(t, 1<<20), "x")
				faulty.SetHook(func(op fsxtest.Op) error {
					if op.Kind == fsxtest.Close {
						return nil
					}
					return c.err
				})
				var dev block.Device = faulty
				if inline {
					dev = trying{faulty}
				}
				s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
				for _, structured := range []bool{false, true} {
					r := s.connect(t)
					r.enter(structured)
					for i, q := range []struct {
						flags, cmd uint16
						length     uint32
					}{
						{0, cmdRead, 4096},
						{0, cmdRead, 600 << 10},
						{0, cmdWrite, 4096},
						{0, cmdWrite, 700 << 10},
						{flagFUA, cmdWrite, 512},
						{0, cmdFlush, 0},
						{0, cmdTrim, 4096},
						{0, cmdZeroes, 4096},
					} {
						payload := make([]byte, 0)
						if q.cmd == cmdWrite {
							payload = make([]byte, q.length)
						}
						r.request(q.flags, q.cmd, uint64(i), 0, q.length, payload...)
						if cookie, errno := r.answer(); cookie != uint64(i) || errno != c.want {
							t.Fatalf("command %d of %d bytes, structured %v: error %d, want %d", q.cmd, q.length, structured, errno, c.want)
						}
					}
				}
				if st, ok := s.srv.Stats(""); !ok || st.Errors != 16 {
					t.Errorf("%d errors counted, want 16", st.Errors)
				}
			})
		}
	}
}

// shrinking offers a descriptor of a file that is shorter than the device.
type shrinking struct {
	*block.File
	size int64
}

func (s shrinking) Size() int64                                     { return s.size }
func (s shrinking) TryReadAt(p []byte, _ int64) (int, error)        { return len(p), nil }
func (s shrinking) ReadFD() (int, bool)                             { return s.File.ReadFD() }
func (s shrinking) Map(_, _ int64, _ func(block.Extent) bool) error { return nil }

// When the file fails behind the header of a structured reply, the chunk is
// filled up and an error chunk says from where on it is no data.
func TestFileThatFailsBehindTheHeaderIsReportedByAnErrorChunk(t *testing.T) {
	f := newFile(t, 96<<10)
	want := make([]byte, 96<<10)
	fill(want, 1)
	_, err := f.WriteAt(want, 0)
	must(t, err)
	s := serve(t, nbd.Options{}, nbd.Export{Device: shrinking{f, 1 << 20}})
	r := s.connect(t)
	r.enter(true)
	const off, length = 32 << 10, 900 << 10
	r.request(0, cmdRead, 1, off, length)
	c := r.chunk()
	if c.flags != 0 || c.typ != 1 || len(c.data) != 8+length || binary.BigEndian.Uint64(c.data) != off {
		t.Fatalf("first chunk: flags %d type %d, %d bytes", c.flags, c.typ, len(c.data))
	}
	for i, b := range c.data[8:] {
		w := byte(0)
		if i < 64<<10 {
			w = want[off+i]
		}
		if b != w {
			t.Fatalf("byte %d is %#x, want %#x", i, b, w)
		}
	}
	c = r.chunk()
	if c.flags != 1 || c.typ != 1<<15|2 || len(c.data) != 14 || binary.BigEndian.Uint32(c.data) != errIO || binary.BigEndian.Uint64(c.data[6:]) != 96<<10 {
		t.Fatalf("second chunk: %+v", c)
	}
	r.request(0, cmdFlush, 2, 0, 0)
	if cookie, errno := r.answer(); cookie != 2 || errno != 0 {
		t.Fatalf("flush afterwards: %d %d", cookie, errno)
	}
	// Our client makes an error of it.
	if _, err := s.dial(t, nbd.ClientOptions{}).ReadAt(make([]byte, length), off); !errors.Is(err, syscall.EIO) {
		t.Fatalf("client: %v", err)
	}
}

// The first piece that fails decides; later pieces are not written, the
// payload is consumed.
func TestFirstErrorOfAWriteInPiecesWins(t *testing.T) {
	for _, inline := range []bool{true, false} {
		t.Run(fmt.Sprintf("inline=%v", inline), func(t *testing.T) {
			faulty := blocktest.NewFaulty(newFile(t, 1<<20), "x")
			var largest int64
			faulty.SetHook(func(op fsxtest.Op) error {
				largest = max(largest, op.Len)
				switch {
				case op.Kind == fsxtest.Write && op.Off == 128<<10:
					return syscall.ENOSPC
				case op.Kind == fsxtest.Write && op.Off > 128<<10:
					return syscall.EIO
				}
				return nil
			})
			var dev block.Device = faulty
			if inline {
				dev = trying{faulty}
			}
			s := serve(t, nbd.Options{Workers: 1}, nbd.Export{Device: dev, MaxPiece: 64 << 10})
			r := s.connect(t)
			r.enter(true)
			r.request(flagFUA, cmdWrite, 1, 0, 512<<10, make([]byte, 512<<10)...)
			if _, errno := r.answer(); errno != errNoSpace {
				t.Fatalf("answer %d", errno)
			}
			if largest > 64<<10 {
				t.Errorf("a piece of %d bytes reached the device", largest)
			}
		})
	}
}

// A piece fails while the connection's loop waits for room for the next one,
// after it has looked: what the loop knows at the end must not cover the error.
func TestAnErrorWhileTheNextPieceWaitsIsTold(t *testing.T) {
	faulty := blocktest.NewFaulty(newFile(t, 1<<20), "x")
	faulty.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Write && op.Off == 0 {
			return syscall.ENOSPC
		}
		return nil
	})
	s := serve(t, nbd.Options{Workers: 1, ParkedRequests: 1}, nbd.Export{Device: faulty, MaxPiece: 64 << 10})
	r := s.connect(t)
	r.enter(true)
	for i := range uint64(50) {
		r.request(0, cmdWrite, i, 0, 128<<10, make([]byte, 128<<10)...)
		if _, errno := r.answer(); errno != errNoSpace {
			t.Fatalf("write %d: answer %d", i, errno)
		}
	}
}

func TestFastZeroIsRefusedWhereZeroingIsSlow(t *testing.T) {
	f := newFile(t, 1<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: plain{f}})
	r := s.connect(t)
	r.enter(true)
	r.request(flagFZ, cmdZeroes, 1, 0, 4096)
	if _, errno := r.answer(); errno != errNotSup {
		t.Fatalf("fast zero of a slow device: %d", errno)
	}
	r.request(flagNoHole, cmdZeroes, 2, 0, 4096)
	if _, errno := r.answer(); errno != 0 {
		t.Fatalf("plain zeroes: %d", errno)
	}
}

// slowZero says that zeroing is slow; nothing may be written for a TRIM then.
type slowZero struct{ plain }

func (slowZero) FastZero() bool { return false }

func TestTrimDoesNotWriteZeros(t *testing.T) {
	f := newFile(t, 1<<20)
	_, err := f.WriteAt([]byte{1}, 0)
	must(t, err)
	s := serve(t, nbd.Options{}, nbd.Export{Device: slowZero{plain{f}}})
	must(t, s.dial(t, nbd.ClientOptions{}).Trim(0, 4096))
	expect(t, f, 0, []byte{1})
	s = serve(t, nbd.Options{}, nbd.Export{Device: f})
	must(t, s.dial(t, nbd.ClientOptions{}).Trim(0, 4096))
	expect(t, f, 0, []byte{0})
}

func TestFUAIsAWriteAndASync(t *testing.T) {
	for _, inline := range []bool{true, false} {
		faulty := blocktest.NewFaulty(newFile(t, 1<<20), "x")
		log := make(chan string, 64)
		faulty.SetHook(func(op fsxtest.Op) error { log <- fmt.Sprint(op.Kind); return nil })
		var dev block.Device = faulty
		if inline {
			dev = trying{faulty}
		}
		s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
		r := s.connect(t)
		r.enter(true)
		for _, cmd := range []uint16{cmdWrite, cmdZeroes, cmdTrim} {
			var payload []byte
			if cmd == cmdWrite {
				payload = make([]byte, 4096)
			}
			r.request(flagFUA, cmd, 1, 0, 4096, payload...)
			if _, errno := r.answer(); errno != 0 {
				t.Fatalf("answer %d", errno)
			}
			var did []string // all of it was before the answer
			for len(log) > 0 {
				did = append(did, <-log)
			}
			if len(did) != 2 || !strings.EqualFold(did[1], fmt.Sprint(fsxtest.Sync)) {
				t.Errorf("inline=%v command %d: %q, want a change and a sync", inline, cmd, did)
			}
		}
	}
}

// punches remembers how ranges were zeroed.
type punches struct {
	plain
	seen chan bool
}

func (p punches) ZeroAt(off, n int64, punch bool) error {
	p.seen <- punch
	return p.plain.ZeroAt(off, n, punch)
}

func TestNoHoleKeepsTheSpace(t *testing.T) {
	dev := punches{plain{newFile(t, 64<<20)}, make(chan bool, 16)}
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
	r := s.connect(t)
	r.enter(true)
	for _, c := range []struct {
		flags, cmd uint16
		length     uint32
		want       []bool
	}{
		{flagNoHole, cmdZeroes, 4096, []bool{false}},
		{0, cmdZeroes, 4096, []bool{true}},
		{0, cmdTrim, 4096, []bool{true}},
		{0, cmdZeroes, 40 << 20, []bool{true, true, true}}, // no range is locked for long
	} {
		r.request(c.flags, c.cmd, 1, 0, c.length)
		if _, errno := r.answer(); errno != 0 {
			t.Fatalf("answer %d", errno)
		}
		for _, want := range c.want {
			if got := <-dev.seen; got != want {
				t.Errorf("command %d flags %d: punch %v", c.cmd, c.flags, got)
			}
		}
		if len(dev.seen) != 0 {
			t.Errorf("command %d flags %d: %d calls too many", c.cmd, c.flags, len(dev.seen))
		}
	}
}

func TestRangeErrorsOfADeviceDependOnTheCommand(t *testing.T) {
	for cmd, want := range map[uint16]nbd.Errno{cmdRead: nbd.EINVAL, cmdWrite: nbd.ENOSPC, cmdZeroes: nbd.ENOSPC, cmdTrim: nbd.EINVAL} {
		if got := nbd.ErrnoOf(fmt.Errorf("disk: %w", block.ErrRange), cmd); got != want {
			t.Errorf("command %d: %v, want %v", cmd, got, want)
		}
	}
}
