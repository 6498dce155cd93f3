package oracle

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
)

// Disk is what a Load writes to, by shape.
type Disk interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	ZeroAt(off, n int64, punch bool) error
	Sync() error
}

// Load makes stamped operations from a seed and notes them in a History.
type Load struct {
	History *History
	Disks   []Disk
	// MaxSectors bounds one operation; 0 = 32. Keep it within one piece of
	// the system under test (128 sectors).
	MaxSectors int
	// Hot is the share of operations, in percent, that goes to the first
	// sixteenth of a disk; 0 = 30.
	Hot int
	// Torn: the disks lie in files; see CheckTornRead.
	Torn bool
	// Stop, when set, ends a worker at the first error for which it is true;
	// other errors are noted and the worker goes on. nil ends at any error.
	Stop func(error) bool
}

// ErrRead wraps a read that showed the wrong content.
var ErrRead = errors.New("wrong data read")

// Run lets workers make n operations each, at the same time, and returns the
// first error that ended one. The operations a worker makes depend on seed and
// its number only.
func (l *Load) Run(seed uint64, workers, n int) error {
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs[w] = l.Worker(seed, uint32(w), n)
		}()
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Worker makes n operations one after the other.
func (l *Load) Worker(seed uint64, worker uint32, n int) error {
	r := rand.New(rand.NewPCG(seed, uint64(worker)+1))
	for range n {
		err := l.Step(r, worker)
		if err == nil || !errors.Is(err, ErrRead) && l.Stop != nil && !l.Stop(err) {
			continue
		}
		return err
	}
	return nil
}

// Step makes one operation: mostly a write, now and then zeroes, a flush of
// all disks, or a read that is checked.
func (l *Load) Step(r *rand.Rand, worker uint32) error {
	d := r.IntN(len(l.Disks))
	lba, n := l.place(r, d)
	switch k := r.IntN(20); {
	case k < 13:
		return l.Write(worker, d, lba, n)
	case k < 15:
		return l.Zero(worker, d, lba, n, k == 14)
	case k < 17:
		return l.Flush(worker)
	default:
		return l.Read(d, lba, n)
	}
}

func (l *Load) place(r *rand.Rand, disk int) (lba, n uint64) {
	total := uint64(len(l.History.Base[disk]) / SectorSize)
	limit, hot := uint64(l.MaxSectors), l.Hot
	if limit == 0 {
		limit = 32
	}
	if hot == 0 {
		hot = 30
	}
	n = 1 + r.Uint64N(min(limit, total))
	span := total - n + 1
	if r.IntN(100) < hot {
		span = max(1, min(span, total/16))
	}
	lba = r.Uint64N(span)
	if r.IntN(2) == 0 { // often on a granule
		lba = lba / 8 * 8
	}
	return lba, n
}

// Write makes one stamped write.
func (l *Load) Write(worker uint32, disk int, lba, n uint64) error {
	o := l.History.Issue(OpWrite, worker, disk, lba, n)
	_, err := l.Disks[disk].WriteAt(l.History.Fill(o), int64(lba*SectorSize))
	l.History.Done(o.Seq, err)
	return err
}

// Zero makes one write of zeroes, or trim.
func (l *Load) Zero(worker uint32, disk int, lba, n uint64, punch bool) error {
	o := l.History.Issue(OpZero, worker, disk, lba, n)
	err := l.Disks[disk].ZeroAt(int64(lba*SectorSize), int64(n*SectorSize), punch)
	l.History.Done(o.Seq, err)
	return err
}

// Flush syncs all disks; it counts as answered when all have answered well.
func (l *Load) Flush(worker uint32) error {
	o := l.History.Issue(OpFlush, worker, 0, 0, 0)
	errs := make([]error, len(l.Disks))
	for i, d := range l.Disks {
		errs[i] = d.Sync()
	}
	err := errors.Join(errs...)
	l.History.Done(o.Seq, err)
	return err
}

// Read makes one read and checks what it shows. A read error is returned as is.
func (l *Load) Read(disk int, lba, n uint64) error {
	b := make([]byte, n*SectorSize)
	w := Window{Begin: l.History.clock()}
	if _, err := l.Disks[disk].ReadAt(b, int64(lba*SectorSize)); err != nil {
		return err
	}
	w.End = l.History.clock()
	check := CheckRead
	if l.Torn {
		check = CheckTornRead
	}
	if err := check(l.History, disk, lba, b, w); err != nil {
		return fmt.Errorf("%w: %w", ErrRead, err)
	}
	return nil
}
