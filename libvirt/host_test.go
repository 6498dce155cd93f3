package libvirt

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	lv "github.com/digitalocean/go-libvirt"
)

func TestDialNamesWhatItTried(t *testing.T) {
	_, err := Dial(t.Context(), Options{Socket: filepath.Join(t.TempDir(), "none")})
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "none") {
		t.Fatalf("got %v", err)
	}
}

func TestErrorsAreToldApartByNumber(t *testing.T) {
	for code, want := range map[lv.ErrorNumber]error{
		lv.ErrNoDomain: ErrNotFound, lv.ErrNoDomainMetadata: ErrNotFound, lv.ErrDomExist: ErrExists, lv.ErrXMLError: ErrInvalid, lv.ErrOperationInvalid: ErrState,
		lv.ErrOperationTimeout: ErrBusy, lv.ErrHookScriptFailed: ErrDenied, lv.ErrNoSupport: ErrUnsupported, lv.ErrAgentUnresponsive: ErrAgent,
	} {
		err := wrapErr("x", lv.Error{Code: uint32(code), Message: "m"}, true)
		if !errors.Is(err, want) {
			t.Errorf("%d: %v is not %v", code, KindOf(err), want)
		}
	}
	if err := wrapErr("x", lv.ErrInterrupted, true); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "look again") {
		t.Errorf("interrupted: %v", err)
	}
}

// muteLibvirtd answers the calls that open a connection and the version, and
// is silent to everything else, as a daemon stuck in QEMU's monitor.
type muteLibvirtd struct {
	mu    sync.Mutex
	conns int
	open  int
}

func (m *muteLibvirtd) serve(t *testing.T, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		m.mu.Lock()
		m.conns++
		m.open++
		m.mu.Unlock()
		go func() {
			defer func() {
				c.Close()
				m.mu.Lock()
				m.open--
				m.mu.Unlock()
			}()
			m.talk(c)
		}()
	}
}

func (m *muteLibvirtd) counts() (conns, open int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conns, m.open
}

func (m *muteLibvirtd) talk(c net.Conn) {
	for {
		var h [28]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return
		}
		size := binary.BigEndian.Uint32(h[:])
		if _, err := io.CopyN(io.Discard, c, int64(size)-28); err != nil {
			return
		}
		var payload []byte
		switch proc := binary.BigEndian.Uint32(h[12:]); proc {
		case 66: // auth list: none
			payload = []byte{0, 0, 0, 1, 0, 0, 0, 0}
		case 1: // open
		case 157: // library version 9.0.0
			payload = binary.BigEndian.AppendUint64(nil, 9_000_000)
		default:
			continue // silence
		}
		binary.BigEndian.PutUint32(h[:], uint32(28+len(payload)))
		binary.BigEndian.PutUint32(h[16:], 1) // reply
		binary.BigEndian.PutUint32(h[24:], 0) // ok
		if _, err := c.Write(append(h[:], payload...)); err != nil {
			return
		}
	}
}

func version(ctx context.Context, h *Host) error {
	return h.do(ctx, "version", func(l *lv.Libvirt) error {
		v, err := l.ConnectGetLibVersion()
		if err == nil && v != 9_000_000 {
			return errors.New("wrong answer")
		}
		return err
	})
}

func TestAHangingCallBlocksNoOther(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	must(t, err)
	defer l.Close()
	m := &muteLibvirtd{}
	go m.serve(t, l)
	h, err := Dial(t.Context(), Options{Socket: sock})
	must(t, err)
	defer h.Close()

	const hanging = 20
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for range hanging {
		wg.Go(func() {
			err := h.do(ctx, "hang", func(l *lv.Libvirt) error { _, err := l.ConnectGetHostname(); return err })
			var e *Error
			if !errors.As(err, &e) || e.Kind != KindTimeout || !e.Unknown {
				t.Errorf("got %v", err)
			}
		})
	}
	// While they hang others are served: at once on a connection with room, or
	// on the shared ones, since the stand-in answers out of order.
	if err := version(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if err := version(t.Context(), h); err != nil {
		t.Fatalf("after the time-outs: %v", err)
	}
	waitFor(t, "closing of the connections that hung", func() bool { _, open := m.counts(); return open == 1 })
	if n, _ := m.counts(); n > maxConns+1 {
		t.Fatalf("%d connections were opened", n)
	}
}

func TestCallsReconnectAfterLibvirtdWasAway(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	must(t, err)
	go (&muteLibvirtd{}).serve(t, l)
	h, err := Dial(t.Context(), Options{Socket: sock})
	must(t, err)
	defer h.Close()
	must(t, version(t.Context(), h))
	l.Close()
	for _, c := range h.conns {
		c.nc.Close()
	}
	waitFor(t, "unavailability", func() bool { return errors.Is(version(t.Context(), h), ErrUnavailable) })
	l, err = net.Listen("unix", sock)
	must(t, err)
	defer l.Close()
	go (&muteLibvirtd{}).serve(t, l)
	must(t, version(t.Context(), h))
	must(t, h.Close())
	if err := version(t.Context(), h); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("after Close: %v", err)
	}
}

func TestEventQueueOverflowsIntoOneSync(t *testing.T) {
	q := newEventQueue()
	for range maxQueued + 10 {
		q.push(Event{Kind: EventStarted})
	}
	if _, overflow, ok := q.pop(t.Context()); !ok || !overflow {
		t.Fatal("the overflow is not reported first")
	}
	n := 0
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for {
		_, overflow, ok := q.pop(ctx)
		if !ok {
			break
		}
		if overflow {
			t.Fatal("a second overflow")
		}
		n++
	}
	if n != 10 {
		t.Fatalf("%d events follow, want the 10 newest", n)
	}
}

func TestUUIDsAreRefusedBeforeACall(t *testing.T) {
	h := &Host{}
	for _, u := range []string{"", "x", "deadbeef-0000-4000-8000-00000000000", "deadbeef-0000-4000-8000-00000000000g", "../../../../../../../../../../../../a"} {
		if _, err := h.Autostart(t.Context(), u); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", u, err)
		}
	}
}
