package nbd

import (
	"encoding/binary"
	"errors"

	"kvmreplica/internal/block"
)

const (
	// sendfileMin: below it copying twice is cheaper than two calls.
	sendfileMin = 16 << 10
	// inlineReadMax is the longest read served by the loop itself by copying.
	inlineReadMax = 128 << 10
	// readChunk is what a worker reads and sends at once of a longer read.
	readChunk = 512 << 10
)

// read serves a valid READ, or parks it.
func (c *conn) read(h header) error {
	n := int(h.length)
	switch {
	case n == 0:
		return c.reply(h, OK)
	case n >= sendfileMin && c.structured && c.exp.fd >= 0 && c.raw != nil && c.warm(h):
		return c.readBySendfile(h)
	case n <= inlineReadMax && c.exp.reader != nil:
		if done, err := c.readInline(h); done || err != nil {
			return err
		}
	}
	cost := n
	if c.mayChunk(h) {
		cost = min(n, readChunk)
	}
	return c.park(h, cost)
}

// mayChunk: the data may be sent as several chunks.
func (c *conn) mayChunk(h header) bool { return c.structured && h.flags&cmdDF == 0 }

// warm looks whether both ends of a range are in the page cache.
func (c *conn) warm(h header) bool {
	if c.exp.reader == nil {
		return false
	}
	for _, off := range [2]int64{int64(h.off), int64(h.off) + int64(h.length) - 1} {
		if _, err := c.exp.reader.TryReadAt(c.probe[:], off); err != nil {
			return false
		}
	}
	return true
}

// dataHeader is the length of what stands in front of the data.
func (c *conn) dataHeader() int {
	if c.structured {
		return chunkSize + chunkDataExtra
	}
	return simpleSize
}

// appendDataHeader is what stands in front of n bytes of data from off.
func (c *conn) appendDataHeader(p []byte, h header, flags uint16, off int64, n int) []byte {
	if !c.structured {
		return appendSimple(p, h.cookie, OK)
	}
	p = appendChunk(p, flags, chunkData, h.cookie, uint32(n+chunkDataExtra))
	return binary.BigEndian.AppendUint64(p, uint64(off))
}

// readInline reads straight behind the reply header in the output buffer.
func (c *conn) readInline(h header) (done bool, err error) {
	n, head := int(h.length), c.dataHeader()
	if err := c.room(head + n); err != nil {
		return false, err
	}
	start := len(c.out)
	data := c.out[start+head : start+head+n]
	_, err = c.exp.reader.TryReadAt(data, int64(h.off))
	switch {
	case err == nil:
		c.out = c.appendDataHeader(c.out, h, chunkDone, int64(h.off), n)
		c.out = c.out[:start+head+n]
		c.bytesRead.Add(uint64(n))
		return true, nil
	case errors.Is(err, block.ErrWouldBlock):
		return false, nil
	}
	return true, c.reply(h, errnoOf(err, cmdRead))
}

// readBySendfile sends the chunk's header and the data without copying it. The
// data chunk is not the last one: should the file fail half-way, the rest is
// padded and an error chunk says from where on the data is not data.
func (c *conn) readBySendfile(h header) error {
	if err := c.room(replyRoom); err != nil {
		return err
	}
	n := int(h.length)
	c.out = c.appendDataHeader(c.out, h, 0, int64(h.off), n)
	failed, err := c.sendFile(int64(h.off), n)
	if err != nil {
		return err
	}
	if failed < 0 {
		c.bytesRead.Add(uint64(n))
		c.out = appendChunk(c.out, chunkDone, chunkNone, h.cookie, 0)
		return nil
	}
	c.errors.Add(1)
	c.out = appendChunk(c.out, chunkDone, chunkErrorOffset, h.cookie, 14)
	c.out = binary.BigEndian.AppendUint32(c.out, uint32(EIO))
	c.out = binary.BigEndian.AppendUint16(c.out, 0)
	c.out = binary.BigEndian.AppendUint64(c.out, uint64(failed))
	return nil
}

// sendFile sends the output buffer and n bytes of the file behind it. failed
// is the offset from which on zeros were sent instead, or -1.
func (c *conn) sendFile(off int64, n int) (failed int64, err error) {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	err = c.sendLocked(c.out)
	c.out = c.out[:0]
	if err != nil {
		return 0, err
	}
	f := &c.file
	f.from, f.off, f.left, f.err = c.exp.fd, off, n, nil
	if err := c.raw.Write(f.step); err != nil {
		c.breakLocked()
		return 0, err
	}
	if f.err == nil {
		return -1, nil
	}
	failed = f.off
	pad := c.out[:cap(c.out)]
	clear(pad)
	for left := f.left; left > 0; left -= min(left, len(pad)) {
		if err := c.sendLocked(pad[:min(left, len(pad))]); err != nil {
			return 0, err
		}
	}
	return failed, nil
}
