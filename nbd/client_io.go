package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"kvmreplica/internal/block"
)

// call is one request under way. The caller owns it until its cookie is set,
// then the receiver does, until done.
type call struct {
	index  uint32
	turn   uint32        // how often it was used: part of the cookie
	cookie atomic.Uint64 // 0 while not under way

	h       header
	data    []byte // where a READ goes
	got     int    // bytes of data received
	extents []block.Extent
	next    int64 // where the next extent starts
	errno   Errno
	done    chan struct{}
}

const (
	clientBuffer  = 64 << 10
	maxErrorChunk = 64 << 10
	maxStatusSize = 1 << 20
)

// do sends one request and waits for the answer.
func (c *Client) do(h header, payload, data []byte, op string) (*call, error) {
	var q *call
	select {
	case q = <-c.slots:
	case <-c.dead:
		return nil, c.Err()
	}
	q.turn++
	h.cookie = uint64(q.turn)<<32 | uint64(q.index) + 1
	q.h, q.data, q.got, q.errno = h, data, 0, OK
	q.extents, q.next = q.extents[:0], int64(h.off)
	q.cookie.Store(h.cookie)
	if err := c.send(h, payload); err != nil {
		c.fail(fmt.Errorf("%w: %w", ErrDisconnected, err))
	}
	select {
	case <-q.done:
	case <-c.dead:
		<-c.done // the receiver no longer writes into data
		select {
		case <-q.done:
		default:
			return nil, c.Err()
		}
	}
	if q.errno != OK {
		c.slots <- q
		return nil, &RequestError{Op: op, Off: int64(h.off), Len: int64(h.length), Errno: q.errno}
	}
	return q, nil
}

// simple is do for requests whose answer is a number.
func (c *Client) simple(h header, payload, data []byte, op string) error {
	q, err := c.do(h, payload, data, op)
	if err == nil {
		c.slots <- q
	}
	return err
}

func (c *Client) send(h header, payload []byte) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	c.sendBf = appendHeader(c.sendBf[:0], h)
	if len(payload) <= clientBuffer {
		c.sendBf = append(c.sendBf, payload...)
		payload = nil
	}
	_, err := c.nc.Write(c.sendBf)
	if err == nil && len(payload) > 0 {
		_, err = c.nc.Write(payload)
	}
	return err
}

// receive reads replies until the connection ends.
func (c *Client) receive() {
	defer close(c.done)
	r := bufio.NewReaderSize(c.nc, clientBuffer)
	for {
		if err := c.receiveOne(r); err != nil {
			if c.rest(err, r.Buffered()) {
				continue
			}
			if !errors.Is(err, ErrProtocol) {
				err = fmt.Errorf("%w: %w", ErrDisconnected, err)
			}
			c.fail(err)
			return
		}
	}
}

func (c *Client) receiveOne(r *bufio.Reader) error {
	head, err := r.Peek(simpleSize)
	if err != nil {
		return err
	}
	if binary.BigEndian.Uint32(head) == magicStructuredReply {
		return c.receiveChunk(r)
	}
	if binary.BigEndian.Uint32(head) != magicSimpleReply {
		return fmt.Errorf("%w: bad magic in a reply", ErrProtocol)
	}
	errno := Errno(binary.BigEndian.Uint32(head[4:]))
	q, err := c.lookup(binary.BigEndian.Uint64(head[8:]))
	if err != nil {
		return err
	}
	_, _ = r.Discard(simpleSize)
	if errno == OK && q.data != nil {
		if c.info.structured {
			return fmt.Errorf("%w: simple reply to a read", ErrProtocol)
		}
		if _, err := io.ReadFull(r, q.data); err != nil {
			return err
		}
		q.got = len(q.data)
	}
	q.errno = errno.known()
	return c.complete(q)
}

func (c *Client) lookup(cookie uint64) (*call, error) {
	i := uint32(cookie) - 1
	if int64(i) >= int64(len(c.table)) || c.table[i].cookie.Load() != cookie {
		return nil, fmt.Errorf("%w: reply to a request that was not sent", ErrProtocol)
	}
	return c.table[i], nil
}

