// Package systemd boots this machine's own system a second time, in a container
// with systemd as its first process, so that the product can be installed and
// run as on a host of somebody's: the unit, its sandbox, the order of a shutdown,
// libvirt as the distribution configures it.
//
// It guarantees that nothing the box does reaches the machine: its files are an
// overlay, its network, processes and names its own; and that nothing of it
// outlives the process that made it. It needs root, systemd-nspawn and cgroups.
//
// Callers say what files to add (Seed) before the first Boot and call Close.
package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Missing names what this machine lacks for a box.
func Missing() (what []string) {
	for _, p := range []string{"systemd-nspawn", "unshare", "nsenter", "ip"} {
		if _, err := exec.LookPath(p); err != nil {
			what = append(what, p)
		}
	}
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		what = append(what, "systemd")
	}
	if len(cgroups()) == 0 {
		what = append(what, "cgroups")
	}
	return what
}

// cgroups are the hierarchies in which systemd keeps track of its services.
func cgroups() (roots []string) {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return []string{"/sys/fs/cgroup"}
	}
	for _, r := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(r, "cgroup.procs")); err == nil {
			roots = append(roots, r)
		}
	}
	return roots
}

// Box is one container. Its methods may be called by one goroutine at a time.
type Box struct {
	name, dir string
	cmd       *exec.Cmd
	leader    int           // the box's process 1, as the machine sees it
	ended     chan struct{} // closed at the box's end
}

// New makes a box that is off; its files live below dir.
func New(dir, name string) (*Box, error) {
	b := &Box{name: name, dir: filepath.Join(dir, name)}
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.MkdirAll(filepath.Join(b.dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// Seed is where files are added to those of the machine, before the first Boot.
func (b *Box) Seed() string { return filepath.Join(b.dir, "upper") }

// Path is where a file of the box's own disk is found from outside. Read only,
// while the box runs.
func (b *Box) Path(p string) string { return filepath.Join(b.Seed(), p) }

// Log is what systemd printed on the box's console since the first Boot.
func (b *Box) Log() string {
	text, _ := os.ReadFile(b.logFile()) // for messages
	return string(text)
}

func (b *Box) logFile() string { return filepath.Join(b.dir, "console.log") }

func (b *Box) cgroup(root string) string {
	return filepath.Join(root, fmt.Sprintf("kvmreplica-%s-%d", b.name, os.Getpid()))
}

// script ends as the container's supervisor: the mounts are its alone.
const script = `set -e
for c in $CGROUPS; do mkdir -p "$c"; echo $$ > "$c/cgroup.procs"; done
exec unshare -m --propagation private sh -c '
  mount -t overlay overlay -o "lowerdir=/,upperdir=$BOX/upper,workdir=$BOX/work" "$BOX/root"
  exec systemd-nspawn -q --register=no --keep-unit --link-journal=no --capability=all -M "$NAME" -D "$BOX/root" \
    --private-network --boot systemd.unit=multi-user.target'
`

// Boot starts the box and returns when its system is up.
func (b *Box) Boot(ctx context.Context) error {
	out, err := os.OpenFile(b.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	var groups []string
	for _, r := range cgroups() {
		groups = append(groups, b.cgroup(r))
	}
	b.cmd = exec.Command("sh", "-c", script)
	b.cmd.Env = append(os.Environ(), "BOX="+b.dir, "NAME="+b.name, "CGROUPS="+strings.Join(groups, " "))
	b.cmd.Stdout, b.cmd.Stderr = out, out
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	b.ended = make(chan struct{})
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the signal of a parent's death is one of its thread's
		defer close(b.ended)
		err := b.cmd.Start()
		started <- err
		if err == nil {
			_ = b.cmd.Wait() // how it ended stands in the log
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	return b.await(ctx)
}

// await waits for process 1 and then for its word that all services run. One
// that failed is the caller's to find: the machine may have odd ones.
func (b *Box) await(ctx context.Context) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if b.leader = b.child(); b.leader != 0 {
			out, _ := b.Command(ctx, "systemctl", "is-system-running").Output()
			if s := string(bytes.TrimSpace(out)); s == "running" || s == "degraded" {
				return nil
			}
		}
		select {
		case <-b.ended:
			return fmt.Errorf("box %s ended: %s", b.name, tail(b.Log()))
		case <-ctx.Done():
			return fmt.Errorf("box %s: %w: %s", b.name, ctx.Err(), tail(b.Log()))
		case <-tick.C:
		}
	}
}

func tail(s string) string { return s[max(0, len(s)-3000):] }

// child is the supervisor's child that is systemd, 0 while there is none.
func (b *Box) child() int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", b.cmd.Process.Pid, b.cmd.Process.Pid))
	for _, f := range strings.Fields(string(text)) {
		if comm, _ := os.ReadFile("/proc/" + f + "/comm"); string(comm) == "systemd\n" {
			pid, _ := strconv.Atoi(f) // the kernel wrote it
			return pid
		}
	}
	return 0
}

// Command runs a program in the box.
func (b *Box) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"-t", strconv.Itoa(b.leader), "-m", "-u", "-i", "-n", "-p", "-w", "--", name}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"}
	return cmd
}

// Exec runs a program in the box and returns what it printed.
func (b *Box) Exec(ctx context.Context, name string, args ...string) (string, error) {
	out, err := b.Command(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s on %s: %w: %s", strings.Join(append([]string{name}, args...), " "), b.name, err, out)
	}
	return string(out), nil
}

// Connect joins two running boxes by a cable and gives them addresses of one
// network of 24 bits.
func Connect(ctx context.Context, a, b *Box, addrA, addrB string) error {
	out, err := exec.CommandContext(ctx, "ip", "link", "add", "cable", "netns", strconv.Itoa(a.leader),
		"type", "veth", "peer", "name", "cable", "netns", strconv.Itoa(b.leader)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("connect %s and %s: %w: %s", a.name, b.name, err, out)
	}
	for _, e := range []struct {
		b    *Box
		addr string
	}{{a, addrA}, {b, addrB}} {
		_, err1 := e.b.Exec(ctx, "ip", "addr", "add", e.addr+"/24", "dev", "cable")
		_, err2 := e.b.Exec(ctx, "ip", "link", "set", "cable", "up")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
	}
	return nil
}

// PowerOff shuts the box down as its power button would, and waits.
func (b *Box) PowerOff(ctx context.Context) error {
	if _, err := b.Exec(ctx, "systemctl", "poweroff"); err != nil {
		return err
	}
	select {
	case <-b.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("box %s does not go off: %w: %s", b.name, ctx.Err(), tail(b.Log()))
	}
}

// Close ends the box, whatever runs in it, and removes its cgroups. Again is a
// no-op.
func (b *Box) Close() error {
	if b.ended != nil {
		if b.leader != 0 {
			_ = syscall.Kill(b.leader, syscall.SIGKILL) // with process 1 all others end
		}
		_ = b.cmd.Process.Kill()
		<-b.ended
	}
	var errs []error
	for _, r := range cgroups() {
		errs = append(errs, removeGroup(b.cgroup(r)))
	}
	return errors.Join(errs...)
}

// removeGroup removes a cgroup and those below it. The last processes may still
// be on their way out.
func removeGroup(dir string) error {
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		var dirs []string
		err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			err = errors.Join(err, os.Remove(dirs[i]))
		}
		if err == nil {
			return nil
		}
		runtime.Gosched()
	}
	return err
}
