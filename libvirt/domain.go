package libvirt

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// Domain is a virtual machine as libvirt describes it. UUID is lower-case
// canonical.
type Domain struct {
	Name       string
	UUID       string
	State      State
	Reason     Reason // why it is paused or off
	Persistent bool
	Autostart  bool
	MemoryKiB  int64
	VCPUs      int
	Machine    string
	Emulator   string
	Type       string // "kvm" or "qemu"
	Firmware   Firmware
	TPM        *TPM
	IOThreads  int
	Disks      []Disk
	NICs       []NIC
	// AgentChannel says that the guest agent's channel exists; AgentConnected
	// that somebody in the guest has opened it (live only).
	AgentChannel, AgentConnected bool
	// Tags are the domain's, see TagsURI; in order of appearance, each once.
	Tags []string
	// Notes are features that concern replication: "hostdev",
	// "filesystem", "shmem", "qemu:commandline", "launchSecurity".
	Notes []string
}

// SourceKind is where a disk's data comes from.
type SourceKind string

// The kinds of disk sources.
const (
	SourceFile  SourceKind = "file"
	SourceBlock SourceKind = "block"
	SourceNBD   SourceKind = "network-nbd"
	SourceNone  SourceKind = "none" // empty drive
	SourceOther SourceKind = "other"
)

// Disk is one disk of a domain.
type Disk struct {
	Target string // "vda"
	Bus    string // "virtio", "scsi", "sata", …
	Device string // "disk", "cdrom", "lun", "floppy"
	Kind   SourceKind
	Path   string // of a file or block device
	Socket string // of an NBD source over a unix socket
	Export string // of an NBD source
	// Address is host:port of an NBD source over TCP; TLS says that it is
	// spoken to with TLS.
	Address string
	TLS     bool
	// Format is libvirt's driver type: "raw", "qcow2"; empty when not given.
	Format       string
	Cache        string // "", "none", "writeback", "writethrough", "directsync", "unsafe"
	Discard      string // "", "unmap", "ignore"
	DetectZeroes string // "", "off", "on", "unmap"
	IO           string // "", "native", "threads", "io_uring"
	IOThread     int    // 0 = none
	ErrorPolicy  string
	RErrorPolicy string
	Serial       string
	Alias        string // live only
	BootOrder    int
	// Controller of a drive address; -1 when the disk has none.
	Controller int
	ReadOnly   bool
	Shareable  bool
	Transient  bool
	CopyOnRead bool
	Throttled  bool // iotune or throttle filters
	Encrypted  bool
	Slices     bool
	// IOThreadMapping says that queues are spread over several iothreads.
	IOThreadMapping bool
	// Backing counts the images below this one.
	Backing int
	// Reconnect is the delay of an NBD source in seconds, 0 when absent.
	Reconnect int
	// ControllerIOThread is the iothread of a SCSI disk's controller, 0 = none.
	ControllerIOThread int
	// ControllerModel is the model of a SCSI disk's controller.
	ControllerModel string
	// Mirror says that a block copy is going on (live only).
	Mirror bool
}

// NIC is one network interface.
type NIC struct {
	MAC     string
	Model   string
	Kind    string // "network", "bridge", "direct", "user", "other"
	Network string // network or bridge name
	Alias   string
	// Device is the tap on this host and Bridge what it is plugged into (live
	// only).
	Device, Bridge string
}

// Firmware says what the guest boots with.
type Firmware struct {
	Class      string // "bios" or "uefi"
	Secure     bool
	Loader     string // path, local to this host
	NVRAM      string // path, local to this host
	Template   string
	Kernel     string // direct kernel boot
	Initrd     string
	Cmdline    string
	AutoSelect bool // firmware='efi' without explicit paths
}

// TPM is an emulated TPM.
type TPM struct {
	Model, Version string
	Encrypted      bool // its state needs a secret of this host
	Passthrough    bool
}

