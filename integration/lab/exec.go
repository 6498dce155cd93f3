package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/integration/lab/inside"
)

// libvirtPoll is how often a wait for libvirtd looks again.
const libvirtPoll = 20 * time.Millisecond

// outputGrace is how long a command that was killed may have its output held
// open by processes that it started.
const outputGrace = 2 * time.Second

// Command prepares a command that will run inside the host, as root, in "/".
// Set its Stdin, Stdout, Stderr and Env before Start; signals sent to it reach
// the command, and killing it kills the command.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	argv := append([]string{"enter", strconv.Itoa(h.Pid()), "--", name}, args...)
	cmd := exec.CommandContext(ctx, h.lab.helper, argv...)
	cmd.WaitDelay = outputGrace
	return cmd
}

// Exec runs a command inside the host and returns its standard output. The
// error of a command that fails carries what it wrote to standard error.
func (h *Host) Exec(ctx context.Context, name string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := h.Command(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("on host %s: %s %s: %w: %s",
			h.name, name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Virsh runs virsh inside the host.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	out, err := h.Exec(ctx, "virsh", args...)
	return strings.TrimSpace(out), err
}

// Daemon is a process started inside a host that runs until it is told to end.
type Daemon struct {
	// LogPath is the file that takes its output.
	LogPath string

	pid  int
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid when done is closed
}

// StartDaemon starts a program inside the host. Its output is appended to
// LogPath. extraEnv is added to the environment of the caller.
func (h *Host) StartDaemon(bin string, args, extraEnv []string) (*Daemon, error) {
	d := &Daemon{LogPath: filepath.Join(h.dir, "log", filepath.Base(bin)+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(d.LogPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	argv := append([]string{"enter", "-tell-pid", strconv.Itoa(h.Pid()), "--", bin}, args...)
	d.cmd = exec.Command(h.lab.helper, argv...)
	d.cmd.Stdout, d.cmd.Stderr = out, out
	d.cmd.ExtraFiles = []*os.File{w}
	d.cmd.Env = append(os.Environ(), extraEnv...)
	// A terminal's interrupt must not reach what only we may end.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = d.cmd.Start()
	_ = w.Close()
	if err != nil {
		return nil, fmt.Errorf("start %s on host %s: %w", bin, h.name, err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.done)
	}()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err == nil {
		d.pid, err = strconv.Atoi(strings.TrimSpace(line))
	}
	if err != nil {
		<-d.done
		return nil, fmt.Errorf("start %s on host %s: %w (see %s)", bin, h.name, errors.Join(d.err, err), d.LogPath)
	}
	return d, nil
}

// Pid is the daemon's process number as the machine, not the host, sees it.
func (d *Daemon) Pid() int { return d.pid }

// Done is closed when the daemon has ended.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Err is how it ended: nil for exit code 0. Call it after Done.
func (d *Daemon) Err() error {
	<-d.done
	return d.err
}

// Signal sends a signal to the daemon itself; none when it has ended.
func (d *Daemon) Signal(s syscall.Signal) error {
	select {
	case <-d.done:
		return nil
	default:
	}
	if err := syscall.Kill(d.pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// Kill is SIGKILL to the daemon alone; its children go on. It returns when the
// daemon is gone.
func (d *Daemon) Kill() error {
	err := d.Signal(syscall.SIGKILL)
	<-d.done
	return err
}

// Stop is SIGTERM; when ctx ends first, SIGKILL. It returns when the daemon is
// gone, with ctx's error if force was needed.
func (d *Daemon) Stop(ctx context.Context) error {
	if err := d.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-d.done:
		return nil
	case <-ctx.Done():
		return errors.Join(ctx.Err(), d.Kill())
	}
}

// KillLibvirtd ends libvirtd with SIGKILL. Process 1 starts it again, unless
// hold; guests are not touched either way.
func (h *Host) KillLibvirtd(hold bool) error {
	if hold {
		if err := os.WriteFile(h.Path(inside.HoldLibvirtd), nil, 0o644); err != nil {
			return err
		}
	}
	pid, err := h.libvirtdPID()
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("open libvirtd's process: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return err
	}
	return waitExit(fd, pid, downTimeout)
}

// ReleaseLibvirtd ends a hold and waits until libvirtd answers again.
func (h *Host) ReleaseLibvirtd(ctx context.Context) error {
	if err := os.RemoveAll(h.Path(inside.HoldLibvirtd)); err != nil {
		return err
	}
	return h.WaitLibvirtd(ctx)
}

// WaitLibvirtd waits until libvirtd answers.
func (h *Host) WaitLibvirtd(ctx context.Context) error {
	tick := time.NewTicker(libvirtPoll)
	defer tick.Stop()
	for {
		_, err := h.Virsh(ctx, "uri")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("libvirtd on host %s does not answer: %w", h.name, err)
		case <-tick.C:
		}
	}
}

// libvirtdPID is libvirtd's number outside the host. It is found by walking
// the children of process 1, since the pid file has the number inside.
func (h *Host) libvirtdPID() (int, error) {
	text, err := os.ReadFile(h.Path(inside.LibvirtPIDFile))
	if err != nil {
		return 0, fmt.Errorf("libvirtd on host %s is not running: %w", h.name, err)
	}
	want := strings.TrimSpace(string(text))
	all, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return 0, err
	}
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.Pid()))
	if err != nil {
		return 0, err
	}
	for _, p := range all {
		dir := filepath.Dir(p)
		if ns, err := os.Readlink(filepath.Join(dir, "ns/pid")); err != nil || ns != own {
			continue
		}
		if insidePID(p) == want {
			return strconv.Atoi(filepath.Base(dir))
		}
	}
	return 0, fmt.Errorf("libvirtd (process %s of host %s) is gone", want, h.name)
}

// insidePID is the last number of a status file's NSpid line.
func insidePID(status string) string {
	text, err := os.ReadFile(status)
	if err != nil {
		return ""
	}
	for l := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(l, "NSpid:"); ok {
			f := strings.Fields(rest)
			return f[len(f)-1]
		}
	}
	return ""
}
