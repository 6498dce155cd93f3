package inside

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Times of process 1.
const (
	libvirtdUp    = 30 * time.Second       // libvirtd must answer within this
	restartPause  = 200 * time.Millisecond // between two starts of libvirtd
	socketRecheck = 20 * time.Millisecond
)

// PID1 is the main loop of a host's process 1. It returns only on failure or
// when the lifeline ends; the kernel then ends every process of the host.
func PID1(specJSON string) error {
	var spec Spec
	if err := json.Unmarshal([]byte(specJSON), &spec); err != nil {
		return fmt.Errorf("read spec: %w", err)
	}
	status := os.NewFile(FDStatus, "status")
	if err := boot(spec); err != nil {
		_, _ = fmt.Fprintln(status, strings.ReplaceAll(err.Error(), "\n", " "))
		return err
	}
	r := newReaper()
	go r.loop()
	if spec.Libvirtd != "" {
		go supervise(r, spec.Libvirtd)
		if err := waitSocket(LibvirtSocket, libvirtdUp); err != nil {
			_, _ = fmt.Fprintln(status, err)
			return err
		}
	}
	if _, err := fmt.Fprintln(status, "ready"); err != nil {
		return err
	}
	if err := status.Close(); err != nil {
		return err
	}
	if spec.Tied {
		_, _ = io.Copy(io.Discard, os.NewFile(FDLifeline, "lifeline"))
		return errors.New("the lab that made this host is gone")
	}
	select {}
}

func boot(spec Spec) error {
	// An interrupt at the terminal is for the lab, not for its hosts.
	signal.Ignore(unix.SIGINT, unix.SIGHUP, unix.SIGPIPE)
	goFile := os.NewFile(FDGo, "go")
	if _, err := io.ReadFull(goFile, make([]byte, 1)); err != nil {
		return fmt.Errorf("wait for the network: %w", err)
	}
	if err := goFile.Close(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if spec.Wire {
		return nil
	}
	return mountAll(spec)
}

// supervise keeps program running, as a service manager would.
func supervise(r *reaper, program string) {
	for {
		if _, err := os.Stat(HoldLibvirtd); errors.Is(err, fs.ErrNotExist) {
			_ = os.Remove(LibvirtPIDFile)
			<-r.start(program, "--listen", "-p", LibvirtPIDFile)
		}
		time.Sleep(restartPause)
	}
}

func waitSocket(path string, limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(socketRecheck) {
		c, err := net.Dial("unix", path)
		if err == nil {
			return c.Close()
		}
		if time.Now().After(end) {
			return fmt.Errorf("libvirtd does not answer after %v: %w", limit, err)
		}
	}
}

// reaper collects every orphan of the host and tells who waits for a child.
type reaper struct {
	mu      sync.Mutex
	waiting map[int]chan struct{} // guarded by mu
	changed chan os.Signal
}

func newReaper() *reaper {
	r := &reaper{waiting: map[int]chan struct{}{}, changed: make(chan os.Signal, 1)}
	signal.Notify(r.changed, unix.SIGCHLD)
	return r
}

// start runs program and returns a channel that closes when it has ended.
func (r *reaper) start(program string, args ...string) <-chan struct{} {
	done := make(chan struct{})
	r.mu.Lock()
	defer r.mu.Unlock()
	p, err := os.StartProcess(program, append([]string{program}, args...), &os.ProcAttr{
		Env: os.Environ(), Files: []*os.File{nil, os.Stdout, os.Stderr},
	})
	if err != nil {
		_, _ = fmt.Fprintf(os.Stderr, "start %s: %v\n", program, err)
		close(done)
		return done
	}
	r.waiting[p.Pid] = done
	_ = p.Release()
	return done
}

func (r *reaper) loop() {
	for range r.changed {
		for r.collect() {
		}
	}
}

// collect reaps one child; false when none is left to reap.
func (r *reaper) collect() bool {
	r.mu.Lock() // a child must not be reaped before start has noted it
	defer r.mu.Unlock()
	pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
	if errors.Is(err, unix.EINTR) {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	if done, ok := r.waiting[pid]; ok {
		delete(r.waiting, pid)
		close(done)
	}
	return true
}