func (c *Client) complete(q *call) error {
	if q.errno == OK && q.got != len(q.data) {
		return fmt.Errorf("%w: %d bytes answer a read of %d", ErrProtocol, q.got, len(q.data))
	}
	q.cookie.Store(0)
	q.data = nil
	q.done <- struct{}{}
	return nil
}

// receiveChunk reads one chunk of a structured reply.
func (c *Client) receiveChunk(r *bufio.Reader) error {
	var in [chunkSize]byte
	if _, err := io.ReadFull(r, in[:]); err != nil {
		return err
	}
	flags, typ := binary.BigEndian.Uint16(in[4:]), binary.BigEndian.Uint16(in[6:])
	length := binary.BigEndian.Uint32(in[16:])
	q, err := c.lookup(binary.BigEndian.Uint64(in[8:]))
	if err != nil {
		return err
	}
	switch {
	case !c.info.structured:
		return fmt.Errorf("%w: structured reply was not negotiated", ErrProtocol)
	case typ == chunkNone && length == 0 && flags&chunkDone != 0:
	case typ == chunkData && length > chunkDataExtra:
		err = q.receiveData(r, length-chunkDataExtra)
	case typ == chunkHole && length == 12:
		err = q.receiveHole(r)
	case typ == chunkBlockStatus && length >= 12 && length <= maxStatusSize && length%8 == 4:
		err = q.receiveStatus(r, length)
	case typ&chunkErrorBit != 0 && length >= 6 && length <= maxErrorChunk:
		err = q.receiveError(r, length)
	default:
		return fmt.Errorf("%w: chunk of type %d with %d bytes", ErrProtocol, typ, length)
	}
	if err != nil || flags&chunkDone == 0 {
		return err
	}
	return c.complete(q)
}

// place checks that [off, off+n) lies in the read and gives the memory.
func (q *call) place(off uint64, n uint32) ([]byte, error) {
	if q.data == nil || off < q.h.off || off-q.h.off > uint64(len(q.data)) || uint64(n) > uint64(len(q.data))-(off-q.h.off) ||
		q.got+int(n) > len(q.data) {
		return nil, fmt.Errorf("%w: data outside the read", ErrProtocol)
	}
	at := off - q.h.off
	q.got += int(n)
	return q.data[at : at+uint64(n)], nil
}

func (q *call) receiveData(r *bufio.Reader, n uint32) error {
	var in [8]byte
	if _, err := io.ReadFull(r, in[:]); err != nil {
		return err
	}
	p, err := q.place(binary.BigEndian.Uint64(in[:]), n)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(r, p)
	return err
}

func (q *call) receiveHole(r *bufio.Reader) error {
	var in [12]byte
	if _, err := io.ReadFull(r, in[:]); err != nil {
		return err
	}
	p, err := q.place(binary.BigEndian.Uint64(in[:]), binary.BigEndian.Uint32(in[8:]))
	clear(p)
	return err
}

func (q *call) receiveError(r *bufio.Reader, length uint32) error {
	body := make([]byte, length)
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	errno := Errno(binary.BigEndian.Uint32(body)).known()
	if errno == OK {
		return fmt.Errorf("%w: error chunk without an error", ErrProtocol)
	}
	if q.errno == OK {
		q.errno = errno
	}
	return nil
}

func (q *call) receiveStatus(r *bufio.Reader, length uint32) error {
	body := make([]byte, length)
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	if q.h.cmd != cmdBlockStatus {
		return fmt.Errorf("%w: block status was not asked", ErrProtocol)
	}
	for p := body[4:]; len(p) > 0; p = p[8:] {
		n, flags := int64(binary.BigEndian.Uint32(p)), binary.BigEndian.Uint32(p[4:])
		if n == 0 {
			return fmt.Errorf("%w: empty extent", ErrProtocol)
		}
		q.extents = append(q.extents, block.Extent{
			Range: block.Range{Off: q.next, Len: n},
			Hole:  flags&statusHole != 0, Zero: flags&statusZero != 0,
		})
		q.next += n
	}
	return nil
}
