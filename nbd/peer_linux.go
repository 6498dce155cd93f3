package nbd

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// syscallTimeout is what a read returns once its deadline has passed.
var syscallTimeout = os.ErrDeadlineExceeded

// peerPID is the process that connected to our unix socket, 0 when unknown.
func peerPID(nc net.Conn) int {
	u, ok := nc.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// peerHungUp asks the kernel whether the peer can send anything more, however
// much of what it sent is still unread.
func (c *conn) peerHungUp() bool {
	if c.raw == nil {
		return false
	}
	gone := false
	err := c.raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
	})
	return gone || err != nil
}

// fileSender moves bytes from a file to the socket without copying them. The
// closure is made once, so that sending allocates nothing.
type fileSender struct {
	from int
	off  int64
	left int
	err  error
	step func(fd uintptr) bool
}

func (f *fileSender) init() { f.step = f.run }

// run is called by the runtime whenever the socket is writable; false waits.
func (f *fileSender) run(fd uintptr) bool {
	for f.left > 0 {
		n, err := unix.Sendfile(int(fd), f.from, &f.off, f.left)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return false
		case err != nil:
			f.err = err
			return true
		case n == 0: // the file is shorter than it was
			f.err = unix.EIO
			return true
		default:
			f.left -= n
		}
	}
	return true
}

// willNeed asks for a range to be read ahead.
func willNeed(fd int, off, n int64) error {
	return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED)
}
