package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// kind is what a workload asks of a server.
type kind string

const (
	reads      kind = "read"
	writes     kind = "write"
	writeFlush kind = "write+flush" // pairs; a pair counts as one operation
	firstTouch kind = "first touch" // writes, each into another MiB than all before
)

// load is one workload of one client.
type load struct {
	Kind       kind `json:"kind"`
	Size       int  `json:"size"`
	Depth      int  `json:"depth"`
	Sequential bool `json:"sequential"`
	// Simple leaves structured replies out of the handshake; QEMU asks for them.
	Simple bool `json:"simple"`
}

func (w load) String() string {
	s := fmt.Sprintf("%s %s q%d", w.Kind, bytesText(w.Size), w.Depth)
	if w.Simple {
		s += " simple"
	}
	return s
}

func bytesText(n int) string {
	if n >= 1<<20 {
		return fmt.Sprintf("%dM", n>>20)
	}
	return fmt.Sprintf("%dK", n>>10)
}

// sample is what one round measured.
type sample struct {
	ops  int
	took time.Duration
	cpu  time.Duration   // of the server
	all  time.Duration   // of the server, with what is not measured
	lat  []time.Duration // of single requests, unordered
}

// Requests and replies of the protocol, as far as a load needs them.
const (
	reqMagic    = 0x25609513
	simpleMagic = 0x67446698
	chunkMagic  = 0x668e33ef
	reqSize     = 28

	nbdRead  = 0
	nbdWrite = 1
	nbdDisc  = 2
	nbdFlush = 3
)

// client drives one connection with blocking calls from one thread, so that it
// costs little beside the server: one writev per batch, one recv per batch, no
// look at payloads.
type client struct {
	fd  int
	w   load
	pos int64 // of the disk

	rng   *rand.Rand
	turn  int64
	first int64
	heads []byte
	iov   [][]byte
	begun []time.Time // by slot
	free  []int       // slots
	in    []byte
	have  int
	skip  int    // payload of a chunk still to come
	last  bool   // that chunk ends a reply
	slot  uint64 // whose reply that chunk belongs to
	lat   []time.Duration

	payload []byte // of a write; not zeros, which could be taken for a hole
}

const clientBuffer = 256 << 10

// dial connects and goes through the handshake.
func (s *server) dial(w load, size int64, seed uint64) (*client, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	c := &client{
		fd: fd, w: w, pos: size, rng: rand.New(rand.NewPCG(seed, 1)),
		in: make([]byte, clientBuffer), begun: make([]time.Time, w.Depth),
		heads: make([]byte, 0, 2*w.Depth*reqSize), lat: make([]time.Duration, 0, 1<<16),
	}
	c.payload = make([]byte, w.Size)
	for i := range c.payload {
		c.payload[i] = byte(i*7 + i>>11 + 1)
	}
	for i := range w.Depth {
		c.free = append(c.free, i)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.socket}); err != nil {
		return nil, errors.Join(fmt.Errorf("connect %s: %w", s.socket, err), unix.Close(fd))
	}
	if err := c.handshake(s.export); err != nil {
		return nil, errors.Join(fmt.Errorf("handshake: %w", err), unix.Close(fd))
	}
	return c, nil
}

