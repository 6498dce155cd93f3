package cbt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"kvmreplica/internal/fsx"
)

// The pages of an intent map; docs/formats/tracker.md has the byte table.
const (
	pageMagic   = "KVRMAP1\n"
	pageSize    = 4096
	pageHead    = 64
	pageWords   = (pageSize - pageHead) / 8 // 504
	pageRegions = pageWords * 64            // 32,256
	copyGap     = 1 << 20                   // the copies are at least this far apart
)

// mapGeometry is where the pages of a disk lie in its map file.
type mapGeometry struct {
	regions uint64
	pages   int
	second  int64 // offset of the second copy
}

func geometry(size int64) mapGeometry {
	regions := uint64(size+RegionSize-1) >> regionShift
	pages := max(int((regions+pageRegions-1)/pageRegions), 1)
	second := (int64(pages)*pageSize + copyGap - 1) / copyGap * copyGap
	return mapGeometry{regions: regions, pages: pages, second: second}
}

func (m mapGeometry) words() int { return m.pages * pageWords }

// fileSize is the length of the map file.
func (m mapGeometry) fileSize() int64 { return m.second + int64(m.pages)*pageSize }

func (m mapGeometry) offset(copyNo, page int) int64 {
	return int64(copyNo)*m.second + int64(page)*pageSize
}

// encodePage writes one copy of a page into b, which has pageSize bytes.
func encodePage(b []byte, id id16, copyNo, page int, seq uint64, words []uint64) {
	p := putter{b: b}
	clear(b[:pageHead])
	p.bytes([]byte(pageMagic))
	p.bytes(id[:])
	p.u32(uint32(copyNo))
	p.u32(uint32(page))
	p.u64(seq)
	for i, w := range words[:pageWords] {
		binary.LittleEndian.PutUint64(b[pageHead+8*i:], w)
	}
	binary.LittleEndian.PutUint32(b[pageHead-4:], pageCRC(b))
}

// pageCRC covers the page without its own field.
func pageCRC(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:pageHead-4], crcTable), crcTable, b[pageHead:pageSize])
}

// decodePage adds a valid copy's bits to words and returns its sequence number.
func decodePage(b []byte, id id16, copyNo, page int, words []uint64) (uint64, error) {
	g := getter{b: b, n: 8}
	var have id16
	g.bytes(have[:])
	gotCopy, gotPage, seq := g.u32(), g.u32(), g.u64()
	switch {
	case string(b[:8]) != pageMagic:
		return 0, fmt.Errorf("%w: no intent page", errDamaged)
	case pageCRC(b) != binary.LittleEndian.Uint32(b[pageHead-4:]):
		return 0, fmt.Errorf("%w: intent page checksum", errDamaged)
	case !bytes.Equal(have[:], id[:]) || gotCopy != uint32(copyNo) || gotPage != uint32(page):
		return 0, fmt.Errorf("%w: intent page %d.%d found where %d.%d belongs", errDamaged, gotCopy, gotPage, copyNo, page)
	}
	for i := range words[:pageWords] {
		words[i] |= binary.LittleEndian.Uint64(b[pageHead+8*i:])
	}
	return seq, nil
}

// mapRead is what loadMap found.
type mapRead struct {
	words []uint64
	seqs  []uint64
	// alarms name tolerated faults; lost counts pages both copies of which
	// were unreadable: all their regions are taken as marked.
	alarms []string
	lost   int
}

// loadMap reads both copies of every page and takes the union of what is
// valid. It never fails: what cannot be read is marked.
func loadMap(f fsx.File, id id16, geo mapGeometry) mapRead {
	r := mapRead{words: make([]uint64, geo.words()), seqs: make([]uint64, geo.pages)}
	b := make([]byte, pageSize)
	for p := range geo.pages {
		words := r.words[p*pageWords:][:pageWords]
		var good int
		var seqs [2]uint64
		for c := range 2 {
			n, err := f.ReadAt(b, geo.offset(c, p))
			if n == pageSize && (err == nil || err == io.EOF) {
				seqs[c], err = decodePage(b, id, c, p, words)
			} else if err == nil {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				r.alarms = append(r.alarms, fmt.Sprintf("page %d copy %d: %v", p, c, err))
				continue
			}
			good++
		}
		r.seqs[p] = max(seqs[0], seqs[1])
		switch {
		case good == 0:
			r.lost++
			for i := range words {
				words[i] = ^uint64(0)
			}
		case good == 2 && seqs[0] != seqs[1]:
			r.alarms = append(r.alarms, fmt.Sprintf("page %d: copies differ in age (%d, %d)", p, seqs[0], seqs[1]))
		}
	}
	trimWords(r.words, geo.regions)
	return r
}

// trimWords clears the bits behind n.
func trimWords(words []uint64, n uint64) {
	for w := range words {
		words[w] &= mask(uint64(w), 0, max(n, uint64(w)*64))
	}
}
