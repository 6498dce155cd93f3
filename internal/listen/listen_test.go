package listen_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/listen"
)

// scripted fails with errs, then accepts.
type scripted struct {
	net.Listener
	errs  []error
	calls atomic.Int32
}

func (s *scripted) Accept() (net.Conn, error) {
	if n := int(s.calls.Add(1)); n <= len(s.errs) {
		return nil, &net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", s.errs[n-1])}
	}
	return s.Listener.Accept()
}

func on(t *testing.T, errs ...error) (*scripted, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return &scripted{Listener: l, errs: errs}, path
}

func TestAServerOutlivesEveryErrorThatMayPass(t *testing.T) {
	l, path := on(t, syscall.ENOMEM, syscall.ENOBUFS, syscall.EPERM, syscall.EMFILE, syscall.ENETDOWN, syscall.ETIMEDOUT, syscall.ECONNABORTED, syscall.EAGAIN)
	srv := &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: time.Minute}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(listen.Patient(l, slog.New(slog.DiscardHandler))) }()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	r, err := c.Get("http://x/")
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Body.Close()
	if err := srv.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		t.Fatalf("the server ended with %v", err)
	}
}

func TestAListenerThatIsNoneIsGivenUpAtOnce(t *testing.T) {
	for _, e := range []syscall.Errno{syscall.EBADF, syscall.EINVAL, syscall.ENOTSOCK} {
		l, _ := on(t, e)
		if _, err := listen.Patient(l, slog.New(slog.DiscardHandler)).Accept(); !errors.Is(err, e) || l.calls.Load() != 1 {
			t.Errorf("%v: %d calls, then %v", e, l.calls.Load(), err)
		}
	}
}

func TestADeadlineOfAListenerIsReported(t *testing.T) {
	l, _ := on(t)
	if err := l.Listener.(*net.UnixListener).SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := listen.Patient(l, slog.New(slog.DiscardHandler)).Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("want the deadline, got %v", err)
	}
}

func TestClosingEndsTheWaitForAnotherTry(t *testing.T) {
	errs := make([]error, 1000)
	for i := range errs {
		errs[i] = syscall.ENOMEM
	}
	l, _ := on(t, errs...)
	p := listen.Patient(l, slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { _, err := p.Accept(); done <- err }()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Fatalf("want closed, got %v", err)
	}
}
