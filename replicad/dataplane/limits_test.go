package dataplane_test

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

type limits = map[wire.DiskName]int64

// cutAt ships one epoch with limits and returns what the stream's header lists.
func cutAt(t *testing.T, p *dt.Run, parent delta.Pos, l limits, replica map[string]*block.Mem, during func()) (delta.Pos, limits) {
	t.Helper()
	ctx := context.Background()
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{Parent: parent, Limits: l})
	if err != nil || e.Empty {
		t.Fatalf("%+v, %v", e, err)
	}
	st, err := p.Status(ctx)
	if err != nil || !cmp.Equal(st.Frozen.Limits, e.Limits) || !cmp.Equal(e.Limits, l) {
		t.Fatalf("limits asked for %v, frozen %v, told %v: %v", l, e.Limits, st.Frozen, err)
	}
	during()
	r, err := p.Frames(ctx, e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	d := dt.MustApply(t, r, replica)
	if err := p.Ack(ctx, d.Pos); err != nil {
		t.Fatal(err)
	}
	listed := limits{}
	for _, x := range d.Header.Disks {
		listed[wire.DiskName(x.Name)] = x.Size
	}
	return d.Pos, listed
}

// A disk is added to a VM whose other disk is replicated: it is all marked, its
// epochs have it piece by piece, and the other disk's changes go with each of
// them. Then it is taken away again. Clean or killed, nothing else is compared
// or sent again.
func TestADiskJoinsPieceByPieceAndLeaves(t *testing.T) {
	ctx := context.Background()
	const a, b = 8 * mib, 6*mib + 512
	both := dt.Config(t, a, b)
	only := both
	only.Disks = both.Disks[:1]
	p := dt.Serve(t, only)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, only, 3)
	g.Scribble(40)
	replica := map[string]*block.Mem{}
	parent, _ := ship(t, p, delta.Pos{}, replica)
	p.Stop()

	p = dt.Serve(t, both)
	st, err := p.Status(ctx)
	if err != nil || st.Suspect != 0 || st.Disks[0].Pending != 0 || st.Disks[1].Pending != b {
		t.Fatalf("with the new disk: %+v, %v", st.Disks, err)
	}
	if err := p.Export(ctx, dataplane.ExportRequest{Disk: "vdb", On: true}); err != nil {
		t.Fatal(err)
	}
	added := both
	added.Disks = both.Disks[1:]
	n := dt.Boot(t, added, 4)
	for _, limit := range []int64{0, 2 * mib, 2 * mib, 5*mib + 4096, b} {
		g.Scribble(10)
		n.Scribble(10)
		wantA, wantB := g.Snapshot()["vda"], n.Snapshot()["vdb"]
		want := limits{"vda": a, "vdb": limit}
		if limit == 0 {
			delete(want, "vdb")
		}
		var listed limits
		parent, listed = cutAt(t, p, parent, limits{"vdb": limit}, replica, func() { g.Scribble(10); n.Scribble(30) })
		if !cmp.Equal(listed, want) {
			t.Fatalf("the epoch lists %v, want %v", listed, want)
		}
		dt.SameContent(t, "replica's vda", dt.Content(t, replica["vda"]), wantA)
		if limit > 0 {
			dt.SameContent(t, "replica's vdb", dt.Content(t, replica["vdb"]), wantB[:limit])
		}
		if limit == 2*mib { // and again after a restart
			p.Stop()
			p = dt.Serve(t, both)
		}
	}
	parent, _ = ship(t, p, parent, replica)
	dt.SameContent(t, "replica's vdb", dt.Content(t, replica["vdb"]), n.Snapshot()["vdb"])
	if e, err := p.Freeze(ctx, dataplane.FreezeRequest{Parent: parent}); err != nil || !e.Empty {
		t.Fatalf("something is left over: %+v, %v", e, err)
	}
	g.Check()
	n.Check()

	p.Stop()
	p = dt.Serve(t, only)
	st, err = p.Status(ctx)
	if err != nil || st.Pending != 0 || len(st.Disks) != 1 {
		t.Fatalf("without the disk: %+v, %v", st.Disks, err)
	}
	line := &dt.Line{Socket: only.NBDSocket(), Export: "vdb"}
	if err := line.Once(ctx, func(c *nbd.Client) error { return c.Sync() }); err == nil || dt.Lost(err) {
		t.Errorf("the export of a disk that is gone: %v", err)
	}
	g.Scribble(5)
	ship(t, p, parent, replica)
	g.Check()
}

func TestLimitsThatCannotBeAreRefused(t *testing.T) {
	ctx := context.Background()
	const size = 2*mib + 512
	p := dt.Serve(t, dt.Config(t, size, mib))
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1), DirtyAll: true})
	for name, c := range map[string]struct {
		l    limits
		want wire.Kind
	}{
		"unknown disk": {limits{"vdx": 0}, wire.KindNotFound},
		"negative":     {limits{"vda": -4096}, wire.KindInvalid},
		"odd":          {limits{"vda": 512}, wire.KindInvalid},
		"no disk left": {limits{"vda": 0, "vdb": 0}, wire.KindInvalid},
	} {
		if _, err := p.Freeze(ctx, dataplane.FreezeRequest{Limits: c.l}); kind(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if st, err := p.Status(ctx); err != nil || st.Highest != 0 || st.Frozen != nil {
		t.Fatalf("a refused cut left something behind: %+v, %v", st, err)
	}
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{Limits: limits{"vda": 1 << 40, "vdb": mib}})
	if err != nil || e.Limits["vda"] != size || e.Bytes != size+mib {
		t.Fatalf("%+v, %v", e, err)
	}
}

// An epoch with limits that is given back, by an upgrade or a restart, is whole
// again: the next cut has everything, and its own limits.
func TestWhatALimitKeptBackIsMarkedAfterTheEpochEnds(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, mib, 4*mib)
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1), DirtyAll: true})
	g := dt.Boot(t, cfg, 1)
	g.Write("vdb", bytes.Repeat([]byte{7}, mib), 3*mib)
	for range 2 {
		e, err := p.Freeze(ctx, dataplane.FreezeRequest{Limits: limits{"vdb": mib}})
		if err != nil || e.Bytes != 2*mib {
			t.Fatalf("%+v, %v", e, err)
		}
		p.Stop()
		p = dt.Serve(t, cfg)
		if st, err := p.Status(ctx); err != nil || st.Frozen != nil || st.Pending != 5*mib {
			t.Fatal(errors.Join(err, errors.New("something of the epoch is lost")), st)
		}
	}
}
