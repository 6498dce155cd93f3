package config

import (
	"path"
	"strings"
)

// Domain is local policy for the domains of replicas: whatever names something
// outside of the guest comes from here, never from a peer.
type Domain struct {
	// DomainType is "kvm" or "qemu" (software emulation).
	DomainType string
	// Emulator is QEMU's path; empty lets libvirt choose.
	Emulator string
	// QEMUUser owns the sockets and images QEMU opens; empty = as libvirt says.
	QEMUUser string
	// ConsoleDir receives the serial output of replicas' guests; empty = none.
	ConsoleDir string
	// LibvirtState is where libvirt keeps firmware state; empty = /var/lib/libvirt.
	LibvirtState string
	// Fence is a program run before an unplanned failover; it must succeed. Its
	// arguments are the VM's name, its UUID and the old primary's host id.
	Fence string
	// Kernels are files of this host, by label, for guests that boot a kernel
	// of their host.
	Kernels map[string]Kernel
}

// Kernel are the files of one label.
type Kernel struct{ Kernel, Initrd string }

type fileDomain struct {
	Type         *string               `toml:"type"`
	Emulator     *string               `toml:"emulator"`
	QEMUUser     *string               `toml:"qemu_user"`
	ConsoleDir   *string               `toml:"console_dir"`
	LibvirtState *string               `toml:"libvirt_state_dir"`
	Fence        *string               `toml:"fence"`
	Kernels      map[string]fileKernel `toml:"kernels"`
}

type fileKernel struct {
	Kernel string `toml:"kernel"`
	Initrd string `toml:"initrd"`
}

func (p *parser) domain(d *Domain, f fileDomain) {
	take(&d.DomainType, f.Type)
	take(&d.Emulator, f.Emulator)
	take(&d.QEMUUser, f.QEMUUser)
	take(&d.ConsoleDir, f.ConsoleDir)
	take(&d.LibvirtState, f.LibvirtState)
	take(&d.Fence, f.Fence)
	for label, k := range f.Kernels {
		if d.Kernels == nil {
			d.Kernels = map[string]Kernel{}
		}
		d.Kernels[label] = Kernel(k)
	}
}

func (d Domain) complaints(say func(key, format string, args ...any)) {
	if d.DomainType != "kvm" && d.DomainType != "qemu" {
		say("domain.type", "%.32q is not kvm or qemu", d.DomainType)
	}
	for key, p := range map[string]string{
		"domain.emulator": d.Emulator, "domain.console_dir": d.ConsoleDir,
		"domain.libvirt_state_dir": d.LibvirtState, "domain.fence": d.Fence,
	} {
		if p != "" && !path.IsAbs(p) {
			say(key, "%.64q is not an absolute path", p)
		}
	}
	if strings.ContainsAny(d.QEMUUser, " :/\x00") {
		say("domain.qemu_user", "%.32q is not a user name", d.QEMUUser)
	}
	for label, k := range d.Kernels {
		if !path.IsAbs(k.Kernel) || (k.Initrd != "" && !path.IsAbs(k.Initrd)) {
			say("domain.kernels."+label, "kernel and initrd must be absolute paths")
		}
	}
}
