package points

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// The superblock file: four copies of 8 KiB. Record number n is written to
// copies n%2 and n%2+2 and made durable by one sync, so a torn write leaves
// the pair of record n-1, and damage at rest of one copy leaves its twin. The
// highest valid number wins, wherever it stands.
const (
	superName  = "super"
	superMagic = "KRPS"
	superBlock = 8 << 10
	superDisks = 512 // offset of the first disk entry
	superDisk  = 112
	version    = 1
)

// role is what the superblock says durably.
type role uint8

const (
	roleSeeding  role = 1
	roleReplica  role = 2
	rolePromoted role = 3
	roleRolling  role = 4
)

const (
	superClean   = 1 << 0 // closed in order: identities are valid, all is synced
	superSuspect = 1 << 1
	superForced  = 1 << 2
	superVerify  = 1 << 3
	superNoUndo  = 1 << 4 // no undo is written; files of it are left over
)

type superDiskInfo struct {
	name     string
	size     int64
	cursor   int64 // durable seed cursor
	file     delta.Digest
	identity delta.Digest
}

// super is the superblock's content.
type super struct {
	role    role
	flags   uint8
	vm      delta.VM
	store   [16]byte // random, binds every other file to this store
	seq     uint64
	applied mark
	seal    delta.Pos // promoted: the position the new generation starts from
	ended   delta.Pos // promoted: what was committed
	gen     delta.Generation
	sealed  time.Time
	points  uint32 // recovery points that ended
	undoLo  uint64 // the open undo segment as of applied, its durable length
	undoEnd int64  // and chain value; 0 = none
	chain   [32]byte
	disks   []superDiskInfo
}

// mark is a commit as the superblock and undo headers remember it.
type mark struct {
	pos     delta.Pos
	ordinal uint64
	at, cut time.Time
	chunks  uint32
	app     bool // application-consistent
	config  delta.Digest
	nvram   delta.Digest // zero = none
	tpm     delta.Digest
}

// markApp is the flag of an application-consistent state.
const markApp = 1 << 0

const markLen = delta.PosLen + 8 + 8 + 8 + 4 + 4 + 3*32

func (m *mark) append(b []byte) []byte {
	b = delta.AppendPos(b, m.pos)
	b = binary.LittleEndian.AppendUint64(b, m.ordinal)
	b = binary.LittleEndian.AppendUint64(b, nanos(m.at))
	b = binary.LittleEndian.AppendUint64(b, nanos(m.cut))
	b = binary.LittleEndian.AppendUint32(b, m.chunks)
	var flags uint32
	if m.app {
		flags |= markApp
	}
	b = binary.LittleEndian.AppendUint32(b, flags)
	b = append(b, m.config[:]...)
	b = append(b, m.nvram[:]...)
	return append(b, m.tpm[:]...)
}

func parseMark(b []byte) mark {
	m := mark{
		pos:     delta.ParsePos(b),
		ordinal: binary.LittleEndian.Uint64(b[56:]),
		at:      fromNanos(binary.LittleEndian.Uint64(b[64:])),
		cut:     fromNanos(binary.LittleEndian.Uint64(b[72:])),
		chunks:  binary.LittleEndian.Uint32(b[80:]),
		app:     binary.LittleEndian.Uint32(b[84:])&markApp != 0,
	}
	copy(m.config[:], b[88:])
	copy(m.nvram[:], b[120:])
	copy(m.tpm[:], b[152:])
	return m
}

// nanos and fromNanos map the zero time to 0.
func nanos(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.UnixNano())
}

func fromNanos(n uint64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(n)).UTC()
}

// sealBlock fills the last 40 bytes of a metadata block: BLAKE3-256 of
// everything before, four zero bytes, CRC32C of everything before it.
func sealBlock(b []byte, prefix ...[]byte) {
	n := len(b) - 40
	d := blockDigest(b[:n], prefix...)
	copy(b[n:], d[:])
	clear(b[n+32 : n+36])
	binary.LittleEndian.PutUint32(b[n+36:], delta.CRC(b[:n+36]))
}

func blockDigest(b []byte, prefix ...[]byte) delta.Digest {
	x := blake3.New()
	for _, p := range prefix {
		_, _ = x.Write(p) // a hash never fails
	}
	_, _ = x.Write(b)
	var d delta.Digest
	x.Sum(d[:0])
	return d
}

// sealedBlock verifies what sealBlock wrote.
func sealedBlock(b []byte, magic string, prefix ...[]byte) bool {
	n := len(b) - 40
	if string(b[:4]) != magic || b[4] != version || binary.LittleEndian.Uint32(b[n+36:]) != delta.CRC(b[:n+36]) {
		return false
	}
	d := blockDigest(b[:n], prefix...)
	return string(d[:]) == string(b[n:n+32]) && b[n+32]|b[n+33]|b[n+34]|b[n+35] == 0
}

