package nbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"kvmreplica/nbd"
)

const (
	repUnsup, repPolicy, repInvalid = uint32(1<<31 | 1), uint32(1<<31 | 2), uint32(1<<31 | 3)
	repUnknown, repTooBig           = uint32(1<<31 | 6), uint32(1<<31 | 9)
)

func name(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }

func TestBadOptionsAreRefusedAndTheNextOneStillWorks(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20)}, nbd.Export{Name: "b", Device: newFile(t, 1<<20), Description: "second"})
	ctx := "base:allocation"
	query := func(n uint32, strs ...string) []byte {
		p := append(name(""), 0, 0, 0, 0)
		binary.BigEndian.PutUint32(p[4:], n)
		for _, s := range strs {
			p = append(p, name(s)...)
		}
		return p
	}
	for _, c := range []struct {
		title string
		opt   uint32
		data  []byte
		want  uint32
	}{
		{"unknown option", 77, []byte("xyz"), repUnsup},
		{"TLS", 5, nil, repUnsup},
		{"extended headers", 11, nil, repUnsup},
		{"list with data", optList, []byte{1}, repInvalid},
		{"structured replies with data", optStructured, []byte{1}, repInvalid},
		{"GO without data", optGo, nil, repInvalid},
		{"GO with a name of 2^31 bytes", optGo, []byte{0x80, 0, 0, 0, 0, 0}, repInvalid},
		{"GO with a name of 2^32-1 bytes", optGo, []byte{0xff, 0xff, 0xff, 0xff, 0, 0}, repInvalid},
		{"GO with too few information requests", optGo, append(name(""), 0, 2, 0, 1), repInvalid},
		{"GO with too many information requests", optGo, append(name(""), 0, 0, 0, 1), repInvalid},
		{"GO with a long name", optGo, append(name(strings.Repeat("n", 5000)), 0, 0), repTooBig},
		{"GO with an unknown name", optGo, append(name("nobody"), 0, 0), repUnknown},
		{"INFO with an unknown name", optInfo, append(name("nobody"), 0, 0), repUnknown},
		{"context before structured replies", optSetMeta, query(1, ctx), repInvalid},
		{"context with 2^32-1 queries", optSetMeta, query(1<<32-1, ctx), repTooBig},
		{"context with a query cut off", optSetMeta, query(2, ctx), repInvalid},
		{"context with rest", optSetMeta, append(query(1, ctx), 0), repInvalid},
		{"context of an unknown export", 9, append(name("nobody"), 0, 0, 0, 0), repUnknown},
		{"an option of 70000 bytes", 99, make([]byte, 70000), repTooBig},
	} {
		t.Run(c.title, func(t *testing.T) {
			r := s.connect(t)
			r.send(uint32(3))
			types, text := r.option(c.opt, c.data)
			if got := types[len(types)-1]; got != c.want {
				t.Fatalf("reply %#x (%s), want %#x", got, text, c.want)
			}
			if types, _ := r.option(optList, nil); len(types) != 3 || types[0] != 2 {
				t.Fatalf("list afterwards: %v", types)
			}
			if types, _ := r.option(optGo, make([]byte, 6)); types[len(types)-1] != 1 {
				t.Fatalf("GO afterwards: %x", types)
			}
		})
	}
}

func TestHopelessClientsAreHungUpOn(t *testing.T) {
	x := nbd.Export{Device: newFile(t, 1<<20)}
	patient := serve(t, nbd.Options{}, x)
	hasty := serve(t, nbd.Options{HandshakeTimeout: 200 * time.Millisecond}, x)
	slow := map[string]bool{"silence": true, "half an option": true, "a byte now and then": true}
	for _, c := range []struct {
		title string
		send  func(r *raw)
	}{
		{"unknown handshake flags", func(r *raw) { r.send(uint32(0xffffffff)) }},
		{"no option magic", func(r *raw) { r.send(uint32(3), uint64(1), optList, uint32(0)) }},
		{"an option of 4 GiB", func(r *raw) { r.send(uint32(3), magicOption, optGo, uint32(1<<32-1)) }},
		{"an option of 2 MiB", func(r *raw) { r.send(uint32(3), magicOption, uint32(99), uint32(2<<20)) }},
		{"EXPORT_NAME of an unknown export", func(r *raw) { r.send(uint32(3), magicOption, optExportName, uint32(1), "x") }},
		{"EXPORT_NAME of 100 KiB", func(r *raw) { r.send(uint32(3), magicOption, optExportName, uint32(100<<10)) }},
		{"silence", func(*raw) {}},
		{"half an option", func(r *raw) { r.send(uint32(3), magicOption) }},
		{"a byte now and then", func(r *raw) {
			for r.trySend([]byte{0}) == nil {
				<-time.After(20 * time.Millisecond)
			}
		}},
		{"ABORT", func(r *raw) { r.send(uint32(3)); r.option(optAbort, nil) }},
	} {
		t.Run(c.title, func(t *testing.T) {
			t.Parallel()
			s := patient
			if slow[c.title] {
				s = hasty
			}
			r := s.connect(t)
			c.send(r)
			r.closed()
		})
	}
	patient.connect(t).enter(true) // the server is well
}

