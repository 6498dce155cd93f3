package cbt_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx/fsxtest"
)

func TestAnEpochShowsTheDiskAsOfTheFreeze(t *testing.T) {
	ctx := context.Background()
	dev := block.NewMem(10<<20 + 512)
	fs := fsxtest.NewMem()
	cfg := cbt.Config{FS: fs, VMID: "vm1", BootID: "b", SharedDir: t.TempDir(), Disks: []cbt.DiskConfig{{Name: "vda", Device: dev}}}
	g, err := cbt.Create(cfg, cbt.Start{Generation: [16]byte{1}, Dirty: cbt.DirtyNone})
	if err != nil {
		t.Fatal(err)
	}
	d := g.Disk("vda")
	old := bytes.Repeat([]byte{1}, 5000)
	if _, err := d.TryWriteAt(old, 1000); err == nil {
		t.Fatal("first touch must wait")
	}
	if _, err := d.WriteAt(old, 1000); err != nil {
		t.Fatal(err)
	}
	e, err := g.Freeze(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(bytes.Repeat([]byte{2}, 9000), 0); err != nil {
		t.Fatal(err)
	}
	for r := range e.Ranges("vda") {
		p := make([]byte, r.Len)
		if _, err := e.ReadAt(ctx, "vda", p, r.Off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p[1000:6000], old) || r.Off != 0 || r.Len != 8192 {
			t.Fatal("not as of the freeze", r)
		}
	}
	if err := e.Ack(cbt.Position{Generation: [16]byte{1}, Epoch: e.Number()}); err != nil {
		t.Fatal(err)
	}
	if n := g.Status().Disks[0].DirtyBytes; n != 12288 {
		t.Fatal(n)
	}
	if err := g.CleanStep(ctx, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := g.Close(ctx); err != nil {
		t.Fatal(err)
	}
	g, rep, err := cbt.Open(cfg)
	if err != nil || rep.Source != cbt.SourceExact || rep.DirtyBytes["vda"] != 12288 {
		t.Fatal(rep, err)
	}
	_ = g
}
