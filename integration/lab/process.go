package lab

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is a process number together with the start time that makes it
// unique, so that a number used again is never taken for ours.
type process struct {
	PID   int
	Start string
}

// identify describes the running process pid.
func identify(pid int) (process, error) {
	s, err := startTime(pid)
	return process{PID: pid, Start: s}, err
}

// startTime is field 22 of /proc/PID/stat, an error for a process that has
// ended and was only not waited for (state Z). The command name before it may
// contain anything, hence the search for its last bracket.
func startTime(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	_, rest, ok := strings.Cut(string(text[strings.LastIndexByte(string(text), ')')+1:]), " ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return "", fmt.Errorf("/proc/%d/stat: unexpected form", pid)
	}
	if f[0] == "Z" || f[0] == "X" {
		return "", fmt.Errorf("process %d has ended", pid)
	}
	return f[19], nil
}

// alive reports whether the process still runs.
func (p process) alive() bool {
	if p.PID <= 0 {
		return false
	}
	s, err := startTime(p.PID)
	return err == nil && s == p.Start
}

// kill ends the process, if it is still the same, and waits until it, and with
// it every process of its pid namespace, is gone.
func (p process) kill(limit time.Duration) error {
	if !p.alive() {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if !p.alive() { // the number changed hands before the descriptor was open
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return waitExit(fd, p.PID, limit)
}

// waitExit waits until the process behind a pid descriptor has ended.
func waitExit(fd, pid int, limit time.Duration) error {
	for end := time.Now().Add(limit); ; {
		left := time.Until(end).Milliseconds()
		if left <= 0 {
			return fmt.Errorf("process %d did not end within %v", pid, limit)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", pid, err)
		}
		if n > 0 {
			return nil
		}
	}
}
