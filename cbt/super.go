package cbt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/zeebo/blake3"

	"kvmreplica/internal/block"
)

// The superblock: one record for the whole VM, so that all its disks change
// state together. docs/formats/tracker.md has the byte table.
const (
	superMagic   = "KVRCBT1\n"
	superVersion = 1
	superSize    = 16 << 10
	superSlotA   = 0
	superSlotB   = 64 << 10
	superHash    = 16352
	superCRC     = 16368
	diskEntryAt  = 2048
	diskEntryLen = 224
	posLen       = 56
)

// Feature bits this version knows. Unknown incompatible bits are refused.
const (
	knownIncompat = 0
	knownROCompat = 0
)

// state is the durable state of a tracker.
type state uint32

// The states. Numbers never change.
const (
	stateClean     state = 1 // stopped; the exact file is the dirty set
	stateInUse     state = 2 // running, or it died
	stateVerifyAll state = 3 // the map cannot be trusted
	stateSealed    state = 4 // handed over; nothing dirty
)

func (s state) String() string {
	switch s {
	case stateClean:
		return "clean"
	case stateInUse:
		return "in-use"
	case stateVerifyAll:
		return "verify-all"
	case stateSealed:
		return "sealed"
	}
	return fmt.Sprintf("state-%d", uint32(s))
}

type id16 = [16]byte

// super is the decoded superblock.
type super struct {
	incompat, roCompat, compat uint64
	seq                        uint64
	set, session               id16
	vm, peer, boot, writer     string
	generation                 id16
	base, parent               Position
	highest                    uint64 // highest epoch ever frozen
	floor                      uint64 // no earlier epoch may be adopted
	state                      state
	reason                     string
	exact                      exactRef
	disks                      []superDisk
}

// exactRef names and proves the exact file of a clean stop.
type exactRef struct {
	id     id16
	length uint64
	digest [32]byte
}

// superDisk is one disk's entry.
type superDisk struct {
	name    string
	id      id16
	size    int64
	mapID   id16
	hasID   bool
	ident   block.Identity
	granule uint8
	region  uint8
}

var crcTable = crc32.MakeTable(crc32.Castagnoli)

func hash16(b []byte) (h id16) {
	sum := blake3.Sum256(b)
	copy(h[:], sum[:])
	return h
}

// putter writes little-endian fields one after the other.
type putter struct {
	b []byte
	n int
}

func (p *putter) u8(v uint8)      { p.b[p.n] = v; p.n++ }
func (p *putter) u32(v uint32)    { binary.LittleEndian.PutUint32(p.b[p.n:], v); p.n += 4 }
func (p *putter) u64(v uint64)    { binary.LittleEndian.PutUint64(p.b[p.n:], v); p.n += 8 }
func (p *putter) bytes(v []byte)  { p.n += copy(p.b[p.n:], v) }
func (p *putter) pos(v *Position) { p.bytes(v.Generation[:]); p.u64(v.Epoch); p.bytes(v.Digest[:]) }
func (p *putter) text(s string, width int) {
	copy(p.b[p.n:p.n+width-1], s)
	p.n += width
}

// getter reads them back.
type getter struct {
	b []byte
	n int
}

func (g *getter) u8() uint8   { g.n++; return g.b[g.n-1] }
func (g *getter) u32() uint32 { g.n += 4; return binary.LittleEndian.Uint32(g.b[g.n-4:]) }
func (g *getter) u64() uint64 { g.n += 8; return binary.LittleEndian.Uint64(g.b[g.n-8:]) }
func (g *getter) bytes(v []byte) {
	g.n += copy(v, g.b[g.n:])
}

func (g *getter) pos(v *Position) {
	g.bytes(v.Generation[:])
	v.Epoch = g.u64()
	g.bytes(v.Digest[:])
}

func (g *getter) text(width int) string {
	f := g.b[g.n : g.n+width]
	g.n += width
	if i := bytes.IndexByte(f, 0); i >= 0 {
		f = f[:i]
	}
	return string(f)
}

// encode writes s into b, which has superSize bytes.
func (s *super) encode(b []byte) {
	clear(b)
	p := putter{b: b}
	p.text(superMagic, 9)
	p.n = 8
	p.u32(superVersion)
	p.u32(superSize)
	p.u64(s.incompat)
	p.u64(s.roCompat)
	p.u64(s.compat)
	p.u64(s.seq)
	p.bytes(s.set[:])
	p.bytes(s.session[:])
	p.text(s.vm, 64)
	p.text(s.peer, 64)
	p.text(s.boot, 64)
	p.text(s.writer, 32)
	p.bytes(s.generation[:])
	p.pos(&s.base)
	p.pos(&s.parent)
	p.u64(s.highest)
	p.u32(uint32(s.state))
	p.u32(uint32(len(s.disks)))
	p.text(s.reason, maxReason+1)
	p.bytes(s.exact.id[:])
	p.u64(s.exact.length)
	p.bytes(s.exact.digest[:])
	p.u64(s.floor)
	for i := range s.disks {
		s.disks[i].encode(b[diskEntryAt+i*diskEntryLen:][:diskEntryLen])
	}
	h := hash16(b[:superHash])
	copy(b[superHash:], h[:])
	binary.LittleEndian.PutUint32(b[superCRC:], crc32.Checksum(b[:superCRC], crcTable))
}

