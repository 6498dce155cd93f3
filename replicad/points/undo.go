package points

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// An undo segment holds, for every granule changed since the point it starts
// at, the content the granule had at that point. It is written ahead of the
// base: table (with its data) synced first, base second.
const (
	undoDir     = "undo"
	undoMagic   = "KRPU"
	tableMagic  = "KRPT"
	footMagic   = "KRPF"
	undoBlock   = 4096
	tableFirst  = 64 // offset of the first entry in a table
	tableMax    = (undoBlock - 40 - tableFirst) / 16
	undoSizesAt = 232
	granule     = delta.Granule
)

// undoKey is disk<<48 | granule number.
type undoKey uint64

func keyOf(disk int, g int64) undoKey { return undoKey(uint64(disk)<<48 | uint64(g)) }

func (k undoKey) disk() int      { return int(k >> 48) }
func (k undoKey) granule() int64 { return int64(k & (1<<48 - 1)) }

// undoEntry is where a saved granule is: block 0 means it was zero.
type undoEntry struct {
	key   undoKey
	block uint32
	crc   uint32
}

// segment is one undo file. The newest one is open, all others are closed and
// immutable.
type segment struct {
	store  [16]byte
	lo, hi uint64 // the numbers it stands for; several after thinning
	file   fsx.File
	start  mark
	sizes  []int64 // at start, of the disks known then; 0 = absent
	closed bool
	stop   uint64       // ordinal at which it was closed
	bytes  atomic.Int64 // length of the file
	damage error

	end   int64    // open: where the next table goes; all before is durable
	chain [32]byte // open: digest of the last durable table

	mu    sync.RWMutex // guards what follows; a leaf
	touch map[undoKey]undoEntry
	index []undoEntry // closed: sorted; nil = not loaded

	// Guarded by Store.mu.
	refs    int
	dead    bool // remove when refs is 0
	leaving bool // its point is just being thinned out
}

func segmentName(lo, hi uint64) string { return fmt.Sprintf("%s/u%016x-%016x", undoDir, lo, hi) }

func (g *segment) name() string { return segmentName(g.lo, g.hi) }

func parseSegmentName(s string) (lo, hi uint64, ok bool) {
	a, b, ok := strings.Cut(s, "-")
	if !ok || len(a) != 17 || len(b) != 16 || a[0] != 'u' {
		return 0, 0, false
	}
	lo, err1 := strconv.ParseUint(a[1:], 16, 64)
	hi, err2 := strconv.ParseUint(b, 16, 64)
	return lo, hi, err1 == nil && err2 == nil && lo <= hi
}

func (g *segment) header() []byte {
	b := append(make([]byte, 0, undoBlock), undoMagic...)
	b = append(b, version, 0, 0, 0)
	b = append(b, g.store[:]...)
	b = binary.LittleEndian.AppendUint64(b, g.lo)
	b = binary.LittleEndian.AppendUint64(b, g.hi)
	b = g.start.append(b)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(g.sizes)))
	b = b[:undoSizesAt]
	for _, n := range g.sizes {
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
	}
	b = b[:undoBlock]
	sealBlock(b)
	return b
}

// parseHeader fills g from its first block.
func (g *segment) parseHeader(b []byte, store [16]byte) error {
	if !sealedBlock(b, undoMagic) || string(b[8:24]) != string(store[:]) ||
		binary.LittleEndian.Uint64(b[24:]) != g.lo || binary.LittleEndian.Uint64(b[32:]) != g.hi {
		return &DamageError{File: g.name(), Text: "header is not readable"}
	}
	g.store = store
	g.start = parseMark(b[40:])
	n := int(binary.LittleEndian.Uint32(b[224:]))
	if n > delta.MaxDisks {
		return &DamageError{File: g.name(), Text: "header is not valid"}
	}
	for i := range n {
		g.sizes = append(g.sizes, int64(binary.LittleEndian.Uint64(b[undoSizesAt+8*i:])))
	}
	copy(g.chain[:], b[undoBlock-40:])
	return nil
}

// createSegment makes segment number lo, starting at start; it is durable.
func createSegment(f fsx.FS, store [16]byte, lo uint64, start mark, sizes []int64) (*segment, error) {
	g := &segment{store: store, lo: lo, hi: lo, start: start, sizes: sizes, touch: map[undoKey]undoEntry{}, end: undoBlock}
	g.bytes.Store(undoBlock)
	file, err := f.Open(g.name(), os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, noSpace("create undo segment", err)
	}
	g.file = file
	head := g.header()
	copy(g.chain[:], head[undoBlock-40:])
	if _, err = file.WriteAt(head, 0); err == nil {
		err = file.Sync()
	}
	if err == nil {
		err = f.SyncDir(undoDir)
	}
	if err != nil {
		return nil, errors.Join(noSpace("create undo segment", err), file.Close())
	}
	return g, nil
}

// has reports whether the open segment has saved a granule.
func (g *segment) has(k undoKey) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	_, ok := g.touch[k]
	return ok
}

