package points

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// footer ends a closed segment; it is the file's last block.
type footer struct {
	end     delta.Pos
	ordinal uint64
	count   uint64
	indexAt int64
	digest  delta.Digest // of the index
	chain   [32]byte
}

func (g *segment) footer(f footer, at int64) []byte {
	b := append(make([]byte, 0, undoBlock), footMagic...)
	b = append(b, version, 0, 0, 0)
	b = append(b, g.store[:]...)
	b = binary.LittleEndian.AppendUint64(b, g.lo)
	b = binary.LittleEndian.AppendUint64(b, g.hi)
	b = delta.AppendPos(b, f.end)
	b = binary.LittleEndian.AppendUint64(b, f.ordinal)
	b = binary.LittleEndian.AppendUint64(b, f.count)
	b = binary.LittleEndian.AppendUint64(b, uint64(f.indexAt))
	b = append(b, f.digest[:]...)
	b = append(b, f.chain[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(at))
	b = b[:undoBlock]
	sealBlock(b)
	return b
}

func (g *segment) parseFooter(b []byte, at int64) (f footer, ok bool) {
	if len(b) != undoBlock || !sealedBlock(b, footMagic) || string(b[8:24]) != string(g.store[:]) ||
		binary.LittleEndian.Uint64(b[24:]) != g.lo || binary.LittleEndian.Uint64(b[32:]) != g.hi ||
		int64(binary.LittleEndian.Uint64(b[184:])) != at {
		return f, false
	}
	f = footer{
		end:     delta.ParsePos(b[40:]),
		ordinal: binary.LittleEndian.Uint64(b[96:]),
		count:   binary.LittleEndian.Uint64(b[104:]),
		indexAt: int64(binary.LittleEndian.Uint64(b[112:])),
	}
	copy(f.digest[:], b[120:])
	copy(f.chain[:], b[152:])
	return f, f.indexAt >= undoBlock && f.indexAt+indexLen(f.count) == at
}

// indexLen is the length of an index of n entries, padded to blocks.
func indexLen(n uint64) int64 { return (int64(n)*16 + undoBlock - 1) / undoBlock * undoBlock }

// close writes index and footer and makes them durable: from then on the
// segment is immutable and its end is a recovery point. The caller sets closed
// and stop.
func (g *segment) close(end mark) error {
	g.mu.RLock()
	entries := make([]undoEntry, 0, len(g.touch))
	for _, e := range g.touch {
		entries = append(entries, e)
	}
	g.mu.RUnlock()
	sortEntries(entries)
	at, err := g.writeEnd(entries, g.end, end.pos, end.ordinal)
	if err != nil {
		if terr := g.file.Truncate(g.end); terr != nil {
			return &syncError{what: "undo segment", err: errors.Join(err, terr)} // half closed
		}
		return err
	}
	g.mu.Lock()
	g.index, g.touch = entries, nil
	g.mu.Unlock()
	g.bytes.Store(at)
	return nil
}

// writeEnd puts index and footer at offset at and returns the file's length.
func (g *segment) writeEnd(entries []undoEntry, at int64, end delta.Pos, ordinal uint64) (int64, error) {
	f := footer{end: end, ordinal: ordinal, count: uint64(len(entries)), indexAt: at, chain: g.chain}
	b := make([]byte, 0, indexLen(f.count)+undoBlock)
	for _, e := range entries {
		b = appendEntry(b, e)
	}
	b = b[:indexLen(f.count)]
	f.digest = blockDigest(b)
	foot := at + int64(len(b))
	b = append(b, g.footer(f, foot)...)
	if _, err := g.file.WriteAt(b, at); err != nil {
		return 0, noSpace("close undo segment", err)
	}
	if err := g.file.Truncate(foot + undoBlock); err != nil {
		return 0, fmt.Errorf("close undo segment: %w", err)
	}
	if err := g.file.Sync(); err != nil {
		return 0, &syncError{what: "undo segment", err: err}
	}
	return foot + undoBlock, nil
}

// load reads the index of a closed segment unless it is in memory; g.mu is
// held, here also across the reading: everybody else waits for the same index.
func (g *segment) load() error {
	if g.damage != nil || g.index != nil || g.touch != nil {
		return g.damage
	}
	entries, err := g.readIndex()
	if err != nil {
		return err
	}
	g.index = entries
	return nil
}

// entries lists everything saved, in no order.
func (g *segment) entries() ([]undoEntry, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.load(); err != nil {
		return nil, err
	}
	out := append(make([]undoEntry, 0, len(g.index)+len(g.touch)), g.index...)
	for _, e := range g.touch {
		out = append(out, e)
	}
	return out, nil
}

// within lists what is saved of the keys in [from, to), in no order.
func (g *segment) within(from, to undoKey) ([]undoEntry, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.load(); err != nil {
		return nil, err
	}
	if g.touch == nil {
		i := sort.Search(len(g.index), func(i int) bool { return g.index[i].key >= from })
		n := i
		for n < len(g.index) && g.index[n].key < to {
			n++
		}
		return g.index[i:n:n], nil // a loaded index never changes
	}
	var out []undoEntry
	for k := from; k < to; k++ {
		if e, ok := g.touch[k]; ok {
			out = append(out, e)
		}
	}
	return out, nil
}

// unload frees the index of a closed segment.
func (g *segment) unload() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.touch == nil {
		g.index = nil
	}
}

