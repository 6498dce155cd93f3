package testcopy

import (
	"context"
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// deaf is an address of this machine where nobody answers a SYN: the backlog is
// full.
func deaf(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	a := net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: at.(*unix.SockaddrInet4).Port}
	c, err := net.Dial("tcp", a.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return a.String()
}

// A guest that boots answers no SYN at first; the kernel's waits between two
// grow, and a drill's RTO with them.
func TestAProofByTCPBeginsAgainLongBeforeItsTimeIsOver(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), proofTry*2/3)
	defer cancel()
	c, err := dial(ctx, deaf(t))
	if err == nil {
		_ = c.Close()
		t.Fatal("somebody answered")
	}
	var n net.Error
	if !errors.As(err, &n) || !n.Timeout() || ctx.Err() != nil {
		t.Fatalf("%v; %v", err, ctx.Err())
	}
}
