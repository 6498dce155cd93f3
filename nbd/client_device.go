package nbd

import (
	"fmt"

	"kvmreplica/internal/block"
)

// aligned widens [off, off+n) to the server's block size, inside the device.
func (c *Client) aligned(off, n int64) (start, end int64) {
	b := c.info.minBlock
	return off &^ (b - 1), min((off+n+b-1)&^(b-1), c.info.size)
}

// chunk is the longest READ or WRITE: a multiple of the block size.
func (c *Client) chunk() int64 {
	return max(c.info.minBlock, min(clientChunk, c.info.maxPayload)&^(c.info.minBlock-1))
}

// ReadAt implements block.Device.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if err := block.Check(off, int64(len(p)), c.info.size); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, c.Err()
	}
	start, end := c.aligned(off, int64(len(p)))
	if start != off || end != off+int64(len(p)) {
		whole := make([]byte, end-start)
		if err := c.readAligned(whole, start); err != nil {
			return 0, err
		}
		return copy(p, whole[off-start:]), nil
	}
	if err := c.readAligned(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *Client) readAligned(p []byte, off int64) error {
	for len(p) > 0 {
		n := min(int64(len(p)), c.chunk())
		h := header{cmd: cmdRead, off: uint64(off), length: uint32(n)}
		if err := c.simple(h, nil, p[:n:n], "read"); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (c *Client) checkWrite(off, n int64) error {
	if c.ReadOnly() {
		return block.ErrReadOnly
	}
	return block.Check(off, n, c.info.size)
}

// WriteAt implements block.Device. What is not aligned to the server's block
// size is read, changed and written back.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	if err := c.checkWrite(off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, c.Err()
	}
	start, end := c.aligned(off, int64(len(p)))
	if start == off && end == off+int64(len(p)) {
		if c.info.minBlock > 1 {
			c.rmwMu.RLock()
			defer c.rmwMu.RUnlock()
		}
		return c.writeAligned(p, off)
	}
	c.rmwMu.Lock()
	defer c.rmwMu.Unlock()
	whole := make([]byte, end-start)
	if err := c.readAligned(whole, start); err != nil {
		return 0, fmt.Errorf("read around an unaligned write: %w", err)
	}
	copy(whole[off-start:], p)
	if _, err := c.writeAligned(whole, start); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *Client) writeAligned(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n := int(min(int64(len(p)-done), c.chunk()))
		h := header{cmd: cmdWrite, off: uint64(off + int64(done)), length: uint32(n)}
		if err := c.simple(h, p[done:done+n], nil, "write"); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// ZeroAt implements block.Device with WRITE_ZEROES, never TRIM, whose result
// is not known; without it zeros are written.
func (c *Client) ZeroAt(off, n int64, punch bool) error {
	if err := c.checkWrite(off, n); err != nil {
		return err
	}
	b := c.info.minBlock
	first, last := (off+b-1)&^(b-1), (off+n)&^(b-1)
	if off+n == c.info.size {
		last = off + n
	}
	if c.info.flags&transZeroes == 0 || first >= last {
		return c.writeZeros(off, n)
	}
	if err := c.writeZeros(off, first-off); err != nil {
		return err
	}
	var flags uint16
	if !punch {
		flags = cmdNoHole
	}
	if err := c.zeroAligned(first, last, flags); err != nil {
		return err
	}
	return c.writeZeros(last, off+n-last)
}

func (c *Client) zeroAligned(first, last int64, flags uint16) error {
	if c.info.minBlock > 1 {
		c.rmwMu.RLock()
		defer c.rmwMu.RUnlock()
	}
	for at := first; at < last; {
		step := min(last-at, clientZeroChunk)
		h := header{cmd: cmdZeroes, flags: flags, off: uint64(at), length: uint32(step)}
		if err := c.simple(h, nil, nil, "write zeroes"); err != nil {
			return err
		}
		at += step
	}
	return nil
}

func (c *Client) writeZeros(off, n int64) error {
	zeros := make([]byte, min(n, c.chunk()))
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		if _, err := c.WriteAt(p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// Trim tells the server that the content of a range is no longer needed. A
// server that cannot is not asked. What the range reads as is then unknown.
func (c *Client) Trim(off, n int64) error {
	if err := c.checkWrite(off, n); err != nil || c.info.flags&transTrim == 0 {
		return err
	}
	b := c.info.minBlock
	for at, last := (off+b-1)&^(b-1), (off+n)&^(b-1); at < last; {
		step := min(last-at, clientZeroChunk)
		if err := c.simple(header{cmd: cmdTrim, off: uint64(at), length: uint32(step)}, nil, nil, "trim"); err != nil {
			return err
		}
		at += step
	}
	return nil
}

// Sync implements block.Device with FLUSH.
func (c *Client) Sync() error {
	if c.info.flags&transFlush == 0 {
		return c.Err() // read-only, or AllowUnsafe
	}
	return c.simple(header{cmd: cmdFlush}, nil, nil, "flush")
}

// Map implements block.Mapper with BLOCK_STATUS. Servers without it say that
// all is data.
func (c *Client) Map(off, n int64, fn func(block.Extent) bool) error {
	if err := block.Check(off, n, c.info.size); err != nil {
		return err
	}
	if !c.info.context {
		if n > 0 {
			fn(block.Extent{Range: block.Range{Off: off, Len: n}})
		}
		return c.Err()
	}
	for end := off + n; off < end; {
		start, stop := c.aligned(off, min(end-off, clientZeroChunk))
		extents, err := c.status(start, stop-start)
		if err != nil {
			return err
		}
		before := off
		for _, e := range extents {
			e.Len = min(e.End(), end) - off
			if e.Off = off; e.Len <= 0 {
				continue
			}
			if !fn(e) {
				return nil
			}
			off = e.End()
		}
		if off == before {
			return fmt.Errorf("%w: block status that does not reach the offset asked for", ErrProtocol)
		}
	}
	return nil
}

// status asks once; the answer covers a part of the range, at least its start.
func (c *Client) status(off, n int64) ([]block.Extent, error) {
	q, err := c.do(header{cmd: cmdBlockStatus, off: uint64(off), length: uint32(n)}, nil, nil, "block status")
	if err != nil {
		return nil, err
	}
	extents := append([]block.Extent(nil), q.extents...)
	c.slots <- q
	if len(extents) == 0 {
		err := fmt.Errorf("%w: no extents in the answer to block status", ErrProtocol)
		c.fail(err)
		return nil, err
	}
	return extents, nil
}

// TryReadAt implements block.TryReader: an answer over the network is never at
// hand.
func (c *Client) TryReadAt([]byte, int64) (int, error) { return 0, block.ErrWouldBlock }

// TryWriteAt implements block.TryWriter; it never succeeds. It is here so that
// a device stacked on a Client does not write inline for want of it.
func (c *Client) TryWriteAt([]byte, int64) (int, error) { return 0, block.ErrWouldBlock }
