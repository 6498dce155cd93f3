package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

func TestRemoveAwaitsWhatRunsAndAnswersTheRestWithShutdown(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev}, nbd.Export{Name: "other", Device: newFile(t, 4096)})
	r := s.connect(t)
	r.enter(true)
	r.request(0, cmdWrite, 1, 0, 4096, bytes.Repeat([]byte{1}, 4096)...)
	<-dev.gate.Held()
	removed := make(chan error, 1)
	go func() { removed <- s.srv.Remove(t.Context(), "") }()
	until(t, "the export is gone", func() bool { _, ok := s.srv.Stats(""); return !ok })
	r.request(0, cmdRead, 2, 0, 512)
	if cookie, errno := r.answer(); cookie != 2 || errno != errShut {
		t.Errorf("request while draining: cookie %d, error %d", cookie, errno)
	}
	select {
	case err := <-removed:
		t.Fatalf("Remove returned while a write ran: %v", err)
	default:
	}
	dev.gate.Open()
	if cookie, errno := r.answer(); cookie != 1 || errno != 0 {
		t.Errorf("the write: cookie %d, error %d", cookie, errno)
	}
	r.closed()
	must(t, <-removed)
	fresh := s.connect(t)
	fresh.send(uint32(3))
	if types, _ := fresh.option(optGo, make([]byte, 6)); types[0] != repUnknown {
		t.Errorf("GO of a removed export: %x", types)
	}
	if err := s.srv.Remove(t.Context(), ""); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("second Remove: %v", err)
	}
	must(t, s.srv.Add(nbd.Export{Device: newFile(t, 4096)})) // the name is free again
}

func TestShutdownLeavesUnansweredWhatAClientWillResend(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
	r := s.connect(t)
	r.enter(true)
	r.request(0, cmdWrite, 1, 0, 4096, bytes.Repeat([]byte{1}, 4096)...)
	<-dev.gate.Held()
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.srv.Shutdown(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Shutdown while a write hangs: %v", err)
	}
	dev.gate.Open()
	must(t, s.srv.Shutdown(t.Context()))
	expect(t, dev, 0, bytes.Repeat([]byte{1}, 4096))
	if err := s.srv.Add(nbd.Export{Name: "x", Device: dev}); !errors.Is(err, nbd.ErrServerClosed) {
		t.Errorf("Add after Shutdown: %v", err)
	}
}

func TestShutdownAnswersWhatRunsAndEndsIdleConnectionsAtOnce(t *testing.T) {
	dev := newHeld(t, 1<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
	idle, shaking, busy := s.connect(t), s.connect(t), s.connect(t)
	idle.enter(true)
	busy.enter(true)
	busy.request(0, cmdWrite, 1, 0, 512, make([]byte, 512)...)
	<-dev.gate.Held()
	done := make(chan error, 1)
	go func() { done <- s.srv.Shutdown(t.Context()) }()
	idle.closed()
	shaking.closed()
	dev.gate.Open()
	if _, errno := busy.answer(); errno != 0 {
		t.Errorf("answer %d", errno)
	}
	busy.closed()
	must(t, <-done)
}

// A second process is refused while the first lives; more connections of the
// same process are not.
func TestOneWriterProcessPerExport(t *testing.T) {
	requires(t, "qemu-io")
	f := newFile(t, 1<<20)
	var pids []int
	s := serve(t, nbd.Options{}, nbd.Export{Device: f, SingleClient: true, AllowPID: func(pid int) error { pids = append(pids, pid); return nil }})
	qemuIO := func() (string, error) {
		out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", s.uri()).CombinedOutput()
		return string(out), err
	}
	a, b := s.dial(t, nbd.ClientOptions{}), s.dial(t, nbd.ClientOptions{})
	if out, err := qemuIO(); err == nil {
		t.Fatalf("a second process was let in: %s", out)
	}
	if st, _ := s.srv.Stats(""); st.ClientPID != os.Getpid() || st.Connections != 2 {
		t.Errorf("stats %+v", st)
	}
	must(t, a.Close())
	must(t, b.Close())
	if out, err := qemuIO(); err != nil {
		t.Fatalf("refused after the first process left: %s", out)
	}
	if len(pids) != 4 || pids[0] != os.Getpid() || pids[2] == os.Getpid() {
		t.Errorf("AllowPID saw %v", pids)
	}
}

func TestUnwantedProcessIsRefusedWithTheReason(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 4096), AllowPID: func(int) error { return errors.New("not the domain's QEMU") }})
	r := s.connect(t)
	r.send(uint32(3))
	types, text := r.option(optGo, make([]byte, 6))
	if types[0] != repPolicy || !bytes.Contains(text, []byte("not the domain's QEMU")) {
		t.Fatalf("reply %x %q", types, text)
	}
}

