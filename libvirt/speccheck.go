package libvirt

import (
	"errors"
	"fmt"
	"sort"
	"strings"
)

// Validate checks every field against its limit and every element of Hardware
// against specRules, and reports all that is wrong.
func (s *Spec) Validate() error {
	var errs []error
	bad := func(cond bool, format string, a ...any) {
		if cond && len(errs) < 20 {
			errs = append(errs, fmt.Errorf(format, a...))
		}
	}
	bad(s.Version != SpecVersion, "version %d is not %d", s.Version, SpecVersion)
	if err := validName(s.Name); err != nil {
		errs = append(errs, err)
	}
	bad(!validUUID(s.UUID), "uuid %q is not in canonical form", s.UUID)
	bad(!plain(256)(s.Title), "title is too long or not printable")
	bad(!enum("x86_64", "i686", "aarch64", "ppc64le", "s390x", "riscv64")(s.Arch), "architecture %q is unknown", s.Arch)
	bad(!word(64)(s.Machine), "machine type %q is not allowed", s.Machine)
	bad(s.MemoryKiB < 1024 || s.MemoryKiB > maxMemoryKiB, "memory of %d KiB is out of range", s.MemoryKiB)
	bad(s.CurrentKiB < 0 || s.CurrentKiB > s.MemoryKiB, "current memory of %d KiB is out of range", s.CurrentKiB)
	bad(s.VCPUs < 1 || s.VCPUs > maxVCPUs, "%d CPUs are out of range", s.VCPUs)
	bad(s.CurrentVCPUs < 0 || s.CurrentVCPUs > s.VCPUs, "%d current CPUs are out of range", s.CurrentVCPUs)
	bad(s.IOThreads < 0 || s.IOThreads > maxIOThreads, "%d iothreads are more than %d", s.IOThreads, maxIOThreads)
	bad(s.Firmware.Secure && !s.Firmware.UEFI, "secure boot without UEFI")
	bad(len(s.Firmware.Boot) > 4, "too many boot devices")
	for _, b := range s.Firmware.Boot {
		bad(!enum("hd", "cdrom", "network", "fd")(b), "boot device %q is unknown", b)
	}
	if k := s.Kernel; k != nil {
		bad(!word(128)(k.Label), "kernel label %q is not allowed", k.Label)
		bad(!plain(maxCmdline)(k.Cmdline), "kernel command line is too long or not printable")
	}
	if t := s.TPM; t != nil {
		bad(!tpmModels()(t.Model), "TPM model %q is unknown", t.Model)
		bad(!enum("1.2", "2.0")(t.Version), "TPM version %q is unknown", t.Version)
	}
	errs = append(errs, s.checkDisks()...)
	errs = append(errs, s.checkNICs()...)
	errs = append(errs, s.checkHardware()...)
	if len(errs) > 0 {
		return fmt.Errorf("VM description refused: %w", errors.Join(errs...))
	}
	return nil
}

func validUUID(s string) bool {
	_, err := parseUUID(s)
	return err == nil && strings.ToLower(s) == s
}

// validTarget: "vda", "sdb", "hdc" …
func validTarget(s string) bool {
	if len(s) < 3 || len(s) > 16 {
		return false
	}
	for i, r := range s {
		if !(r >= 'a' && r <= 'z' || i > 0 && r >= '0' && r <= '9') {
			return false
		}
	}
	return true
}

func (s *Spec) checkDisks() []error {
	var errs []error
	bad := func(cond bool, format string, a ...any) {
		if cond && len(errs) < 20 {
			errs = append(errs, fmt.Errorf(format, a...))
		}
	}
	bad(len(s.Disks) > maxDisks, "%d disks are more than %d", len(s.Disks), maxDisks)
	seen := map[string]bool{}
	for _, d := range s.Disks[:min(len(s.Disks), maxDisks)] {
		t := d.Target
		bad(!validTarget(t) || seen[t], "disk target %q is not allowed or comes twice", t)
		seen[t] = true
		bad(!diskBuses()(d.Bus), "disk %q: bus %q is not allowed", t, d.Bus)
		bad(!enum("", "disk", "cdrom")(d.Device), "disk %q: device %q is not allowed", t, d.Device)
		bad(d.Size < 0, "disk %q: negative size", t)
		bad(!plain(128)(d.Serial) || !plain(16)(d.WWN) || !only(d.WWN, "") || !plain(8)(d.Vendor) || !plain(16)(d.Product), "disk %q: serial, wwn, vendor or product is not allowed", t)
		bad(d.BootOrder < 0 || d.BootOrder > 1024, "disk %q: boot order is out of range", t)
		errs = append(errs, checkAttrs("disk "+t, d.Driver, diskDriverRules())...)
		errs = append(errs, checkAttrs("disk "+t, d.Attrs, diskAttrRules())...)
		bad(len(d.Driver["iothread"]) > 0 && !upTo(uint64(max(s.IOThreads, 0)))(d.Driver["iothread"]), "disk %q: there is no such iothread", t)
		errs = append(errs, checkAddress("disk "+t, d.Address)...)
	}
	return errs
}

