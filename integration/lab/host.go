package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"kvmreplica/integration/lab/inside"
)

// wireName is the folder and host name of the switch.
const wireName = "wire"

// startTimeout bounds a host's way up when the caller's context does not.
const startTimeout = 60 * time.Second

// runMark is the variable by which .ci/run finds what a run left behind.
const runMark = "KVMREPLICA_RUN"

// Host is one pretend host. Its methods may be called from one goroutine at a
// time, except Exec, Command, StartDaemon, Path and the plain getters.
type Host struct {
	lab   *Lab
	name  string
	index int // 1 for A, 2 for B, 0 for the switch
	dir   string
	proc  process
	ended chan struct{} // closed when our own child has been waited for
}

// Name is "A" or "B".
func (h *Host) Name() string { return h.name }

// Hostname is the host's own name, e.g. "kvm-a.lab".
func (h *Host) Hostname() string { return "kvm-" + strings.ToLower(h.name) + ".lab" }

// IP is the host's address on the switch.
func (h *Host) IP() string { return fmt.Sprintf("10.77.0.%d", h.index) }

// Pid is the number of the host's process 1, as the machine sees it.
func (h *Host) Pid() int { return h.proc.PID }

// Up reports whether the host runs.
func (h *Host) Up() bool { return h.proc.alive() }

// VirshSocket is libvirtd's socket as seen from outside the host.
func (h *Host) VirshSocket() string { return h.Path(inside.LibvirtSocket) }

// VirshURI is the connection URI to use outside the host; inside it is
// qemu:///system as everywhere.
func (h *Host) VirshURI() string { return "qemu:///system?socket=" + h.VirshSocket() }

func (h *Host) isWire() bool { return h.index == 0 }

func (h *Host) uuid() string { return h.lab.uuidOf("host " + h.name) }

// Start boots the host: with the files of its previous life, with an empty
// /run and a new boot id. It returns when libvirtd answers.
func (h *Host) Start(ctx context.Context) error {
	if h.Up() {
		return fmt.Errorf("host %s is up already", h.name)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	spec, err := h.spec()
	if err != nil {
		return fmt.Errorf("prepare host %s: %w", h.name, err)
	}
	b, err := h.spawn(spec)
	if err != nil {
		return fmt.Errorf("start host %s: %w", h.name, err)
	}
	defer b.close()
	if h.proc, err = identify(b.cmd.Process.Pid); err != nil {
		return fmt.Errorf("start host %s: %w", h.name, err)
	}
	if err := h.lab.save(); err != nil {
		return errors.Join(err, h.Crash())
	}
	if err := h.connect(); err != nil {
		return errors.Join(fmt.Errorf("connect host %s to the switch: %w", h.name, err), h.Crash())
	}
	if err := b.release(ctx); err != nil {
		return errors.Join(fmt.Errorf("start host %s: %w (see %s)", h.name, err, h.bootLog()), h.Crash())
	}
	return nil
}

func (h *Host) bootLog() string { return filepath.Join(h.dir, "log", "boot.log") }

func (h *Host) spec() (inside.Spec, error) {
	s := inside.Spec{
		Hostname: h.Hostname(), Wire: h.isWire(), Tied: !h.lab.opts.Keep,
		ScratchDir: filepath.Join(h.dir, "scratch"),
		BootID:     h.lab.uuidOf(fmt.Sprint("boot", h.name, time.Now().UnixNano())),
		MachineID:  strings.ReplaceAll(h.lab.uuidOf("machine "+h.name), "-", ""),
	}
	if h.isWire() {
		return s, os.MkdirAll(filepath.Join(h.dir, "log"), 0o755)
	}
	var err error
	if s.Binds, err = h.makeDirs(); err != nil {
		return s, err
	}
	if !h.lab.opts.NoLibvirt {
		s.Libvirtd = libvirtdPath
	}
	for _, f := range h.lab.opts.Boot {
		if err := copyFile(f, filepath.Join(h.dir, "lib-libvirt/boot", filepath.Base(f))); err != nil {
			return s, err
		}
	}
	return s, nil
}

// birth is a host's process 1 before it is on its own.
type birth struct {
	cmd        *exec.Cmd
	goW, stats *os.File
}

func (b *birth) close() {
	_ = b.goW.Close()
	_ = b.stats.Close()
}

// spawn starts process 1; it waits for release before it does anything.
func (h *Host) spawn(spec inside.Spec) (*birth, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	out, err := os.OpenFile(h.bootLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	goR, goW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer goR.Close()
	statR, statW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer statW.Close()
	lifeR, err := h.lab.lifeline()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(h.lab.helper, "pid1", string(text))
	cmd.Stdout, cmd.Stderr = out, out
	// What a host runs must not depend on who made it.
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8",
		runMark + "=" + os.Getenv(runMark),
	}
	cmd.ExtraFiles = []*os.File{goR, statW}
	if lifeR != nil {
		defer lifeR.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, lifeR)
	}
	flags := syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS
	if !h.isWire() {
		flags |= syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: uintptr(flags), Setsid: true}
	if err := cmd.Start(); err != nil {
		_ = goW.Close()
		_ = statR.Close()
		return nil, err
	}
	ended := make(chan struct{})
	h.ended = ended
	go func() { // collects the child whenever it ends
		_ = cmd.Wait() // how it ended is in its log
		close(ended)
	}()
	return &birth{cmd: cmd, goW: goW, stats: statR}, nil
}

// release lets process 1 boot and waits for its verdict.
func (b *birth) release(ctx context.Context) error {
	if _, err := b.goW.Write([]byte{1}); err != nil {
		return err
	}
	if end, ok := ctx.Deadline(); ok {
		if err := b.stats.SetReadDeadline(end); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = b.stats.SetReadDeadline(time.Now()) })
	defer stop()
	line, err := bufio.NewReader(b.stats).ReadString('\n')
	if err != nil {
		return fmt.Errorf("no word from it: %w", err)
	}
	if line = strings.TrimSpace(line); line != "ready" {
		return errors.New(line)
	}
	return nil
}

// Crash cuts the host's power: every process of it is killed at once and has
// ended on return. A host that is down stays so.
func (h *Host) Crash() error {
	if err := h.proc.kill(downTimeout); err != nil {
		return fmt.Errorf("crash host %s: %w", h.name, err)
	}
	if h.ended != nil {
		<-h.ended
		h.ended = nil
	}
	return nil
}

// lifeline returns the reading end of a pipe whose writing end this process
// keeps, or nil for a lab that is kept.
func (l *Lab) lifeline() (*os.File, error) {
	if l.opts.Keep {
		return nil, nil
	}
	if l.life == nil {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		l.life = w
		l.lifeR = r
	}
	fd, err := syscall.Dup(int(l.lifeR.Fd()))
	if err != nil {
		return nil, err
	}
	syscall.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "lifeline"), nil
}
