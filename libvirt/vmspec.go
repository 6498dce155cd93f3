package libvirt

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// SpecVersion is the version of Spec written by this build.
const SpecVersion = 1

// Limits of a description. Every one is checked before anything is built.
const (
	maxSpecBytes = 256 << 10
	maxSpecNodes = 2000
	maxSpecDepth = 6
	maxDisks     = 64
	maxNICs      = 32
	maxMemoryKiB = 64 << 30 // 64 TiB
	maxVCPUs     = 4096
	maxIOThreads = 16
	maxCmdline   = 2048
)

// Spec is a virtual machine described for another host: everything the guest
// can see, and nothing of where or how this host does it. There is no path,
// no program, no host device, no listener and no password in it, and there is
// no way to say one.
type Spec struct {
	Version   int
	Name      string
	UUID      string
	Title     string `json:",omitempty"`
	Arch      string // "x86_64"
	Machine   string // "pc-q35-7.2"
	MemoryKiB int64
	// CurrentKiB is what the balloon leaves the guest; 0 means all.
	CurrentKiB int64 `json:",omitempty"`
	VCPUs      int
	// CurrentVCPUs are plugged in at the start; 0 means all.
	CurrentVCPUs int `json:",omitempty"`
	IOThreads    int `json:",omitempty"`
	Firmware     SpecFirmware
	// Kernel is set for a guest booted with a kernel of its host.
	Kernel *SpecKernel `json:",omitempty"`
	// GenID says that the guest has a VM generation id; its value is never
	// copied, the other host makes its own.
	GenID bool       `json:",omitempty"`
	Disks []SpecDisk `json:",omitempty"`
	NICs  []SpecNIC  `json:",omitempty"`
	TPM   *SpecTPM   `json:",omitempty"`
	// Hardware is the rest of what the guest sees, as a tree that holds only
	// what specRules allows: cpu, features, clock, os, pm, sysinfo, on_*,
	// controllers, input, graphics, video, sound, serial, console, channel,
	// rng, memballoon, watchdog, panic, iommu, hub, vsock.
	Hardware []SpecNode `json:",omitempty"`
}

// SpecFirmware is the class of firmware; files are the other host's.
type SpecFirmware struct {
	UEFI, Secure bool
	// Boot are the boot devices of <os>: "hd", "cdrom", "network".
	Boot []string `json:",omitempty"`
}

// SpecKernel says that the guest boots a kernel given by its host. The kernel
// is named by a label that the other host's own policy turns into files.
type SpecKernel struct {
	Label   string
	Cmdline string `json:",omitempty"`
}

// SpecDisk is a disk as the guest sees it. Its content comes by replication.
type SpecDisk struct {
	Target    string // "vda"
	Bus       string
	Device    string `json:",omitempty"` // "disk" (default) or "cdrom" (comes empty)
	Size      int64  `json:",omitempty"` // bytes; informative
	Serial    string `json:",omitempty"`
	WWN       string `json:",omitempty"`
	Vendor    string `json:",omitempty"`
	Product   string `json:",omitempty"`
	BootOrder int    `json:",omitempty"`
	ReadOnly  bool   `json:",omitempty"`
	// Driver are the guest-visible and tuning attributes of <driver>: cache,
	// discard, detect_zeroes, iothread, queues, queue_size, iommu, ats, packed.
	Driver map[string]string `json:",omitempty"`
	// Attrs are those of <target> and <blockio>: removable, rotation_rate,
	// logical_block_size, physical_block_size.
	Attrs   map[string]string `json:",omitempty"`
	Address *SpecNode         `json:",omitempty"`
}

// SpecNIC is a network interface as the guest sees it. Network is a logical
// name, mapped by the other host's policy.
type SpecNIC struct {
	MAC       string
	Model     string `json:",omitempty"`
	Network   string
	BootOrder int  `json:",omitempty"`
	MTU       int  `json:",omitempty"`
	LinkDown  bool `json:",omitempty"`
	Queues    int  `json:",omitempty"`
	RxSize    int  `json:",omitempty"`
	TxSize    int  `json:",omitempty"`
	Address   *SpecNode
}

// SpecTPM is an emulated TPM.
type SpecTPM struct {
	Model   string
	Version string // "1.2" or "2.0"
}

// SpecNode is an allowed element. Which names, attributes, values and children
// may occur is decided by specRules alone.
type SpecNode struct {
	Name  string
	Attrs map[string]string `json:",omitempty"`
	Text  string            `json:",omitempty"`
	Kids  []SpecNode        `json:",omitempty"`
}

