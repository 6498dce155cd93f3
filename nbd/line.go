package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// line is a client's socket that the Go runtime's poller does not know. The
// poller hears of everything that happens to a socket, also that the client has
// merely taken an answer out of it, and wakes a thread each time; a line waits
// in poll for what it needs. That costs a thread per connection, and a processor
// of the runtime (GOMAXPROCS) per connection that has waited for less than 10 ms,
// so a server has a bounded number of lines.
//
// It does what net.Conn promises, except that a Write notices another deadline
// or a Close only within writeLook.
type line struct {
	net.Conn // closed: only its addresses are used
	fd, wake int
	state    atomic.Int64 // calls that use the descriptors, plus lineClosed or lineGone
	closed   func()

	readUntil, writeUntil atomic.Int64 // unix nanoseconds; 0: no deadline

	reading sync.Mutex
	waits   [2]unix.PollFd // guarded by reading, as what follows
	drained bool           // the last Read left nothing
	forData watcher
	yielded time.Time

	writing sync.Mutex
	full    [1]unix.PollFd // guarded by writing, as what follows
	forRoom watcher
}

const (
	lineClosed = 1 << 40 // far above any count of calls
	lineGone   = lineClosed << 1

	// writeLook is how often a Write that waits looks at its deadline.
	writeLook = 50 * time.Millisecond
	// yieldEvery is well below the 10 ms after which the runtime takes a
	// processor away, and well above what giving it up costs.
	yieldEvery = 3 * time.Millisecond
	// watchFor is as long as QEMU's own event loops look before they sleep.
	watchFor = 32 * time.Microsecond
	// watchMisses: after so many watches in vain one wait in 1024 is watched.
	watchMisses = 10
	// sendBuffer is what may wait in the socket, where the system lets us: with
	// its usual 208 KiB a client that reads much waits for us half of the time.
	sendBuffer = 1 << 20
)

