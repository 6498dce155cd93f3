package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/confine"
)

// Restart pauses: short first, because a guest waits; capped, because a data
// plane that cannot start should not eat the host.
const (
	restartFirst  = 50 * time.Millisecond
	restartMax    = time.Second     // the guest waits meanwhile; one start a second costs a host little
	restartStable = 2 * time.Second // a run this long resets the pause
)

// keeper owns the sockets of one VM and keeps a data plane behind them.
type keeper struct {
	cfg     Config
	file    string
	log     *slog.Logger
	nbd     *os.File
	control *os.File
}

// RunKeeper is the verb "keeper": it creates the sockets, keeps a data plane
// running behind them and returns when that was drained, which it asks for when
// ctx ends. A second keeper of the same VM returns an error at once.
func RunKeeper(ctx context.Context, configFile string) error {
	cfg, err := LoadConfig(configFile)
	if err != nil {
		return err
	}
	launch := inheritedLaunch(cfg)
	lock, err := lockPID(cfg.keeperPID())
	if launch != nil {
		_ = launch.Close() // the launch is over, one way or the other
	}
	if err != nil {
		return fmt.Errorf("keeper of %s: %w", cfg.Name, err)
	}
	defer lock.release()
	for _, f := range []string{cfg.failureFile(), cfg.drainedFile(), cfg.readyFile()} {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	k := &keeper{cfg: cfg, file: configFile, log: newLogger(cfg).With("part", "keeper")}
	orphan, err := k.adopt()
	if err == nil && orphan == nil {
		err = k.listen()
	}
	if err != nil {
		err = fmt.Errorf("keeper of %s: %w", cfg.Name, err)
		writeFailure(cfg, err) // for Ensure
		return err
	}
	defer k.unlink()
	if err := replaceFile(cfg.readyFile(), fmt.Appendln(nil, os.Getpid()), 0o600); err != nil {
		return err
	}
	return k.supervise(ctx, orphan)
}

// listen creates both sockets.
func (k *keeper) listen() error {
	mode := k.cfg.SocketMode
	if mode == 0 {
		mode = 0o660
	}
	var err error
	if k.control, err = listenUnix(k.cfg.ControlSocket(), 0o600, nil, nil); err != nil {
		return err
	}
	k.nbd, err = listenUnix(k.cfg.NBDSocket(), mode, k.cfg.SocketUID, k.cfg.SocketGID)
	return err
}

// unlink takes the names away: from here on connect() says that nothing runs.
func (k *keeper) unlink() {
	for _, p := range []string{k.cfg.NBDSocket(), k.cfg.ControlSocket()} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			k.log.Warn("socket stays behind", "path", p, "err", err)
		}
	}
}

// supervise runs data planes one after the other.
func (k *keeper) supervise(ctx context.Context, p process) error {
	pause := restartFirst
	for {
		started := time.Now()
		if p == nil {
			var err error
			if p, err = k.next(); err != nil {
				k.log.Error("the data plane does not start", "err", err)
			}
		}
		if p != nil {
			code := k.watch(ctx, p)
			var err error
			if p, err = k.heir(); p != nil {
				k.log.Info("the data plane was succeeded by another")
				continue
			}
			if err == nil && (k.drained() || ctx.Err() != nil) {
				k.log.Info("the data plane has ended", "code", code)
				return nil
			}
			k.log.Error("the data plane died, starting it again", "code", code, "ran", time.Since(started), "pause", pause, "err", err)
		}
		if time.Since(started) > restartStable {
			pause = restartFirst
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, restartMax)
	}
}

// next is the data plane that runs already, or a new one.
func (k *keeper) next() (process, error) {
	if p, err := k.heir(); p != nil || err != nil {
		return p, err
	}
	return k.start()
}

// heir finds the data plane that holds the pid file: one that took over from
// another is nobody's child. An error means that one lives or just died, and
// that the file does not name it yet.
func (k *keeper) heir() (process, error) {
	pid, err := runningPID(k.cfg.planePID())
	if err != nil || pid == 0 {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("data plane %d: %w", pid, err)
	}
	return adopted(pidfd), nil
}

