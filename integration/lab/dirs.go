package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"kvmreplica/integration/lab/inside"
)

// ownDirs are the directories that belong to a host and survive its crash:
// the path inside the host, and the name below the host's folder.
var ownDirs = []struct{ inside, name string }{
	{"/etc/libvirt", "etc-libvirt"},
	{"/var/lib/libvirt", "lib-libvirt"},
	{"/var/cache/libvirt", "cache-libvirt"},
	{"/var/log/libvirt", "log-libvirt"},
	{"/etc/replicad", "etc-replicad"},
	{"/var/lib/replicad", "lib-replicad"},
}

// makeDirs lays a host's folder out and returns its binds.
func (h *Host) makeDirs() ([]inside.Bind, error) {
	var binds []inside.Bind
	for _, d := range ownDirs {
		own := filepath.Join(h.dir, d.name)
		binds = append(binds, inside.Bind{Source: own, Target: d.inside})
		if err := os.MkdirAll(own, 0o755); err != nil {
			return nil, err
		}
	}
	for _, d := range []string{
		"etc-libvirt/hooks", "etc-libvirt/secrets", "etc-libvirt/storage/autostart",
		"etc-libvirt/qemu/networks/autostart", "lib-libvirt/images", "lib-libvirt/qemu",
		"lib-libvirt/dnsmasq", "lib-libvirt/boot", "log-libvirt/qemu", "cache-libvirt/qemu",
		"log", "scratch",
	} {
		if err := os.MkdirAll(filepath.Join(h.dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	return binds, h.writeConfig()
}

// Path returns where a file of the host is found from outside: paths in the
// host's own directories always, others (/run, for one) only while it is up.
func (h *Host) Path(p string) string {
	for _, d := range ownDirs {
		if rest, ok := strings.CutPrefix(p, d.inside); ok && (rest == "" || rest[0] == '/') {
			return filepath.Join(h.dir, d.name, rest)
		}
	}
	return fmt.Sprintf("/proc/%d/root%s", h.Pid(), p)
}

// PutFile writes a file of the host, by its path inside the host, and makes
// the directories above it.
func (h *Host) PutFile(p string, content []byte, mode fs.FileMode) error {
	out := h.Path(p)
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(out, content, mode); err != nil {
		return err
	}
	return os.Chmod(out, mode)
}

// copyTree copies files below from to to, unless to is there.
func copyTree(from, to string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	err := os.CopyFS(to, os.DirFS(from))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the distribution has none
	}
	return err
}
