package overlay

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"kvmreplica/internal/block"
)

// granule is the unit of copy-on-write.
const granule = 4096

// ErrQuota: the overlay may not grow further. It is also syscall.ENOSPC, so
// that a guest sees a full disk and not a broken one.
var ErrQuota = fmt.Errorf("the overlay's quota is used up: %w", syscall.ENOSPC)

// Scratch is a copy-on-write device whose writes end with it. It is sparse:
// only granules that were written, and are not zero, take space and quota.
type Scratch struct {
	base  block.Device
	data  block.Device
	size  int64
	quota int64 // bytes, 0 = none
	used  atomic.Int64
	in    presence
	locks stripes
	shut  atomic.Bool
	end   func() error // more to close; may be nil
	room  func() error // whether the data may grow; may be nil
}

var (
	_ block.Device     = (*Scratch)(nil)
	_ block.Mapper     = (*Scratch)(nil)
	_ block.FastZeroer = (*Scratch)(nil)
	_ block.TryReader  = (*Scratch)(nil)
	_ block.TryWriter  = (*Scratch)(nil)
)

// CreateScratch makes an overlay over base whose data is in a sparse file
// without a name in dir. quota bounds its data in bytes; 0 means that only the
// file system does. It grows while reserve bytes stay free there.
func CreateScratch(dir string, base block.Device, quota, reserve int64) (*Scratch, error) {
	f, err := os.CreateTemp(dir, ".scratch-*")
	if err != nil {
		return nil, fmt.Errorf("create scratch overlay: %w", err)
	}
	err = errors.Join(f.Truncate(base.Size()), f.Close())
	var data *block.File
	if err == nil {
		data, err = block.OpenFile(f.Name(), block.FileOptions{})
	}
	if rm := os.Remove(f.Name()); rm != nil {
		err = errors.Join(err, rm)
		if data != nil {
			err = errors.Join(err, data.Close())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("create scratch overlay: %w", err)
	}
	s := NewScratch(base, data, quota)
	s.room = (&Room{Dir: dir, Reserve: reserve}).Check
	return s, nil
}

// NewScratch makes an overlay over base whose data goes into data, which must
// be as large and is the overlay's from now on; what it holds is never read.
func NewScratch(base, data block.Device, quota int64) *Scratch {
	return &Scratch{base: base, data: data, size: base.Size(), quota: max(quota, 0), in: newPresence(base.Size())}
}

// Used is the space taken by what was written, in bytes.
func (s *Scratch) Used() int64 { return s.used.Load() }

// Quota is the most that Used may become, 0 = without bound.
func (s *Scratch) Quota() int64 { return s.quota }

// Size implements block.Device.
func (s *Scratch) Size() int64 { return s.size }

// FastZero implements block.FastZeroer: whole granules are only marked.
func (s *Scratch) FastZero() bool { return true }

// Sync implements block.Device. There is nothing to make durable: the overlay
// ends with the process.
func (s *Scratch) Sync() error {
	if s.shut.Load() {
		return block.ErrClosed
	}
	return nil
}

// Close implements block.Device: it waits for what is under way and gives the
// space back. The device below stays open.
func (s *Scratch) Close() error {
	defer s.locks.all()()
	if s.shut.Swap(true) {
		return block.ErrClosed
	}
	err := s.data.Close()
	if s.end != nil {
		err = errors.Join(err, s.end())
	}
	return err
}

// enter checks a request and locks its range.
func (s *Scratch) enter(off, n int64, write bool) (leave func(), err error) {
	if err := block.Check(off, n, s.size); err != nil {
		return nil, err
	}
	leave = s.locks.lock(off, n, write)
	if s.shut.Load() {
		leave()
		return nil, block.ErrClosed
	}
	return leave, nil
}

// ReadAt implements block.Device.
func (s *Scratch) ReadAt(p []byte, off int64) (int, error) {
	leave, err := s.enter(off, int64(len(p)), false)
	if err != nil {
		return 0, err
	}
	defer leave()
	done := 0
	for r := range s.in.runs(off, int64(len(p))) {
		part := p[r.Off-off : r.End()-off]
		switch r.state {
		case zeroed:
			clear(part)
		case present:
			_, err = s.data.ReadAt(part, r.Off)
		default:
			_, err = s.base.ReadAt(part, r.Off)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, nil
}

// TryReadAt implements block.TryReader: it never finds the data at hand,
// because the device below may be slow.
func (s *Scratch) TryReadAt([]byte, int64) (int, error) { return 0, block.ErrWouldBlock }

// TryWriteAt implements block.TryWriter: a part of a granule has to be read.
func (s *Scratch) TryWriteAt([]byte, int64) (int, error) { return 0, block.ErrWouldBlock }

// WriteAt implements block.Device.
func (s *Scratch) WriteAt(p []byte, off int64) (int, error) {
	leave, err := s.enter(off, int64(len(p)), true)
	if err != nil {
		return 0, err
	}
	defer leave()
	if err := s.reserve(off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		n, err := s.writePiece(p[done:], at)
		if err != nil {
			s.settle(at, off+int64(len(p)))
			return done, err
		}
		done += n
	}
	return done, nil
}

// reserve takes the quota of all granules of a range that have no data yet.
func (s *Scratch) reserve(off, n int64) error {
	need := s.missing(off, off+n)
	if need > 0 && s.room != nil {
		if err := s.room(); err != nil {
			return fmt.Errorf("write %d bytes: %w", n, err)
		}
	}
	if used := s.used.Add(need); s.quota > 0 && used > s.quota && need > 0 {
		s.used.Add(-need)
		return fmt.Errorf("write %d bytes: %w (%d of %d bytes)", n, ErrQuota, used-need, s.quota)
	}
	return nil
}

// settle gives back what was reserved for granules that did not come about.
func (s *Scratch) settle(off, end int64) { s.used.Add(-s.missing(off, end)) }

// missing counts the bytes of granules of [off, end) without data of their own.
func (s *Scratch) missing(off, end int64) int64 {
	var n int64
	for g := off / granule; g*granule < end; g++ {
		if s.in.get(g) != present {
			n += granule
		}
	}
	return n
}

// writePiece writes the first part of p: whole granules together, else what
// belongs to one granule.
func (s *Scratch) writePiece(p []byte, at int64) (int, error) {
	g := at / granule
	whole := s.whole(at, int64(len(p)))
	if whole == 0 {
		p = p[:min(int64(len(p)), (g+1)*granule-at)]
		return len(p), s.patch(g, p, at)
	}
	if _, err := s.data.WriteAt(p[:whole], at); err != nil {
		return 0, err
	}
	s.in.set(g, (whole+granule-1)/granule, present)
	return int(whole), nil
}

// whole is the length of the whole granules at the beginning of [at, at+n);
// the last one of the device may be short.
func (s *Scratch) whole(at, n int64) int64 {
	switch {
	case at%granule != 0:
		return 0
	case at+n == s.size:
		return n
	}
	return n / granule * granule
}

// patch puts p into one granule.
func (s *Scratch) patch(g int64, p []byte, at int64) error {
	if s.in.get(g) == present {
		_, err := s.data.WriteAt(p, at)
		return err
	}
	var buf [granule]byte
	b := buf[:min(granule, s.size-g*granule)]
	if s.in.get(g) == below {
		if _, err := s.base.ReadAt(b, g*granule); err != nil {
			return fmt.Errorf("read below the overlay: %w", err)
		}
	}
	copy(b[at-g*granule:], p)
	if _, err := s.data.WriteAt(b, g*granule); err != nil {
		return err
	}
	s.in.set(g, 1, present)
	return nil
}

// ZeroAt implements block.Device. Whole granules only change their mark, and
// give back their quota and space.
func (s *Scratch) ZeroAt(off, n int64, punch bool) error {
	leave, err := s.enter(off, n, true)
	if err != nil || n == 0 {
		if err == nil {
			leave()
		}
		return err
	}
	defer leave()
	first, last := (off+granule-1)/granule, (off+n)/granule
	if off+n == s.size {
		last = (s.size + granule - 1) / granule
	}
	if first >= last { // inside one granule, or over the edge between two
		return s.zeroParts(off, n)
	}
	if err := s.zeroParts(off, first*granule-off); err != nil {
		return err
	}
	if tail := off + n - last*granule; tail > 0 {
		if err := s.zeroParts(last*granule, tail); err != nil {
			return err
		}
	}
	return s.zeroWhole(first, last, punch)
}

// zeroParts zeros parts of granules.
func (s *Scratch) zeroParts(off, n int64) error {
	for n > 0 {
		g := off / granule
		part := min(n, (g+1)*granule-off)
		if s.in.get(g) != zeroed {
			if err := s.reserve(off, part); err != nil {
				return err
			}
			if err := s.patch(g, make([]byte, part), off); err != nil {
				s.settle(off, off+part)
				return err
			}
		}
		off, n = off+part, n-part
	}
	return nil
}

// zeroWhole marks granules as zeros and frees what they held.
func (s *Scratch) zeroWhole(first, last int64, punch bool) error {
	var err error
	for r := range s.in.runs(first*granule, min(last*granule, s.size)-first*granule) {
		if r.state != present {
			continue
		}
		if e := s.data.ZeroAt(r.Off, r.Len, punch); e != nil {
			err = e // the mark below makes it zeros all the same
		}
		s.used.Add(-(r.Len + granule - 1) / granule * granule)
	}
	s.in.set(first, last-first, zeroed)
	if err != nil && !punch {
		return nil
	}
	return err
}

// Map implements block.Mapper: what was zeroed is a hole, what was written is
// data, and below the device below is asked.
func (s *Scratch) Map(off, n int64, fn func(block.Extent) bool) error {
	leave, err := s.enter(off, n, false)
	if err != nil {
		return err
	}
	var out []block.Extent
	m, maps := s.base.(block.Mapper)
	for r := range s.in.runs(off, n) {
		switch {
		case r.state == zeroed:
			out = append(out, block.Extent{Range: r.Range, Hole: true, Zero: true})
		case r.state == present || !maps:
			out = append(out, block.Extent{Range: r.Range})
		default:
			err = m.Map(r.Off, r.Len, func(e block.Extent) bool { out = append(out, e); return true })
		}
		if err != nil {
			break
		}
	}
	leave()
	if err != nil {
		return err
	}
	for _, e := range out {
		if !fn(e) {
			return nil
		}
	}
	return nil
}
