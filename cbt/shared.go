package cbt

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Shared memory outlives the process, not the boot. One small file per VM says
// what the bitmaps are relative to and whether they can be believed; one file
// per disk holds three bitmaps: the two that take turns as active and frozen,
// and the suspect one. docs/formats/tracker.md has the byte tables.
const (
	sharedMagic = "KVRSHM1\n"
	sharedHead  = 4096
	sharedCRC   = sharedHead - 4
	ackSlot0    = 2048
	ackSlotLen  = 256
	voidFlag    = 3072
	slots       = 3
	suspectSlot = 2
)

// sharedHeader ties a file to one run of one tracker.
type sharedHeader struct {
	set, session, disk id16
	size               int64
	boot               string
}

func (h *sharedHeader) encode(b []byte) {
	p := putter{b: b}
	p.bytes([]byte(sharedMagic))
	p.bytes(h.set[:])
	p.bytes(h.session[:])
	p.bytes(h.disk[:])
	p.u64(uint64(h.size))
	p.text(h.boot, maxID+1)
	binary.LittleEndian.PutUint32(b[p.n:], crc32.Checksum(b[:p.n], crcTable))
}

func (h *sharedHeader) matches(b []byte) bool {
	want := make([]byte, 256)
	h.encode(want)
	return len(b) >= 256 && string(b[:256]) == string(want)
}

// mapping is one mmapped file.
type mapping struct {
	path string
	f    *os.File
	mem  []byte
}

func openMapping(path string, size int64, create bool) (*mapping, error) {
	flag := os.O_RDWR | unix.O_NOFOLLOW
	if create {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		flag |= os.O_CREATE | os.O_EXCL
	}
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, err
	}
	m := &mapping{path: path, f: f}
	if err := m.attach(size, create); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return m, nil
}

func (m *mapping) attach(size int64, create bool) error {
	if create {
		if err := m.f.Truncate(size); err != nil {
			return err
		}
	} else if st, err := m.f.Stat(); err != nil || st.Size() != size {
		return fmt.Errorf("%s: wrong size", m.path)
	}
	// The header is touched at once; an unbacked page would mean SIGBUS.
	if err := unix.Fallocate(int(m.f.Fd()), 0, 0, sharedHead); err != nil {
		return fmt.Errorf("reserve %s: %w", m.path, err)
	}
	mem, err := unix.Mmap(int(m.f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s: %w", m.path, err)
	}
	m.mem = mem
	return nil
}

// close gives the descriptor back. The mapping itself stays: a reader that
// still holds a bitmap must find zeros, not a fault. Its memory is freed.
func (m *mapping) close(remove bool) error {
	if !remove {
		return m.f.Close()
	}
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	err := os.Remove(m.path)
	if perr := unix.Fallocate(int(m.f.Fd()), mode, 0, int64(len(m.mem))); err == nil {
		err = perr
	}
	return errors.Join(err, m.f.Close())
}

// sharedVM is the per-VM file.
type sharedVM struct {
	*mapping
	mu  sync.Mutex
	seq uint64 // guarded by mu
}

func sharedVMPath(dir string, set id16) string {
	return filepath.Join(dir, "cbt-"+hex.EncodeToString(set[:])+".shm")
}

func sharedDiskPath(dir string, set, disk id16) string {
	return filepath.Join(dir, "cbt-"+hex.EncodeToString(set[:])+"-"+hex.EncodeToString(disk[:])+".shm")
}

// removeShared frees the memory of a tracker that is no more. What stays is
// refused by its set id.
func removeShared(dir string, set id16) {
	names, err := filepath.Glob(filepath.Join(dir, "cbt-"+hex.EncodeToString(set[:])+"*.shm"))
	if err != nil {
		return
	}
	for _, n := range names {
		_ = os.Remove(n)
	}
}

// sweepShared frees the memory of disks that are tracked no more, and of those
// that an Open which did not get to its end was about to track.
func (g *Group) sweepShared() {
	if g.cfg.SharedDir == "" {
		return
	}
	set := g.meta.current().set
	keep := map[string]bool{}
	for _, d := range g.disks {
		keep[sharedDiskPath(g.cfg.SharedDir, set, d.id)] = true
	}
	names, err := filepath.Glob(filepath.Join(g.cfg.SharedDir, "cbt-"+hex.EncodeToString(set[:])+"-*.shm"))
	if err != nil {
		return
	}
	for _, n := range names {
		if !keep[n] {
			_ = os.Remove(n) // what stays is refused by its id
		}
	}
}

func createSharedVM(dir string, h sharedHeader, acked Position) (*sharedVM, error) {
	m, err := openMapping(sharedVMPath(dir, h.set), sharedHead, true)
	if err != nil {
		return nil, err
	}
	v := &sharedVM{mapping: m}
	v.setAcked(acked)
	h.encode(m.mem) // last: valid only from here on
	return v, nil
}

// openSharedVM returns the file and the acked position if both can be proven.
func openSharedVM(dir string, h sharedHeader) (*sharedVM, Position, error) {
	m, err := openMapping(sharedVMPath(dir, h.set), sharedHead, false)
	if err != nil {
		return nil, Position{}, err
	}
	v := &sharedVM{mapping: m}
	if !h.matches(m.mem) || v.isVoid() {
		return nil, Position{}, errors.Join(errors.New("shared copy is from another run or void"), m.close(false))
	}
	var acked Position
	found := false
	for i := range 2 {
		b := m.mem[ackSlot0+i*ackSlotLen:][:ackSlotLen]
		if crc32.Checksum(b[:64], crcTable) != binary.LittleEndian.Uint32(b[64:]) {
			continue
		}
		g := getter{b: b}
		if seq := g.u64(); seq > v.seq {
			v.seq, found = seq, true
			g.pos(&acked)
		}
	}
	if !found {
		return nil, Position{}, errors.Join(errors.New("shared copy has no valid position"), m.close(false))
	}
	return v, acked, nil
}

// setAcked records what the bitmaps are relative to, in the older of two
// slots, so that a kill in the middle leaves the other.
func (v *sharedVM) setAcked(p Position) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.seq++
	b := v.mem[ackSlot0+int(v.seq%2)*ackSlotLen:][:ackSlotLen]
	w := putter{b: b}
	w.u64(v.seq)
	w.pos(&p)
	binary.LittleEndian.PutUint32(b[64:], crc32.Checksum(b[:64], crcTable))
}

