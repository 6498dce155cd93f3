package fsx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path"
)

// ErrCorrupt: a file contains what no crash can have left there.
var ErrCorrupt = errors.New("file is corrupt")

// Layout of a log file, little-endian:
//
//	header
//	  0  8  magic "KVRLOG1\n"
//	  8 16  identity, chosen by the creator
//	 24  4  zero
//	 28  4  CRC32C of bytes 0..27
//	record, at a multiple of 512 bytes behind the header or record before it
//	  0  4  magic "KRec"
//	  4  4  payload length
//	  8  8  number of the record, from 0
//	 16  4  CRC32C of identity, bytes 0..15 and the payload
//	 20  n  payload
//
// Zeros fill the gaps; nobody reads them. A record shares no sector with an
// earlier one, so that an append can never hurt what was acknowledged. Identity
// and number in the checksum keep a record of another log, or of an
// earlier life of this one, from being taken for a valid one.
const (
	logMagic     = "KVRLOG1\n"
	recMagic     = "KRec"
	logHeaderLen = 32
	recHeaderLen = 20
	logAlign     = 512
)

// LogID tells one log from all others; random, or the id of what it is about.
type LogID [16]byte

// LogOptions bound a log. Zero values mean the defaults in brackets.
type LogOptions struct {
	MaxRecord int   // longest payload accepted (1 MiB)
	MaxSize   int64 // longest file read (64 MiB)
}

func (o LogOptions) withDefaults() LogOptions {
	if o.MaxRecord == 0 {
		o.MaxRecord = 1 << 20
	}
	if o.MaxSize == 0 {
		o.MaxSize = 64 << 20
	}
	return o
}

// LogContent is what a log file holds.
type LogContent struct {
	ID      LogID
	Records [][]byte
	// End is the length of the valid part; Tail the number of bytes behind it,
	// the remains of an append that was never acknowledged - or of an
	// acknowledged last record that was damaged since: the two cannot be told
	// apart here. A caller that has other evidence of the last record (a
	// successor elsewhere, a superblock) must compare.
	End, Tail int64
}

// Log is an append-only file of checksummed records. Append is durable when it
// returns nil. Methods must not be called concurrently.
type Log struct {
	f      File
	name   string
	id     LogID
	opts   LogOptions
	end    int64
	next   uint64
	tail   bool
	failed error
}

// CreateLog makes (or atomically replaces) a log that holds records. Records
// may be empty.
func CreateLog(f FS, name string, id LogID, o LogOptions, records ...[]byte) (*Log, error) {
	o = o.withDefaults()
	data := append([]byte(logMagic), id[:]...)
	data = append(data, 0, 0, 0, 0)
	data = binary.LittleEndian.AppendUint32(data, crc32.Checksum(data, castagnoli()))
	data = append(data, make([]byte, logAlign-len(data))...)
	for i, r := range records {
		if len(r) > o.MaxRecord {
			return nil, fmt.Errorf("create log %s: record of %d bytes, at most %d", name, len(r), o.MaxRecord)
		}
		data = appendRecord(data, id, uint64(i), r)
	}
	if int64(len(data)) > o.MaxSize {
		return nil, fmt.Errorf("create log %s: %w", name, ErrTooLarge)
	}
	if err := WriteAtomic(f, name, data); err != nil {
		return nil, err
	}
	l, _, err := OpenLog(f, name, o)
	return l, err
}

// OpenLog opens a log for appending and returns what it holds, made durable
// first: a process that died may have left its last record, and the file's
// name, in the page cache only, even marked clean by a sync that failed. A torn tail is cut off before the first Append. Absence is fs.ErrNotExist; damage that a
// crash cannot explain is ErrCorrupt, and the content up to it is returned.
func OpenLog(f FS, name string, o LogOptions) (*Log, LogContent, error) {
	o = o.withDefaults()
	c, err := ReadLog(f, name, o)
	if err != nil {
		return nil, c, err
	}
	file, err := f.Open(name, os.O_RDWR)
	if err != nil {
		return nil, c, fmt.Errorf("open log %s: %w", name, err)
	}
	l := &Log{f: file, name: name, id: c.ID, opts: o, end: c.End, next: uint64(len(c.Records)), tail: c.Tail > 0}
	err = l.settle(c)
	if err == nil {
		err = f.SyncDir(path.Dir(name))
	}
	if err != nil {
		return nil, c, errors.Join(fmt.Errorf("open log %s: %w", name, err), file.Close())
	}
	return l, c, nil
}

// ReadLog reads a log and changes nothing, so what it returns need not be
// durable; see OpenLog for its errors.
func ReadLog(f FS, name string, o LogOptions) (LogContent, error) {
	o = o.withDefaults()
	data, err := ReadFile(f, name, o.MaxSize)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return LogContent{}, err
		}
		return LogContent{}, fmt.Errorf("read log %s: %w", name, err)
	}
	c, err := decodeLog(data, o.MaxRecord)
	if err != nil {
		return c, fmt.Errorf("read log %s: %w", name, err)
	}
	return c, nil
}

