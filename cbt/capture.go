package cbt

import "sync"

const slabSize = 1 << 20

// captureStore holds old content of frozen granules, one granule per slot, in
// slabs of 1 MiB that are kept for the next epoch. Beyond its limit it may use a
// spill file, see spill.
type captureStore struct {
	mu    sync.Mutex
	limit int      // slots
	slabs [][]byte // guarded by mu
	free  []uint32 // guarded by mu
	used  int      // guarded by mu
	spare [][]byte // guarded by mu: buffers of copyRun bytes
	spill *spill   // guarded by mu; nil: none
}

func newCaptureStore(limit int64, spillDir string) *captureStore {
	s := &captureStore{limit: int(limit >> granuleShift)}
	if spillDir != "" {
		s.spill = &spill{dir: spillDir}
	}
	return s
}

// take reserves a slot; ok is false when the budget is exhausted.
func (s *captureStore) take() (slot uint32, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used >= s.limit && !s.spill.room(s.used-s.limit) {
		return 0, false
	}
	if len(s.free) == 0 {
		base := uint32(len(s.slabs)) * (slabSize / GranuleSize)
		slab := s.slab()
		if slab == nil {
			return 0, false
		}
		s.slabs = append(s.slabs, slab)
		for i := uint32(slabSize / GranuleSize); i > 0; i-- {
			s.free = append(s.free, base+i-1)
		}
	}
	slot = s.free[len(s.free)-1]
	s.free = s.free[:len(s.free)-1]
	s.used++
	return slot, true
}

// at is the memory of a slot the caller owns.
func (s *captureStore) at(slot uint32) []byte {
	s.mu.Lock()
	slab := s.slabs[slot/(slabSize/GranuleSize)]
	s.mu.Unlock()
	return slab[slot%(slabSize/GranuleSize)*GranuleSize:][:GranuleSize]
}

func (s *captureStore) give(slot uint32) {
	s.mu.Lock()
	s.free = append(s.free, slot)
	if s.used--; s.used == 0 {
		s.shrink()
	}
	s.mu.Unlock()
}

func (s *captureStore) bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(s.used) << granuleShift
}

// buffer lends a buffer of copyRun bytes.
func (s *captureStore) buffer() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.spare); n > 0 {
		b := s.spare[n-1]
		s.spare = s.spare[:n-1]
		return b
	}
	return make([]byte, copyRun)
}

func (s *captureStore) unbuffer(b []byte) {
	s.mu.Lock()
	if len(s.spare) < 16 {
		s.spare = append(s.spare, b)
	}
	s.mu.Unlock()
}
