// Package cutwire is what the power-cut campaign and cutstore say to each other.
package cutwire

import "kvmreplica/replicad/delta"

// PosHeader names the position whose content follows.
const PosHeader = "Position"

// DiskSize of the replicated disk.
const DiskSize = 1 << 20

// VM is the replicated machine.
func VM() delta.VM { return delta.VM{1, 2, 3} }

// Disks are its disks.
func Disks() []delta.Disk { return []delta.Disk{{Name: "vda", Size: DiskSize}} }

// State is what a store says of itself.
type State struct {
	Seeding   bool
	Seeded    map[string]int64
	Committed delta.Pos
	Points    []delta.Pos
	Damage    []string
	VerifyAll string
}