func (s *super) encode() []byte {
	b := append(make([]byte, 0, superBlock), superMagic...)
	b = append(b, version, byte(s.role), s.flags, 0)
	b = append(b, s.vm[:]...)
	b = append(b, s.store[:]...)
	b = binary.LittleEndian.AppendUint64(b, s.seq)
	b = s.applied.append(b)
	b = delta.AppendPos(b, s.seal)
	b = delta.AppendPos(b, s.ended)
	b = append(b, s.gen[:]...)
	b = binary.LittleEndian.AppendUint64(b, nanos(s.sealed))
	b = binary.LittleEndian.AppendUint32(b, s.points)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(s.disks)))
	b = binary.LittleEndian.AppendUint64(b, s.undoLo)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.undoEnd))
	b = append(b, s.chain[:]...)
	b = b[:superBlock]
	for i, d := range s.disks {
		e := b[superDisks+i*superDisk:]
		copy(e[:16], d.name)
		binary.LittleEndian.PutUint64(e[16:], uint64(d.size))
		binary.LittleEndian.PutUint64(e[24:], uint64(d.cursor))
		copy(e[32:], d.file[:])
		copy(e[64:], d.identity[:])
	}
	sealBlock(b)
	return b
}

// decodeSuper returns nil when the copy is not valid.
func decodeSuper(b []byte) *super {
	if len(b) != superBlock || !sealedBlock(b, superMagic) {
		return nil
	}
	s := &super{role: role(b[5]), flags: b[6]}
	copy(s.vm[:], b[8:])
	copy(s.store[:], b[24:])
	s.seq = binary.LittleEndian.Uint64(b[40:])
	at := 48
	s.applied = parseMark(b[at:])
	at += markLen
	s.seal = delta.ParsePos(b[at:])
	s.ended = delta.ParsePos(b[at+delta.PosLen:])
	at += 2 * delta.PosLen
	copy(s.gen[:], b[at:])
	s.sealed = fromNanos(binary.LittleEndian.Uint64(b[at+16:]))
	s.points = binary.LittleEndian.Uint32(b[at+24:])
	n := int(binary.LittleEndian.Uint32(b[at+28:]))
	s.undoLo = binary.LittleEndian.Uint64(b[at+32:])
	s.undoEnd = int64(binary.LittleEndian.Uint64(b[at+40:]))
	copy(s.chain[:], b[at+48:])
	if n > delta.MaxDisks || s.role < roleSeeding || s.role > roleRolling {
		return nil
	}
	for i := range n {
		e := b[superDisks+i*superDisk:]
		d := superDiskInfo{
			name:   strings.TrimRight(string(e[:16]), "\x00"),
			size:   int64(binary.LittleEndian.Uint64(e[16:])),
			cursor: int64(binary.LittleEndian.Uint64(e[24:])),
		}
		copy(d.file[:], e[32:])
		copy(d.identity[:], e[64:])
		s.disks = append(s.disks, d)
	}
	if !s.validDisks() {
		return nil
	}
	return s
}

// validDisks checks the list; an absent disk has size 0, but not all of them.
func (s *super) validDisks() bool {
	all := s.diskList()
	for i := range all {
		if all[i].Size == 0 {
			all[i].Size = delta.Granule // stands for any
		}
	}
	there := slices.ContainsFunc(s.disks, func(d superDiskInfo) bool { return d.size > 0 })
	return there && delta.ValidateDisks(all) == nil
}

func (s *super) diskList() []delta.Disk {
	out := make([]delta.Disk, len(s.disks))
	for i, d := range s.disks {
		out[i] = delta.Disk{Name: d.name, Size: d.size}
	}
	return out
}

// clone is a deep copy, for changes that count only once they are durable.
func (s *super) clone() *super {
	c := *s
	c.disks = append([]superDiskInfo(nil), s.disks...)
	return &c
}

// createSuper puts a new superblock file in place, atomically.
func createSuper(f fsx.FS, s *super) error {
	block := s.encode()
	all := make([]byte, 4*superBlock)
	for _, i := range []uint64{s.seq % 2, s.seq%2 + 2} {
		copy(all[i*superBlock:], block)
	}
	return fsx.WriteAtomic(f, superName, all)
}

// writeSuper writes s with the next number into the older pair.
func writeSuper(f fsx.File, s *super) error {
	s.seq++
	return putSuper(f, s)
}

// putSuper writes s into its own pair. At open it repeats the newest record
// this way: that one may never have reached the disk, and the next one goes
// over the record before it.
func putSuper(f fsx.File, s *super) error {
	block := s.encode()
	for _, i := range []int64{int64(s.seq % 2), int64(s.seq%2) + 2} {
		if _, err := f.WriteAt(block, i*superBlock); err != nil {
			return fmt.Errorf("write superblock: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync superblock: %w", err)
	}
	return nil
}

// readSuper returns the newest valid copy and how many copies are bad (torn,
// damaged or, in a young store, never written).
func readSuper(fsys fsx.FS) (s *super, bad int, err error) {
	f, err := fsys.Open(superName, os.O_RDONLY)
	if err != nil {
		return nil, 0, fmt.Errorf("open superblock: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	block := make([]byte, superBlock)
	for i := range int64(4) {
		n, rerr := f.ReadAt(block, i*superBlock)
		if rerr != nil && !errors.Is(rerr, io.EOF) {
			return nil, 0, fmt.Errorf("read superblock: %w", rerr)
		}
		c := decodeSuper(block[:n])
		if c == nil {
			bad++
		} else if s == nil || c.seq > s.seq {
			s = c
		}
	}
	if s == nil {
		return nil, bad, &DamageError{File: superName, Text: "no copy of the superblock is readable; recreate the replica"}
	}
	return s, bad, nil
}

func superExists(f fsx.FS) (bool, error) {
	ok, err := fsx.Exists(f, superName)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return ok, err
}
