// Package oracle decides from the outside whether a replicated disk may look
// as it does. It shares no code with the product: it knows sectors that carry
// their own history, a log of what was asked and answered, and the rules a
// replica, a recovery point and a role must keep.
//
// A test drives disks through a Load (or records its own operations in a
// History): every sector written carries a stamp with the number of the write.
// The History notes, in logical time, when each operation was issued and done
// and when freezes began and ended. From an image and the History follow:
//
//   - CheckCut: the image is a consistent cut over all disks of the VM;
//   - CheckDurable: nothing a flush covered is missing after a power cut;
//   - CheckRead: a read showed something that was written there in time;
//   - CheckSuperset: wherever two images differ, the tracker says dirty;
//   - Points: a recovery point is what was committed, for ever;
//   - Acks: nothing acknowledged is ever missing, no name has two contents;
//   - Roles: one writer per generation, forks are reported by both sides;
//   - Settles: when faults stop, all is well again within a few cycles.
//
// Every checker returns an error that names the disk, the sector and the rule;
// nil means the image is possible. The checkers are tested with wrong images
// and wrong histories, one per rule.
package oracle

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// SectorSize is the unit the oracle knows.
const SectorSize = 512

const stampMagic = 0x504d415453525648 // "HVRSTAMP"

// Stamp is what a written sector says about itself. On disk, little-endian:
//
//	  0   8  "HVRSTAMP"
//	  8   8  VM
//	 16   4  Disk
//	 20   4  Writer
//	 24   8  LBA
//	 32   8  Seq
//	 40 468  filler made from Seq and LBA
//	508   4  CRC32C of bytes 0..507
type Stamp struct {
	VM     uint64 // which VM
	Disk   uint32 // which of its disks
	Writer uint32 // which worker, for people
	LBA    uint64 // sector number on the disk
	Seq    uint64 // number of the write, from 1
}

// Put writes the stamp into the 512 bytes of b.
func (s Stamp) Put(b []byte) {
	_ = b[SectorSize-1]
	binary.LittleEndian.PutUint64(b, stampMagic)
	binary.LittleEndian.PutUint64(b[8:], s.VM)
	binary.LittleEndian.PutUint32(b[16:], s.Disk)
	binary.LittleEndian.PutUint32(b[20:], s.Writer)
	binary.LittleEndian.PutUint64(b[24:], s.LBA)
	binary.LittleEndian.PutUint64(b[32:], s.Seq)
	x := s.Seq*0x9e3779b97f4a7c15 ^ s.LBA<<17 ^ 0x5bd1e995
	for i := 40; i < 508; i++ {
		if i%4 == 0 { // a quarter random, the rest compressible
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
		}
		b[i] = byte(x)
	}
	binary.LittleEndian.PutUint32(b[508:], crc32.Checksum(b[:508], crc32.MakeTable(crc32.Castagnoli)))
}

// Content says what kind of thing a sector holds.
type Content uint8

// The kinds of content.
const (
	Zeros     Content = iota + 1 // zeroed, trimmed or never written
	Written                      // a valid stamp of this very sector
	Misplaced                    // a valid stamp of another VM, disk or sector
	Garbage                      // neither zeros nor a valid stamp
)

// String names the content.
func (c Content) String() string {
	return [...]string{"?", "zeros", "written", "misplaced", "garbage"}[min(int(c), 4)]
}

// Sector is one decoded sector; Stamp is set for Written and Misplaced.
type Sector struct {
	Content Content
	Stamp   Stamp
}

// String describes the sector for messages.
func (s Sector) String() string {
	switch s.Content {
	case Written:
		return fmt.Sprintf("write %d", s.Stamp.Seq)
	case Misplaced:
		return fmt.Sprintf("write %d of VM %d disk %d sector %d", s.Stamp.Seq, s.Stamp.VM, s.Stamp.Disk, s.Stamp.LBA)
	}
	return s.Content.String()
}

// DecodeSector says what the 512 bytes of b hold at the given place.
func DecodeSector(b []byte, vm uint64, disk uint32, lba uint64) Sector {
	if isZero(b[:SectorSize]) {
		return Sector{Content: Zeros}
	}
	if binary.LittleEndian.Uint64(b) != stampMagic {
		return Sector{Content: Garbage}
	}
	s := Stamp{
		VM: binary.LittleEndian.Uint64(b[8:]), Disk: binary.LittleEndian.Uint32(b[16:]),
		Writer: binary.LittleEndian.Uint32(b[20:]), LBA: binary.LittleEndian.Uint64(b[24:]), Seq: binary.LittleEndian.Uint64(b[32:]),
	}
	var want [SectorSize]byte
	s.Put(want[:]) // the filler too: half a sector of another write is garbage
	switch {
	case want != [SectorSize]byte(b[:SectorSize]):
		return Sector{Content: Garbage}
	case s.VM != vm || s.Disk != disk || s.LBA != lba:
		return Sector{Content: Misplaced, Stamp: s}
	}
	return Sector{Content: Written, Stamp: s}
}

// Images are the contents of all disks of a VM, by disk number.
type Images [][]byte

// Decode decodes every sector of one disk. A last part of a sector is ignored.
func Decode(image []byte, vm uint64, disk uint32) []Sector {
	out := make([]Sector, len(image)/SectorSize)
	for i := range out {
		out[i] = DecodeSector(image[i*SectorSize:], vm, disk, uint64(i))
	}
	return out
}

func isZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
