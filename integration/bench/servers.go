package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/dataplane"
)

// server is a server process under test.
type server struct {
	name, socket string
	export       string // its name there
	log          string // what it says
	cmd          *exec.Cmd
	plane        *plane // instead of cmd
	clock        int32  // CPU clock of the process
}

// The servers, in the order of the table. The tracked ones are data planes as
// replicad starts them: under a keeper, confined.
const (
	tracked   = "tracked"
	untracked = "untracked"
	qemuNBD   = "qemu-nbd"
	nbdkit    = "nbdkit"
	baseline  = "baseline" // tracked, another build
)

// rig is where servers run: a directory with the image, and how to start them.
type rig struct {
	dir      string
	replicad string // the built program
	baseline string // another build of it, or empty
	size     int64
	pin      string // split, same or free
}

// serverCPU and clientCPU are where both ends live when they are pinned.
const (
	clientCPU = 0
	serverCPU = 1
)

// patience bounds what must merely happen.
const patience = 30 * time.Second

// image makes an image of its own for a server: written, so that nobody meets
// holes.
func (r *rig) image(name string) (string, error) {
	path := filepath.Join(r.dir, name+".img")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return "", err
	}
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i*13 + i>>9 + 1)
	}
	for off := int64(0); off < r.size; off += int64(len(p)) {
		if _, err := f.Write(p); err != nil {
			return "", errors.Join(err, f.Close())
		}
	}
	return path, f.Close()
}

// command is how a server is started for an image.
func (r *rig) command(name, img, socket string) []string {
	switch name {
	case qemuNBD:
		return []string{
			"qemu-nbd", "-t", "-k", socket, "--shared=0", "--cache=writeback", "--image-opts",
			"driver=raw,file.driver=file,file.locking=off,file.filename=" + img,
		}
	case nbdkit:
		return []string{"nbdkit", "-f", "-U", socket, "file", img}
	}
	return []string{r.replicad, "nbd", img, "--socket", socket}
}

// pinned puts a command on the servers' CPU.
func (r *rig) pinned(argv []string) []string {
	cpu := serverCPU
	switch r.pin {
	case "free":
		return argv
	case "same":
		cpu = clientCPU
	}
	return append([]string{"taskset", "-c", strconv.Itoa(cpu)}, argv...)
}

// start starts a server on an image. wrap is put in front of its command.
func (r *rig) start(ctx context.Context, name, img string, wrap ...string) (*server, error) {
	switch name {
	case tracked:
		return r.protect(ctx, name, r.replicad, img, wrap)
	case baseline:
		return r.protect(ctx, name, r.baseline, img, wrap)
	}
	s := &server{name: name, socket: filepath.Join(r.dir, name+".sock")}
	argv := slices.Concat(wrap, r.command(name, img, s.socket))
	argv = r.pinned(argv)
	s.cmd = exec.Command(argv[0], argv[1:]...)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, err := os.Create(filepath.Join(r.dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s.log = log.Name()
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.clock = cpuClock(s.cmd.Process.Pid)
	if err := s.awaitListening(ctx); err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, errors.Join(fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, text), s.stop())
	}
	return s, nil
}

// protect starts a data plane.
func (r *rig) protect(ctx context.Context, name, program, img string, wrap []string) (*server, error) {
	dir := filepath.Join(r.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	p, err := startPlane(ctx, dir, program, img, r.pinned(wrap)...)
	s := &server{name: name, socket: p.cfg.NBDSocket(), export: string(planeDisk), plane: p}
	if err == nil {
		var st dataplane.Status
		st, err = p.Status(ctx)
		s.clock = cpuClock(st.PID)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), s.stop())
	}
	return s, nil
}

func (s *server) awaitListening(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if nc, err := net.Dial("unix", s.socket); err == nil {
			_, err = io.ReadFull(nc, make([]byte, 18)) // it greets: it is up
			return errors.Join(err, nc.Close())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("does not listen: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// cpuClock is the CPU clock of another process, as clock_getcpuclockid makes it.
func cpuClock(pid int) int32 { return int32(^pid)<<3 | 2 }

// cpu is the CPU time the process has used, ended threads included.
func (s *server) cpu() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(s.clock, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// stop ends the process and waits for it.
func (s *server) stop() error {
	if s.plane != nil {
		return errors.Join(s.plane.end(context.Background()), os.RemoveAll(filepath.Dir(s.plane.cfg.RunDir)))
	}
	if s.cmd.Process == nil {
		return nil
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	killer := time.AfterFunc(patience, func() { _ = s.cmd.Process.Kill() })
	defer killer.Stop()
	var exit *exec.ExitError
	if err := s.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return err
	}
	return os.RemoveAll(s.socket)
}
