package cbt

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// spill is where old content goes when the memory for it is used up. Alone, the
// rule "abandon at once, the guest wins" would ship nothing of a guest that
// overwrites its working set faster than it travels: the set returns, grows and
// is lost again. So after spillAfter lost epochs the next one may use a file:
// mapped, reserved piece by piece, written by nobody but the page cache, and
// never longer than the epoch's frozen granules. Without room for it the epoch
// is lost as before.
//
// The store's lock guards it.
type spill struct {
	dir   string
	file  *os.File
	slots int // what the present epoch may use; 0: nothing
	slabs int
	first int // index of the first slab that lies in the file
}

// room says whether n slots lie in the file and one more may; nil has none.
func (p *spill) room(n int) bool { return p != nil && n < p.slots }

// allowSpill sets what the epoch about to be frozen may spill. cutMu held.
func (g *Group) allowSpill() {
	s := g.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spill == nil {
		return
	}
	s.spill.slots = 0
	if g.overruns.Load() < spillAfter {
		return
	}
	g.gate.RLock()
	for _, d := range g.disks {
		st := d.st.Load()
		s.spill.slots += int(min(uint64(st.fine[g.slot].count.Load())+granulesPerRegion, st.granules))
	}
	g.gate.RUnlock()
	g.cfg.Log.Info("the next epoch may spill old content to disk", "lost_in_a_row", g.overruns.Load(), "at_most", s.spill.slots<<granuleShift)
}

// slab returns a new slab: of memory up to the limit, else of the file; nil when
// there is no room. mu held.
func (s *captureStore) slab() []byte {
	if len(s.slabs)*(slabSize/GranuleSize) < s.limit || s.spill == nil {
		return make([]byte, slabSize)
	}
	b, err := s.spill.grow()
	if err != nil {
		return nil // the epoch is lost with ErrOverrun, which says enough
	}
	if s.spill.slabs == 1 {
		s.spill.first = len(s.slabs)
	}
	return b
}

// grow reserves and maps one more slab.
func (p *spill) grow() (_ []byte, err error) {
	if p.file == nil {
		if p.file, err = os.CreateTemp(p.dir, "spill-"); err != nil {
			return nil, err
		}
		if err := os.Remove(p.file.Name()); err != nil { // it ends with this process
			return nil, err
		}
	}
	fd := int(p.file.Fd())
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, err
	}
	if int64(fs.Bavail)*fs.Bsize < spillReserve+slabSize {
		return nil, fmt.Errorf("spill: less than %d bytes are free in %s", spillReserve, p.dir)
	}
	off := int64(p.slabs) * slabSize
	if err := unix.Fallocate(fd, 0, off, slabSize); err != nil { // an unbacked page would mean SIGBUS
		return nil, err
	}
	b, err := unix.Mmap(fd, off, slabSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	p.slabs++
	return b, nil
}

// shrink gives the file up. mu held, no slot in use.
func (s *captureStore) shrink() {
	p := s.spill
	if p == nil || p.slabs == 0 {
		return
	}
	for _, b := range s.slabs[p.first:] {
		_ = unix.Munmap(b) // nobody has a slot of it
	}
	s.slabs = s.slabs[:p.first]
	_ = p.file.Close() // it has no name
	p.file, p.slabs = nil, 0
	s.free = s.free[:0]
	for i := uint32(len(s.slabs) * (slabSize / GranuleSize)); i > 0; i-- {
		s.free = append(s.free, i-1)
	}
}

// spilled is what lies in the file.
func (s *captureStore) spilled() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.spill == nil {
		return 0
	}
	return int64(s.spill.slabs) * slabSize
}
