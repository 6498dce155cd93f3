package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/overlay/overlaytest"
)

const (
	durA = 40 * 4096
	durB = 5*4096 + 1536 // the last granule is short
)

var durDisks = []delta.Disk{{Name: "vda", Size: durA}, {Name: "vdb", Size: durB}}

func durHead() overlay.Head {
	return overlay.Head{VM: delta.VM{1}, Generation: delta.Generation{2}, At: delta.Pos{Generation: delta.Generation{3}, Epoch: 4, Digest: delta.Digest{5}}, Disks: durDisks, Created: time.Unix(1_700_000_000, 0).UTC()}
}

func durConfig(h *blocktest.Host, shared bool) overlay.Config {
	c := overlay.Config{
		FS:        fsx.Sub(h.FS, "over"),
		Below:     func(disk string) (block.Device, error) { return h.Disk(disk, sizeOf(disk)), nil },
		Data:      func(disk string, size int64) (block.Device, error) { return h.Disk(disk+".over", size), nil },
		CompactAt: 4096,
	}
	if shared {
		c.Shared, c.BootID = fsx.Sub(h.FS, "shm"), "boot-1"
	}
	return c
}

func sizeOf(disk string) int64 {
	for _, d := range durDisks {
		if d.Name == disk {
			return d.Size
		}
	}
	return 0
}

// guest is a guest on an overlay, and how far it came.
type guest struct {
	*overlaytest.Guest
	made, done bool // the overlay was made; the merge came to its end
}

func newGuest(seed uint64) *guest {
	content := map[string][]byte{}
	for i, d := range durDisks {
		content[d.Name] = overlaytest.Random(seed+uint64(i), d.Size)
	}
	return &guest{Guest: overlaytest.NewGuest(seed, durDisks, content)}
}

func (g *guest) act(o *overlay.Durable) error {
	return g.Act(func(disk string) block.Device { return o.Disk(disk) })
}

// life makes an overlay, lets the guest work, commits, and merges while the
// guest goes on. bases are what the disks hold before.
func (g *guest) life(h *blocktest.Host, shared bool) error {
	err := h.Setup(func() error {
		for _, d := range durDisks {
			dev := h.Disk(d.Name, d.Size)
			if _, err := dev.WriteAt(g.Now(d.Name), 0); err != nil {
				return err
			}
			if err := dev.Sync(); err != nil {
				return err
			}
		}
		return errors.Join(h.FS.MkdirAll("over"), h.FS.MkdirAll("shm"))
	})
	if err != nil {
		return err
	}
	if err := overlay.Create(fsx.Sub(h.FS, "over"), durHead()); err != nil {
		return err
	}
	g.made = true
	o, err := overlay.Open(durConfig(h, shared))
	if err != nil {
		return err
	}
	defer o.Close()
	for range 14 {
		if err := g.act(o); err != nil {
			return err
		}
	}
	if err := o.Commit(); err != nil {
		return err
	}
	err = o.Merge(context.Background(), func(context.Context, int64) error {
		if err := g.act(o); err != nil {
			return err
		}
		return g.act(o)
	})
	if err != nil {
		return err
	}
	g.done = true
	for range 4 {
		if err := g.act(o); err != nil {
			return err
		}
	}
	return nil
}

// recheck opens what is left, compares, finishes the merge and compares the
// disks below.
func (g *guest) recheck(h *blocktest.Host, shared bool) error {
	o, err := overlay.Open(durConfig(h, shared))
	if errors.Is(err, fs.ErrNotExist) && !g.made {
		return nil
	}
	if err != nil {
		return err
	}
	defer o.Close()
	if g.done && o.Phase() != overlay.Done {
		return errors.New("the end of the merge was forgotten")
	}
	seen := map[string][]byte{}
	for _, d := range durDisks {
		if seen[d.Name], err = overlaytest.ReadAll(o.Disk(d.Name)); err != nil {
			return err
		}
		if err := g.Allowed(d.Name, seen[d.Name]); err != nil {
			return fmt.Errorf("phase %s: %w", o.Phase(), err)
		}
	}
	if err := o.Commit(); err != nil {
		return err
	}
	if err := o.Merge(context.Background(), nil); err != nil {
		return err
	}
	for _, d := range durDisks {
		raw := h.Disk(d.Name, d.Size).Content()
		if !bytes.Equal(raw, seen[d.Name]) {
			return fmt.Errorf("disk %s is not what the guest saw after the merge", d.Name)
		}
	}
	return nil
}