// read fills p (at most a granule) with a saved granule's first bytes.
func (g *segment) read(e undoEntry, p []byte) error {
	if e.block == 0 {
		clear(p)
		return nil
	}
	var b [granule]byte
	n, err := g.file.ReadAt(b[:], int64(e.block)*undoBlock)
	if n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			return &DamageError{File: g.name(), Text: "shorter than its index says"}
		}
		return fmt.Errorf("read %s: %w", g.name(), err)
	}
	if delta.CRC(b[:]) != e.crc {
		return &DamageError{File: g.name(), Text: fmt.Sprintf("granule %d of disk %d does not match its checksum", e.key.granule(), e.key.disk())}
	}
	copy(p, b[:])
	return nil
}

// undoWriter appends one batch to the open segment. Nothing of it counts
// before done.
type undoWriter struct {
	g      *segment
	target uint64 // ordinal the batch leads to
	at     int64
	chain  [32]byte
	keys   []undoEntry
	data   []byte
	fresh  []undoEntry // written by this batch
	tables int
}

func newUndoWriter(g *segment, target uint64) *undoWriter {
	return &undoWriter{g: g, target: target, at: g.end, chain: g.chain}
}

// add saves one granule; p has its bytes and is padded with zeros.
func (w *undoWriter) add(k undoKey, p []byte) error {
	e := undoEntry{key: k}
	if !allZero(p) {
		w.data = append(w.data, p...)
		w.data = append(w.data, make([]byte, granule-len(p))...)
		e.crc = delta.CRC(w.data[len(w.data)-granule:])
		e.block = uint32(len(w.data) / granule) // behind the table, made absolute by flush
	}
	w.keys = append(w.keys, e)
	if len(w.keys) == tableMax {
		return w.flush()
	}
	return nil
}

// flush writes the pending table, also an empty one.
func (w *undoWriter) flush() error {
	first := uint32(w.at / undoBlock)
	b := append(make([]byte, 0, undoBlock+len(w.data)), tableMagic...)
	b = append(b, version, 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, w.g.lo)
	b = binary.LittleEndian.AppendUint64(b, uint64(w.at))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(w.keys)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(w.data)/granule))
	b = binary.LittleEndian.AppendUint64(b, w.target)
	b = append(b, w.g.store[:]...)
	b = b[:tableFirst]
	for _, e := range w.keys {
		if e.block != 0 {
			e.block += first
		}
		b = appendEntry(b, e)
		w.fresh = append(w.fresh, e)
	}
	b = b[:undoBlock]
	sealBlock(b, w.chain[:], w.data)
	copy(w.chain[:], b[undoBlock-40:])
	b = append(b, w.data...)
	if _, err := w.g.file.WriteAt(b, w.at); err != nil {
		return noSpace("write undo", err)
	}
	w.at += int64(len(b))
	w.keys, w.data = w.keys[:0], w.data[:0]
	w.tables++
	return nil
}

// done makes the batch durable and, only then, visible.
func (w *undoWriter) done() error {
	if len(w.keys) > 0 || w.tables == 0 {
		if err := w.flush(); err != nil {
			return err
		}
	}
	if err := w.g.file.Sync(); err != nil {
		return &syncError{what: "undo", err: err}
	}
	w.g.mu.Lock()
	defer w.g.mu.Unlock()
	for _, e := range w.fresh {
		w.g.touch[e.key] = e
	}
	w.g.end, w.g.chain = w.at, w.chain
	w.g.bytes.Store(w.at)
	return nil
}

func appendEntry(b []byte, e undoEntry) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(e.key))
	b = binary.LittleEndian.AppendUint32(b, e.block)
	return binary.LittleEndian.AppendUint32(b, e.crc)
}

func parseEntry(b []byte) undoEntry {
	return undoEntry{
		key:   undoKey(binary.LittleEndian.Uint64(b)),
		block: binary.LittleEndian.Uint32(b[8:]),
		crc:   binary.LittleEndian.Uint32(b[12:]),
	}
}

func allZero(p []byte) bool {
	for len(p) >= 8 {
		if binary.LittleEndian.Uint64(p) != 0 {
			return false
		}
		p = p[8:]
	}
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// syncError is a failed sync: final, the store must be opened again.
type syncError struct {
	what string
	err  error
}

func (e *syncError) Error() string { return fmt.Sprintf("sync %s: %v", e.what, e.err) }
func (e *syncError) Unwrap() error { return e.err }

// saved and seal serve merging, where one source after the other is added:
// seal publishes in memory what was added, so that the next one skips it.
func (w *undoWriter) saved(k undoKey) bool { return w.g.has(k) }

func (w *undoWriter) seal() {
	w.g.mu.Lock()
	defer w.g.mu.Unlock()
	for _, e := range w.fresh {
		w.g.touch[e.key] = e
	}
	for _, e := range w.keys {
		if e.block != 0 {
			e.block += uint32(w.at / undoBlock)
		}
		w.g.touch[e.key] = e
	}
}

func sortEntries(es []undoEntry) {
	slices.SortFunc(es, func(a, b undoEntry) int { return cmp.Compare(a.key, b.key) })
}