// drained reports that the last data plane ended on purpose.
func (k *keeper) drained() bool {
	_, err := os.Stat(k.cfg.drainedFile())
	return err == nil
}

// watch waits for the end of a data plane, asking for it when ctx ends.
func (k *keeper) watch(ctx context.Context, p process) int {
	done := make(chan int, 1)
	go func() { done <- p.wait() }()
	select {
	case code := <-done:
		return code
	case <-ctx.Done():
	}
	k.log.Info("draining the data plane")
	p.signal(unix.SIGTERM)
	select {
	case code := <-done:
		return code
	case <-time.After(drainTimeout):
		k.log.Error("the data plane does not drain, killing it")
		p.signal(unix.SIGKILL)
		return <-done
	}
}

// process is a data plane, our child or adopted.
type process interface {
	wait() int // exit code; -1 when a signal ended it or nobody knows
	signal(unix.Signal)
}

func (k *keeper) start() (process, error) {
	bin, err := k.cfg.binary()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, "dataplane", "--config", k.file)
	cmd.ExtraFiles = []*os.File{k.nbd, k.control} // become fdNBD and fdControl
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// Its own group: a signal meant for the keeper's group must not reach it,
	// the keeper drains it in order.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	missing, err := confine.Start(cmd, k.limits())
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		k.log.Warn("the data plane may do more than it should: this kernel refuses to take it away", "what", missing)
	}
	return (*child)(cmd), nil
}

// limits are what a data plane is left; its successors in upgrades inherit them.
// The images' directories are not among what it may change: only for the time of
// a failover on trial, when it ends by taking files away there, it may write
// anywhere.
func (k *keeper) limits() confine.Limits {
	cfg, err := LoadConfig(k.file) // it may have changed since this keeper began
	if err != nil {
		cfg = k.cfg // the data plane will say what is wrong
	}
	l := confine.Limits{Writable: []string{cfg.StateDir, cfg.SharedDir, cfg.RunDir}}
	for _, d := range cfg.Disks {
		switch {
		case d.Kind == NBD:
			l.Network = true
		case !d.ReadOnly:
			l.Writable = append(l.Writable, d.Path)
		}
	}
	if cfg.Overlay != nil {
		l.Writable = nil
	}
	return l
}

// child is a data plane this keeper started.
type child exec.Cmd

func (c *child) wait() int {
	cmd := (*exec.Cmd)(c)
	_ = cmd.Wait()
	return cmd.ProcessState.ExitCode()
}

func (c *child) signal(s unix.Signal) { _ = c.Process.Signal(s) }

// adopt finds a data plane whose keeper died: it goes on serving the guest, so
// it stays, and its listening sockets are fetched from it.
func (k *keeper) adopt() (process, error) {
	pid, err := runningPID(k.cfg.planePID())
	if err != nil || pid == 0 {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("adopt data plane %d: %w", pid, err)
	}
	for _, s := range []struct {
		fd  int
		dst **os.File
	}{{fdNBD, &k.nbd}, {fdControl, &k.control}} {
		fd, err := unix.PidfdGetfd(pidfd, s.fd, 0)
		if err != nil {
			_ = unix.Close(pidfd)
			return nil, fmt.Errorf("adopt data plane %d: fetch its sockets (needs CAP_SYS_PTRACE): %w", pid, err)
		}
		*s.dst = os.NewFile(uintptr(fd), "socket")
	}
	k.log.Info("adopted a running data plane", "pid", pid)
	return adopted(pidfd), nil
}

// adopted is a data plane somebody else started, by its pidfd. Its exit code
// belongs to its parent.
type adopted int

func (a adopted) wait() int {
	fds := []unix.PollFd{{Fd: int32(a), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	_ = unix.Close(int(a))
	return -1
}

func (a adopted) signal(s unix.Signal) { _ = unix.PidfdSendSignal(int(a), s, nil, 0) }

// binary is the program to run.
func (c Config) binary() (string, error) {
	if c.Binary != "" {
		return c.Binary, nil
	}
	return os.Executable()
}

// newLogger writes to standard error, which Ensure points at the log file.
func newLogger(c Config) *slog.Logger {
	level := slog.LevelInfo
	if c.Verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("vm", c.Name)
}
