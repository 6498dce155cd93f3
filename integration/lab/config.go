package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// writeConfig gives libvirtd what it needs to run as root without any other
// service: no polkit, sasl, logd or lockd. TCP without authentication is for
// migration between the two hosts; nobody else can reach that network.
func (h *Host) writeConfig() error {
	etc := filepath.Join(h.dir, "etc-libvirt")
	daemon := lines(
		`unix_sock_rw_perms = "0700"`,
		`auth_unix_ro = "none"`,
		`auth_unix_rw = "none"`,
		`listen_tls = 0`,
		`listen_tcp = 1`,
		`auth_tcp = "none"`,
		fmt.Sprintf(`listen_addr = %q`, h.IP()),
		fmt.Sprintf(`host_uuid = %q`, h.uuid()),
		`log_outputs = "2:file:/var/log/libvirt/libvirtd.log"`,
	)
	qemu := []string{
		`security_driver = "none"`,
		`security_default_confined = 0`,
		`cgroup_controllers = [ ]`,
		`namespaces = [ ]`,
		`seccomp_sandbox = 0`,
		`stdio_handler = "file"`,
		fmt.Sprintf(`migration_address = %q`, h.IP()),
		fmt.Sprintf(`migration_host = %q`, h.IP()),
		`remember_owner = 0`,
	}
	if h.lab.opts.nonRoot(h.name) {
		qemu = append(qemu, `user = "libvirt-qemu"`, `group = "kvm"`, `dynamic_ownership = 1`)
	} else {
		qemu = append(qemu, `user = "root"`, `group = "root"`, `dynamic_ownership = 0`)
	}
	for name, text := range map[string]string{
		"libvirtd.conf": daemon, "qemu.conf": lines(qemu...), "libvirt.conf": "",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := copyTree("/etc/libvirt/nwfilter", filepath.Join(etc, "nwfilter")); err != nil {
		return err
	}
	return defaultNetwork(filepath.Join(etc, "qemu/networks/default.xml"))
}

// defaultNetwork takes the distribution's default network over.
func defaultNetwork(to string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	for _, from := range []string{"/usr/share/libvirt/networks/default.xml", "/etc/libvirt/qemu/networks/default.xml"} {
		text, err := os.ReadFile(from)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		return os.WriteFile(to, text, 0o600)
	}
	return nil
}

func lines(l ...string) string { return strings.Join(l, "\n") + "\n" }
