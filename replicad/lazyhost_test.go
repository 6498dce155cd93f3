package replicad

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/libvirt"
)

// silentLibvirtd opens connections and says its version; it answers nothing else,
// as one that is stuck on a guest.
func silentLibvirtd(t *testing.T) (socket string, dialled *atomic.Int32) {
	t.Helper()
	socket, dialled = filepath.Join(t.TempDir(), "s"), new(atomic.Int32)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			dialled.Add(1)
			go answerOpen(c)
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return socket, dialled
}

// answerOpen ends with its client.
func answerOpen(c net.Conn) {
	defer c.Close()
	for {
		var h [28]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(h[:]))-int64(len(h))); err != nil {
			return
		}
		var payload []byte
		switch binary.BigEndian.Uint32(h[12:]) {
		case 66: // which authentication: none
			payload = []byte{0, 0, 0, 1, 0, 0, 0, 0}
		case 1: // open
		case 157: // version of the library
			payload = binary.BigEndian.AppendUint64(nil, 9_000_000)
		default:
			continue
		}
		binary.BigEndian.PutUint32(h[:], uint32(len(h)+len(payload)))
		binary.BigEndian.PutUint32(h[16:], 1) // a reply
		binary.BigEndian.PutUint32(h[24:], 0) // that is none of an error
		if _, err := c.Write(append(h[:], payload...)); err != nil {
			return
		}
	}
}

// A host that does not say whom QEMU runs as is of no use as long as nobody
// knows: sockets would get the wrong owner. Where it was learnt before, the
// guests must not wait for it.
func TestALibvirtThatDoesNotSayWhoItIsIsOfUseOnlyWhereThatIsKnown(t *testing.T) {
	t.Parallel()
	socket, dialled := silentLibvirtd(t)
	known := false
	l := &lazyHost{
		opt:   libvirt.Options{Socket: socket, CallTimeout: 100 * time.Millisecond},
		learn: func(i libvirt.HostInfo) { t.Errorf("it was learnt: %+v", i) },
		known: func() bool { return known },
	}
	if h, err := l.host(t.Context()); err == nil || h != nil {
		t.Fatalf("taken although nobody knows whom QEMU runs as: %v", err)
	}
	known = true
	h, err := l.host(t.Context())
	if err != nil {
		t.Fatalf("known from before: %v", err)
	}
	defer h.Close()
	n := dialled.Load()
	if again, err := l.host(t.Context()); again != h || err != nil || dialled.Load() != n {
		t.Errorf("it is not kept: %v, dialled %d times, then %d", err, n, dialled.Load())
	}
}
