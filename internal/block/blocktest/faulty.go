package blocktest

import (
	"sync"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx/fsxtest"
)

// Faulty puts a hook in front of any device: it may return an error for an
// operation (fsxtest.Short for a partial transfer), or block to hold it in
// flight. Unlike Crashable it keeps no content of its own.
type Faulty struct {
	dev  block.Device
	name string

	mu   sync.Mutex
	ops  int
	hook func(fsxtest.Op) error
}

var _ block.Device = (*Faulty)(nil)

// NewFaulty wraps dev; its Op paths are "disk:NAME".
func NewFaulty(dev block.Device, name string) *Faulty { return &Faulty{dev: dev, name: name} }

// SetHook installs h, called before each operation without any lock; nil
// removes it.
func (f *Faulty) SetHook(h func(fsxtest.Op) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = h
}

func (f *Faulty) fault(kind fsxtest.Kind, off, n int64) error {
	f.mu.Lock()
	op := fsxtest.Op{Kind: kind, Path: "disk:" + f.name, Off: off, Len: n, Index: f.ops}
	f.ops++
	hook := f.hook
	f.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(op)
}

// ReadAt implements block.Device.
func (f *Faulty) ReadAt(p []byte, off int64) (int, error) {
	return transfer(p, off, f.fault(fsxtest.Read, off, int64(len(p))), f.dev.ReadAt)
}

// WriteAt implements block.Device.
func (f *Faulty) WriteAt(p []byte, off int64) (int, error) {
	return transfer(p, off, f.fault(fsxtest.Write, off, int64(len(p))), f.dev.WriteAt)
}

func transfer(p []byte, off int64, fault error, call func([]byte, int64) (int, error)) (int, error) {
	n, fault := fsxtest.ShortCount(fault, len(p))
	if fault != nil && n == 0 {
		return 0, fault
	}
	n, err := call(p[:n], off)
	if err == nil {
		err = fault
	}
	return n, err
}

// ZeroAt implements block.Device.
func (f *Faulty) ZeroAt(off, n int64, punch bool) error {
	if err := f.fault(fsxtest.Zero, off, n); err != nil {
		return err
	}
	return f.dev.ZeroAt(off, n, punch)
}

// Sync implements block.Device.
func (f *Faulty) Sync() error {
	if err := f.fault(fsxtest.Sync, 0, 0); err != nil {
		return err
	}
	return f.dev.Sync()
}

// Size implements block.Device.
func (f *Faulty) Size() int64 { return f.dev.Size() }

// Close implements block.Device.
func (f *Faulty) Close() error {
	if err := f.fault(fsxtest.Close, 0, 0); err != nil {
		return err
	}
	return f.dev.Close()
}

// Gate holds operations in flight. Use Hold as (part of) a hook.
type Gate struct {
	held    chan fsxtest.Op
	release chan struct{}
	once    sync.Once
}

// NewGate returns a closed gate.
func NewGate() *Gate {
	return &Gate{held: make(chan fsxtest.Op, 1024), release: make(chan struct{})}
}

// Hold announces op on Held and waits for Open.
func (g *Gate) Hold(op fsxtest.Op) {
	g.held <- op
	<-g.release
}

// Held delivers each operation that began to wait (at most 1024 unread).
func (g *Gate) Held() <-chan fsxtest.Op { return g.held }

// Open lets all held and all later operations pass. Twice is harmless.
func (g *Gate) Open() { g.once.Do(func() { close(g.release) }) }

// HoldMatching is a hook that holds the operations for which match is true.
func (g *Gate) HoldMatching(match func(fsxtest.Op) bool) func(fsxtest.Op) error {
	return func(op fsxtest.Op) error {
		if match(op) {
			g.Hold(op)
		}
		return nil
	}
}
