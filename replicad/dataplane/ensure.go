package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/wire"
)

// Polling while processes come and go.
const (
	pollEvery   = 20 * time.Millisecond
	pollAttempt = 500 * time.Millisecond
)

// maxLog is the size at which the log is put aside when a keeper starts.
const maxLog = 8 << 20

// Ensure starts the keeper of cfg's VM unless it runs, waits until the data
// plane answers and returns a client. A data plane that runs with another
// configuration keeps it; use Stop and Ensure to change that. When the data
// plane cannot start, the error says why while the keeper goes on trying.
func Ensure(ctx context.Context, cfg Config) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("data plane of %s: %v", cfg.Name, err)}
	}
	pid, err := runningPID(cfg.keeperPID())
	if err != nil {
		return nil, fmt.Errorf("find the keeper of %s: %w", cfg.Name, err)
	}
	c := NewClient(cfg.ControlSocket())
	if pid != 0 {
		// It may have been killed just now and hold its lock a little longer.
		if err = await(ctx, cfg, c); err == nil {
			return c, nil
		}
	}
	if pid == 0 || errors.Is(err, errEnded) {
		if err := launch(ctx, cfg); err != nil {
			return nil, fmt.Errorf("start the keeper of %s: %w", cfg.Name, err)
		}
		err = await(ctx, cfg, c)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// launch prepares the directories and starts a detached keeper.
func launch(ctx context.Context, cfg Config) error {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{cfg.StateDir, 0o700}, {cfg.SharedDir, 0o700}, {cfg.RunDir, 0o711}} {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return err
		}
	}
	// QEMU's user must be able to pass through, not to list.
	if err := os.Chmod(cfg.RunDir, 0o711); err != nil {
		return err
	}
	// Begun is finished: a keeper that nobody waited for would come up after a
	// Stop that did not see it, and hold the images for ever.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), launchTimeout)
	defer cancel()
	lock, err := lockLaunch(ctx, cfg)
	if err != nil {
		return err
	}
	defer lock.Close()
	if pid, err := runningPID(cfg.keeperPID()); err != nil || pid != 0 {
		return err // the launch that was waited for did it
	}
	if err := cfg.save(); err != nil {
		return err
	}
	out, err := openLog(cfg.logFile())
	if err != nil {
		return err
	}
	defer out.Close()
	bin, err := cfg.binary()
	if err != nil {
		return err
	}
	args := append(append([]string(nil), cfg.Launcher...), bin, "keeper", "--detach", "--config", cfg.configFile())
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	passLaunch(cmd, lock)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = "/"
	return cmd.Run()
}

// launchTimeout bounds the start of a keeper, detachTimeout the wait for its
// sign of life in it.
const (
	launchTimeout = time.Minute
	detachTimeout = 30 * time.Second
)

// Detach starts the keeper proper in a session of its own and returns when that
// can be found, or has ended: the verb "keeper --detach". The keeper then has no
// parent that could take it down.
func Detach(configFile string) error {
	cfg, err := LoadConfig(configFile)
	if err != nil {
		return err
	}
	bin, err := os.Executable()
	if err != nil {
		return err
	}
	lock := inheritedLaunch(cfg)
	if lock != nil {
		defer lock.Close()
	}
	cmd := exec.Command(bin, "keeper", "--config", configFile)
	passLaunch(cmd, lock)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Dir = "/"
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // it says why it failed in the failure file
	}()
	tooLong := time.After(detachTimeout)
	for {
		if pid, err := runningPID(cfg.keeperPID()); err == nil && pid != 0 {
			return nil
		}
		select {
		case <-ended:
			return nil
		case <-tooLong:
			return fmt.Errorf("the keeper of %s did not lock %s within %s (log: %s)", cfg.Name, cfg.keeperPID(), detachTimeout, cfg.logFile())
		case <-time.After(pollEvery):
		}
	}
}