// ParseDomain reads a domain document of our own host into plain values. It
// knows neither state nor persistence.
func ParseDomain(doc []byte) (Domain, error) {
	if len(doc) > maxDocument {
		return Domain{}, fmt.Errorf("read domain XML: %d bytes are more than %d", len(doc), maxDocument)
	}
	var x libvirtxml.Domain
	if err := x.Unmarshal(string(doc)); err != nil {
		return Domain{}, fmt.Errorf("read domain XML: %w", err)
	}
	d := Domain{Name: x.Name, UUID: strings.ToLower(x.UUID), Type: x.Type, IOThreads: int(x.IOThreads)}
	if x.Memory != nil {
		d.MemoryKiB = toKiB(x.Memory.Value, x.Memory.Unit)
	}
	if x.VCPU != nil {
		d.VCPUs = int(x.VCPU.Value)
	}
	if x.OS != nil {
		if x.OS.Type != nil {
			d.Machine = x.OS.Type.Machine
		}
		d.Firmware = firmwareOf(x.OS)
	}
	if x.QEMUCommandline != nil || x.QEMUOverride != nil {
		d.Notes = append(d.Notes, "qemu:commandline")
	}
	if x.Metadata != nil {
		d.Tags = tagsOf(x.Metadata.XML)
	}
	if x.LaunchSecurity != nil {
		d.Notes = append(d.Notes, "launchSecurity")
	}
	if x.Devices != nil {
		d.readDevices(x.Devices)
	}
	return d, nil
}

func (d *Domain) readDevices(v *libvirtxml.DomainDeviceList) {
	d.Emulator = v.Emulator
	for i := range v.Disks {
		d.Disks = append(d.Disks, diskOf(&v.Disks[i], v.Controllers))
	}
	for i := range v.Interfaces {
		d.NICs = append(d.NICs, nicOf(&v.Interfaces[i]))
	}
	for _, c := range v.Channels {
		if c.Target != nil && c.Target.VirtIO != nil && c.Target.VirtIO.Name == "org.qemu.guest_agent.0" {
			d.AgentChannel = true
			d.AgentConnected = c.Target.VirtIO.State == "connected"
		}
	}
	for _, t := range v.TPMs {
		d.TPM = tpmOf(t)
	}
	note := func(n int, what string) {
		if n > 0 {
			d.Notes = append(d.Notes, what)
		}
	}
	note(len(v.Hostdevs), "hostdev")
	note(len(v.Filesystems), "filesystem")
	note(len(v.Shmems), "shmem")
	note(len(v.Memorydevs), "memory device")
}

func tpmOf(t libvirtxml.DomainTPM) *TPM {
	r := &TPM{Model: t.Model}
	if b := t.Backend; b != nil {
		r.Passthrough = b.Passthrough != nil
		if b.Emulator != nil {
			r.Version = b.Emulator.Version
			r.Encrypted = b.Emulator.Encryption != nil
		}
	}
	return r
}

func firmwareOf(o *libvirtxml.DomainOS) Firmware {
	f := Firmware{Class: "bios", Kernel: o.Kernel, Initrd: o.Initrd, Cmdline: o.Cmdline}
	if o.Firmware == "efi" {
		f.Class, f.AutoSelect = "uefi", true
	}
	if l := o.Loader; l != nil {
		f.Loader, f.Secure = strings.TrimSpace(l.Path), l.Secure == "yes"
		f.AutoSelect = f.AutoSelect && f.Loader == ""
		if l.Type == "pflash" {
			f.Class = "uefi"
		}
	}
	if n := o.NVRam; n != nil {
		f.NVRAM, f.Template = strings.TrimSpace(n.NVRam), n.Template
		if n.Source != nil && n.Source.File != nil {
			f.NVRAM = n.Source.File.File
		}
	}
	return f
}

func diskOf(x *libvirtxml.DomainDisk, ctl []libvirtxml.DomainController) Disk {
	d := Disk{
		Device: x.Device, Serial: strings.TrimSpace(x.Serial), ReadOnly: x.ReadOnly != nil,
		Shareable: x.Shareable != nil, Transient: x.Transient != nil, Mirror: x.Mirror != nil,
		Throttled: x.IOTune != nil || x.ThrottleFilters != nil, Encrypted: x.Encryption != nil,
		Controller: -1, Kind: SourceNone,
	}
	if d.Device == "" {
		d.Device = "disk"
	}
	if x.Target != nil {
		d.Target, d.Bus = x.Target.Dev, x.Target.Bus
	}
	if x.Alias != nil {
		d.Alias = x.Alias.Name
	}
	if x.Boot != nil {
		d.BootOrder = int(x.Boot.Order)
	}
	if r := x.Driver; r != nil {
		d.readDriver(r)
	}
	d.readSource(x.Source)
	// An empty <backingStore/> says that the chain ends; a real one always has
	// a format.
	for b := x.BackingStore; b != nil && b.Format != nil; b = b.BackingStore {
		d.Backing++
	}
	if a := x.Address; a != nil && a.Drive != nil && a.Drive.Controller != nil {
		d.Controller = int(*a.Drive.Controller)
		for i := range ctl {
			c := &ctl[i]
			if c.Type != d.Bus || c.Index == nil || int(*c.Index) != d.Controller {
				continue
			}
			d.ControllerModel = c.Model
			if c.Driver != nil {
				d.ControllerIOThread = int(c.Driver.IOThread)
				d.IOThreadMapping = d.IOThreadMapping || c.Driver.IOThreads != nil
			}
		}
	}
	return d
}