func TestExportsAreCheckedWhenAdded(t *testing.T) {
	srv := nbd.NewServer(nbd.Options{})
	f := newFile(t, 4096)
	must(t, srv.Add(nbd.Export{Name: "a", Device: f}))
	if err := srv.Add(nbd.Export{Name: "a", Device: f}); !errors.Is(err, nbd.ErrExportExists) {
		t.Errorf("same name: %v", err)
	}
	for _, bad := range []nbd.Export{{Name: "b"}, {Name: string(make([]byte, 5000)), Device: f}} {
		if err := srv.Add(bad); err == nil {
			t.Errorf("%q was accepted", bad.Name)
		}
	}
}

func TestStatsCount(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20)})
	c := s.dial(t, nbd.ClientOptions{})
	_, err := c.WriteAt(make([]byte, 300<<10), 0)
	must(t, err)
	_, err = c.ReadAt(make([]byte, 100<<10), 0)
	must(t, err)
	must(t, c.Sync())
	check := func(conns int) {
		t.Helper()
		st, ok := s.srv.Stats("")
		if !ok || st.BytesWritten != 300<<10 || st.BytesRead != 100<<10 || st.Requests != 3 || st.Errors != 0 ||
			st.Parked < 1 || st.Connections != conns || time.Since(st.LastActivity) > patience {
			t.Errorf("stats %+v", st)
		}
	}
	check(1)
	must(t, c.Close())
	until(t, "the connection is gone", func() bool { st, _ := s.srv.Stats(""); return st.Connections == 0 })
	check(0)
	if _, ok := s.srv.Stats("absent"); ok {
		t.Error("stats of no export")
	}
}

func TestUpstreamErrorsAreClear(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20)}, nbd.Export{Name: "ro", Device: newFile(t, 1<<20), ReadOnly: true})
	if _, err := nbd.DialURI(t.Context(), s.uriOf("nobody"), nbd.ClientOptions{}); err == nil || !bytes.Contains([]byte(err.Error()), []byte("no such export")) {
		t.Errorf("unknown export: %v", err)
	}
	if _, err := nbd.DialURI(t.Context(), s.uriOf("ro"), nbd.ClientOptions{}); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("writable client of a read-only export: %v", err)
	}
	c := s.dial(t, nbd.ClientOptions{})
	must(t, s.srv.Remove(t.Context(), ""))
	if _, err := c.ReadAt(make([]byte, 512), 0); !errors.Is(err, nbd.ErrDisconnected) && !errors.Is(err, nbd.ESHUTDOWN) {
		t.Errorf("after the server left: %v", err)
	}
	<-c.Done()
	if err := c.Sync(); !errors.Is(err, nbd.ErrDisconnected) {
		t.Errorf("Sync afterwards: %v", err)
	}
}

// scriptedListener fails as told, then hands out nothing more.
type scriptedListener struct {
	net.Listener
	errs []error
}

func (l *scriptedListener) Accept() (net.Conn, error) {
	if len(l.errs) == 0 {
		return l.Listener.Accept()
	}
	err := l.errs[0]
	l.errs = l.errs[1:]
	return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
}

func TestAcceptSurvivesWhatMayPassAndReportsTheRest(t *testing.T) {
	srv := nbd.NewServer(nbd.Options{})
	ln, err := net.Listen("unix", t.TempDir()+"/s")
	must(t, err)
	err = srv.Serve(t.Context(), &scriptedListener{Listener: ln, errs: []error{syscall.EMFILE, syscall.ECONNABORTED, syscall.EPERM, syscall.ENOSYS, syscall.EBADF}})
	if !errors.Is(err, syscall.EBADF) {
		t.Fatalf("Serve: %v", err)
	}
}
