package delta

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// Decoder reads one stream frame by frame and hands out whole frames whose
// bounds and CRC32C are good; chunk contents are opened by a ChunkDecoder. It
// allocates one frame at a time, and a manifest only as fast as it arrives.
type Decoder struct {
	r     io.Reader
	buf   []byte
	head  Header
	stage stage
}

// NewDecoder reads from r and never beyond the frame it returns.
func NewDecoder(r io.Reader) *Decoder { return &Decoder{r: r} }

// Header reads the header frame; it must be the first call.
func (d *Decoder) Header() (Header, error) {
	if d.stage != stageHeader {
		return Header{}, fmt.Errorf("decode header: %w", ErrOrder)
	}
	frame, t, err := d.frame()
	if err == nil && t != FrameHeader {
		err = fmt.Errorf("%w: stream starts with a %v frame", ErrOrder, t)
	}
	if err == nil {
		d.head, err = ParseHeader(frame)
	}
	if err != nil {
		d.stage = stageFailed
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Header{}, err
	}
	d.stage = stageChunks
	return d.head, nil
}

// Next returns the next chunk or manifest frame, valid until the next call.
// io.EOF comes after the manifest, or between two chunks of a seed stream;
// any other end is io.ErrUnexpectedEOF, and bytes after the manifest are
// ErrFormat.
func (d *Decoder) Next() (frame []byte, t FrameType, err error) {
	switch d.stage {
	case stageChunks:
	case stageDone:
		return nil, 0, d.atEnd()
	default:
		return nil, 0, fmt.Errorf("decode chunk: %w", ErrOrder)
	}
	frame, t, err = d.frame()
	switch {
	case errors.Is(err, io.EOF) && !d.head.Seed:
		err = io.ErrUnexpectedEOF
	case err == nil && (t == FrameHeader || (t == FrameManifest && d.head.Seed)):
		err = fmt.Errorf("%w: %v frame after the header", ErrOrder, t)
	}
	if err != nil {
		d.stage = stageFailed
		return nil, 0, err
	}
	if t == FrameManifest {
		d.stage = stageDone
	}
	return frame, t, nil
}

func (d *Decoder) atEnd() error {
	var b [1]byte
	for {
		n, err := d.r.Read(b[:])
		if n > 0 {
			d.stage = stageFailed
			return malformed("bytes after the manifest")
		}
		if err != nil {
			return err
		}
	}
}

// frame reads one whole frame and checks its CRC. A clean end is io.EOF.
func (d *Decoder) frame() ([]byte, FrameType, error) {
	var start [frameStart]byte
	if _, err := io.ReadFull(d.r, start[:]); err != nil {
		return nil, 0, err
	}
	t, _, total, err := checkStart(start[:])
	if err != nil {
		return nil, 0, err
	}
	frame, err := d.fill(start[:], total)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, 0, err
	}
	_, _, err = openFrame(frame, t)
	return frame, t, err
}

// fill reads the rest of a frame. Up to MaxFrame it goes into the one buffer;
// only a manifest with firmware is longer, and its memory grows with what has
// arrived.
func (d *Decoder) fill(start []byte, total int) ([]byte, error) {
	if total <= MaxFrame {
		if cap(d.buf) < total {
			d.buf = make([]byte, min(MaxFrame, max(2*total, 64<<10)))
		}
		frame := d.buf[:total]
		copy(frame, start)
		_, err := io.ReadFull(d.r, frame[frameStart:])
		return frame, err
	}
	var b bytes.Buffer
	b.Write(start)
	if n, err := io.CopyN(&b, d.r, int64(total-frameStart)); err != nil {
		return nil, fmt.Errorf("after %d bytes: %w", n, err)
	}
	return b.Bytes(), nil
}
