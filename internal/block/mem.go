package block

import "sync"

const memPage = 64 << 10

// Mem is a Device in memory, for tests and scratch. It is sparse: pages of
// 64 KiB exist once something but zeros was written to them. Sync does nothing.
type Mem struct {
	size int64

	mu     sync.RWMutex
	pages  map[int64]*[memPage]byte
	closed bool
}

var (
	_ Device     = (*Mem)(nil)
	_ Mapper     = (*Mem)(nil)
	_ FastZeroer = (*Mem)(nil)
	_ TryReader  = (*Mem)(nil)
	_ TryWriter  = (*Mem)(nil)
)

// NewMem returns a device of size bytes that reads as zeros.
func NewMem(size int64) *Mem {
	return &Mem{size: size, pages: map[int64]*[memPage]byte{}}
}

func (m *Mem) check(off, n int64) error {
	if m.closed {
		return ErrClosed
	}
	return Check(off, n, m.size)
}

// ReadAt implements Device.
func (m *Mem) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	for n := 0; n < len(p); {
		page, in := (off+int64(n))/memPage, (off+int64(n))%memPage
		part := p[n:min(len(p), n+int(memPage-in))]
		if data := m.pages[page]; data != nil {
			copy(part, data[in:])
		} else {
			clear(part)
		}
		n += len(part)
	}
	return len(p), nil
}

// TryReadAt implements TryReader: memory never waits.
func (m *Mem) TryReadAt(p []byte, off int64) (int, error) { return m.ReadAt(p, off) }

// WriteAt implements Device.
func (m *Mem) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	for n := 0; n < len(p); {
		page, in := (off+int64(n))/memPage, (off+int64(n))%memPage
		data := m.pages[page]
		if data == nil {
			data = new([memPage]byte)
			m.pages[page] = data
		}
		n += copy(data[in:], p[n:])
	}
	return len(p), nil
}

// TryWriteAt implements TryWriter: memory never waits.
func (m *Mem) TryWriteAt(p []byte, off int64) (int, error) { return m.WriteAt(p, off) }

// ZeroAt implements Device. Whole pages are freed either way. Its cost follows
// what was written, not n.
func (m *Mem) ZeroAt(off, n int64, _ bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, n); err != nil {
		return err
	}
	zero := Range{Off: off, Len: n}
	for page, data := range m.pages {
		have := Range{Off: page * memPage, Len: memPage}
		if !zero.Overlaps(have) {
			continue
		}
		lo, hi := max(zero.Off, have.Off), min(zero.End(), have.End())
		if hi-lo == memPage {
			delete(m.pages, page)
		} else {
			clear(data[lo-have.Off : hi-have.Off])
		}
	}
	return nil
}

// Sync implements Device.
func (m *Mem) Sync() error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.check(0, 0)
}

// Size implements Device.
func (m *Mem) Size() int64 { return m.size }

// Close implements Device.
func (m *Mem) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrClosed
	}
	m.closed, m.pages = true, nil
	return nil
}

// FastZero implements FastZeroer.
func (m *Mem) FastZero() bool { return true }

// Map implements Mapper: pages never written are holes.
func (m *Mem) Map(off, n int64, fn func(Extent) bool) error {
	m.mu.RLock()
	if err := m.check(off, n); err != nil {
		m.mu.RUnlock()
		return err
	}
	var out []Extent
	for end := off + n; off < end; {
		next := min(end, (off/memPage+1)*memPage)
		hole := m.pages[off/memPage] == nil
		if k := len(out); k > 0 && out[k-1].Hole == hole {
			out[k-1].Len += next - off
		} else {
			out = append(out, Extent{Range: Range{Off: off, Len: next - off}, Hole: hole, Zero: hole})
		}
		off = next
	}
	m.mu.RUnlock()
	for _, e := range out {
		if !fn(e) {
			return nil
		}
	}
	return nil
}