func (d *Disk) readDriver(r *libvirtxml.DomainDiskDriver) {
	d.Format, d.Cache, d.Discard, d.DetectZeroes, d.IO = r.Type, r.Cache, r.Discard, r.DetectZeros, r.IO
	d.ErrorPolicy, d.RErrorPolicy = r.ErrorPolicy, r.RErrorPolicy
	d.CopyOnRead = r.CopyOnRead == "on"
	d.IOThreadMapping = r.IOThreads != nil
	if r.IOThread != nil {
		d.IOThread = int(*r.IOThread)
	}
}

func (d *Disk) readSource(s *libvirtxml.DomainDiskSource) {
	if s == nil {
		return
	}
	d.Encrypted = d.Encrypted || s.Encryption != nil
	d.Slices = s.Slices != nil
	switch {
	case s.File != nil && s.File.File != "":
		d.Kind, d.Path = SourceFile, s.File.File
	case s.Block != nil && s.Block.Dev != "":
		d.Kind, d.Path = SourceBlock, s.Block.Dev
	case s.File != nil || s.Block != nil:
		d.Kind = SourceNone
	case s.Network != nil && s.Network.Protocol == "nbd":
		d.Kind, d.Export = SourceNBD, s.Network.Name
		d.TLS = s.Network.TLS == "yes"
		for _, h := range s.Network.Hosts {
			if d.Socket = h.Socket; h.Socket == "" && h.Name != "" {
				port := h.Port
				if port == "" {
					port = nbdPort
				}
				d.Address = net.JoinHostPort(h.Name, port)
			}
		}
		if s.Network.Reconnect != nil {
			d.Reconnect, _ = strconv.Atoi(s.Network.Reconnect.Delay)
		}
	default:
		d.Kind = SourceOther
	}
}

// nbdPort is what libvirt assumes for an NBD source without a port.
const nbdPort = "10809"

func nicOf(x *libvirtxml.DomainInterface) NIC {
	n := NIC{Kind: "other"}
	if x.MAC != nil {
		n.MAC = x.MAC.Address
	}
	if x.Model != nil {
		n.Model = x.Model.Type
	}
	if x.Alias != nil {
		n.Alias = x.Alias.Name
	}
	if x.Target != nil {
		n.Device = x.Target.Dev
	}
	if s := x.Source; s != nil {
		switch {
		case s.Network != nil:
			n.Kind, n.Network, n.Bridge = "network", s.Network.Network, s.Network.Bridge
		case s.Bridge != nil:
			n.Kind, n.Network, n.Bridge = "bridge", s.Bridge.Bridge, s.Bridge.Bridge
		case s.Direct != nil:
			n.Kind, n.Network = "direct", s.Direct.Dev
		case s.User != nil:
			n.Kind = "user"
		}
	}
	return n
}

// toKiB converts libvirt's scaled integers; KiB is its default.
func toKiB(v uint, unit string) int64 {
	n := int64(v)
	switch strings.ToLower(unit) {
	case "b", "bytes":
		return n / 1024
	case "kb":
		return n * 1000 / 1024
	case "m", "mib":
		return n << 10
	case "mb":
		return n * 1000 * 1000 / 1024
	case "g", "gib":
		return n << 20
	case "gb":
		return n * 1000 * 1000 * 1000 / 1024
	case "t", "tib":
		return n << 30
	}
	return n
}

// Disk finds a disk by target name.
func (d *Domain) Disk(target string) (Disk, bool) {
	for _, k := range d.Disks {
		if k.Target == target {
			return k, true
		}
	}
	return Disk{}, false
}
