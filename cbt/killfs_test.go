package cbt_test

import (
	"errors"
	"sync"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// death notices the first operation that found the power gone, before the code
// under test does: at a kill nothing of what it does afterwards counts.
type death struct {
	once sync.Once
	fn   func()
}

func (d *death) see(err error) error {
	if errors.Is(err, fsxtest.ErrPowerLost) {
		d.once.Do(d.fn)
	}
	return err
}

// mortal makes everything a tracker is given tell d.
func mortal(c *cbt.Config, d *death) {
	c.FS = mortalFS{c.FS, d}
	for i := range c.Disks {
		c.Disks[i].Device = mortalDev{c.Disks[i].Device, d}
	}
}

type mortalFS struct {
	fs fsx.FS
	d  *death
}

func (m mortalFS) Open(name string, flag int) (fsx.File, error) {
	f, err := m.fs.Open(name, flag)
	if err != nil {
		return nil, m.d.see(err)
	}
	return mortalFile{f, m.d}, nil
}
func (m mortalFS) Rename(a, b string) error        { return m.d.see(m.fs.Rename(a, b)) }
func (m mortalFS) Remove(n string) error           { return m.d.see(m.fs.Remove(n)) }
func (m mortalFS) List(n string) ([]string, error) { l, err := m.fs.List(n); return l, m.d.see(err) }
func (m mortalFS) MkdirAll(n string) error         { return m.d.see(m.fs.MkdirAll(n)) }
func (m mortalFS) SyncDir(n string) error          { return m.d.see(m.fs.SyncDir(n)) }

type mortalFile struct {
	f fsx.File
	d *death
}

func (m mortalFile) ReadAt(p []byte, o int64) (int, error) {
	n, err := m.f.ReadAt(p, o)
	return n, m.d.see(err)
}

func (m mortalFile) WriteAt(p []byte, o int64) (int, error) {
	n, err := m.f.WriteAt(p, o)
	return n, m.d.see(err)
}
func (m mortalFile) Allocate(o, n int64) error { return m.d.see(m.f.Allocate(o, n)) }
func (m mortalFile) Truncate(n int64) error    { return m.d.see(m.f.Truncate(n)) }
func (m mortalFile) Sync() error               { return m.d.see(m.f.Sync()) }
func (m mortalFile) Size() (int64, error)      { n, err := m.f.Size(); return n, m.d.see(err) }
func (m mortalFile) Close() error              { return m.f.Close() }

type mortalDev struct {
	dev block.Device
	d   *death
}

func (m mortalDev) ReadAt(p []byte, o int64) (int, error) {
	n, err := m.dev.ReadAt(p, o)
	return n, m.d.see(err)
}

func (m mortalDev) WriteAt(p []byte, o int64) (int, error) {
	n, err := m.dev.WriteAt(p, o)
	return n, m.d.see(err)
}

func (m mortalDev) ZeroAt(o, n int64, punch bool) error { return m.d.see(m.dev.ZeroAt(o, n, punch)) }
func (m mortalDev) Sync() error                         { return m.d.see(m.dev.Sync()) }
func (m mortalDev) Size() int64                         { return m.dev.Size() }
func (m mortalDev) Close() error                        { return m.dev.Close() }
