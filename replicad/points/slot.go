package points

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// A slot is one spool file. It is preallocated in steps and used again for
// later epochs, so whatever is in it may be stale: every record carries the
// random number of its use and its own place.
const (
	spoolDir    = "spool"
	slotMagic   = "KRPL"
	recMagic    = "KRPR"
	slotBlock   = 4096
	recHead     = 64
	slotFrameAt = 64 // of the header frame inside the slot block
)

// slot is an open spool file. Its fields are guarded by whoever owns it: the
// receive while partial, nobody (immutable) once committed.
type slot struct {
	number uint32
	file   fsx.File
	size   int64 // allocated
}

func slotName(n uint32) string { return fmt.Sprintf("%s/s%08d", spoolDir, n) }

func parseSlotName(name string) (uint32, bool) {
	if len(name) != 9 || name[0] != 's' {
		return 0, false
	}
	n, err := strconv.ParseUint(name[1:], 10, 32)
	return uint32(n), err == nil
}

// slotHead is the first block of a slot.
type slotHead struct {
	store   [16]byte
	number  uint32
	ordinal uint64
	use     uint64
	head    delta.Header
}

func (h *slotHead) encode() ([]byte, error) {
	frame, err := h.head.AppendFrame(nil)
	if err != nil {
		return nil, err
	}
	b := append(make([]byte, 0, slotBlock), slotMagic...)
	b = append(b, version, 0, 0, 0)
	b = append(b, h.store[:]...)
	b = binary.LittleEndian.AppendUint64(b, h.ordinal)
	b = binary.LittleEndian.AppendUint64(b, h.use)
	b = binary.LittleEndian.AppendUint32(b, h.number)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(frame)))
	b = b[:slotBlock]
	copy(b[slotFrameAt:], frame)
	sealBlock(b)
	return b, nil
}

// decodeSlotHead returns nil when the block is not a valid slot header of
// this store and slot.
func decodeSlotHead(b []byte, store [16]byte, number uint32) *slotHead {
	if len(b) != slotBlock || !sealedBlock(b, slotMagic) {
		return nil
	}
	h := &slotHead{
		ordinal: binary.LittleEndian.Uint64(b[24:]),
		use:     binary.LittleEndian.Uint64(b[32:]),
		number:  binary.LittleEndian.Uint32(b[40:]),
	}
	copy(h.store[:], b[8:])
	n := int(binary.LittleEndian.Uint32(b[44:]))
	if h.store != store || h.number != number || n > slotBlock-40-slotFrameAt {
		return nil
	}
	var err error
	if h.head, err = delta.ParseHeader(b[slotFrameAt : slotFrameAt+n]); err != nil {
		return nil
	}
	return h
}

// record is one frame in a slot.
type record struct {
	typ   delta.FrameType
	index uint32 // chunk number; of the manifest: number of chunks
	at    time.Time
	off   int64 // of the record
	len   int   // of the frame
}

func (r *record) end() int64 { return r.off + recHead + int64(r.len) }

// appendHead appends the 64-byte record header.
func (r *record) appendHead(b []byte, use uint64) []byte {
	at := len(b)
	b = append(b, recMagic...)
	b = append(b, version, byte(r.typ), 0, 0)
	b = binary.LittleEndian.AppendUint64(b, use)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.off))
	b = binary.LittleEndian.AppendUint32(b, r.index)
	b = binary.LittleEndian.AppendUint32(b, uint32(r.len))
	b = binary.LittleEndian.AppendUint64(b, nanos(r.at))
	b = append(b, make([]byte, recHead-4-(len(b)-at))...)
	return binary.LittleEndian.AppendUint32(b, delta.CRC(b[at:]))
}

func parseRecord(b []byte, use uint64, off int64) (record, bool) {
	if len(b) < recHead || string(b[:4]) != recMagic || b[4] != version ||
		binary.LittleEndian.Uint64(b[8:]) != use || int64(binary.LittleEndian.Uint64(b[16:])) != off ||
		binary.LittleEndian.Uint32(b[recHead-4:]) != delta.CRC(b[:recHead-4]) {
		return record{}, false
	}
	return record{
		typ: delta.FrameType(b[5]), index: binary.LittleEndian.Uint32(b[24:]), len: int(binary.LittleEndian.Uint32(b[28:])),
		at: fromNanos(binary.LittleEndian.Uint64(b[32:])), off: off,
	}, true
}

// readRecord reads the record at off and its frame; ok is false where none of
// this use is. Only reading errors are errors.
func (s *slot) readRecord(use uint64, off int64) (r record, frame []byte, ok bool, err error) {
	head := make([]byte, recHead+12)
	if n, err := s.file.ReadAt(head, off); n < len(head) {
		if err == nil || errors.Is(err, io.EOF) {
			return r, nil, false, nil
		}
		return r, nil, false, fmt.Errorf("read %s: %w", slotName(s.number), err)
	}
	if r, ok = parseRecord(head, use, off); !ok {
		return r, nil, false, nil
	}
	typ, total, ferr := delta.FrameLen(head[recHead:])
	if ferr != nil || typ != r.typ || total != r.len {
		return r, nil, false, nil
	}
	frame = make([]byte, r.len)
	if err := s.readFrame(frame, off); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return r, nil, false, nil
		}
		return r, nil, false, err
	}
	return r, frame, true, nil
}

// readFrame fills frame with the frame of the record at off.
func (s *slot) readFrame(frame []byte, off int64) error {
	n, err := s.file.ReadAt(frame, off+recHead)
	if n == len(frame) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %s at %d: %w", slotName(s.number), off, err)
}

// reserve makes sure that [0, end) is allocated.
func (s *slot) reserve(end, step int64) error {
	if end <= s.size {
		return nil
	}
	want := (end + step - 1) / step * step
	if err := s.file.Allocate(s.size, want-s.size); err != nil {
		// A full step may be too much where just enough is there.
		want = end
		if err := s.file.Allocate(s.size, want-s.size); err != nil {
			return noSpace("reserve "+slotName(s.number), err)
		}
	}
	s.size = want
	return nil
}

// createSlot makes a new spool file; its name is durable afterwards.
func createSlot(f fsx.FS, number uint32) (*slot, error) {
	file, err := f.Open(slotName(number), os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, noSpace("create "+slotName(number), err)
	}
	if err := f.SyncDir(spoolDir); err != nil {
		return nil, errors.Join(fmt.Errorf("create %s: %w", slotName(number), err), file.Close())
	}
	return &slot{number: number, file: file}, nil
}

func openSlot(f fsx.FS, number uint32) (*slot, error) {
	file, err := f.Open(slotName(number), os.O_RDWR)
	if err != nil {
		return nil, fmt.Errorf("open spool: %w", err)
	}
	size, err := file.Size()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open spool: %w", err), file.Close())
	}
	return &slot{number: number, file: file, size: size}, nil
}