// newLine takes a connection out of the runtime's poller; closed is called once
// it is closed. Nil, and nothing happened to the connection, when it has no
// descriptor or the process is out of them.
func newLine(nc net.Conn, closed func()) *line {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	fd := -1
	err = raw.Control(func(old uintptr) {
		if n, err := unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); err == nil {
			fd = n
		}
	})
	if err != nil || fd < 0 {
		return nil
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(fd)
		return nil
	}
	_ = nc.Close() // takes it out of the poller; the socket lives on in fd
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
	}
	l := &line{Conn: nc, fd: fd, wake: wake, closed: closed}
	l.waits = [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
	l.full = [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	return l
}

// enter keeps the descriptors open until leave.
func (l *line) enter() error {
	if l.state.Add(1) >= lineClosed {
		l.leave()
		return net.ErrClosed
	}
	return nil
}

func (l *line) leave() {
	if l.state.Add(-1) == lineClosed && l.state.CompareAndSwap(lineClosed, lineGone) {
		_ = unix.Close(l.fd)
		_ = unix.Close(l.wake)
	}
}

// Close ends what runs with net.ErrClosed. Twice is an error and harmless.
func (l *line) Close() error {
	if err := l.enter(); err != nil {
		return err
	}
	defer l.leave()
	for old := l.state.Load(); !l.state.CompareAndSwap(old, old+lineClosed); old = l.state.Load() {
		if old >= lineClosed {
			return net.ErrClosed
		}
	}
	l.rouse()
	l.closed()
	return nil
}

// rouse makes a Read that waits look again.
func (l *line) rouse() {
	one := [8]byte{1}
	_, _ = unix.Write(l.wake, one[:])
}

// Read receives at least a byte.
func (l *line) Read(p []byte) (int, error) {
	if err := l.enter(); err != nil {
		return 0, err
	}
	defer l.leave()
	l.reading.Lock()
	defer l.reading.Unlock()
	l.yield()
	watched := false
	for {
		if passed(&l.readUntil) {
			return 0, os.ErrDeadlineExceeded
		}
		if !l.drained {
			n, err := l.receive(p)
			if n > 0 || err != nil {
				return n, err
			}
		}
		if !watched {
			watched = true
			if n, err := l.watch(p); n > 0 || err != nil {
				return n, err
			}
		}
		if err := l.await(l.waits[:], &l.readUntil, -1); err != nil {
			return 0, err
		}
		if l.waits[1].Revents != 0 {
			var sink [8]byte
			_, _ = unix.Read(l.wake, sink[:])
		}
		l.drained = l.waits[0].Revents == 0
	}
}

// receive takes what is there; 0 and no error when that is nothing.
func (l *line) receive(p []byte) (int, error) {
	for {
		n, err := syscall.Read(l.fd, p) // not x/sys: the race detector knows no order between the two
		switch {
		case err == syscall.EINTR:
		case err == syscall.EAGAIN:
			l.drained = true
			return 0, nil
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, io.EOF
		default:
			l.drained = n < len(p)
			return n, nil
		}
	}
}

// watch looks for the next request for a moment without sleeping.
func (l *line) watch(p []byte) (n int, err error) {
	l.forData.look(func() bool {
		n, err = l.receive(p)
		return n > 0 || err != nil
	})
	return n, err
}

// watcher decides when to look for something without sleeping, which is when
// that has been worth it lately: waking a thread costs more than a busy client
// needs for its next request. Clients that are slower, or that want this very
// CPU, make it look ever less often.
type watcher struct {
	misses int // in vain, one after the other
	skip   int // so many times not at all
}

// look calls there until it is true, for a moment at most.
func (w *watcher) look(there func() bool) bool {
	if w.skip > 0 {
		w.skip--
		return false
	}
	for begun := time.Now(); time.Since(begun) < watchFor; {
		if there() {
			w.misses = 0
			return true
		}
	}
	w.misses = min(w.misses+1, watchMisses)
	w.skip = 1<<w.misses - 1
	return false
}

// yield passes the processor on for a moment, now and then. To the runtime's
// monitor a goroutine that never does looks like one that hogs it: from 10 ms on
// it takes the processor away in every system call, and each costs two threads'
// waking up.
func (l *line) yield() {
	if now := time.Now(); now.Sub(l.yielded) >= yieldEvery {
		l.yielded = now
		runtime.Gosched()
	}
}

// await polls until something happens, the deadline, or the limit (when it is
// not negative). Only a closed line is an error.
func (l *line) await(fds []unix.PollFd, deadline *atomic.Int64, limit time.Duration) error {
	if until := deadline.Load(); until != 0 {
		left := time.Duration(max(0, until-time.Now().UnixNano()))
		if limit < 0 || left < limit {
			limit = left
		}
	}
	ms := -1
	if limit >= 0 {
		ms = int((limit + time.Millisecond - 1) / time.Millisecond)
	}
	for i := range fds {
		fds[i].Revents = 0
	}
	_, err := unix.Poll(fds, ms)
	if err != nil && err != unix.EINTR {
		return os.NewSyscallError("poll", err)
	}
	if l.state.Load() >= lineClosed {
		return net.ErrClosed
	}
	return nil
}

// Write sends all of p, or says how much and why not more.
func (l *line) Write(p []byte) (int, error) {
	if err := l.enter(); err != nil {
		return 0, err
	}
	defer l.leave()
	l.writing.Lock()
	defer l.writing.Unlock()
	if passed(&l.writeUntil) {
		return 0, os.ErrDeadlineExceeded
	}
	sent := 0
	for sent < len(p) {
		n, err := syscall.Write(l.fd, p[sent:])
		sent += max(0, n)
		switch {
		case err == syscall.EAGAIN:
			if err := l.awaitRoom(); err != nil {
				return sent, err
			}
		case err != nil && err != syscall.EINTR:
			return sent, os.NewSyscallError("write", err)
		}
	}
	return sent, nil
}

// awaitRoom waits until something can be sent.
func (l *line) awaitRoom() error {
	if l.forRoom.look(l.hasRoom) {
		return nil
	}
	for {
		if passed(&l.writeUntil) {
			return os.ErrDeadlineExceeded
		}
		if err := l.await(l.full[:], &l.writeUntil, writeLook); err != nil {
			return err
		}
		if l.full[0].Revents != 0 {
			return nil
		}
	}
}

func (l *line) hasRoom() bool {
	n, _ := unix.Poll(l.full[:], 0)
	return n > 0
}

func passed(deadline *atomic.Int64) bool {
	until := deadline.Load()
	return until != 0 && until <= time.Now().UnixNano()
}

// SetDeadline sets both deadlines.
func (l *line) SetDeadline(t time.Time) error {
	_ = l.SetWriteDeadline(t)
	return l.SetReadDeadline(t)
}

// SetReadDeadline is heeded by a Read that waits, at once.
func (l *line) SetReadDeadline(t time.Time) error {
	return l.setDeadline(&l.readUntil, t)
}

// SetWriteDeadline is heeded by a Write that waits, within writeLook.
func (l *line) SetWriteDeadline(t time.Time) error {
	return l.setDeadline(&l.writeUntil, t)
}

func (l *line) setDeadline(d *atomic.Int64, t time.Time) error {
	if err := l.enter(); err != nil {
		return err
	}
	defer l.leave()
	ns := int64(0)
	if !t.IsZero() {
		ns = t.UnixNano()
	}
	if d.Swap(ns) != ns && d == &l.readUntil {
		l.rouse()
	}
	return nil
}

// SyscallConn gives the descriptor out.
func (l *line) SyscallConn() (syscall.RawConn, error) { return (*rawLine)(l), nil }

// rawLine is the line's descriptor as the syscall package wants it.
type rawLine line

func (r *rawLine) Control(f func(fd uintptr)) error {
	l := (*line)(r)
	if err := l.enter(); err != nil {
		return err
	}
	defer l.leave()
	f(uintptr(l.fd))
	return nil
}

// Read is of no use to anybody here.
func (r *rawLine) Read(func(fd uintptr) bool) error { return errors.ErrUnsupported }

// Write calls f whenever something can be sent, until it returns true.
func (r *rawLine) Write(f func(fd uintptr) bool) error {
	l := (*line)(r)
	if err := l.enter(); err != nil {
		return err
	}
	defer l.leave()
	l.writing.Lock()
	defer l.writing.Unlock()
	for !f(uintptr(l.fd)) {
		if err := l.awaitRoom(); err != nil {
			return err
		}
	}
	return nil
}
