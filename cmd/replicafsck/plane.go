package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The pid files of a VM's data plane, below RUN/vm/UUID. Each is locked for as
// long as its process lives.
const (
	keeperPID = "keeper.pid"
	planePID  = "dataplane.pid"
	pidPoll   = 50 * time.Millisecond
)

// stopPlane drains what serves the VM's disks: the keeper, which ends the data
// plane in order, or a data plane without one.
func (c *command) stopPlane(ctx context.Context, r vmRecord) error {
	dir := filepath.Join(c.runDir, "vm", string(r.VM))
	told := map[int]bool{}
	for {
		keeper, err1 := holder(filepath.Join(dir, keeperPID))
		plane, err2 := holder(filepath.Join(dir, planePID))
		if err := errors.Join(err1, err2); err != nil {
			return fmt.Errorf("find the data plane: %w", err)
		}
		pid := keeper
		if pid == 0 {
			pid = plane
		}
		if pid == 0 {
			return nil
		}
		if !told[pid] {
			told[pid] = true
			fmt.Fprintf(c.out, "stopping    process %d, which serves the disks of %s\n", pid, r.Name)
			if err := unix.Kill(pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("stop process %d: %w", pid, err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d still serves the disks (log: %s): kill -9 %d; %w", pid, filepath.Join(dir, "dataplane.log"), pid, ctx.Err())
		case <-time.After(pidPoll):
		}
	}
}

// holder is the process that holds a pid file, 0 when none does. It only looks.
func holder(path string) (int, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lk := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
		return 0, fmt.Errorf("query lock of %s: %w", path, err)
	}
	if lk.Type == unix.F_UNLCK {
		return 0, nil
	}
	var pid int
	if _, err := fmt.Fscan(f, &pid); err != nil || pid <= 1 {
		return 0, fmt.Errorf("%s is locked but names no process", path)
	}
	return pid, nil
}