func TestEndlessOptionsEnd(t *testing.T) {
	s := serve(t, nbd.Options{HandshakeTimeout: 10 * patience}, nbd.Export{Device: newFile(t, 4096)})
	r := s.connect(t)
	r.send(uint32(3))
	var many []byte
	for range 1000 {
		many = binary.BigEndian.AppendUint64(many, magicOption)
		many = append(many, 0, 0, 0, 77, 0, 0, 0, 0)
	}
	_ = r.trySend(many) // the server may hang up first
	said, err := io.ReadAll(r)
	if errors.Is(err, os.ErrDeadlineExceeded) || len(said) == 0 || len(said) > 600*(20+len("option not supported")) {
		t.Fatalf("server sent %d bytes and then %v", len(said), err)
	}
}

func TestInvalidRequestsAreAnsweredAndTheNextOneStillWorks(t *testing.T) {
	const size = 1 << 20
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, size)})
	ro := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, size), ReadOnly: true})
	for _, c := range []struct {
		title      string
		flags, cmd uint16
		off        uint64
		length     uint32
		payload    int
		want       uint32
		readOnly   bool
	}{
		{"read past the end", 0, cmdRead, size, 1, 0, errInval, false},
		{"read across the end", 0, cmdRead, size - 1, 2, 0, errInval, false},
		{"read at 2^64-1", 0, cmdRead, 1<<64 - 1, 1, 0, errInval, false},
		{"read at 2^63", 0, cmdRead, 1 << 63, 1, 0, errInval, false},
		{"read of 4 GiB", 0, cmdRead, 0, 1<<32 - 1, 0, errInval, false},
		{"write across the end", 0, cmdWrite, size - 1, 2, 2, errNoSpace, false},
		{"write past the end", 0, cmdWrite, 1 << 62, 4096, 4096, errNoSpace, false},
		{"write of 40 MiB", 0, cmdWrite, 0, 40 << 20, 40 << 20, errNoSpace, false},
		{"zeroes past the end", 0, cmdZeroes, size, 1, 0, errNoSpace, false},
		{"trim past the end", 0, cmdTrim, size, 1, 0, errInval, false},
		{"cache past the end", 0, cmdCache, size, 1, 0, errInval, false},
		{"status past the end", 0, cmdStatus, size, 1, 0, errInval, false},
		{"status of nothing", 0, cmdStatus, 0, 0, 0, errInval, false},
		{"unknown command", 0, 99, 0, 0, 0, errInval, false},
		{"command 2^16-1", 0, 1<<16 - 1, 0, 1<<32 - 1, 0, errInval, false},
		{"unknown flag", 1 << 15, cmdRead, 0, 1, 0, errInval, false},
		{"unknown flag of a write", 1 << 15, cmdWrite, 0, 1, 1, errInval, false},
		{"DF of a write", flagDF, cmdWrite, 0, 1, 1, errInval, false},
		{"REQ_ONE of a read", flagOne, cmdRead, 0, 1, 0, errInval, false},
		{"NO_HOLE of a trim", flagNoHole, cmdTrim, 0, 1, 0, errInval, false},
		{"flush of a range", 0, cmdFlush, 0, 1, 0, errInval, false},
		{"write to a read-only export", 0, cmdWrite, 0, 4096, 4096, errPerm, true},
		{"trim of a read-only export", 0, cmdTrim, 0, 4096, 0, errPerm, true},
		{"zeroes of a read-only export", 0, cmdZeroes, 0, 4096, 0, errPerm, true},
	} {
		t.Run(c.title, func(t *testing.T) {
			s := s
			if c.readOnly {
				s = ro
			}
			for _, structured := range []bool{false, true} {
				r := s.connect(t)
				r.enter(structured)
				r.request(c.flags, c.cmd, 7, c.off, c.length, make([]byte, c.payload)...)
				if cookie, errno := r.answer(); cookie != 7 || errno != c.want {
					t.Fatalf("structured %v: cookie %d, error %d, want %d", structured, cookie, errno, c.want)
				}
				r.request(0, cmdFlush, 8, 0, 0)
				if cookie, errno := r.answer(); cookie != 8 || errno != 0 {
					t.Fatalf("flush afterwards: cookie %d, error %d", cookie, errno)
				}
			}
		})
	}
}

