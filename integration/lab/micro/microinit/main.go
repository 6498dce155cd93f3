// Command microinit is process 1 of a throw-away virtual machine. It mounts
// the usual file systems, inserts the modules that the kernel command line
// names, and then does what the test on the host asks for: run programs, write
// files, and join connections to unix sockets in the guest. See package micro.
//
// Kernel command line:
//
//	micro.port=N     TCP port on the host that requests come from
//	micro.load=A,B   modules to insert, in this order
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := start(); err != nil {
		fmt.Println("microinit:", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func start() error {
	if err := mounts(); err != nil {
		return err
	}
	if f, err := os.OpenFile("/dev/ttyS0", os.O_WRONLY|unix.O_NOCTTY, 0); err == nil {
		os.Stdout, os.Stderr = f, f
	}
	knobs, err := readKnobs()
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(knobs["micro.load"], ",") {
		if err := load(name); err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"link", "set", "eth0", "up"},
		{"addr", "add", "10.0.2.15/24", "dev", "eth0"},
	} {
		if out, err := run(append([]string{"/bin/busybox", "ip"}, args...)); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	fmt.Println("MICRO up")
	return serve("10.0.2.2:" + knobs["micro.port"])
}

func mounts() error {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"}, {"tmpfs", "/dev/shm"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
}

func readKnobs() (map[string]string, error) {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	knobs := map[string]string{}
	for _, w := range strings.Fields(string(text)) {
		if k, v, ok := strings.Cut(w, "="); ok {
			knobs[k] = v
		}
	}
	return knobs, nil
}

// load inserts a module and what it needs.
func load(name string) error {
	order, err := os.ReadFile(filepath.Join("/mod", name+".order"))
	if err != nil {
		return err
	}
	for _, m := range strings.Fields(string(order)) {
		f, err := os.Open(filepath.Join("/mod", m))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("%s: %w", m, err)
		}
	}
	return nil
}

// retry is the pause between two attempts to reach the host.
const retry = 50 * time.Millisecond
