// Package blocktest holds what tests of block devices share: the conformance
// suite Run, the doubles Crashable (what a power cut may leave) and Faulty
// (errors and held operations in front of any device), and Host with Sweep and
// FailSweep, which try every crash point and every single fault of a scenario
// over a file system and several disks at once.
//
// A sweep in short:
//
//	blocktest.Sweep(t, func(h *blocktest.Host) error {
//		ledger.reset() // the scenario runs many times
//		disk := h.Disk("vda", 1<<20)
//		... run the code under test on h.FS and disk until it fails ...
//	}, func(h *blocktest.Host) error {
//		... h is the machine after restart: open again, compare with the ledger,
//		... which check must not change: one crash has many survivors ...
//	})
//
// The storage model is that of package fsxtest. Reads of a Crashable count as
// operations but are not crash points.
package blocktest

import (
	"fmt"
	"sync/atomic"
	"syscall"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx/fsxtest"
)

// Crashable is a disk under the strict storage model: sectors of 512 bytes
// survive a cut independently unless synced; a failed Sync reports once and
// leaves old or new. Close does not sync. Its Op paths are "disk:NAME".
type Crashable struct {
	name   string
	size   int64
	power  *fsxtest.Power
	data   *fsxtest.Sectors
	closed atomic.Bool
	torn   bool
}

var (
	_ block.Device     = (*Crashable)(nil)
	_ block.FastZeroer = (*Crashable)(nil)
)

// NewCrashable returns an all-zero disk of its own machine.
func NewCrashable(name string, size int64) *Crashable {
	return NewCrashableOn(fsxtest.NewPower(), name, size)
}

// NewCrashableOn returns an all-zero disk of the machine p belongs to.
func NewCrashableOn(p *fsxtest.Power, name string, size int64) *Crashable {
	return &Crashable{name: name, size: size, power: p, data: fsxtest.NewSectors()}
}

// Power is the machine's clock of operations.
func (c *Crashable) Power() *fsxtest.Power { return c.power }

// SetTorn makes CrashClone offer garbage in one sector of the write that was
// under way when the power went.
func (c *Crashable) SetTorn(torn bool) { c.power.Locked(func() { c.torn = torn }) }

// CrashClone returns the disk as a power cut now might have left it.
func (c *Crashable) CrashClone(choose fsxtest.Chooser) *Crashable {
	return c.crashCloneOn(fsxtest.NewPower(), choose)
}

// KillClone returns the disk as the next process finds it after this one died.
func (c *Crashable) KillClone(choose fsxtest.Chooser) *Crashable {
	return c.killCloneOn(fsxtest.NewPower(), choose)
}

func (c *Crashable) crashCloneOn(p *fsxtest.Power, choose fsxtest.Chooser) *Crashable {
	n := &Crashable{name: c.name, size: c.size, power: p, torn: c.torn}
	c.power.Locked(func() { n.data = c.data.Cut(choose, c.torn) })
	return n
}

func (c *Crashable) killCloneOn(p *fsxtest.Power, choose fsxtest.Chooser) *Crashable {
	n := &Crashable{name: c.name, size: c.size, power: p, torn: c.torn}
	c.power.Locked(func() { n.data = c.data.Kill(choose) })
	return n
}

func (c *Crashable) do(kind fsxtest.Kind, off, n int64, fn func(fault error, dying bool) error) error {
	if c.closed.Load() {
		return block.ErrClosed
	}
	if err := block.Check(off, n, c.size); err != nil {
		return err
	}
	op := fsxtest.Op{Kind: kind, Path: "disk:" + c.name, Off: off, Len: n}
	if err := c.power.Do(op, fn); err != nil {
		return fmt.Errorf("%s disk %s at %d: %w", kind, c.name, off, err)
	}
	return nil
}

// ReadAt implements block.Device.
func (c *Crashable) ReadAt(p []byte, off int64) (n int, err error) {
	err = c.do(fsxtest.Read, off, int64(len(p)), func(fault error, _ bool) error {
		n, fault = fsxtest.ShortCount(fault, len(p))
		c.data.ReadAt(p[:n], off)
		return fault
	})
	return n, err
}

// WriteAt implements block.Device.
func (c *Crashable) WriteAt(p []byte, off int64) (n int, err error) {
	err = c.do(fsxtest.Write, off, int64(len(p)), func(fault error, dying bool) error {
		n, fault = fsxtest.ShortCount(fault, len(p))
		c.data.WriteAt(p[:n], off, dying)
		return fault
	})
	return n, err
}

// ZeroAt implements block.Device. Its cost follows what was written, not n.
func (c *Crashable) ZeroAt(off, n int64, _ bool) error {
	return c.do(fsxtest.Zero, off, n, func(fault error, dying bool) error {
		if fault == nil {
			c.data.Zero(off, n, dying)
		}
		return fault
	})
}

// Sync implements block.Device.
func (c *Crashable) Sync() error {
	return c.do(fsxtest.Sync, 0, 0, func(fault error, dying bool) error {
		switch {
		case dying:
		case fault != nil:
			c.data.SyncFailed(c.power.Drops())
		default:
			c.data.Sync()
		}
		return fault
	})
}

// Size implements block.Device.
func (c *Crashable) Size() int64 { return c.size }

// Close implements block.Device. The content stays with the Host, which hands
// out a new open device by Disk.
func (c *Crashable) Close() error {
	if c.closed.Swap(true) {
		return block.ErrClosed
	}
	return nil
}

// FastZero implements block.FastZeroer.
func (c *Crashable) FastZero() bool { return true }

// Pending is the number of sectors a cut might leave in more than one way.
func (c *Crashable) Pending() (n int) {
	c.power.Locked(func() { n = c.data.Pending() })
	return n
}

// Content returns the whole disk as a read shows it, without counting as an
// operation and also when the power is gone: for oracles.
func (c *Crashable) Content() []byte {
	b := make([]byte, c.size)
	c.power.Locked(func() { c.data.ReadAt(b, 0) })
	return b
}

// Damage changes content at rest: fn gets the n bytes at off and alters them in
// place; what results is durable. It is not an operation of the machine.
func (c *Crashable) Damage(off int64, n int, fn func(b []byte)) error {
	if err := block.Check(off, int64(n), c.size); err != nil {
		return err
	}
	if n == 0 {
		return syscall.EINVAL
	}
	b := make([]byte, n)
	c.power.Locked(func() {
		c.data.ReadAt(b, off)
		fn(b)
		c.data.Replace(b, off)
	})
	return nil
}
