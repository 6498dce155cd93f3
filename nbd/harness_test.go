package nbd_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// patience bounds every wait of a test; reaching it is a failure.
const patience = 2 * time.Minute

func requires(t testing.TB, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skipf("needs %s: %v", tool, err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newFile opens a sparse image of the given size.
func newFile(t testing.TB, size int64) *block.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	f, err := block.OpenFile(path, block.FileOptions{})
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// service is a server on a unix socket.
type service struct {
	srv    *nbd.Server
	socket string
}

func (s service) uri() string { return s.uriOf("") }

func (s service) uriOf(export string) string {
	return "nbd+unix:///" + url.PathEscape(export) + "?socket=" + s.socket
}

// serve offers exports until the test ends.
func serve(t testing.TB, opts nbd.Options, exports ...nbd.Export) service {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbdt") // short: a socket's path has 107 bytes
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := service{srv: nbd.NewServer(opts), socket: filepath.Join(dir, "s")}
	for _, x := range exports {
		must(t, s.srv.Add(x))
	}
	ln, err := net.Listen("unix", s.socket)
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- s.srv.Serve(context.Background(), ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		for _, x := range exports {
			if h, ok := x.Device.(*held); ok {
				h.letGo()
			}
		}
		if err := s.srv.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil && !errors.Is(err, nbd.ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	return s
}

// dial connects a Client.
func (s service) dial(t testing.TB, opts nbd.ClientOptions) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(t.Context(), "unix", s.socket, opts)
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// raw is a peer that sends whatever bytes a test wants.
type raw struct {
	net.Conn
	t testing.TB
}

// connect opens a raw connection and reads the greeting.
func (s service) connect(t testing.TB) *raw {
	t.Helper()
	nc, err := net.Dial("unix", s.socket)
	must(t, err)
	must(t, nc.SetDeadline(time.Now().Add(patience)))
	r := &raw{Conn: nc, t: t}
	t.Cleanup(func() { _ = nc.Close() })
	r.read(18)
	return r
}

func (r *raw) send(parts ...any) {
	r.t.Helper()
	must(r.t, r.trySend(parts...))
}

// trySend sends numbers big-endian, byte slices and strings as they are.
func (r *raw) trySend(parts ...any) error {
	var p []byte
	for _, x := range parts {
		switch v := x.(type) {
		case uint16:
			p = binary.BigEndian.AppendUint16(p, v)
		case uint32:
			p = binary.BigEndian.AppendUint32(p, v)
		case uint64:
			p = binary.BigEndian.AppendUint64(p, v)
		case []byte:
			p = append(p, v...)
		case string:
			p = append(p, v...)
		default:
			r.t.Fatalf("cannot send %T", x)
		}
	}
	_, err := r.Write(p)
	return err
}

func (r *raw) read(n int) []byte {
	r.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(r, p); err != nil {
		r.t.Fatalf("read %d bytes: %v", n, err)
	}
	return p
}

// closed waits for the server to hang up.
func (r *raw) closed() {
	r.t.Helper()
	if n, err := io.Copy(io.Discard, r); err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		r.t.Fatalf("server did not hang up; it sent %d bytes", n)
	}
}

// Numbers of the protocol, written down anew.
const (
	magicOption  = uint64(0x49484156454f5054)
	magicReply   = uint64(0x3e889045565a9)
	magicRequest = uint32(0x25609513)
	magicSimple  = uint32(0x67446698)
	magicChunk   = uint32(0x668e33ef)

	optExportName = uint32(1)
	optAbort      = uint32(2)
	optList       = uint32(3)
	optInfo       = uint32(6)
	optGo         = uint32(7)
	optStructured = uint32(8)
	optSetMeta    = uint32(10)

	cmdRead, cmdWrite, cmdDisc, cmdFlush          = uint16(0), uint16(1), uint16(2), uint16(3)
	cmdTrim, cmdCache, cmdZeroes, cmdStatus       = uint16(4), uint16(5), uint16(6), uint16(7)
	flagFUA, flagNoHole, flagDF, flagOne, flagFZ  = uint16(1), uint16(2), uint16(4), uint16(8), uint16(16)
	errPerm, errIO, errInval, errNoSpace, errOver = uint32(1), uint32(5), uint32(22), uint32(28), uint32(75)
	errNotSup, errShut                            = uint32(95), uint32(108)
)

// option sends an option and returns the types of the replies and the last
// one's data.
func (r *raw) option(opt uint32, data []byte) (types []uint32, last []byte) {
	r.t.Helper()
	r.send(magicOption, opt, uint32(len(data)), data)
	for {
		h := r.read(20)
		if got := binary.BigEndian.Uint64(h); got != magicReply || binary.BigEndian.Uint32(h[8:]) != opt {
			r.t.Fatalf("reply %x to option %d", h, opt)
		}
		typ := binary.BigEndian.Uint32(h[12:])
		last = r.read(int(binary.BigEndian.Uint32(h[16:])))
		types = append(types, typ)
		if typ == 1 || typ>>31 == 1 {
			return types, last
		}
	}
}

// enter goes to the transmission phase of the default export.
func (r *raw) enter(structured bool) {
	r.t.Helper()
	r.send(uint32(3))
	if structured {
		r.option(optStructured, nil)
		ctx := "base:allocation"
		data := append(make([]byte, 4), 0, 0, 0, 1, 0, 0, 0, byte(len(ctx)))
		r.option(optSetMeta, append(data, ctx...))
	}
	if types, text := r.option(optGo, make([]byte, 6)); types[len(types)-1] != 1 {
		r.t.Fatalf("GO refused: %x %s", types, text)
	}
}

func (r *raw) request(flags, cmd uint16, cookie, off uint64, length uint32, payload ...byte) {
	r.t.Helper()
	r.send(magicRequest, flags, cmd, cookie, off, length, payload)
}

// simple reads a simple reply.
func (r *raw) simple() (cookie uint64, errno uint32) {
	r.t.Helper()
	h := r.read(16)
	if binary.BigEndian.Uint32(h) != magicSimple {
		r.t.Fatalf("no simple reply: %x", h)
	}
	return binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[4:])
}

type chunk struct {
	flags, typ uint16
	cookie     uint64
	data       []byte
}

// chunk reads one chunk of a structured reply.
func (r *raw) chunk() chunk {
	r.t.Helper()
	h := r.read(20)
	if binary.BigEndian.Uint32(h) != magicChunk {
		r.t.Fatalf("no structured reply: %x", h)
	}
	return chunk{
		flags: binary.BigEndian.Uint16(h[4:]), typ: binary.BigEndian.Uint16(h[6:]), cookie: binary.BigEndian.Uint64(h[8:]),
		data: r.read(int(binary.BigEndian.Uint32(h[16:]))),
	}
}

// answer reads any reply and returns its error number.
func (r *raw) answer() (cookie uint64, errno uint32) {
	r.t.Helper()
	h := r.read(4)
	if binary.BigEndian.Uint32(h) == magicSimple {
		h = r.read(12)
		return binary.BigEndian.Uint64(h[4:]), binary.BigEndian.Uint32(h)
	}
	for {
		h = r.read(16)
		data := r.read(int(binary.BigEndian.Uint32(h[12:])))
		if binary.BigEndian.Uint16(h[2:])>>15 == 1 && errno == 0 {
			errno = binary.BigEndian.Uint32(data)
		}
		if binary.BigEndian.Uint16(h)&1 == 1 {
			return binary.BigEndian.Uint64(h[4:]), errno
		}
		r.read(4)
	}
}