func (s *Spec) checkNICs() []error {
	var errs []error
	bad := func(cond bool, format string, a ...any) {
		if cond && len(errs) < 20 {
			errs = append(errs, fmt.Errorf(format, a...))
		}
	}
	bad(len(s.NICs) > maxNICs, "%d network interfaces are more than %d", len(s.NICs), maxNICs)
	for i, n := range s.NICs[:min(len(s.NICs), maxNICs)] {
		bad(!validMAC(n.MAC), "interface %d: address %q is not allowed", i, n.MAC)
		bad(n.Model != "" && !nicModels()(n.Model), "interface %d: model %q is not allowed", i, n.Model)
		bad(n.Network == "" || !plain(128)(n.Network), "interface %d: network name is empty, too long or not printable", i)
		bad(n.BootOrder < 0 || n.BootOrder > 1024, "interface %d: boot order is out of range", i)
		bad(n.MTU != 0 && (n.MTU < 68 || n.MTU > 65535), "interface %d: MTU %d is out of range", i, n.MTU)
		for _, v := range []int{n.Queues, n.RxSize, n.TxSize} {
			bad(v < 0 || v > 4096, "interface %d: queue setting %d is out of range", i, v)
		}
		errs = append(errs, checkAddress(fmt.Sprintf("interface %d", i), n.Address)...)
	}
	return errs
}

func validMAC(s string) bool {
	if len(s) != 17 {
		return false
	}
	for i, r := range s {
		if i%3 == 2 {
			if r != ':' {
				return false
			}
		} else if !strings.ContainsRune("0123456789abcdef", r) {
			return false
		}
	}
	return strings.ContainsRune("02468ace", rune(s[1])) // unicast
}

func checkAddress(where string, a *SpecNode) []error {
	if a == nil {
		return nil
	}
	if a.Name != "address" {
		return []error{fmt.Errorf("%s: %q stands where an address belongs", where, a.Name)}
	}
	n := 0
	return checkNode(where, a, addressRule(), 1, &n)
}

func (s *Spec) checkHardware() []error {
	var errs []error
	rules := specRules()
	n := 0
	seen := map[string]bool{}
	for i := range s.Hardware {
		h := &s.Hardware[i]
		r, ok := rules[h.Name]
		if !ok {
			errs = append(errs, fmt.Errorf("element %q is not allowed", clip(h.Name)))
			break
		}
		if seen[h.Name] {
			errs = append(errs, fmt.Errorf("element %q comes twice", h.Name))
			break
		}
		seen[h.Name] = true
		if errs = append(errs, checkNode(h.Name, h, r, 1, &n)...); len(errs) > 20 {
			break
		}
		if h.Name == "devices" {
			errs = append(errs, s.checkControllerThreads(h)...)
		}
	}
	return errs
}

func (s *Spec) checkControllerThreads(devs *SpecNode) []error {
	for _, c := range devs.Kids {
		for _, d := range c.Kids {
			if t, ok := d.Attrs["iothread"]; ok && c.Name == "controller" && !upTo(uint64(max(s.IOThreads, 0)))(t) {
				return []error{errors.New("controller: there is no such iothread")}
			}
		}
	}
	return nil
}

// checkNode checks one element; count is the number of elements so far.
func checkNode(where string, n *SpecNode, r specRule, depth int, count *int) []error {
	if *count++; *count > maxSpecNodes || depth > maxSpecDepth {
		return []error{fmt.Errorf("%s: too many or too deeply nested elements", where)}
	}
	errs := checkAttrs(where, n.Attrs, r.attrs)
	if n.Text != "" && (r.text == nil || !r.text(n.Text)) {
		errs = append(errs, fmt.Errorf("%s: text %q is not allowed", where, clip(n.Text)))
	}
	for i := range n.Kids {
		k := &n.Kids[i]
		kr, ok := r.kids[k.Name]
		if !ok {
			return append(errs, fmt.Errorf("%s: element %q is not allowed", where, clip(k.Name)))
		}
		if errs = append(errs, checkNode(where+"/"+k.Name, k, kr, depth+1, count)...); len(errs) > 20 {
			return errs
		}
	}
	return errs
}

func checkAttrs(where string, got map[string]string, rules map[string]valueRule) []error {
	if len(got) > 32 {
		return []error{fmt.Errorf("%s: too many attributes", where)}
	}
	var errs []error
	for _, k := range sortedKeys(got) {
		if ok := rules[k]; ok == nil || !ok(got[k]) {
			errs = append(errs, fmt.Errorf("%s: attribute %q with value %q is not allowed", where, clip(k), clip(got[k])))
		}
	}
	return errs
}

func sortedKeys[V any](m map[string]V) []string {
	ks := make([]string, 0, len(m))
	for k := range m {
		ks = append(ks, k)
	}
	sort.Strings(ks)
	return ks
}

// clip keeps a peer's text in an error short.
func clip(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}