func (c *client) readFull(n int) ([]byte, error) {
	p := make([]byte, n)
	for done := 0; done < n; {
		m, err := unix.Read(c.fd, p[done:])
		if m == 0 && err == nil {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
		done += max(m, 0)
	}
	return p, nil
}

func (c *client) handshake(export string) error {
	if _, err := c.readFull(18); err != nil {
		return err
	}
	if _, err := unix.Write(c.fd, binary.BigEndian.AppendUint32(nil, 3)); err != nil {
		return err
	}
	if !c.w.Simple {
		if err := c.option(8, nil); err != nil {
			return err
		}
	}
	name := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	return c.option(7, append(append(name, export...), 0, 0))
}

// option sends an option and reads replies up to ACK.
func (c *client) option(opt uint32, data []byte) error {
	p := append([]byte("IHAVEOPT"), 0, 0, 0, 0, 0, 0, 0, 0)
	binary.BigEndian.PutUint32(p[8:], opt)
	binary.BigEndian.PutUint32(p[12:], uint32(len(data)))
	if _, err := unix.Write(c.fd, append(p, data...)); err != nil {
		return err
	}
	for {
		h, err := c.readFull(20)
		if err != nil {
			return err
		}
		typ, n := binary.BigEndian.Uint32(h[12:]), binary.BigEndian.Uint32(h[16:])
		if _, err := c.readFull(int(n)); err != nil {
			return err
		}
		switch {
		case typ == 1:
			return nil
		case typ>>31 != 0:
			return fmt.Errorf("server refuses option %d with %#x", opt, typ)
		}
	}
}

// run keeps the depth full for d, then lets what is under way end.
func (c *client) run(d time.Duration) (ops int, took time.Duration, err error) {
	start := time.Now()
	now := start
	for {
		for now.Sub(start) < d && len(c.free) > 0 {
			c.next(now)
		}
		if len(c.free) == c.w.Depth {
			return ops, now.Sub(start), nil
		}
		if err := c.push(); err != nil {
			return 0, 0, err
		}
		n, err := unix.Read(c.fd, c.in[c.have:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, 0, err
		case n == 0:
			return 0, 0, errors.New("server hung up")
		}
		c.have += n
		now = time.Now()
		done, err := c.parse(now)
		if err != nil {
			return 0, 0, err
		}
		ops += done
	}
}

// next queues one request in a free slot.
func (c *client) next(now time.Time) {
	slot := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	c.begun[slot] = now
	cmd, off := uint16(nbdRead), c.offset()
	if c.w.Kind != reads {
		cmd = nbdWrite
	}
	c.queue(cmd, uint64(slot), off, uint32(c.w.Size))
	c.turn++
}

func (c *client) offset() int64 {
	slots := c.pos / int64(c.w.Size)
	switch {
	case c.w.Kind == firstTouch: // in an order nobody can run ahead of
		return (c.first + c.turn*7919) % (c.pos >> 20) << 20
	case c.w.Sequential:
		return c.turn % slots * int64(c.w.Size)
	}
	return c.rng.Int64N(slots) * int64(c.w.Size)
}

func (c *client) queue(cmd uint16, cookie uint64, off int64, n uint32) {
	at := len(c.heads)
	c.heads = binary.BigEndian.AppendUint32(c.heads, reqMagic)
	c.heads = binary.BigEndian.AppendUint32(c.heads, uint32(cmd))
	c.heads = binary.BigEndian.AppendUint64(c.heads, cookie)
	c.heads = binary.BigEndian.AppendUint64(c.heads, uint64(off))
	c.heads = binary.BigEndian.AppendUint32(c.heads, n)
	c.iov = append(c.iov, c.heads[at:])
	if cmd == nbdWrite {
		c.iov = append(c.iov, c.payload)
	}
}

// push sends all that is queued.
func (c *client) push() error {
	left := c.iov
	for len(left) > 0 {
		n, err := unix.Writev(c.fd, left[:min(len(left), 512)])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for n > 0 {
			k := min(n, len(left[0]))
			n -= k
			if left[0] = left[0][k:]; len(left[0]) == 0 {
				left = left[1:]
			}
		}
	}
	c.iov, c.heads = c.iov[:0], c.heads[:0]
	return nil
}

// parse consumes what was received and counts the operations that ended.
func (c *client) parse(now time.Time) (done int, err error) {
	p := c.in[:c.have]
	for len(p) > 0 {
		if c.skip > 0 {
			n := min(c.skip, len(p))
			p, c.skip = p[n:], c.skip-n
			if c.skip == 0 && c.last {
				done += c.answered(c.slot, now)
			}
			continue
		}
		if len(p) < 20 && (len(p) < 16 || binary.BigEndian.Uint32(p) != simpleMagic) {
			break
		}
		c.slot = binary.BigEndian.Uint64(p[8:])
		switch binary.BigEndian.Uint32(p) {
		case simpleMagic:
			if e := binary.BigEndian.Uint32(p[4:]); e != 0 {
				return done, fmt.Errorf("server answers error %d", e)
			}
			p = p[16:]
			if c.last = true; c.w.Kind == reads {
				c.skip = c.w.Size
				continue
			}
			done += c.answered(c.slot, now)
		case chunkMagic:
			if typ := binary.BigEndian.Uint16(p[6:]); typ>>15 != 0 {
				return done, fmt.Errorf("server answers with error chunk %#x", typ)
			}
			c.skip, c.last = int(binary.BigEndian.Uint32(p[16:])), p[5]&1 == 1
			if p = p[20:]; c.skip == 0 && c.last {
				done += c.answered(c.slot, now)
			}
		default:
			return done, errors.New("server sends what is no reply")
		}
	}
	c.have = copy(c.in, p)
	return done, nil
}

// flushBit in a cookie marks the second half of a pair.
const flushBit = 1 << 32

// answered ends a request; after the write of a pair comes its flush.
func (c *client) answered(cookie uint64, now time.Time) int {
	if c.w.Kind == writeFlush && cookie&flushBit == 0 {
		c.queue(nbdFlush, cookie|flushBit, 0, 0)
		return 0
	}
	slot := int(cookie &^ flushBit)
	c.free = append(c.free, slot)
	if len(c.lat) < cap(c.lat) {
		c.lat = append(c.lat, now.Sub(c.begun[slot]))
	}
	return 1
}

// pinThread binds the calling thread, which is locked, to a CPU until unpin.
func pinThread(cpu int) (unpin func(), err error) {
	var was, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &was); err != nil {
		return nil, err
	}
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return nil, err
	}
	return func() { _ = unix.SchedSetaffinity(0, &was) }, nil
}

// close says goodbye: some servers die of a client that just leaves.
func (c *client) close() error {
	c.queue(nbdDisc, 0, 0, 0)
	return errors.Join(c.push(), unix.Close(c.fd))
}

// measure runs one round of a workload against a server.
func (s *server) measure(w load, d time.Duration, size int64, seed uint64, pin bool) (sample, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if pin {
		unpin, err := pinThread(clientCPU)
		if err != nil {
			return sample{}, err
		}
		defer unpin()
	}
	begin := s.cpu()
	c, err := s.dial(w, size, seed)
	if err != nil {
		return sample{}, fmt.Errorf("%s: %w", s.name, err)
	}
	if _, _, err := c.run(d / 8); err != nil { // caches, workers, pools
		return sample{}, fmt.Errorf("%s: %w", s.name, err)
	}
	c.lat = c.lat[:0]
	before := s.cpu()
	ops, took, err := c.run(d)
	used := s.cpu() - before
	if err = errors.Join(err, c.close()); err != nil {
		text, _ := os.ReadFile(s.log)
		return sample{}, fmt.Errorf("%s: %s: %w\n%s", s.name, w, err, text)
	}
	return sample{ops: ops, took: took, cpu: used, all: s.cpu() - begin, lat: c.lat}, nil
}