// ParseSpec reads a peer's description: strict JSON, limited, validated.
func ParseSpec(doc []byte) (Spec, error) {
	var s Spec
	if len(doc) > maxSpecBytes {
		return s, fmt.Errorf("read VM description: %d bytes are more than %d", len(doc), maxSpecBytes)
	}
	if err := checkJSONShape(doc); err != nil {
		return s, fmt.Errorf("read VM description: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(doc))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return Spec{}, fmt.Errorf("read VM description: %w", err)
	}
	if err := s.Validate(); err != nil {
		return Spec{}, err
	}
	return s, nil
}

// checkJSONShape refuses deep nesting, floods of values, duplicate keys and
// trailing bytes before anything is decoded into structures.
func checkJSONShape(doc []byte) error {
	d := json.NewDecoder(bytes.NewReader(doc))
	d.UseNumber()
	type frame struct {
		object, wantValue bool
		keys              map[string]bool
	}
	var stack []frame
	for n := 0; ; n++ {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if n > 20*maxSpecNodes {
			return errors.New("too many values")
		}
		if delim, ok := t.(json.Delim); ok && (delim == '}' || delim == ']') {
			stack = stack[:len(stack)-1]
			continue
		}
		if top := len(stack) - 1; top >= 0 && stack[top].object {
			f := &stack[top]
			if !f.wantValue {
				key, _ := t.(string)
				if f.keys[key] {
					return fmt.Errorf("the key %q comes twice", key)
				}
				f.keys[key], f.wantValue = true, true
				continue
			}
			f.wantValue = false
		}
		if delim, ok := t.(json.Delim); ok {
			if len(stack) >= 2*maxSpecDepth+6 {
				return errors.New("nested too deeply")
			}
			stack = append(stack, frame{object: delim == '{', keys: map[string]bool{}})
		}
	}
	var one json.RawMessage
	e := json.NewDecoder(bytes.NewReader(doc))
	if err := e.Decode(&one); err != nil {
		return err
	}
	if _, err := e.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something behind the description")
	}
	return nil
}

// Policy is what this host adds when it renders a description: every path,
// program, network and label in the result comes from here.
type Policy struct {
	// Type is "kvm" or "qemu".
	Type string
	// Emulator is QEMU's path; empty lets libvirt choose.
	Emulator string
	// Name and UUID replace the description's when set (test failover).
	Name, UUID string
	// Disks gives every disk its source, by target. A description's disk that
	// is missing here is an error; empty cdroms need none.
	Disks map[string]PolicySource
	// Networks maps logical names to ours. A name that is missing is an error
	// unless DefaultNetwork is set.
	Networks       map[string]PolicyNetwork
	DefaultNetwork *PolicyNetwork
	// NewMACs leaves the NICs' addresses out, so that libvirt makes new ones.
	NewMACs bool
	// NICs says more of single NICs, by the description's MAC address.
	NICs map[string]PolicyNIC
	// Firmware files; both are needed for a UEFI guest unless AutoFirmware,
	// which lets libvirt choose them.
	Loader, SecureLoader, NVRAM, NVRAMTemplate string
	AutoFirmware                               bool
	// AllowKernel maps labels to files of this host. A guest that boots a
	// kernel of its host is refused when its label is not here.
	AllowKernel map[string]PolicyKernel
	// ConsoleLog is a file that receives the first serial port's output;
	// empty: a pty.
	ConsoleLog string
	// ListenAddress of graphics; empty is "127.0.0.1".
	ListenAddress string
	// GenID is the generation id to give a guest that has one; empty lets
	// libvirt make a new one when the document is defined.
	GenID string
	// Metadata is put into our metadata element; empty leaves it out.
	Metadata string
	// ReplaceCPU, when set, is used instead of the description's host-model or
	// host-passthrough: a named model, e.g. "EPYC-Rome".
	ReplaceCPU string
}

// PolicySource is a disk's source on this host; its format is always raw.
type PolicySource struct {
	File  string     // image file, or
	Block string     // block device, or
	NBD   *NBDSource // an export of ours
}

// PolicyNetwork is a network of this host: exactly one is set, or Disconnect.
type PolicyNetwork struct {
	Network, Bridge string
	// User is QEMU's own user network, for tests.
	User bool
	// Down plugs the NIC in with its link down.
	Down bool
}

// PolicyNIC is what this host decides for one NIC.
type PolicyNIC struct {
	// Network, when set, is used whatever Networks says.
	Network *PolicyNetwork
	// MAC, when set, replaces the description's address.
	MAC string
}

// PolicyKernel are the files of one label.
type PolicyKernel struct{ Kernel, Initrd string }
