// Package dataplanetest makes small VMs for tests: images, a configuration and
// a writer that knows what every block must hold.
package dataplanetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// ID of the test VM.
const ID wire.VMID = "11111111-2222-3333-4444-555555555555"

// Config makes sparse raw images of the given sizes (vda, vdb, ...) and a
// configuration for them in a short directory of its own.
func Config(t testing.TB, sizes ...int64) dataplane.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "dp") // t.TempDir is too long for a unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	c := dataplane.Config{
		VM: ID, Name: "test", StateDir: filepath.Join(dir, "state"), SharedDir: filepath.Join(dir, "shm"),
		RunDir: filepath.Join(dir, "run"), BootID: "boot-1",
		AnyClient: true, // tests are no QEMU
	}
	for _, d := range []string{c.StateDir, c.SharedDir, c.RunDir} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for i, n := range sizes {
		name := wire.DiskName(fmt.Sprintf("vd%c", 'a'+i))
		path := filepath.Join(dir, string(name)+".img")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(n); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		c.Disks = append(c.Disks, dataplane.DiskConfig{Name: name, Kind: dataplane.Raw, Path: path, QemuLock: true})
	}
	return c
}

// Generation is a recognisable generation.
func Generation(n byte) (g delta.Generation) {
	g[0], g[15] = n, n
	return g
}

// Guest writes to a VM's disks through NBD and knows what they must hold. One
// goroutine uses it at a time: the test's, or that of a Load.
type Guest struct {
	t   testing.TB
	cfg dataplane.Config
	// on ends with the test: nothing waits for a data plane after it.
	on  context.Context
	off context.CancelFunc

	lines map[wire.DiskName]*Line

	// Want is what every disk must read.
	Want map[wire.DiskName]*block.Mem
	// Replica is for tests that apply what was shipped.
	Replica map[string]*block.Mem
	rand    *rand.Rand
	no      uint64
}

// Boot connects to every disk of cfg, whose images are all zero.
func Boot(t testing.TB, cfg dataplane.Config, seed uint64) *Guest {
	t.Helper()
	on, off := context.WithCancel(context.Background())
	g := &Guest{
		t: t, cfg: cfg, on: on, off: off, lines: map[wire.DiskName]*Line{},
		Want: map[wire.DiskName]*block.Mem{}, rand: rand.New(rand.NewPCG(seed, 0)),
	}
	t.Cleanup(func() { off(); g.Disconnect() })
	for _, d := range cfg.Disks {
		g.lines[d.Name] = &Line{Socket: cfg.NBDSocket(), Export: string(d.Name)}
		g.Do(d.Name, func(c *nbd.Client) error { g.Want[d.Name] = block.NewMem(c.Size()); return nil })
	}
	return g
}

func (g *Guest) do(disk wire.DiskName, f func(c *nbd.Client) error) error {
	ctx, cancel := context.WithTimeout(g.on, Patience)
	defer cancel()
	if err := g.lines[disk].Do(ctx, f); err != nil {
		return fmt.Errorf("guest: %s: %w", disk, err)
	}
	return nil
}

// Do runs one request and sends it again on a new connection as long as the
// old one is lost; an error that the server answers is the test's failure.
func (g *Guest) Do(disk wire.DiskName, f func(c *nbd.Client) error) {
	g.t.Helper()
	if err := g.do(disk, f); err != nil {
		g.t.Fatal(err)
	}
}

// Write stores p at off and remembers it.
func (g *Guest) Write(disk wire.DiskName, p []byte, off int64) {
	g.t.Helper()
	if err := g.write(disk, p, off); err != nil {
		g.t.Fatal(err)
	}
}

func (g *Guest) write(disk wire.DiskName, p []byte, off int64) error {
	if err := g.do(disk, func(c *nbd.Client) error { _, err := c.WriteAt(p, off); return err }); err != nil {
		return err
	}
	_, err := g.Want[disk].WriteAt(p, off)
	return err
}

// Scribble makes n random changes over all disks: mostly writes of stamped
// data, some zeroing, a flush now and then.
func (g *Guest) Scribble(n int) {
	g.t.Helper()
	for range n {
		if err := g.change(); err != nil {
			g.t.Fatal(err)
		}
	}
}

// change makes one random change.
func (g *Guest) change() error {
	d := g.cfg.Disks[g.rand.IntN(len(g.cfg.Disks))].Name
	size := g.Want[d].Size()
	length := int64(1+g.rand.IntN(64)) * 512
	off := g.rand.Int64N((size-length)/512+1) * 512
	switch g.rand.IntN(12) {
	case 0:
		if err := g.do(d, func(c *nbd.Client) error { return c.ZeroAt(off, length, true) }); err != nil {
			return err
		}
		return g.Want[d].ZeroAt(off, length, true)
	case 1:
		return g.do(d, func(c *nbd.Client) error { return c.Sync() })
	}
	return g.write(d, g.stamp(length), off)
}

// stamp is content that no other write has.
func (g *Guest) stamp(n int64) []byte {
	g.no++
	p := make([]byte, n)
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], g.no)
		binary.LittleEndian.PutUint64(p[i+8:], g.rand.Uint64())
	}
	return p
}

// Resized tells the guest that a disk has another size now.
func (g *Guest) Resized(disk wire.DiskName, size int64) {
	g.Want[disk] = sized(g.Want[disk], size)
}

// Check reads everything back.
func (g *Guest) Check() {
	g.t.Helper()
	for _, d := range g.cfg.Disks {
		var got []byte
		g.Do(d.Name, func(c *nbd.Client) error {
			got = make([]byte, c.Size())
			_, err := c.ReadAt(got, 0)
			return err
		})
		SameContent(g.t, "guest's "+string(d.Name), got, Content(g.t, g.Want[d.Name]))
	}
}

// Snapshot is what every disk must hold now.
func (g *Guest) Snapshot() map[wire.DiskName][]byte {
	s := map[wire.DiskName][]byte{}
	for n, d := range g.Want {
		s[n] = Content(g.t, d)
	}
	return s
}

// Disconnect closes the connections; the next request makes new ones.
func (g *Guest) Disconnect() {
	for _, l := range g.lines {
		l.Close()
	}
}

// Content reads a whole device.
func Content(t testing.TB, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// SameContent fails with the first differing granule.
func SameContent(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%s has %d bytes, want %d", what, len(got), len(want))
	}
	bad, first := 0, -1
	for off := 0; off < len(want); off += delta.Granule {
		end := min(off+delta.Granule, len(want))
		if !bytes.Equal(got[off:end], want[off:end]) {
			bad++
			if first < 0 {
				first = off
			}
		}
	}
	t.Fatalf("%s: %d granules differ, the first at %d", what, bad, first)
}