func openLog(path string) (*os.File, error) {
	if st, err := os.Stat(path); err == nil && st.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

var (
	errNotReady = errors.New("the keeper is not ready")
	errEnded    = errors.New("the keeper has ended without a word")
)

// keeperReady reports that a living keeper holds the sockets. A data plane
// alone may answer before a new keeper has adopted it.
func keeperReady(cfg Config) bool {
	pid, err := runningPID(cfg.keeperPID())
	if err != nil || pid == 0 {
		return false
	}
	b, err := os.ReadFile(cfg.readyFile())
	return err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(pid)
}

// await polls until the data plane answers or says why it cannot, or until its
// keeper has ended.
func await(ctx context.Context, cfg Config, c *Client) error {
	for {
		err := errNotReady
		if keeperReady(cfg) {
			try, cancel := context.WithTimeout(ctx, pollAttempt)
			_, err = c.Status(try)
			cancel()
		}
		if err == nil {
			return nil
		}
		gone := false
		if errors.Is(err, errNotReady) {
			pid, perr := runningPID(cfg.keeperPID())
			gone = pid == 0 && perr == nil
		}
		if f := readFailure(cfg); f != nil {
			return f
		}
		if gone {
			return fmt.Errorf("wait for the data plane of %s (log: %s): %w", cfg.Name, cfg.logFile(), errEnded)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the data plane of %s (log: %s): %w", cfg.Name, cfg.logFile(), err)
		case <-time.After(pollEvery):
		}
	}
}

// writeFailure leaves a word for Ensure; a data plane that serves takes it away.
func writeFailure(cfg Config, err error) {
	b, jerr := json.Marshal(newAnswer(err))
	if jerr == nil {
		_ = replaceFile(cfg.failureFile(), b, 0o600)
	}
}

func readFailure(cfg Config) error {
	b, err := os.ReadFile(cfg.failureFile())
	if err != nil || len(b) > maxConfig {
		return nil
	}
	var a answer
	if json.Unmarshal(b, &a) != nil {
		return nil
	}
	return a.named()
}

// Stop drains and ends the data plane and its keeper, and waits for that, also
// for a keeper that somebody is just launching. It is a no-op when none runs.
func Stop(ctx context.Context, cfg Config) error {
	told := map[int]bool{}
	for {
		// In this order: a keeper has its lock before its launch ends.
		coming, err0 := launching(cfg)
		keeper, err1 := runningPID(cfg.keeperPID())
		plane, err2 := runningPID(cfg.planePID())
		if !coming && keeper == 0 && plane == 0 && errors.Join(err0, err1, err2) == nil {
			return nil
		}
		// The keeper passes it on; an orphan, or the one that took over from it
		// meanwhile, is told directly.
		who := keeper
		if who == 0 {
			who = plane
		}
		if who != 0 && !told[who] {
			told[who] = true
			if err := unix.Kill(who, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("stop process %d of %s: %w", who, cfg.Name, err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stop the data plane of %s (keeper %d, data plane %d, another is being launched: %t; log: %s): %w",
				cfg.Name, keeper, plane, coming, cfg.logFile(), errors.Join(ctx.Err(), err0, err1, err2))
		case <-time.After(pollEvery):
		}
	}
}

// EndKeeper ends the keeper and nothing else. Ensure starts one of the installed
// program then, which adopts the data plane. A guest does not notice: the data
// plane has the sockets as well.
func EndKeeper(ctx context.Context, cfg Config) error {
	pid, err := runningPID(cfg.keeperPID())
	if err != nil {
		return fmt.Errorf("find the keeper of %s: %w", cfg.Name, err)
	}
	if pid != 0 {
		// Not asked to end: it would drain the data plane.
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("end the keeper %d of %s: %w", pid, cfg.Name, err)
		}
	}
	for {
		now, err := runningPID(cfg.keeperPID())
		if err == nil && now != pid {
			return nil // gone, or another one is there already
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of the keeper %d of %s: %w", pid, cfg.Name, ctx.Err())
		case <-time.After(pollEvery):
		}
	}
}

// asWire gives every error the shape that crosses the socket.
func asWire(err error) *wire.Error {
	var e *wire.Error
	if errors.As(err, &e) {
		if e.Text == err.Error() {
			return e
		}
		out := &wire.Error{Kind: e.Kind, Text: err.Error(), Have: e.Have}
		if text, ok := strings.CutSuffix(out.Text, " ("+e.Hint+")"); ok && e.Hint != "" {
			out.Text, out.Hint = text, e.Hint // shown apart
		}
		return out
	}
	return &wire.Error{Kind: wire.KindInternal, Text: err.Error()}
}

// Reconfigure changes what the next start of the data plane does; one that runs
// goes on as it is.
func Reconfigure(cfg Config) error {
	if err := cfg.Validate(); err != nil {
		return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("data plane of %s: %v", cfg.Name, err)}
	}
	return cfg.save()
}
