package nbd

import (
	"errors"

	"kvmreplica/internal/block"
)

// exactReceive: behind a write longer than this the loop receives no more than
// the write itself, so that the next payload needs no moving.
const exactReceive = 64 << 10

// write executes a valid WRITE in pieces, each wholly in the input window. A
// piece that would wait is copied and parked; the loop goes on.
func (c *conn) write(h header) error {
	var (
		q     *request // made when the first piece is parked
		errno Errno
		off   = int64(h.off)
		left  = int(h.length)
	)
	for left > 0 {
		n := min(left, c.exp.MaxPiece)
		if err := c.need(n, receiveLimit(left, n)); err != nil {
			c.giveUp(q)
			return err
		}
		if errno == OK {
			var err error
			if q, err = c.writePiece(q, h, c.in[c.r:c.r+n], off, &errno); err != nil {
				c.giveUp(q)
				return err
			}
		}
		c.r += n
		off, left = off+int64(n), left-n
	}
	if errno == OK {
		c.bytesWritten.Add(uint64(h.length))
	}
	if q != nil {
		return c.finishFromLoop(q, errno)
	}
	if errno == OK && h.flags&cmdFUA != 0 {
		return c.sync(h)
	}
	return c.reply(h, errno)
}

// receiveLimit bounds what is received while a piece of n bytes is awaited
// with left bytes of its write to come.
func receiveLimit(left, n int) int {
	switch {
	case left > n:
		return n
	case n > exactReceive:
		return n + requestSize
	}
	return inSize
}

// writePiece writes p at off, or parks a copy of it. The error ends the
// connection; errno is the request's result so far.
func (c *conn) writePiece(q *request, h header, p []byte, off int64, errno *Errno) (*request, error) {
	if q != nil {
		if *errno = q.result(); *errno != OK {
			return q, nil // an earlier piece failed: consume the rest
		}
	}
	if c.exp.writer != nil {
		_, err := c.exp.writer.TryWriteAt(p, off)
		if err == nil {
			return q, nil
		}
		if !errors.Is(err, block.ErrWouldBlock) {
			*errno = errnoOf(err, cmdWrite)
			return q, nil
		}
	}
	if err := c.acquire(len(p)); err != nil {
		return q, err
	}
	if q == nil {
		q = c.srv.pool.request(h)
		c.parked.Add(1)
	}
	buf := c.srv.pool.get(len(p))
	copy(buf.b, p)
	q.parts.Add(1)
	c.submit(task{q: q, buf: buf, off: off, cost: len(p)})
	return q, nil
}

// finishFromLoop drops the loop's own hold on a request with parked pieces.
func (c *conn) finishFromLoop(q *request, errno Errno) error {
	q.fail(errno)
	if q.parts.Add(-1) > 0 {
		return nil // the last piece answers
	}
	h, errno := q.h, q.result()
	c.srv.pool.putRequest(q)
	if errno == OK && h.flags&cmdFUA != 0 {
		return c.sync(h)
	}
	return c.reply(h, errno)
}

// giveUp drops the loop's hold on a write whose payload never came; it gets no
// answer.
func (c *conn) giveUp(q *request) {
	if q == nil {
		return
	}
	q.silent.Store(true)
	if q.parts.Add(-1) == 0 {
		c.srv.pool.putRequest(q)
	}
}
