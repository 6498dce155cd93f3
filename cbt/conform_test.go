package cbt_test

import (
	"testing"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
)

func TestATrackedDiskConforms(t *testing.T) {
	blocktest.Run(t, func(t *testing.T, size int64) block.Device {
		cfg := cbt.Config{FS: fsxtest.NewMem(), VMID: "vm", Disks: []cbt.DiskConfig{{Name: "vda", Device: block.NewMem(size)}}}
		g, err := cbt.Create(cfg, cbt.Start{Generation: gen1})
		if err != nil {
			t.Fatal(err)
		}
		return g.Disk("vda")
	})
}