// The power goes at every operation that persists something.
func TestAPowerCutAnywhereKeepsWhatWasFlushed(t *testing.T) {
	g := &guest{}
	every := 1
	if testing.Short() {
		every = 5
	}
	for seed := uint64(1); seed <= 2; seed++ {
		blocktest.SweepWith(t, blocktest.Options{MaxAll: 8, Random: 4, Every: every, NoKill: true}, func(h *blocktest.Host) error {
			*g = *newGuest(seed)
			return g.life(h, false)
		}, func(h *blocktest.Host) error { return g.recheck(h, false) })
	}
}

// The process dies at every operation: what was answered is there.
func TestADeathOfTheProcessAnywhereKeepsWhatWasAnswered(t *testing.T) {
	g := &guest{}
	for seed := uint64(1); seed <= 2; seed++ {
		blocktest.SweepWith(t, blocktest.Options{MaxAll: 8, Random: 2, NoCut: true}, func(h *blocktest.Host) error {
			*g = *newGuest(seed)
			return g.life(h, true)
		}, func(h *blocktest.Host) error {
			strict := &guest{Guest: g.Strict(), made: g.made, done: g.done}
			return strict.recheck(h, true)
		})
	}
}

// One operation fails, once: the guest is told, and what it had flushed stays.
func TestAnyFailingCallLosesNothingThatWasFlushed(t *testing.T) {
	g := &guest{}
	blocktest.FailSweepWith(t, blocktest.Options{MaxAll: 4, Random: 2}, func(h *blocktest.Host) error {
		*g = *newGuest(7)
		return g.life(h, false)
	}, func(h *blocktest.Host) error { return g.recheck(h, false) })
}

func TestADurableOverlayIsADisk(t *testing.T) {
	for _, mode := range []string{"over", "plain"} {
		t.Run(mode, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T, size int64) block.Device {
				fsys := fsxtest.NewMem()
				head := durHead()
				head.Disks = []delta.Disk{{Name: "vda", Size: size}}
				if err := overlay.Create(fsys, head); err != nil {
					t.Fatal(err)
				}
				o, err := overlay.Open(overlay.Config{
					FS:    fsys,
					Below: func(string) (block.Device, error) { return block.NewMem(size), nil },
					Data:  func(_ string, n int64) (block.Device, error) { return block.NewMem(n), nil },
				})
				if err != nil {
					t.Fatal(err)
				}
				if mode == "plain" {
					if err := errors.Join(o.Commit(), o.Merge(t.Context(), nil)); err != nil {
						t.Fatal(err)
					}
				}
				return closing{o.Disk("vda"), o}
			})
		})
	}
}

// closing closes the overlay with its only disk.
type closing struct {
	*overlay.Disk
	o *overlay.Durable
}

var _ block.Device = closing{}

func (c closing) Close() error { return c.o.Close() }

func TestAnOverlayIsNeverReplacedByAnother(t *testing.T) {
	fsys := fsxtest.NewMem()
	h := durHead()
	if err := errors.Join(overlay.Create(fsys, h), overlay.Create(fsys, h)); err != nil {
		t.Fatal(err)
	}
	h.Generation = delta.Generation{9}
	if err := overlay.Create(fsys, h); !errors.Is(err, overlay.ErrExists) {
		t.Fatalf("another overlay over it: %v", err)
	}
	if err := errors.Join(overlay.Remove(fsys), overlay.Remove(fsys), overlay.Create(fsys, h)); err != nil {
		t.Fatal(err)
	}
}
