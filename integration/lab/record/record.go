// Package record is the log that the lab's guest keeps on its disks: numbered
// records of 512 bytes, written one after the other, each durable before the
// next one is begun, spread in turn over all disks.
//
// It guarantees that any copy of all disks taken at one moment holds records
// 1 to N without a gap; a gap proves that the disks were not copied at one
// moment, or that a write or a flush was lost.
//
// The caller appends with Encode, syncs, and only then calls a record safe.
package record

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
)

// Size of a record, and Magic at its start.
//
//	offset  size  meaning
//	0       8     magic "KVMREPL1"
//	8       8     record number, from 1, little endian
//	16      8     time of writing, milliseconds since 1970
//	24      8     nonce of the guest's boot that wrote it
//	32      4     number of disks
//	36      472   filler derived from the number
//	508     4     CRC-32C of bytes 0 to 507
const (
	Size  = 512
	Magic = "KVMREPL1"
)

// MaxDisks bounds the number of disks of one guest.
const MaxDisks = 16

// Record is the meaning of one record.
type Record struct {
	Number uint64
	Millis int64
	Boot   uint64
	Disks  uint32
}

// Disk is the index of the disk that holds record n of a guest with the given
// number of disks.
func Disk(n uint64, disks int) int { return int((n - 1) % uint64(disks)) }

// Encode returns the 512 bytes of r.
func (r Record) Encode() []byte {
	b := make([]byte, Size)
	copy(b, Magic)
	binary.LittleEndian.PutUint64(b[8:], r.Number)
	binary.LittleEndian.PutUint64(b[16:], uint64(r.Millis))
	binary.LittleEndian.PutUint64(b[24:], r.Boot)
	binary.LittleEndian.PutUint32(b[32:], r.Disks)
	fill(b[36:508], r.Number)
	binary.LittleEndian.PutUint32(b[508:], checksum(b))
	return b
}

// fill makes records that neither compress away nor look alike.
func fill(b []byte, n uint64) {
	src := rand.NewPCG(n, 1)
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], src.Uint64())
	}
}

func checksum(b []byte) uint32 {
	return crc32.Checksum(b[:508], crc32.MakeTable(crc32.Castagnoli))
}

// ErrDamaged: 512 bytes that are no record.
var ErrDamaged = errors.New("damaged record")

// Decode reads one record back.
func Decode(b []byte) (Record, error) {
	if len(b) != Size || !bytes.Equal(b[:8], []byte(Magic)) || binary.LittleEndian.Uint32(b[508:]) != checksum(b) {
		return Record{}, ErrDamaged
	}
	return Record{
		Number: binary.LittleEndian.Uint64(b[8:]),
		Millis: int64(binary.LittleEndian.Uint64(b[16:])),
		Boot:   binary.LittleEndian.Uint64(b[24:]),
		Disks:  binary.LittleEndian.Uint32(b[32:]),
	}, nil
}

// Verdict is what a set of logs holds.
type Verdict struct {
	// Highest is N when records 1 to N are all there.
	Highest uint64
	// Bad is the number of the first record that is damaged, out of order or
	// missing although a later one is there; -1 when there is none.
	Bad int64
	// Boots counts the guest's boots that wrote; LastBoot is the latest's nonce.
	Boots    int
	LastBoot uint64
	// Trailing counts bytes behind the last whole record of any log.
	Trailing int
}

func (v Verdict) String() string {
	return fmt.Sprintf("highest=%d bad=%d boots=%d trailing=%d", v.Highest, v.Bad, v.Boots, v.Trailing)
}

// Verify reads the logs of all disks, in the order of the disks; a log that
// does not exist is an empty reader.
func Verify(logs []io.Reader) (Verdict, error) {
	v := Verdict{Bad: -1}
	if len(logs) == 0 || len(logs) > MaxDisks {
		return v, fmt.Errorf("%d logs: want 1 to %d", len(logs), MaxDisks)
	}
	rd := make([]*bufio.Reader, len(logs))
	for i, l := range logs {
		rd[i] = bufio.NewReaderSize(l, 1<<16)
	}
	var lastBoot uint64
	for n := uint64(1); ; n++ {
		r, trailing, err := next(rd[Disk(n, len(rd))])
		v.Trailing += trailing
		switch {
		case err == nil && r.Number == n:
			if r.Boot != lastBoot {
				lastBoot, v.LastBoot = r.Boot, r.Boot
				v.Boots++
			}
			v.Highest = n
			continue
		case err == nil || errors.Is(err, ErrDamaged):
			v.Bad = int64(n)
		case !errors.Is(err, io.EOF):
			return v, err
		}
		return v.rest(rd, n)
	}
}

// rest looks for records behind the first one that is missing, number n.
func (v Verdict) rest(rd []*bufio.Reader, n uint64) (Verdict, error) {
	for i, r := range rd {
		if i == Disk(n, len(rd)) {
			continue // its own log has ended, or is bad already
		}
		_, trailing, err := next(r)
		v.Trailing += trailing
		if errors.Is(err, io.EOF) {
			continue
		}
		if err != nil && !errors.Is(err, ErrDamaged) {
			return v, err
		}
		if v.Bad < 0 {
			v.Bad = int64(n)
		}
	}
	return v, nil
}

// next reads one record; trailing is the length of an incomplete one, which
// counts as the end of the log.
func next(r io.Reader) (rec Record, trailing int, err error) {
	b := make([]byte, Size)
	n, err := io.ReadFull(r, b)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return rec, n, io.EOF
	}
	if err != nil {
		return rec, 0, err
	}
	rec, err = Decode(b)
	return rec, 0, err
}