func (d *superDisk) encode(b []byte) {
	p := putter{b: b}
	p.text(d.name, maxName+1)
	p.bytes(d.id[:])
	p.u64(uint64(d.size))
	p.bytes(d.mapID[:])
	p.u8(granuleShift)
	p.u8(regionShift)
	var has, kind uint8
	if d.hasID {
		has = 1
	}
	if d.ident.Kind == block.KindBlockDevice {
		kind = 1
	}
	p.u8(has)
	p.u8(kind)
	p.u32(0)
	p.u64(uint64(d.ident.Size))
	p.u64(d.ident.Device)
	p.u64(d.ident.Inode)
	p.u64(uint64(d.ident.BirthTime))
	p.u64(uint64(d.ident.MtimeNS))
	p.u64(uint64(d.ident.CtimeNS))
}

// decodeSuper checks and reads one slot. ErrFeature means: whole, but newer.
func decodeSuper(b []byte) (*super, error) {
	if len(b) != superSize || string(b[:8]) != superMagic {
		return nil, fmt.Errorf("%w: no superblock", errDamaged)
	}
	if crc32.Checksum(b[:superCRC], crcTable) != binary.LittleEndian.Uint32(b[superCRC:]) {
		return nil, fmt.Errorf("%w: superblock checksum", errDamaged)
	}
	if h := hash16(b[:superHash]); !bytes.Equal(h[:], b[superHash:superCRC]) {
		return nil, fmt.Errorf("%w: superblock hash", errDamaged)
	}
	for _, c := range b[superCRC+4:] {
		if c != 0 {
			return nil, fmt.Errorf("%w: superblock tail", errDamaged)
		}
	}
	g := getter{b: b, n: 8}
	version, length := g.u32(), g.u32()
	s := &super{incompat: g.u64(), roCompat: g.u64(), compat: g.u64(), seq: g.u64()}
	if version != superVersion || length != superSize || s.incompat&^uint64(knownIncompat) != 0 || s.roCompat&^uint64(knownROCompat) != 0 {
		return nil, fmt.Errorf("%w (version %d, features %#x)", ErrFeature, version, s.incompat|s.roCompat)
	}
	g.bytes(s.set[:])
	g.bytes(s.session[:])
	s.vm, s.peer, s.boot, s.writer = g.text(64), g.text(64), g.text(64), g.text(32)
	g.bytes(s.generation[:])
	g.pos(&s.base)
	g.pos(&s.parent)
	s.highest = g.u64()
	s.state = state(g.u32())
	n := g.u32()
	s.reason = g.text(maxReason + 1)
	g.bytes(s.exact.id[:])
	s.exact.length = g.u64()
	g.bytes(s.exact.digest[:])
	s.floor = g.u64()
	if n == 0 || n > MaxDisks || s.state < stateClean || s.state > stateSealed {
		return nil, fmt.Errorf("%w: %d disks, %v", errDamaged, n, s.state)
	}
	s.disks = make([]superDisk, n)
	for i := range s.disks {
		if err := s.disks[i].decode(b[diskEntryAt+i*diskEntryLen:][:diskEntryLen]); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (d *superDisk) decode(b []byte) error {
	g := getter{b: b}
	d.name = g.text(maxName + 1)
	g.bytes(d.id[:])
	d.size = int64(g.u64())
	g.bytes(d.mapID[:])
	d.granule, d.region = g.u8(), g.u8()
	has, kind := g.u8(), g.u8()
	g.u32()
	d.hasID = has == 1
	d.ident = block.Identity{
		Kind: block.KindFile, Size: int64(g.u64()), Device: g.u64(), Inode: g.u64(),
		BirthTime: int64(g.u64()), MtimeNS: int64(g.u64()), CtimeNS: int64(g.u64()),
	}
	if kind == 1 {
		d.ident.Kind = block.KindBlockDevice
	}
	if !d.hasID {
		d.ident = block.Identity{}
	}
	if !validID(d.name, maxName) || d.size < 0 || d.size > maxDiskSize || d.granule != granuleShift || d.region != regionShift {
		return fmt.Errorf("%w: disk entry %q, size %d, shifts %d/%d", errDamaged, d.name, d.size, d.granule, d.region)
	}
	return nil
}

func (s *super) clone() *super {
	c := *s
	c.disks = append([]superDisk(nil), s.disks...)
	return &c
}
