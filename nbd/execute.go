package nbd

import (
	"encoding/binary"

	"kvmreplica/internal/block"
)

// zeroPiece bounds one ZeroAt, so that a device never holds a range of 4 GiB.
const zeroPiece = 16 << 20

// maxExtents bounds a reply to block status.
const maxExtents = 1024

// execute runs a task in a worker and answers when it was the last part.
func (c *conn) execute(t task, scratch []byte) {
	q, dev := t.q, c.exp.Device
	switch q.h.cmd {
	case cmdRead:
		c.executeRead(q, scratch)
		return
	case cmdBlockStatus:
		c.executeBlockStatus(q, scratch)
		return
	case cmdWrite:
		if t.buf != nil && q.result() == OK {
			_, err := dev.WriteAt(t.buf.b, t.off)
			q.fail(errnoOf(err, cmdWrite))
		}
		c.srv.pool.put(t.buf)
	case cmdFlush:
		q.fail(errnoOf(c.exp.sync(), cmdFlush))
	case cmdTrim:
		if f, ok := dev.(block.FastZeroer); !ok || f.FastZero() {
			c.zero(q, true)
		} // else: permitted to do nothing, and writing zeros would not free anything
	case cmdZeroes:
		c.zero(q, q.h.flags&cmdNoHole == 0)
	case cmdCache:
		if c.exp.fd >= 0 {
			_ = willNeed(c.exp.fd, t.off, int64(q.h.length)) // advice
		}
	}
	c.finish(q, scratch)
}

func fastZero(dev block.Device) bool {
	f, ok := dev.(block.FastZeroer)
	return ok && f.FastZero()
}

// zero zeroes in pieces; a connection that ended stops between two of them.
func (c *conn) zero(q *request, punch bool) {
	off, left := int64(q.h.off), int64(q.h.length)
	for left > 0 && q.result() == OK {
		if c.canceled.Load() {
			q.silent.Store(true)
			return
		}
		n := min(left, zeroPiece)
		q.fail(errnoOf(c.exp.Device.ZeroAt(off, n, punch), q.h.cmd))
		off, left = off+n, left-n
	}
}

// finish drops a part; the last one makes FUA true and answers.
func (c *conn) finish(q *request, scratch []byte) {
	if q.parts.Add(-1) > 0 {
		return
	}
	if !q.silent.Load() {
		if q.h.flags&cmdFUA != 0 && changes(q.h.cmd) && q.result() == OK {
			q.fail(errnoOf(c.exp.sync(), cmdFlush))
		}
		_ = c.send(c.appendReply(scratch[:0], q.h, q.result()))
	}
	c.srv.pool.putRequest(q)
}

func changes(cmd uint16) bool { return cmd == cmdWrite || cmd == cmdTrim || cmd == cmdZeroes }

// executeRead reads and sends chunk by chunk, or at once where the reply must
// not be cut. Nothing is sent of a chunk before its data was read.
func (c *conn) executeRead(q *request, scratch []byte) {
	h := q.h
	off, left, step := int64(h.off), int(h.length), int(h.length)
	if c.mayChunk(h) {
		step = min(step, readChunk)
	}
	head := c.dataHeader()
	buf := c.srv.pool.get(head + step)
	defer c.srv.pool.put(buf)
	for left > 0 {
		n := min(left, step)
		if _, err := c.exp.Device.ReadAt(buf.b[head:head+n], off); err != nil {
			q.fail(errnoOf(err, cmdRead))
			c.finish(q, scratch)
			return
		}
		flags := chunkDone
		if n < left {
			flags = 0
		}
		c.appendDataHeader(buf.b[:0], h, flags, off, n)
		if c.send(buf.b[:head+n]) != nil {
			break
		}
		c.bytesRead.Add(uint64(n))
		off, left = off+int64(n), left-n
	}
	q.silent.Store(true) // answered, or nobody listens
	c.finish(q, scratch)
}

// executeBlockStatus answers with the extents from the offset on, as many as
// fit; the protocol allows to describe less than was asked.
func (c *conn) executeBlockStatus(q *request, scratch []byte) {
	h := q.h
	limit := maxExtents
	if h.flags&cmdReqOne != 0 {
		limit = 1
	}
	const head = chunkSize + 4
	buf := c.srv.pool.get(head + maxExtents*8)
	defer c.srv.pool.put(buf)
	x := extentList{p: buf.b[head:head], limit: limit, next: int64(h.off), end: int64(h.off) + int64(h.length)}
	if c.exp.mapper != nil {
		err := c.exp.mapper.Map(int64(h.off), int64(h.length), x.add)
		if err != nil {
			q.fail(errnoOf(err, cmdBlockStatus))
			c.finish(q, scratch)
			return
		}
	}
	if x.next == int64(h.off) { // the device said nothing: all is data
		x.add(block.Extent{Range: block.Range{Off: x.next, Len: x.end - x.next}})
	}
	x.flush()
	p := appendChunk(buf.b[:0], chunkDone, chunkBlockStatus, h.cookie, uint32(4+len(x.p)))
	_ = binary.BigEndian.AppendUint32(p, contextAllocationID)
	_ = c.send(buf.b[:head+len(x.p)])
	q.silent.Store(true)
	c.finish(q, scratch)
}

// extentList gathers descriptors {length, flags}, joining equal neighbours.
type extentList struct {
	p         []byte
	limit     int
	count     int
	next, end int64
	length    int64 // of the descriptor being gathered
	flags     uint32
}

// add is the callback of Map. A gap or overlap ends the list: what was said
// before is still true.
func (x *extentList) add(e block.Extent) bool {
	if e.Off != x.next || e.Len <= 0 {
		return false
	}
	n := min(e.Len, x.end-x.next)
	var flags uint32
	if e.Hole {
		flags |= statusHole
	}
	if e.Zero {
		flags |= statusZero
	}
	if x.length > 0 && flags != x.flags {
		if x.count+1 >= x.limit {
			return false
		}
		x.flush()
	}
	x.length += n
	x.flags = flags
	x.next += n
	return x.next < x.end
}

// flush writes the descriptor being gathered.
func (x *extentList) flush() {
	if x.length == 0 {
		return
	}
	x.p = binary.BigEndian.AppendUint32(x.p, uint32(x.length))
	x.p = binary.BigEndian.AppendUint32(x.p, x.flags)
	x.length, x.count = 0, x.count+1
}
