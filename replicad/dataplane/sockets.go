package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Descriptor numbers at which a data plane finds its listening sockets. They
// stay open for its whole life so that a later keeper can fetch them.
const (
	fdNBD     = 3
	fdControl = 4
	fdLink    = 5 // of a successor: to its predecessor
)

// backlog is how many clients may wait while no data plane accepts.
const backlog = 128

// listenUnix makes a listening socket that appears under its name only when
// owner and mode are right and connect() works.
func listenUnix(path string, mode uint32, uid, gid *int) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err := publish(fd, path, mode, uid, gid); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("make socket %s: %w", path, err)
	}
	return f, nil
}

func publish(fd int, path string, mode uint32, uid, gid *int) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: tmp}); err != nil {
		return err
	}
	if err := os.Chmod(tmp, os.FileMode(mode)); err != nil {
		return err
	}
	if uid != nil || gid != nil {
		if err := os.Chown(tmp, orKeep(uid), orKeep(gid)); err != nil {
			return err
		}
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// orKeep is the value chown(2) takes for "leave it".
func orKeep(id *int) int {
	if id == nil {
		return -1
	}
	return *id
}

// inherited turns a descriptor handed over by the keeper into a listener. The
// descriptor itself stays open: it is never wrapped into an os.File, which
// would close it when it is collected.
func inherited(fd int, name string) (net.Listener, error) {
	unix.CloseOnExec(fd)
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("take over the %s socket from the keeper (descriptor %d): %w", name, fd, err)
	}
	f := os.NewFile(uintptr(dup), name)
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("take over the %s socket from the keeper (descriptor %d): %w", name, fd, err)
	}
	return l, nil
}

// pidFile is a file that names a process and is locked for as long as it
// lives; the lock is the truth, the number is for people and signals.
type pidFile struct{ f *os.File }

// errRunning: the pid file is locked by a living process.
var errRunning = errors.New("already running")

func lockPID(path string) (*pidFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	lk := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, errRunning
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	p := &pidFile{f}
	if err := p.write(os.Getpid()); err != nil {
		_ = f.Close()
		return nil, err
	}
	return p, nil
}

// write names a process in the file.
func (p *pidFile) write(pid int) error {
	_, err := p.f.WriteAt(fmt.Appendf(nil, "%-10d\n", pid), 0)
	return err
}

func (p *pidFile) release() { _ = p.f.Close() }

// runningPID returns the process that holds a pid file; 0 when none does.
func runningPID(path string) (int, error) {
	f, held, err := lockHeld(path)
	if f != nil {
		defer f.Close()
	}
	if err != nil || !held {
		return 0, err
	}
	var pid int
	if _, err := fmt.Fscan(f, &pid); err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s is locked but names no process yet", path)
	}
	return pid, nil
}

// listenerPID is the process that listens on a unix socket.
func listenerPID(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return 0, err
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}
