package cutdisk

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// The few words of the NBD protocol that QEMU needs (fixed newstyle, simple
// replies); see https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md.
const (
	magicServer  = 0x4e42444d41474943 // NBDMAGIC
	magicOption  = 0x49484156454f5054 // IHAVEOPT
	magicAnswer  = 0x0003e889045565a9
	magicRequest = 0x25609513
	magicReply   = 0x67446698

	optExportName = 1
	optAbort      = 2
	optInfo       = 6
	optGo         = 7

	repAck   = 1
	repInfo  = 3
	repUnsup = 1<<31 + 1

	flags = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6 // flags, flush, FUA, trim, write zeroes

	cmdRead, cmdWrite, cmdDisc, cmdFlush, cmdTrim, cmdZeroes = 0, 1, 2, 3, 4, 6

	maxRequest = 32 << 20
	codeIO     = 5
	codeInval  = 22
)

// Server offers one disk on a unix socket to one client after the other.
type Server struct {
	disk *Disk
	ln   net.Listener
	wg   sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool // guarded by mu; nil once closed
}

// Serve starts a server for d on a unix socket.
func Serve(d *Disk, socket string) (*Server, error) {
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	s := &Server{disk: d, ln: ln, conns: map[net.Conn]bool{}}
	s.wg.Go(s.accept)
	return s, nil
}

// Close ends all connections and waits: no request is executed afterwards.
func (s *Server) Close() error {
	err := s.ln.Close()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.conns = nil
	s.mu.Unlock()
	s.wg.Wait()
	return err
}

func (s *Server) accept() {
	for {
		c, err := s.ln.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.conns == nil {
			s.mu.Unlock()
			_ = c.Close()
			return
		}
		s.conns[c] = true
		s.wg.Add(1)
		s.mu.Unlock()
		go func() {
			defer s.wg.Done()
			_ = s.client(c) // QEMU was killed, or says goodbye
			_ = c.Close()
			s.mu.Lock()
			delete(s.conns, c)
			s.mu.Unlock()
		}()
	}
}

func (s *Server) client(c net.Conn) error {
	r, w := bufio.NewReaderSize(c, 1<<20), bufio.NewWriter(c)
	if err := s.handshake(r, w); err != nil {
		return err
	}
	for {
		if err := s.request(r, w); err != nil {
			return err
		}
		if r.Buffered() == 0 {
			if err := w.Flush(); err != nil {
				return err
			}
		}
	}
}

var errBye = errors.New("the client says goodbye")

func put(w io.Writer, vs ...any) error {
	for _, v := range vs {
		if err := binary.Write(w, binary.BigEndian, v); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) handshake(r *bufio.Reader, w *bufio.Writer) error {
	if err := errors.Join(put(w, uint64(magicServer), uint64(magicOption), uint16(3)), w.Flush()); err != nil {
		return err
	}
	var client uint32
	if err := binary.Read(r, binary.BigEndian, &client); err != nil {
		return err
	}
	for {
		var h struct {
			Magic  uint64
			Option uint32
			Len    uint32
		}
		if err := binary.Read(r, binary.BigEndian, &h); err != nil {
			return err
		}
		if h.Magic != magicOption || h.Len > 64<<10 {
			return fmt.Errorf("option %d of %d bytes", h.Option, h.Len)
		}
		if _, err := io.CopyN(io.Discard, r, int64(h.Len)); err != nil {
			return err
		}
		answer := func(kind uint32, data ...any) error {
			return put(w, append([]any{uint64(magicAnswer), h.Option, kind, uint32(sizeOf(data))}, data...)...)
		}
		var err error
		switch h.Option {
		case optExportName:
			err = put(w, uint64(s.disk.size), uint16(flags))
			if err == nil && client&2 == 0 {
				err = put(w, make([]byte, 124))
			}
			return errors.Join(err, w.Flush())
		case optInfo, optGo:
			err = errors.Join(
				answer(repInfo, uint16(3), uint32(Sector), uint32(page), uint32(maxRequest)),
				answer(repInfo, uint16(0), uint64(s.disk.size), uint16(flags)), answer(repAck))
		case optAbort:
			return errors.Join(answer(repAck), w.Flush(), errBye)
		default:
			err = answer(repUnsup)
		}
		if err := errors.Join(err, w.Flush()); err != nil || h.Option == optGo {
			return err
		}
	}
}

func sizeOf(data []any) (n int) {
	for _, d := range data {
		n += binary.Size(d)
	}
	return n
}

// request executes one request; requests are executed in the order they come.
func (s *Server) request(r *bufio.Reader, w *bufio.Writer) error {
	var q struct {
		Magic       uint32
		Flags, Type uint16
		Cookie      uint64
		Off         uint64
		Len         uint32
	}
	if err := binary.Read(r, binary.BigEndian, &q); err != nil {
		return err
	}
	if q.Magic != magicRequest || q.Len > maxRequest && q.Type <= cmdWrite {
		return fmt.Errorf("request %d of %d bytes", q.Type, q.Len)
	}
	fua := q.Flags&1 != 0
	var err error
	var data []byte
	switch q.Type {
	case cmdRead:
		data = make([]byte, q.Len)
		err = s.disk.read(data, int64(q.Off))
	case cmdWrite:
		in := make([]byte, q.Len)
		if _, err := io.ReadFull(r, in); err != nil {
			return err // a write that did not arrive whole never happened
		}
		err = s.disk.write(int64(q.Off), int64(q.Len), in, fua)
	case cmdTrim, cmdZeroes:
		err = s.disk.write(int64(q.Off), int64(q.Len), nil, fua)
	case cmdFlush:
		err = s.disk.flush()
	case cmdDisc:
		return errBye
	default:
		return errors.Join(put(w, uint32(magicReply), uint32(codeInval), q.Cookie), w.Flush())
	}
	if errors.Is(err, errOff) {
		// What was answered but is still in our buffer was executed; the rest of
		// the world ends here.
		_, err := io.Copy(io.Discard, r)
		return errors.Join(errOff, err)
	}
	if err != nil {
		return put(w, uint32(magicReply), uint32(codeIO), q.Cookie)
	}
	return put(w, uint32(magicReply), uint32(0), q.Cookie, data)
}
