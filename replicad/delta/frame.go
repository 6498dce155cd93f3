package delta

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Version is the only format version this build reads and writes. It stands in
// byte 4 of every frame.
const Version = 1

// Sizes and limits of the format. A decoder refuses what exceeds them before
// it allocates.
const (
	Granule      = 4096             // unit of extents; only a disk's last one may be shorter
	MaxRaw       = 1 << 20          // bytes of content in one chunk
	MaxExtents   = MaxRaw / Granule // extents in one chunk
	MaxFrame     = MaxRaw + 64<<10  // a whole chunk frame
	MaxHole      = 256 << 20        // bytes one zero extent of a seed stream may cover
	MaxDisks     = 64               // disks of one VM
	MaxDiskName  = 16               // bytes
	MaxDiskSize  = 1 << 52          // bytes
	MaxNVRAM     = 4 << 20          // bytes of firmware variables
	MaxTPM       = 16 << 20         // bytes of TPM permanent state
	maxHeader    = 4 << 10          // a whole header frame
	maxManifest  = MaxNVRAM + MaxTPM + 64<<10
	frameStart   = 12 // bytes before the body
	frameEnd     = 4  // CRC32C after the body
	maxChunkBody = MaxFrame - frameStart - frameEnd
)

// FrameType is the fourth byte of a frame's magic.
type FrameType byte

// The frame types.
const (
	FrameHeader   FrameType = 'H'
	FrameChunk    FrameType = 'C'
	FrameManifest FrameType = 'M'
)

func (t FrameType) String() string {
	switch t {
	case FrameHeader:
		return "header"
	case FrameChunk:
		return "chunk"
	case FrameManifest:
		return "manifest"
	}
	return fmt.Sprintf("type %#02x", byte(t))
}

// Errors of this package. Test with errors.Is; the text says what was wrong.
var (
	// ErrFormat: the bytes are not what the format allows.
	ErrFormat = errors.New("malformed delta stream")
	// ErrChecksum: a frame's CRC32C or a content digest does not match.
	ErrChecksum = errors.New("delta checksum does not match")
	// ErrVersion: a frame of a version this build does not know.
	ErrVersion = errors.New("unknown delta format version")
	// ErrOrder: a method was called, or a frame came, out of order.
	ErrOrder = errors.New("delta frames out of order")
)

func malformed(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, a...))
}

// CRC is the CRC32C of the concatenation of parts.
func CRC(parts ...[]byte) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	var c uint32
	for _, p := range parts {
		c = crc32.Update(c, table, p)
	}
	return c
}

// startFrame appends the first 12 bytes of a frame; endFrame fills the length.
func startFrame(b []byte, t FrameType, aux byte) []byte {
	b = append(b, 'K', 'R', 'D', byte(t), Version, aux, 0, 0)
	return append(b, 0, 0, 0, 0)
}

// endFrame completes a frame that begins at b[0].
func endFrame(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-frameStart))
	return binary.LittleEndian.AppendUint32(b, CRC(b))
}

// bodyLimit is the largest body of a frame type, 0 for unknown types.
func bodyLimit(t FrameType) int {
	switch t {
	case FrameHeader:
		return maxHeader - frameStart - frameEnd
	case FrameChunk:
		return maxChunkBody
	case FrameManifest:
		return maxManifest - frameStart - frameEnd
	}
	return 0
}

// checkStart validates the first 12 bytes of a frame and returns its type, its
// auxiliary byte and its total length. Nothing else of it was looked at.
func checkStart(b []byte) (t FrameType, aux byte, total int, err error) {
	if len(b) < frameStart {
		return 0, 0, 0, malformed("frame of %d bytes", len(b))
	}
	if b[0] != 'K' || b[1] != 'R' || b[2] != 'D' {
		return 0, 0, 0, malformed("frame starts with % x", b[:4])
	}
	t = FrameType(b[3])
	limit := bodyLimit(t)
	if limit == 0 {
		return 0, 0, 0, malformed("frame %v is unknown", t)
	}
	if b[4] != Version {
		return 0, 0, 0, fmt.Errorf("%w %d (this build reads %d)", ErrVersion, b[4], Version)
	}
	if b[6] != 0 || b[7] != 0 || (t != FrameChunk && b[5] != 0) {
		return 0, 0, 0, malformed("%v frame: reserved bytes are not zero", t)
	}
	n := binary.LittleEndian.Uint32(b[8:])
	if int64(n) > int64(limit) {
		return 0, 0, 0, malformed("%v frame: body of %d bytes exceeds %d", t, n, limit)
	}
	return t, b[5], frameStart + int(n) + frameEnd, nil
}

// FrameLen returns the type and the total length of the frame that starts with
// b (at least 12 bytes), for readers that keep frames in files of their own.
func FrameLen(b []byte) (FrameType, int, error) {
	t, _, n, err := checkStart(b)
	return t, n, err
}

// openFrame validates a whole frame (start, length, CRC) and returns its body.
func openFrame(frame []byte, want FrameType) (body []byte, aux byte, err error) {
	t, aux, total, err := checkStart(frame)
	if err != nil {
		return nil, 0, err
	}
	if t != want {
		return nil, 0, fmt.Errorf("%w: %v frame where a %v frame is due", ErrOrder, t, want)
	}
	if total != len(frame) {
		return nil, 0, malformed("%v frame of %d bytes says it has %d", t, len(frame), total)
	}
	end := total - frameEnd
	if CRC(frame[:end]) != binary.LittleEndian.Uint32(frame[end:]) {
		return nil, 0, fmt.Errorf("%v frame: %w", t, ErrChecksum)
	}
	return frame[frameStart:end], aux, nil
}
