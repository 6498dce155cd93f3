package nbd_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/server"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/nbd"
)

// plain hides every optional interface, so that each request is parked.
type plain struct{ dev block.Device }

func (p plain) ReadAt(b []byte, off int64) (int, error)  { return p.dev.ReadAt(b, off) }
func (p plain) WriteAt(b []byte, off int64) (int, error) { return p.dev.WriteAt(b, off) }
func (p plain) ZeroAt(off, n int64, punch bool) error    { return p.dev.ZeroAt(off, n, punch) }
func (p plain) Sync() error                              { return p.dev.Sync() }
func (p plain) Size() int64                              { return p.dev.Size() }
func (p plain) Close() error                             { return p.dev.Close() }

func TestClientOfOurServerConforms(t *testing.T) {
	for _, c := range []struct {
		name string
		wrap func(*block.File) block.Device
	}{
		{"inline", func(f *block.File) block.Device { return f }},
		{"parked", func(f *block.File) block.Device { return plain{f} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T, size int64) block.Device {
				s := serve(t, nbd.Options{}, nbd.Export{Device: c.wrap(newFile(t, size))})
				return s.dial(t, nbd.ClientOptions{})
			})
		})
	}
}

func TestPlainTransportsWorkToo(t *testing.T) {
	for _, network := range []string{"tcp", "pipe"} {
		t.Run(network, func(t *testing.T) {
			f := newFile(t, 1<<20)
			s := serve(t, nbd.Options{}, nbd.Export{Device: f})
			var nc net.Conn
			if network == "pipe" {
				var theirs net.Conn
				nc, theirs = net.Pipe()
				go s.srv.Serve(t.Context(), &oneConn{conn: theirs, closed: make(chan struct{})}) //nolint:errcheck // ends with the test
			} else {
				ln, err := net.Listen("tcp", "127.0.0.1:0")
				must(t, err)
				go s.srv.Serve(t.Context(), ln) //nolint:errcheck // ends with the test
				nc, err = net.Dial("tcp", ln.Addr().String())
				must(t, err)
			}
			c, err := nbd.NewClient(t.Context(), nc, nbd.ClientOptions{})
			must(t, err)
			defer c.Close()
			want := make([]byte, 300<<10)
			fill(want, 1)
			_, err = c.WriteAt(want, 4000)
			must(t, err)
			must(t, c.Sync())
			expect(t, c, 4000, want)
			expect(t, f, 4000, want)
		})
	}
}

// oneConn is a listener with one connection.
type oneConn struct {
	conn   net.Conn
	closed chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn = nil
		return c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}
func (l *oneConn) Close() error   { defer func() { _ = recover() }(); close(l.closed); return nil }
func (l *oneConn) Addr() net.Addr { return nil }

// fill writes a pattern that differs in every 512 bytes.
func fill(p []byte, seed byte) {
	for i := range p {
		p[i] = seed + byte(i) + byte(i>>9)*7 + byte(i>>17)*13
	}
}

func expect(t testing.TB, r io.ReaderAt, off int64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	_, err := r.ReadAt(got, off)
	must(t, err)
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %d is %#x, want %#x", off+int64(i), got[i], want[i])
		}
	}
}

func TestForeignGoServerReadsThroughOurAdapter(t *testing.T) {
	f := newFile(t, 1<<20)
	want := make([]byte, 64<<10)
	fill(want, 3)
	_, err := f.WriteAt(want, 8192)
	must(t, err)
	ours, theirs := net.Pipe()
	go server.Handle(theirs, []*server.Export{{Name: "x", Backend: nbd.ReadOnlyBackend(f)}}, nil) //nolint:errcheck // ends with the pipe
	c, err := nbd.NewClient(t.Context(), ours, nbd.ClientOptions{Export: "x", ReadOnly: true})
	must(t, err)
	defer c.Close()
	expect(t, c, 8192, want)
	if _, err := c.WriteAt(want, 0); err == nil {
		t.Error("write through a read-only client succeeded")
	}
	d, err := nbd.BackendDevice(nbd.ReadOnlyBackend(f))
	must(t, err)
	expect(t, d, 8192, want)
	if _, err := d.ReadAt(make([]byte, 1), d.Size()); err == nil {
		t.Error("read past the end succeeded")
	}
	if got := fmt.Sprint(d.ZeroAt(0, 1, false)); got == "<nil>" {
		t.Error("zero through a read-only device succeeded")
	}
}
