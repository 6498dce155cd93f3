package powerfail_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/micro"
	"kvmreplica/integration/powerfail/cutdisk"
)

// diskSize is what mkfs.xfs accepts as its least, and some.
const diskSize = 320 << 20

// patience bounds each wait inside a life; nothing waits this long when all is
// well.
const patience = 4 * time.Minute

// idle is how long a cut waits for the write it is to follow.
const idle = 3 * time.Second

// fsModule is the module of a file system that the kernel has not built in.
func fsModule(fs string) []string {
	if fs == "ext4" {
		return nil
	}
	return []string{fs}
}

// files makes the guest of the campaign, once.
func files(ctx context.Context) (guest.Files, error) {
	return guest.Custom(ctx, micro.Recipe(guest.Recipe{
		Name:     "powerfail",
		Modules:  []string{"xfs", "btrfs"},
		Commands: map[string]string{"/bin/replicad": "./cmd/replicad", "/bin/cutstore": "./integration/powerfail/cutstore"},
		Tools:    map[string]string{"/sbin/mkfs.ext4": "mke2fs", "/sbin/mkfs.xfs": "mkfs.xfs", "/sbin/mkfs.btrfs": "mkfs.btrfs"},
	}))
}

// world is one life's machine and disk.
type world struct {
	t     *testing.T
	ctx   context.Context
	rng   *rand.Rand
	fs    string
	dir   string
	files guest.Files
	disk  *cutdisk.Disk
	srv   *cutdisk.Server
	vm    *micro.Machine // nil while off
	boots int
	cuts  int
}

func newWorld(ctx context.Context, t *testing.T, f guest.Files, fs string, seed uint64) (*world, error) {
	dir, err := os.MkdirTemp("", "pf") // short: it holds sockets
	if err != nil {
		return nil, err
	}
	w := &world{
		t: t, ctx: ctx, rng: rand.New(rand.NewPCG(seed, 77)), fs: fs, dir: dir, files: f, disk: cutdisk.New(diskSize),
	}
	if w.srv, err = cutdisk.Serve(w.disk, filepath.Join(dir, "disk")); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return w, nil
}

func (w *world) close() error {
	if w.vm != nil {
		w.vm.Cut()
	}
	return errors.Join(w.srv.Close(), os.RemoveAll(w.dir))
}

// boot starts the machine and mounts its disk at /data, making the file system
// at the first boot.
func (w *world) boot() error {
	ctx, cancel := context.WithTimeout(w.ctx, patience)
	defer cancel()
	m, err := micro.Boot(ctx, micro.Config{Files: w.files, Dir: w.dir, Disks: []string{filepath.Join(w.dir, "disk")}, Load: fsModule(w.fs), MemoryMiB: 320})
	if err != nil {
		return err
	}
	w.vm = m
	if w.boots++; w.boots == 1 {
		mkfs := []string{"/sbin/mkfs." + w.fs, "-q", "/dev/vda"}
		if w.fs == "ext4" {
			mkfs = []string{"/sbin/mkfs.ext4", "-q", "-F", "-t", "ext4", "/dev/vda"}
		}
		if _, err := m.Exec(ctx, mkfs...); err != nil {
			return err
		}
		if _, err := m.Exec(ctx, "/bin/busybox", "sync"); err != nil {
			return err
		}
	}
	// Write back early, so that unflushed data reaches the disk, too.
	if _, err := m.Exec(ctx, "/bin/busybox", "sh", "-c", "mkdir -p /data && cd /proc/sys/vm && echo 10 >dirty_writeback_centisecs && echo 20 >dirty_expire_centisecs"); err != nil {
		return err
	}
	_, err = m.Exec(ctx, "/bin/busybox", "mount", "-t", w.fs, "/dev/vda", "/data")
	return err
}

// survive gives the disk its survivor, after the machine's power was cut and
// everybody who uses the seed's numbers has ended.
func (w *world) survive() {
	w.vm = nil
	w.cuts++
	w.t.Logf("%s cut %d: %s", w.fs, w.cuts, w.disk.Cut(w.rng))
}

// moment is how long the work may go on.
func (w *world) moment(most time.Duration) time.Duration {
	return time.Duration(w.rng.Int64N(int64(most)))
}

// powerGoes waits for the moment, lets the power go after some more writes (at
// most a few seconds later), and ends the machine. Between two writes of one
// flush is where a cut hurts.
func (w *world) powerGoes(moment time.Duration, writes int) {
	w.await(moment)
	gone := w.disk.Arm(writes)
	timer := time.NewTimer(idle)
	defer timer.Stop()
	select {
	case <-gone:
	case <-timer.C:
	case <-w.ctx.Done():
	}
	w.vm.Cut()
}

// await waits for a moment to come.
func (w *world) await(moment time.Duration) {
	timer := time.NewTimer(moment)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.ctx.Done():
	}
}

// consoleTail is for failures.
func (w *world) consoleTail() string {
	b, err := os.ReadFile(filepath.Join(w.dir, "console"))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-1500):])
}

// wrong is a broken promise, as opposed to trouble with the test itself.
type wrong struct{ error }

func violated(format string, args ...any) error { return wrong{fmt.Errorf(format, args...)} }
