package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// A start of a keeper goes through three processes: this one, "keeper --detach"
// and the keeper. Any of them may be killed at any moment, and Stop must not
// overlook a keeper that is still to come: it would hold the images of a role
// that has ended. So the launch file is locked before the first fork, and the
// lock belongs to an open file that all three inherit: it ends when the keeper
// holds its own lock, or when none of them is left.

// fdLaunch is where the launch file is inherited.
const fdLaunch = 3

// lockLaunch waits until no keeper is being launched and claims the next launch.
func lockLaunch(ctx context.Context, cfg Config) (*os.File, error) {
	f, err := os.OpenFile(cfg.launchFile(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", cfg.launchFile(), err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("another launch holds %s: %w", cfg.launchFile(), ctx.Err()), f.Close())
		case <-time.After(pollEvery):
		}
	}
}

// launching reports whether a keeper is on its way.
func launching(cfg Config) (bool, error) {
	f, held, err := lockHeld(cfg.launchFile())
	if f != nil {
		_ = f.Close() // it was only looked at
	}
	return held, err
}

// inheritedLaunch is the launch file this process was given, nil when it was
// started by hand or by a launcher that passes no files on.
func inheritedLaunch(cfg Config) *os.File {
	// What this process opens itself is closed on exec.
	if flags, err := unix.FcntlInt(fdLaunch, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC != 0 {
		return nil
	}
	var have, want unix.Stat_t
	if unix.Fstat(fdLaunch, &have) != nil || unix.Stat(cfg.launchFile(), &want) != nil || have.Dev != want.Dev || have.Ino != want.Ino {
		return nil
	}
	unix.CloseOnExec(fdLaunch)
	return os.NewFile(fdLaunch, cfg.launchFile())
}

// passLaunch lets a command inherit the launch.
func passLaunch(cmd *exec.Cmd, f *os.File) {
	if f != nil {
		cmd.ExtraFiles = []*os.File{f} // becomes fdLaunch
	}
}

// lockHeld opens a lock file and reports whether a living process has it locked.
// It only looks: a lock taken to find out would make a starting process fail.
// The file is nil when there is none.
func lockHeld(path string) (f *os.File, held bool, err error) {
	f, err = os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	lk := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
		return f, false, fmt.Errorf("query lock of %s: %w", path, err)
	}
	return f, lk.Type != unix.F_UNLCK, nil
}
