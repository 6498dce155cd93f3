package guest

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
)

// BootDir is where a lab host keeps the guest's kernel and initramfs.
const BootDir = "/var/lib/libvirt/boot"

// Disk is one disk of a guest; exactly one of File and NBD is set.
type Disk struct {
	// File is a path as the host sees it; Format is its format, raw when empty.
	File, Format string
	// NBD is a unix socket, Export a name on it.
	NBD, Export string
	// DriverAttrs are further attributes of <driver>, e.g. "discard='unmap'".
	DriverAttrs string
	// Serial is the disk's serial number.
	Serial string
}

// Domain describes a libvirt definition for the lab's guest. Name, Files and
// Disks are needed.
type Domain struct {
	Name  string
	UUID  string // libvirt makes one when empty
	Files Files
	Disks []Disk
	// MemoryMiB is 128 when 0, 256 with UEFI.
	MemoryMiB int
	// Knobs are labinit's, e.g. "lab.interval=10"; lab.disks is added.
	Knobs string
	// Machine is "pc" when empty, "q35" with UEFI.
	Machine string
	// Root boots the system on the first disk.
	Root bool
	// UEFI boots through OVMF with a variable store of the guest's own.
	UEFI bool
	// IOThread gives the disks a thread of their own.
	IOThread bool
	// Agent runs the guest agent and gives it its channel.
	Agent bool
	// Network is the name of a libvirt network; empty for none.
	Network, MAC string
	// Metadata and Extra are XML put into <metadata> and <devices>.
	Metadata, Extra string
	// Emulator is the QEMU to use.
	Emulator string
}

// ConsoleFile is the guest's console, as the host sees it.
func (d Domain) ConsoleFile() string { return "/var/log/libvirt/qemu/" + d.Name + ".console" }

// NVRAM is the guest's UEFI variable store, as the host sees it.
func (d Domain) NVRAM() string { return "/var/lib/libvirt/qemu/nvram/" + d.Name + "_VARS.fd" }

// KernelPath and InitramfsPath are where the host finds what to boot.
func (d Domain) KernelPath() string { return filepath.Join(BootDir, filepath.Base(d.Files.Kernel)) }

// InitramfsPath is the initramfs as the host sees it.
func (d Domain) InitramfsPath() string {
	return filepath.Join(BootDir, filepath.Base(d.Files.Initramfs))
}

// Cmdline is the kernel's command line.
func (d Domain) Cmdline() string {
	c := fmt.Sprintf("console=ttyS0 quiet mitigations=off edd=off lab.disks=%d", len(d.Disks))
	if d.Agent {
		c += " lab.ga=1"
	}
	if d.Root {
		c += " lab.root=1"
	}
	if d.Network != "" {
		c += " lab.net=1"
	}
	return strings.TrimSpace(c + " " + d.Knobs)
}

// Target is the device name of disk i in the definition and in the guest.
func (d Domain) Target(i int) string { return "vd" + string(rune('a'+i)) }

// XML renders the definition.
func (d Domain) XML() (string, error) {
	d.Disks = slices.Clone(d.Disks)
	for i, k := range d.Disks {
		if (k.File == "") == (k.NBD == "") {
			return "", fmt.Errorf("disk %d of %s: want either a file or an NBD socket", i, d.Name)
		}
		if k.Format == "" {
			d.Disks[i].Format = "raw"
		}
	}
	if d.Machine == "" {
		d.Machine = "pc"
		if d.UEFI {
			d.Machine = "q35"
		}
	}
	if d.MemoryMiB == 0 {
		d.MemoryMiB = 128
		if d.UEFI {
			d.MemoryMiB = 256
		}
	}
	if d.Emulator == "" {
		d.Emulator = "/usr/bin/qemu-system-x86_64"
	}
	t, err := template.New("domain").Parse(domainXML)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	err = t.Execute(&out, d)
	return out.String(), err
}

// Names in the definition come from tests, not from outside: nothing is escaped.
const domainXML = `<domain type='qemu'>
  <name>{{.Name}}</name>
{{- if .UUID}}
  <uuid>{{.UUID}}</uuid>
{{- end}}
{{- if .Metadata}}
  <metadata>{{.Metadata}}</metadata>
{{- end}}
  <memory unit='MiB'>{{.MemoryMiB}}</memory>
  <vcpu>1</vcpu>
{{- if .IOThread}}
  <iothreads>1</iothreads>
{{- end}}
  <os>
    <type arch='x86_64' machine='{{.Machine}}'>hvm</type>
{{- if .UEFI}}
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{{.NVRAM}}</nvram>
{{- end}}
    <kernel>{{.KernelPath}}</kernel>
    <initrd>{{.InitramfsPath}}</initrd>
    <cmdline>{{.Cmdline}}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{{.Emulator}}</emulator>
{{- range $i, $d := .Disks}}
{{- if .File}}
    <disk type='file' device='disk'>
      <driver name='qemu' type='{{.Format}}' cache='none' discard='unmap'{{if $.IOThread}} iothread='1'{{end}} {{.DriverAttrs}}/>
      <source file='{{.File}}'/>
{{- else}}
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw' cache='none' discard='unmap'{{if $.IOThread}} iothread='1'{{end}} {{.DriverAttrs}}/>
      <source protocol='nbd' name='{{.Export}}'><host transport='unix' socket='{{.NBD}}'/></source>
{{- end}}
      <target dev='{{$.Target $i}}' bus='virtio'/>
{{- if .Serial}}
      <serial>{{.Serial}}</serial>
{{- end}}
    </disk>
{{- end}}
    <serial type='file'><source path='{{.ConsoleFile}}' append='on'/><target port='0'/></serial>
    <console type='file'><source path='{{.ConsoleFile}}' append='on'/><target type='serial' port='0'/></console>
{{- if .Agent}}
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
{{- end}}
{{- if .Network}}
    <interface type='network'>{{if .MAC}}<mac address='{{.MAC}}'/>{{end}}<source network='{{.Network}}'/><model type='virtio'/></interface>
{{- end}}
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='none'/>
{{- if .Extra}}
    {{.Extra}}
{{- end}}
  </devices>
</domain>
`
