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

// Guest writes to a VM's disks through NBD and knows what they must hold.
type Guest struct {
	t     testing.TB
	cfg   dataplane.Config
	disks map[wire.DiskName]*nbd.Client
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
	g := &Guest{t: t, cfg: cfg, disks: map[wire.DiskName]*nbd.Client{}, Want: map[wire.DiskName]*block.Mem{}, rand: rand.New(rand.NewPCG(seed, 0))}
	for _, d := range cfg.Disks {
		g.Want[d.Name] = block.NewMem(g.client(d.Name).Size())
	}
	t.Cleanup(g.Disconnect)
	return g
}

// client is the connection of a disk, made anew after it was lost: a client
// that waits, as QEMU does with a long reconnect-delay.
func (g *Guest) client(disk wire.DiskName) *nbd.Client {
	g.t.Helper()
	if c := g.disks[disk]; c != nil {
		return c
	}
	c, err := nbd.Dial(context.Background(), "unix", g.cfg.NBDSocket(), nbd.ClientOptions{Export: string(disk)})
	if err != nil {
		g.t.Fatalf("guest: connect to %s: %v", disk, err)
	}
	g.disks[disk] = c
	return c
}

// Do runs one request and sends it again on a new connection as long as the
// old one is lost; an error that the server answers is the test's failure.
func (g *Guest) Do(disk wire.DiskName, f func(c *nbd.Client) error) {
	g.t.Helper()
	for range 100 {
		c := g.client(disk)
		err := f(c)
		if err == nil {
			return
		}
		select {
		case <-c.Done():
			_ = c.Close()
			delete(g.disks, disk)
		default:
			g.t.Fatalf("guest: %s: %v", disk, err)
		}
	}
	g.t.Fatalf("guest: %s: the connection is lost again and again", disk)
}

// Write stores p at off and remembers it.
func (g *Guest) Write(disk wire.DiskName, p []byte, off int64) {
	g.t.Helper()
	g.Do(disk, func(c *nbd.Client) error { _, err := c.WriteAt(p, off); return err })
	if _, err := g.Want[disk].WriteAt(p, off); err != nil {
		g.t.Fatal(err)
	}
}

// Scribble makes n random changes over all disks: mostly writes of stamped
// data, some zeroing, a flush now and then.
func (g *Guest) Scribble(n int) {
	g.t.Helper()
	for range n {
		d := g.cfg.Disks[g.rand.IntN(len(g.cfg.Disks))].Name
		size := g.Want[d].Size()
		length := int64(1+g.rand.IntN(64)) * 512
		off := g.rand.Int64N((size-length)/512+1) * 512
		switch g.rand.IntN(12) {
		case 0:
			g.Do(d, func(c *nbd.Client) error { return c.ZeroAt(off, length, true) })
			if err := g.Want[d].ZeroAt(off, length, true); err != nil {
				g.t.Fatal(err)
			}
		case 1:
			g.Do(d, func(c *nbd.Client) error { return c.Sync() })
		default:
			g.Write(d, g.stamp(length), off)
		}
	}
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

// Disconnect closes the connections.
func (g *Guest) Disconnect() {
	for n, c := range g.disks {
		_ = c.Close()
		delete(g.disks, n)
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
