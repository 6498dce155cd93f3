package inside

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// mountAll gives the host its own view: private mounts, own /proc, /sys, /run
// and /dev/shm (all lost with the host), own directories from spec.Binds.
func mountAll(spec Spec) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/run"}, {"tmpfs", "/dev/shm"},
	} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.at, err)
		}
	}
	for _, d := range []string{"/run/libvirt", "/run/lock", "/run/replicad"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, b := range spec.Binds {
		if err := os.MkdirAll(b.Target, 0o755); err != nil {
			return err
		}
		if err := bind(b.Source, b.Target); err != nil {
			return err
		}
	}
	if err := replaceFile(spec.ScratchDir, "/proc/sys/kernel/random/boot_id", spec.BootID); err != nil {
		return err
	}
	return replaceFile(spec.ScratchDir, "/etc/machine-id", spec.MachineID)
}

// replaceFile shows content in place of the file at; an absent file stays so.
func replaceFile(scratch, at, content string) error {
	if _, err := os.Stat(at); errors.Is(err, fs.ErrNotExist) || content == "" {
		return nil
	}
	own := filepath.Join(scratch, filepath.Base(at))
	if err := os.WriteFile(own, []byte(content+"\n"), 0o444); err != nil {
		return err
	}
	return bind(own, at)
}

func bind(source, target string) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s over %s: %w", source, target, err)
	}
	return nil
}