// setVoid says that the bitmaps are no longer exact: the next start must use
// the intent map.
func (v *sharedVM) setVoid() { (*atomic.Uint32)(unsafe.Pointer(&v.mem[voidFlag])).Store(1) }

func (v *sharedVM) isVoid() bool {
	return (*atomic.Uint32)(unsafe.Pointer(&v.mem[voidFlag])).Load() != 0
}

// sharedDisk is one disk's file: a header and three bitmaps.
type sharedDisk struct {
	*mapping
	slotLen int64

	mu   sync.Mutex
	have []uint64 // guarded by mu: pages of a slot that are backed in all slots
}

func sharedSlotLen(granules uint64) int64 {
	return max((int64(wordsFor(granules))*8+4095)/4096*4096, 4096)
}

func openSharedDisk(dir string, h sharedHeader, granules uint64, create bool) (*sharedDisk, error) {
	n := sharedSlotLen(granules)
	m, err := openMapping(sharedDiskPath(dir, h.set, h.disk), sharedHead+slots*n, create)
	if err != nil {
		return nil, err
	}
	if create {
		h.encode(m.mem)
	} else if !h.matches(m.mem) {
		return nil, errors.Join(errors.New("shared copy is from another run"), m.close(false))
	}
	return &sharedDisk{mapping: m, slotLen: n, have: make([]uint64, wordsFor(uint64(n/4096)))}, nil
}

// words is one slot as bitmap words. A page must be backed before it is used.
func (s *sharedDisk) words(slot int) []uint64 {
	b := s.mem[sharedHead+int64(slot)*s.slotLen:][:s.slotLen]
	return unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), len(b)/8)
}

// back reserves the memory behind granules [lo, hi) in all slots, so that
// touching it can never raise SIGBUS. If there is no room, those pages are
// replaced by ordinary memory and the shared copy becomes void.
func (s *sharedDisk) back(vm *sharedVM, lo, hi uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var failed error
	for p := lo >> 15; p <= (hi-1)>>15; p++ { // 2^15 granules per page
		if s.have[p/64]>>(p%64)&1 != 0 {
			continue
		}
		for slot := range slots {
			off := sharedHead + int64(slot)*s.slotLen + int64(p)*4096
			if err := unix.Fallocate(int(s.f.Fd()), 0, off, 4096); err != nil {
				vm.setVoid()
				failed = err
				if err := s.replacePage(off); err != nil {
					return err
				}
			}
		}
		s.have[p/64] |= 1 << (p % 64)
	}
	if failed != nil {
		return fmt.Errorf("%w: %w", errSharedVoid, failed)
	}
	return nil
}

// errSharedVoid: tracking goes on, but a kill will cost a digest pass.
var errSharedVoid = errors.New("shared memory is full, the exact copy is given up")

func (s *sharedDisk) replacePage(off int64) error {
	_, err := unix.MmapPtr(-1, 0, unsafe.Pointer(&s.mem[off]), 4096,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED)
	return err
}

// scan reports the non-zero words of a slot without touching pages that were
// never backed, and notes those that were: all slots of a page are backed
// together before the first of them is used.
func (s *sharedDisk) scan(slot int, found func(w, v uint64)) error {
	buf := make([]byte, min(1<<20, s.slotLen)) // no more: a guest waits while a successor does this
	base := sharedHead + int64(slot)*s.slotLen
	for off := int64(0); off < s.slotLen; off += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), s.slotLen-off)]
		if _, err := s.f.ReadAt(part, base+off); err != nil {
			return err
		}
		for i := 0; i < len(part); i += 8 {
			if v := binary.NativeEndian.Uint64(part[i:]); v != 0 {
				w := uint64(off)/8 + uint64(i)/8
				s.have[w>>9/64] |= 1 << (w >> 9 % 64)
				found(w, v)
			}
		}
	}
	return nil
}