func decodeLog(data []byte, maxRecord int) (LogContent, error) {
	var c LogContent
	if len(data) < logAlign || string(data[:8]) != logMagic ||
		crc32.Checksum(data[:28], castagnoli()) != binary.LittleEndian.Uint32(data[28:]) {
		return c, fmt.Errorf("%w: bad header", ErrCorrupt)
	}
	copy(c.ID[:], data[8:])
	pos := logAlign
	for pos < len(data) {
		n := decodeRecord(data[pos:], c.ID, uint64(len(c.Records)), maxRecord)
		if n < 0 {
			break
		}
		c.Records = append(c.Records, data[pos+recHeaderLen:pos+n:pos+n])
		pos += aligned(n)
	}
	c.End, c.Tail = int64(pos), int64(max(0, len(data)-pos))
	if at := laterRecord(data, pos+logAlign, c.ID, uint64(len(c.Records)), maxRecord); at >= 0 {
		return c, fmt.Errorf("%w: record %d at byte %d is damaged, a later one at byte %d is whole", ErrCorrupt, len(c.Records), pos, at)
	}
	return c, nil
}

// laterRecord finds a whole record of this log behind the first bad one. Since
// an append starts only after the sync of the one before, it means damage.
func laterRecord(data []byte, from int, id LogID, after uint64, maxRecord int) int {
	for at := from; at+recHeaderLen <= len(data); at += logAlign {
		if string(data[at:at+4]) != recMagic {
			continue
		}
		no := binary.LittleEndian.Uint64(data[at+8:])
		if no >= after && decodeRecord(data[at:], id, no, maxRecord) > 0 {
			return at
		}
	}
	return -1
}

func appendRecord(b []byte, id LogID, no uint64, payload []byte) []byte {
	at := len(b)
	b = append(b, recMagic...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint64(b, no)
	b = binary.LittleEndian.AppendUint32(b, recordSum(id, b[at:at+16], payload))
	b = append(b, payload...)
	return append(b, make([]byte, aligned(len(b)-at)-(len(b)-at))...)
}

func aligned(n int) int { return (n + logAlign - 1) / logAlign * logAlign }

// decodeRecord returns the length of the record at the start of b, or -1.
func decodeRecord(b []byte, id LogID, no uint64, maxRecord int) int {
	if len(b) < recHeaderLen || string(b[:4]) != recMagic || binary.LittleEndian.Uint64(b[8:]) != no {
		return -1
	}
	n := binary.LittleEndian.Uint32(b[4:])
	if int64(n) > int64(maxRecord) || int(n) > len(b)-recHeaderLen {
		return -1
	}
	end := recHeaderLen + int(n)
	if recordSum(id, b[:16], b[recHeaderLen:end]) != binary.LittleEndian.Uint32(b[16:]) {
		return -1
	}
	return end
}

func recordSum(id LogID, head, payload []byte) uint32 {
	sum := crc32.Update(0, castagnoli(), id[:])
	sum = crc32.Update(sum, castagnoli(), head)
	return crc32.Update(sum, castagnoli(), payload)
}

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// ID is the log's identity.
func (l *Log) ID() LogID { return l.id }

// Len is the number of records.
func (l *Log) Len() uint64 { return l.next }

// Append adds a record and makes it durable. After an error the record may or
// may not be there and the Log takes no more: open it again to find out.
func (l *Log) Append(payload []byte) error {
	if l.failed != nil {
		return fmt.Errorf("append to log %s: an earlier append failed: %w", l.name, l.failed)
	}
	if len(payload) > l.opts.MaxRecord {
		return fmt.Errorf("append to log %s: record of %d bytes, at most %d", l.name, len(payload), l.opts.MaxRecord)
	}
	rec := appendRecord(nil, l.id, l.next, payload)
	if l.end+int64(len(rec)) > l.opts.MaxSize {
		return fmt.Errorf("append to log %s: %w", l.name, ErrTooLarge)
	}
	if err := l.append(rec); err != nil {
		l.failed = err
		return fmt.Errorf("append to log %s: %w", l.name, err)
	}
	l.end += int64(len(rec))
	l.next++
	return nil
}

func (l *Log) append(rec []byte) error {
	if l.tail {
		if err := l.f.Truncate(l.end); err != nil {
			return err
		}
		if err := l.f.Sync(); err != nil {
			return err
		}
		l.tail = false
	}
	if _, err := l.f.WriteAt(rec, l.end); err != nil {
		return err
	}
	return l.f.Sync()
}

// settle writes the last record again and syncs: all earlier ones were durable
// before it was begun.
func (l *Log) settle(c LogContent) error {
	if n := len(c.Records); n > 0 {
		rec := appendRecord(nil, l.id, uint64(n-1), c.Records[n-1])
		if _, err := l.f.WriteAt(rec, l.end-int64(len(rec))); err != nil {
			return err
		}
	}
	return l.f.Sync()
}

// Close releases the file.
func (l *Log) Close() error { return l.f.Close() }