func TestStatusWithoutAContextIsRefused(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20)})
	r := s.connect(t)
	r.send(uint32(3))
	r.option(optStructured, nil)
	r.option(optGo, make([]byte, 6))
	r.request(0, cmdStatus, 1, 0, 4096)
	if _, errno := r.answer(); errno != errInval {
		t.Fatalf("answer %d", errno)
	}
}

// An abrupt end in any state leaves a server that serves the next client.
func TestAbruptEndInEveryState(t *testing.T) {
	f := newFile(t, 8<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: f, SingleClient: true})
	payload := bytes.Repeat([]byte{5}, 1<<20)
	for _, stop := range []func(r *raw){
		func(*raw) {},
		func(r *raw) { r.send([]byte{0}) },
		func(r *raw) { r.send(uint32(3)) },
		func(r *raw) { r.send(uint32(3), magicOption, optGo, uint32(6), []byte{0}) },
		func(r *raw) { r.send(uint32(3), magicOption, optGo, uint32(6), make([]byte, 6)) }, // before the reply
		func(r *raw) { r.enter(true) },
		func(r *raw) { r.enter(true); r.send(magicRequest) }, // half a header
		func(r *raw) { r.enter(true); r.send(make([]byte, 28)) },
		func(r *raw) { r.enter(true); r.request(0, cmdWrite, 1, 0, 4096, payload[:100]...) },
		func(r *raw) { r.enter(true); r.request(0, cmdWrite, 1, 0, 1<<20, payload[:700<<10]...) },
		func(r *raw) { r.enter(true); r.request(0, cmdWrite, 1, 1<<40, 1<<20, payload[:5000]...) }, // being skipped
		func(r *raw) { r.enter(true); r.request(0, cmdRead, 1, 0, 8<<20) },                         // in the middle of the reply
		func(r *raw) { r.enter(false); r.request(0, cmdRead, 1, 0, 8<<20); r.read(100) },
		func(r *raw) { r.enter(true); r.request(0, cmdFlush, 1, 0, 0) },
		func(r *raw) { r.enter(true); r.request(0, cmdZeroes, 1, 0, 8<<20) },
	} {
		r := s.connect(t)
		stop(r)
		must(t, r.Close())
		next := s.connect(t)
		next.enter(true)
		next.request(0, cmdFlush, 2, 0, 0)
		if _, errno := next.answer(); errno != 0 {
			t.Fatalf("answer %d", errno)
		}
		must(t, next.Close())
	}
}

// A client that does not read its replies must not grow the server, and gets
// them all once it reads.
func TestSlowReaderIsHeldBack(t *testing.T) {
	f := newFile(t, 64<<20)
	s := serve(t, nbd.Options{ParkedBytes: 4 << 20}, nbd.Export{Device: plain{f}})
	r := s.connect(t)
	r.enter(false)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const requests = 64
	for i := range uint64(requests) {
		r.request(0, cmdRead, i, 0, 2<<20)
	}
	until(t, "the budget is used", func() bool { st, _ := s.srv.Stats(""); return st.InFlight >= 2 })
	runtime.ReadMemStats(&after)
	if grown := int64(after.Sys) - int64(before.Sys); grown > 64<<20 {
		t.Errorf("server grew by %d bytes for a client that does not read", grown)
	}
	seen := map[uint64]bool{}
	for range requests {
		cookie, errno := r.simple()
		if errno != 0 || seen[cookie] {
			t.Fatalf("cookie %d twice or error %d", cookie, errno)
		}
		if st, _ := s.srv.Stats(""); st.InFlight > 2 {
			t.Fatalf("%d reads of 2 MiB under way, the budget holds 2", st.InFlight)
		}
		seen[cookie] = true
		r.read(2 << 20)
	}
}

func TestConnectionsAreCapped(t *testing.T) {
	s := serve(t, nbd.Options{MaxConns: 3}, nbd.Export{Device: newFile(t, 4096), MaxConns: 2})
	a, b := s.connect(t), s.connect(t)
	a.enter(true)
	b.enter(true)
	c := s.connect(t)
	c.send(uint32(3))
	if types, text := c.option(optGo, make([]byte, 6)); types[0] != repPolicy {
		t.Errorf("third connection of the export: %x %s", types, text)
	}
	d, err := net.Dial("unix", s.socket)
	must(t, err)
	defer d.Close()
	must(t, d.SetDeadline(time.Now().Add(patience)))
	if n, err := d.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("fourth connection of the server read %d, %v", n, err)
	}
	must(t, a.Close())
	c.enter2()
}

// enter2 retries GO on a connection that was refused.
func (r *raw) enter2() {
	r.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if types, _ := r.option(optGo, make([]byte, 6)); types[len(types)-1] == 1 {
			return
		}
	}
	r.t.Fatal("never admitted")
}
