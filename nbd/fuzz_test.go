package nbd_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/boundtest"
	"kvmreplica/nbd"
)

// captures are what real programs sent; the suffix says which side.
func captures(f *testing.F, suffix string) {
	f.Helper()
	files, err := filepath.Glob("testdata/captures/*" + suffix)
	must(f, err)
	if len(files) == 0 {
		f.Fatal("no captures")
	}
	for _, name := range files {
		p, err := os.ReadFile(name)
		must(f, err)
		f.Add(p)
	}
}

const fuzzSize = 64 << 10

// converse plays a client that sends p and reads whatever comes, then hangs
// up. It returns what the server said and fails when the server does not end.
func converse(t *testing.T, srv *nbd.Server, p []byte) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	must(t, ours.SetDeadline(time.Now().Add(patience)))
	ended, heard := make(chan struct{}), make(chan []byte)
	go func() { defer close(ended); srv.ServeConn(theirs) }()
	go func() {
		said, _ := io.ReadAll(io.LimitReader(ours, 256<<20))
		heard <- said
	}()
	_, _ = ours.Write(p)
	_ = ours.Close()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the server does not end")
	}
	return <-heard
}

// well shows that the server still serves and that the export is whole.
func well(t *testing.T, srv *nbd.Server) {
	t.Helper()
	ours, theirs := net.Pipe()
	go srv.ServeConn(theirs)
	c, err := nbd.NewClient(t.Context(), ours, nbd.ClientOptions{})
	must(t, err)
	defer c.Close()
	if c.Size() != fuzzSize {
		t.Fatalf("size %d", c.Size())
	}
	must(t, c.Sync())
	_, err = c.ReadAt(make([]byte, fuzzSize), 0)
	must(t, err)
}

func FuzzConversation(f *testing.F) {
	captures(f, ".client")
	f.Fuzz(func(t *testing.T, p []byte) {
		defer boundtest.Input(t)()
		srv := nbd.NewServer(nbd.Options{ParkedRequests: 4, ParkedBytes: 1 << 20})
		must(t, srv.Add(nbd.Export{Device: block.NewMem(fuzzSize)}))
		converse(t, srv, p)
		well(t, srv)
	})
}

// FuzzRequests starts behind the handshake. A read-only export must come out
// unchanged, whatever was sent.
func FuzzRequests(f *testing.F) {
	f.Add(true, []byte{})
	for _, cmd := range []uint16{cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdCache, cmdZeroes, cmdStatus, cmdDisc, 99} {
		for _, length := range []uint32{0, 1, 4096, 1 << 31} {
			p := binary.BigEndian.AppendUint32(nil, magicRequest)
			p = binary.BigEndian.AppendUint32(p, uint32(cmd))
			p = binary.BigEndian.AppendUint64(p, 7)
			p = binary.BigEndian.AppendUint64(p, 512)
			p = binary.BigEndian.AppendUint32(p, length)
			if cmd == cmdWrite && length < 1<<20 {
				p = append(p, make([]byte, length)...)
			}
			f.Add(cmd%2 == 0, append(p, p...))
		}
	}
	f.Fuzz(func(t *testing.T, structured bool, p []byte) {
		defer boundtest.Input(t)()
		dev := block.NewMem(fuzzSize)
		want := bytes.Repeat([]byte{0xa5}, fuzzSize)
		_, err := dev.WriteAt(want, 0)
		must(t, err)
		srv := nbd.NewServer(nbd.Options{ParkedRequests: 4})
		must(t, srv.Add(nbd.Export{Device: dev}))
		must(t, srv.Add(nbd.Export{Name: "r", Device: dev, ReadOnly: true}))
		for _, export := range []string{"r", ""} {
			hello := []byte{0, 0, 0, 3}
			opt := func(o uint32, data []byte) {
				hello = binary.BigEndian.AppendUint64(hello, magicOption)
				hello = binary.BigEndian.AppendUint32(hello, o)
				hello = binary.BigEndian.AppendUint32(hello, uint32(len(data)))
				hello = append(hello, data...)
			}
			if structured {
				opt(optStructured, nil)
				opt(optSetMeta, append(append(name(export), 0, 0, 0, 1), name("base:allocation")...))
			}
			opt(optGo, append(name(export), 0, 0))
			converse(t, srv, append(hello, p...))
			if export == "r" {
				expect(t, dev, 0, want)
			}
		}
		well(t, srv)
	})
}

// FuzzServerAnswers plays a server to our client.
func FuzzServerAnswers(f *testing.F) {
	captures(f, ".server")
	f.Fuzz(func(t *testing.T, p []byte) {
		defer boundtest.Input(t)()
		ours, theirs := net.Pipe()
		heard := make(chan struct{})
		go func() { defer close(heard); _, _ = io.Copy(io.Discard, theirs) }()
		go func() { _, _ = theirs.Write(p); _ = theirs.Close() }()
		c, err := nbd.NewClient(t.Context(), ours, nbd.ClientOptions{AllowUnsafe: true, InFlight: 2, Timeout: patience})
		if err == nil {
			buf := make([]byte, 4096)
			if c.Size() >= int64(len(buf)) {
				_, _ = c.ReadAt(buf, 0)
				_, _ = c.WriteAt(buf, 0)
				_ = c.Map(0, int64(len(buf)), func(e block.Extent) bool { return e.Len > 0 })
			}
			_ = c.Close()
		} else if strings.Contains(err.Error(), "deadline") {
			t.Fatal(err)
		}
		<-heard
	})
}
