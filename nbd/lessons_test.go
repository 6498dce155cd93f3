package nbd_test

import (
	"bytes"
	"net"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"kvmreplica/nbd"
)

// The tests of this file are what a simpler server gets wrong: each was seen
// with a real client before this server was written.

func TestLessonFlushAndFriendsAreOffered(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 4096)})
	out := tool(t, "nbdinfo", s.uri())
	for _, l := range []string{"can_flush: true", "can_fua: true", "can_trim: true", "can_zero: true", "can_multi_conn: true", "structured"} {
		if !strings.Contains(out, l) {
			t.Errorf("missing %q:\n%s", l, out)
		}
	}
}

func TestLessonTransmissionFlagsAreNeverZero(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 4096), ReadOnly: true})
	r := s.connect(t)
	r.send(uint32(3), magicOption, optExportName, uint32(0))
	if p := r.read(10); p[9]&1 == 0 { // HAS_FLAGS
		t.Fatalf("flags %x", p[8:])
	}
}

// A device that takes a millisecond must serve 32 at once in the time of a few.
func TestLessonRequestsRunAtTheSameTime(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
	r := s.connect(t)
	r.enter(true)
	r.request(0, cmdWrite, 1, 0, 512, make([]byte, 512)...)
	<-dev.gate.Held() // and stays so
	for i := range uint64(10) {
		r.request(0, cmdWrite, 10+i, 4096*i, 512, make([]byte, 512)...)
		if cookie, errno := r.answer(); cookie != 10+i || errno != 0 {
			t.Fatalf("answer to %d: %d", cookie, errno)
		}
	}
	dev.gate.Open()
	if cookie, _ := r.answer(); cookie != 1 {
		t.Fatalf("cookie %d", cookie)
	}
}

func TestLessonReadPastTheEndIsAnsweredNotHungUpOn(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 4096)})
	for _, structured := range []bool{false, true} {
		r := s.connect(t)
		r.enter(structured)
		r.request(0, cmdRead, 1, 4096, 512)
		if _, errno := r.answer(); errno != errInval {
			t.Fatalf("answer %d", errno)
		}
		r.request(0, cmdRead, 2, 0, 512)
		if _, errno := r.answer(); errno != 0 {
			t.Fatalf("answer %d", errno)
		}
	}
}

func TestLessonUnadvertisedCommandsDoNotDesynchronise(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20), ReadOnly: true})
	r := s.connect(t)
	r.enter(false)
	r.request(0, cmdTrim, 1, 0, 1<<20)
	r.request(0, cmdZeroes, 2, 0, 1<<20)
	r.request(0, 42, 3, 0, 1<<20)
	r.request(0, cmdRead, 4, 0, 512)
	for i, want := range []uint32{errPerm, errPerm, errInval, 0} {
		if cookie, errno := r.simple(); cookie != uint64(i+1) || errno != want {
			t.Fatalf("request %d: cookie %d, error %d", i+1, cookie, errno)
		}
	}
	r.read(512)
}

func TestLessonALongNameTakesNoMemory(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 4096)})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 50 {
		r := s.connect(t)
		r.send(uint32(3), magicOption, optGo, uint32(1<<31), uint32(1<<31-6))
		r.closed()
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
		t.Fatalf("50 hellos with a name of 2^31 bytes took %d bytes", n)
	}
}

func TestLessonOurClientIsAcceptedByNBDKit(t *testing.T) {
	requires(t, "nbdkit")
	sock := filepath.Join(t.TempDir(), "s")
	cmd := exec.Command("nbdkit", "-f", "-U", sock, "memory", "1M")
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	c := dialWhenUp(t, sock, nbd.ClientOptions{})
	want := bytes.Repeat([]byte{3}, 70<<10)
	_, err := c.WriteAt(want, 1000)
	must(t, err)
	must(t, c.Sync())
	expect(t, c, 1000, want)
}

// dialWhenUp connects to a server that was just started.
func dialWhenUp(t testing.TB, sock string, opts nbd.ClientOptions) *nbd.Client {
	t.Helper()
	for deadline := time.Now().Add(patience); ; <-time.After(10 * time.Millisecond) {
		nc, err := net.Dial("unix", sock)
		if err == nil {
			c, err := nbd.NewClient(t.Context(), nc, opts)
			must(t, err)
			t.Cleanup(func() { _ = c.Close() })
			return c
		}
		if time.Now().After(deadline) {
			t.Fatalf("server does not listen: %v", err)
		}
	}
}

// A read behind the end of a device must not make the next one hang.
func TestLessonErrorsLeaveTheDeviceUsable(t *testing.T) {
	f := newFile(t, 4096)
	d, err := nbd.BackendDevice(nbd.ReadOnlyBackend(f))
	must(t, err)
	s := serve(t, nbd.Options{}, nbd.Export{Device: d, ReadOnly: true})
	c := s.dial(t, nbd.ClientOptions{ReadOnly: true})
	for _, off := range []int64{4096, 4095, -1, 1 << 62} {
		if _, err := d.ReadAt(make([]byte, 2), off); err == nil {
			t.Errorf("read at %d succeeded", off)
		}
	}
	expect(t, c, 0, make([]byte, 4096))
}