func (g *segment) readIndex() ([]undoEntry, error) {
	f, err := g.readFooter()
	if err != nil {
		return nil, err
	}
	b := make([]byte, indexLen(f.count))
	if err := g.readBlock(b, f.indexAt); err != nil {
		return nil, err
	}
	if blockDigest(b) != f.digest {
		return nil, &DamageError{File: g.name(), Text: "index does not match its digest"}
	}
	entries := make([]undoEntry, f.count)
	for i := range entries {
		entries[i] = parseEntry(b[16*i:])
	}
	return entries, nil
}

func (g *segment) readFooter() (footer, error) {
	size, err := g.file.Size()
	if err != nil {
		return footer{}, fmt.Errorf("open %s: %w", g.name(), err)
	}
	at := size - undoBlock
	if at < undoBlock {
		return footer{}, &DamageError{File: g.name(), Text: "too short to be closed"}
	}
	b := make([]byte, undoBlock)
	if err := g.readBlock(b, at); err != nil {
		return footer{}, err
	}
	f, ok := g.parseFooter(b, at)
	if !ok {
		return footer{}, &DamageError{File: g.name(), Text: "footer is not readable"}
	}
	return f, nil
}

// readBlock fills b from offset at; a short file is damage.
func (g *segment) readBlock(b []byte, at int64) error {
	n, err := g.file.ReadAt(b, at)
	switch {
	case n == len(b):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return &DamageError{File: g.name(), Text: fmt.Sprintf("ends before byte %d", at+int64(len(b)))}
	}
	return fmt.Errorf("read %s: %w", g.name(), err)
}

// openSegment opens a segment file and reads header and, if there is one,
// footer. A damaged segment is returned with damage set; err is for reading
// errors only.
func openSegment(f fsx.FS, lo, hi uint64, store [16]byte) (*segment, error) {
	g := &segment{lo: lo, hi: hi}
	file, err := f.Open(g.name(), os.O_RDWR)
	if err != nil {
		return nil, fmt.Errorf("open undo: %w", err)
	}
	g.file = file
	size, err := file.Size()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open undo: %w", err), file.Close())
	}
	g.bytes.Store(size)
	b := make([]byte, undoBlock)
	if err = g.readBlock(b, 0); err == nil {
		err = g.parseHeader(b, store)
	}
	if err == nil {
		var ft footer
		if ft, err = g.readFooter(); err == nil {
			g.closed, g.stop, g.chain = true, ft.ordinal, ft.chain
		} else if errors.Is(err, ErrDamaged) {
			err = nil // not closed; the caller knows whether that may be
		}
	}
	if errors.Is(err, ErrDamaged) {
		g.damage, err = err, nil
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return g, nil
}

// scan reads the tables of an unclosed segment up to the first one that is not
// whole, rebuilds the index and calls seen for each (offset behind it, its
// chain value, its target).
func (g *segment) scan(seen func(end int64, chain [32]byte, target uint64)) error {
	g.touch, g.index, g.closed = map[undoKey]undoEntry{}, nil, false
	g.end = undoBlock
	b := g.header()
	copy(g.chain[:], b[undoBlock-40:])
	var data []byte
	for {
		if err := g.readBlock(b, g.end); errors.Is(err, ErrDamaged) {
			return nil
		} else if err != nil {
			return err
		}
		count, blocks := binary.LittleEndian.Uint32(b[24:]), binary.LittleEndian.Uint32(b[28:])
		if string(b[:4]) != tableMagic || count > tableMax || blocks > count ||
			binary.LittleEndian.Uint64(b[8:]) != g.lo || int64(binary.LittleEndian.Uint64(b[16:])) != g.end || string(b[40:56]) != string(g.store[:]) {
			return nil
		}
		data = append(data[:0], make([]byte, int(blocks)*granule)...)
		if err := g.readBlock(data, g.end+undoBlock); errors.Is(err, ErrDamaged) {
			return nil
		} else if err != nil {
			return err
		}
		if !sealedBlock(b, tableMagic, g.chain[:], data) {
			return nil
		}
		for i := range int(count) {
			e := parseEntry(b[tableFirst+16*i:])
			if _, ok := g.touch[e.key]; !ok { // the first touch counts
				g.touch[e.key] = e
			}
		}
		copy(g.chain[:], b[undoBlock-40:])
		g.end += undoBlock + int64(len(data))
		seen(g.end, g.chain, binary.LittleEndian.Uint64(b[32:]))
	}
}
