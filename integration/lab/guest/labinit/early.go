package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// earlyMounts makes the directories every program expects.
func (g *guest) earlyMounts() error {
	for _, d := range []string{"/proc", "/sys", "/dev", "/mnt", "/run", "/tmp", "/var"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, m := range []struct{ kind, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	if err := os.Symlink("/run", "/var/run"); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return os.Setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
}

func (g *guest) openConsole() error {
	for _, p := range []string{"/dev/ttyS0", "/dev/console"} {
		if f, err := os.OpenFile(p, os.O_WRONLY|unix.O_NOCTTY, 0); err == nil {
			g.console = f
			return nil
		}
	}
	return errors.New("no /dev/ttyS0 and no /dev/console")
}

// loadModules inserts the kernel modules of the initramfs in the order that
// its maker worked out.
func (g *guest) loadModules() {
	order, err := os.ReadFile("/mod/order")
	if err != nil {
		g.say("ERROR op=modules err=%q", err.Error())
		return
	}
	for _, name := range strings.Fields(string(order)) {
		f, err := os.Open(filepath.Join("/mod", name))
		if err == nil {
			err = unix.FinitModule(int(f.Fd()), "", 0)
			_ = f.Close()
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			g.say("ERROR op=module name=%s err=%q", name, err.Error())
		}
	}
}

// switchRoot makes the first disk the root file system and starts its
// /sbin/init; it returns only on failure.
func (g *guest) switchRoot() error {
	dev := g.knobs.path(0)
	if err := waitFor(dev); err != nil {
		return err
	}
	if g.knobs.fsck {
		g.fsck(dev)
	}
	if err := unix.Mount(dev, "/mnt", "ext4", 0, g.knobs.mount); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	for _, d := range []string{"/dev", "/proc", "/sys", "/run"} {
		if err := unix.Mount(d, "/mnt"+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", d, err)
		}
	}
	if err := os.Chdir("/mnt"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	g.say("ROOT dev=%s", dev)
	return unix.Exec("/sbin/init", []string{"/sbin/init"}, append(os.Environ(), stageVar+"=root", "HOME=/", "TERM=linux"))
}
