package dataplane_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// ship brings a replica to the present state and returns the epoch's size.
func ship(t *testing.T, p *dt.Run, parent delta.Pos, replica map[string]*block.Mem) (delta.Pos, int64) {
	t.Helper()
	ctx := context.Background()
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{Parent: parent})
	if err != nil || e.Empty {
		t.Fatalf("%+v, %v", e, err)
	}
	r, err := p.Frames(ctx, e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	pos := dt.MustApply(t, r, replica).Pos
	if err := p.Ack(ctx, pos); err != nil {
		t.Fatal(err)
	}
	return pos, e.Bytes
}

func clientSees(t *testing.T, g *dt.Guest, disk wire.DiskName, want int64) {
	t.Helper()
	g.Do(disk, func(c *nbd.Client) error { return c.Sync() }) // a lost connection is noticed by using it
	g.Do(disk, func(c *nbd.Client) error {
		if c.Size() != want {
			t.Errorf("the client sees %d bytes, want %d", c.Size(), want)
		}
		return nil
	})
}

// F18: a disk grows under a guest that writes; an epoch that is frozen is given
// back, only what is new is sent besides the guest's changes, and a restart
// with the old configuration keeps the size.
func TestADiskGrowsUnderItsGuest(t *testing.T) {
	ctx := context.Background()
	const was, size = 8 * mib, 8*mib + 3*4096 + 512
	cfg := dt.Config(t, was, 4*mib)
	for i, n := range []int64{was, 4 * mib} {
		cfg.Disks[i].Size = n
	}
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, cfg, 7)
	replica := map[string]*block.Mem{}
	g.Scribble(40)
	parent, _ := ship(t, p, delta.Pos{}, replica)
	g.Scribble(1)
	if _, err := p.Freeze(ctx, dataplane.FreezeRequest{Parent: parent, Force: true}); err != nil {
		t.Fatal(err)
	}
	a, err := p.Resize(ctx, dataplane.ResizeRequest{Disk: "vda", Size: size})
	if err != nil || a.Was != was || a.Size != size {
		t.Fatalf("%+v, %v", a, err)
	}
	clientSees(t, g, "vda", size)
	g.Resized("vda", size)
	g.Write("vda", []byte("behind the old end"), was+4090)
	parent, bytes := ship(t, p, parent, replica)
	if bytes > size-was+2*(64*512+4096) { // and what Scribble changed
		t.Errorf("%d bytes were sent for %d new ones", bytes, size-was)
	}
	p.Stop()
	p = dt.Serve(t, cfg)
	clientSees(t, g, "vda", size)
	g.Scribble(20)
	ship(t, p, parent, replica)
	for n, want := range g.Snapshot() {
		dt.SameContent(t, "replica's "+string(n), dt.Content(t, replica[string(n)]), want)
	}
	g.Check()
}

// An image that somebody made longer is told of, and taken up on request or
// when the data plane starts; one that is shorter than configured is refused.
func TestAnImageThatBecameLongerIsTakenUp(t *testing.T) {
	ctx := context.Background()
	for _, restart := range []bool{false, true} {
		cfg := dt.Config(t, 4*mib)
		cfg.Disks[0].Size = 4 * mib
		p := dt.Serve(t, cfg)
		p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
		replica := map[string]*block.Mem{}
		parent, _ := ship(t, p, delta.Pos{}, replica)
		if err := os.Truncate(cfg.Disks[0].Path, 6*mib); err != nil {
			t.Fatal(err)
		}
		if st, err := p.Status(ctx); err != nil || st.Disks[0].Grown != 2*mib || st.Disks[0].Size != 4*mib {
			t.Fatalf("%+v, %v", st.Disks, err)
		}
		if _, err := p.Resize(ctx, dataplane.ResizeRequest{Disk: "vda", Size: 5 * mib}); kind(err) != wire.KindInvalid {
			t.Errorf("less than the image has: %v", err)
		}
		if restart {
			p.Stop()
			p = dt.Serve(t, cfg)
		} else if _, err := p.Resize(ctx, dataplane.ResizeRequest{Disk: "vda"}); err != nil {
			t.Fatal(err)
		}
		if st, err := p.Status(ctx); err != nil || st.Disks[0].Grown != 0 || st.Disks[0].Size != 6*mib {
			t.Fatalf("%+v, %v", st.Disks, err)
		}
		if _, bytes := ship(t, p, parent, replica); !restart && bytes != 2*mib {
			t.Errorf("%d bytes were sent", bytes)
		}
		if n := replica["vda"].Size(); n != 6*mib {
			t.Errorf("the replica has %d bytes", n)
		}
		p.Stop()
		if err := os.Truncate(cfg.Disks[0].Path, 2*mib); err != nil {
			t.Fatal(err)
		}
		if _, err := dataplane.Open(ctx, cfg, slog.New(slog.DiscardHandler)); kind(err) != wire.KindRefused {
			t.Errorf("an image that is too short: %v", err)
		}
	}
}

// A disk is made shorter on request only, when nobody uses it; the cut is not an
// empty one.
func TestADiskIsMadeShorterOnlyOnRequest(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 4*mib)
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, cfg, 8)
	replica := map[string]*block.Mem{}
	parent, _ := ship(t, p, delta.Pos{}, replica)
	for _, r := range []dataplane.ResizeRequest{{Disk: "vda", Size: 3 * mib}, {Disk: "vda", Size: 3*mib + 1}, {Disk: "vda", Size: -512}} {
		if _, err := p.Resize(ctx, r); kind(err) != wire.KindInvalid {
			t.Errorf("%+v: %v", r, err)
		}
	}
	if err := p.Export(ctx, dataplane.ExportRequest{On: true}); err != nil {
		t.Fatal(err)
	}
	g.Do("vda", func(c *nbd.Client) error { return c.Sync() })
	shrink := dataplane.ResizeRequest{Disk: "vda", Size: 3 * mib, Shrink: true}
	if _, err := p.Resize(ctx, shrink); kind(err) != wire.KindRefused {
		t.Errorf("under a guest: %v", err)
	}
	if err := p.Export(ctx, dataplane.ExportRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Resize(ctx, shrink); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(cfg.Disks[0].Path); err != nil || st.Size() != 3*mib {
		t.Fatalf("the image: %+v, %v", st, err)
	}
	ship(t, p, parent, replica)
	if n := replica["vda"].Size(); n != 3*mib {
		t.Errorf("the replica has %d bytes", n)
	}
}

// An image that somebody else has locked is refused before anything is served.
func TestAnImageThatIsLockedElsewhereIsNotServed(t *testing.T) {
	cfg := dt.Config(t, 4*mib)
	f, err := block.OpenFile(cfg.Disks[0].Path, block.FileOptions{NoLock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.LockQEMU(); err != nil {
		t.Fatal(err)
	}
	var locked *block.LockedError
	if _, err := dataplane.Open(t.Context(), cfg, slog.New(slog.DiscardHandler)); !errors.As(err, &locked) {
		t.Errorf("opened: %v", err)
	}
	if err := f.UnlockQEMU(); err != nil {
		t.Fatal(err)
	}
	dt.Serve(t, cfg).Stop()
}
