package libvirt

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Render writes the domain document of a description under local policy. The
// description is validated first; every path, program, network, listener and
// label in the result comes from the policy, and every disk is raw.
func Render(s Spec, p Policy) ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	w := &writer{}
	r := &renderer{w: w, s: &s, p: &p, hw: map[string]*SpecNode{}}
	for i := range s.Hardware {
		r.hw[s.Hardware[i].Name] = &s.Hardware[i]
	}
	if err := r.domain(); err != nil {
		return nil, fmt.Errorf("render domain %s: %w", s.Name, err)
	}
	doc := []byte(w.b.String())
	if _, err := domainRoot(doc); err != nil {
		return nil, fmt.Errorf("render domain %s: %w", s.Name, err)
	}
	return doc, nil
}

// writer writes elements; all values are escaped.
type writer struct {
	b     strings.Builder
	depth int
}

type at = [2]string

func (w *writer) open(name string, attrs ...at) {
	w.start(name, attrs)
	w.b.WriteString(">\n")
	w.depth++
}

func (w *writer) close(name string) {
	w.depth--
	w.indent()
	w.b.WriteString("</" + name + ">\n")
}

func (w *writer) empty(name string, attrs ...at) {
	w.start(name, attrs)
	w.b.WriteString("/>\n")
}

func (w *writer) text(name, text string, attrs ...at) {
	w.start(name, attrs)
	w.b.WriteString(">" + esc(text) + "</" + name + ">\n")
}

func (w *writer) start(name string, attrs []at) {
	w.indent()
	w.b.WriteString("<" + name)
	for _, a := range attrs {
		if a[1] != "" {
			w.b.WriteString(" " + a[0] + "='" + esc(a[1]) + "'")
		}
	}
}

func (w *writer) indent() { w.b.WriteString(strings.Repeat("  ", w.depth)) }

// node writes an allowed element as it is.
func (w *writer) node(n *SpecNode, extra ...at) {
	attrs := extra
	for _, k := range sortedKeys(n.Attrs) {
		attrs = append(attrs, at{k, n.Attrs[k]})
	}
	switch {
	case len(n.Kids) > 0:
		w.open(n.Name, attrs...)
		for i := range n.Kids {
			w.node(&n.Kids[i])
		}
		w.close(n.Name)
	case n.Text != "":
		w.text(n.Name, n.Text, attrs...)
	default:
		w.empty(n.Name, attrs...)
	}
}

type renderer struct {
	w       *writer
	s       *Spec
	p       *Policy
	hw      map[string]*SpecNode
	serials int
}

func (r *renderer) domain() error {
	w, s, p := r.w, r.s, r.p
	if p.Type != "kvm" && p.Type != "qemu" {
		return fmt.Errorf("the policy's domain type %q is neither kvm nor qemu", p.Type)
	}
	w.open("domain", at{"type", p.Type})
	w.text("name", or(p.Name, s.Name))
	w.text("uuid", or(p.UUID, s.UUID))
	if s.GenID {
		if p.GenID != "" {
			w.text("genid", p.GenID)
		} else {
			w.empty("genid")
		}
	}
	if s.Title != "" {
		w.text("title", s.Title)
	}
	if p.Metadata != "" {
		w.open("metadata")
		w.b.WriteString(metadataElement(p.Metadata) + "\n")
		w.close("metadata")
	}
	w.text("memory", i64(s.MemoryKiB), at{"unit", "KiB"})
	if s.CurrentKiB > 0 {
		w.text("currentMemory", i64(s.CurrentKiB), at{"unit", "KiB"})
	}
	w.text("vcpu", strconv.Itoa(s.VCPUs), at{"current", nz(s.CurrentVCPUs)})
	if s.IOThreads > 0 {
		w.text("iothreads", strconv.Itoa(s.IOThreads))
	}
	if err := r.osElement(); err != nil {
		return err
	}
	if err := r.cpu(); err != nil {
		return err
	}
	for _, n := range []string{"sysinfo", "features", "clock", "on_poweroff", "on_reboot", "on_crash", "pm"} {
		h := r.hw[n]
		if h != nil && n == "sysinfo" && p.UUID != "" {
			h = withoutSystemUUID(h)
		}
		if h != nil {
			w.node(h)
		}
	}
	if err := r.devices(); err != nil {
		return err
	}
	w.close("domain")
	return nil
}

// withoutSystemUUID leaves the UUID out of the SMBIOS data of a domain under
// another UUID: libvirt insists that they are equal.
func withoutSystemUUID(n *SpecNode) *SpecNode {
	out := *n
	out.Kids = slices.Clone(n.Kids)
	for i, b := range out.Kids {
		if b.Name == "system" {
			out.Kids[i].Kids = slices.DeleteFunc(slices.Clone(b.Kids), func(e SpecNode) bool { return e.Attrs["name"] == "uuid" })
		}
	}
	return &out
}

func (r *renderer) osElement() error {
	w, s, p := r.w, r.s, r.p
	f := s.Firmware
	auto := f.UEFI && p.AutoFirmware
	var attrs []at
	if auto {
		attrs = append(attrs, at{"firmware", "efi"})
	}
	w.open("os", attrs...)
	w.text("type", "hvm", at{"arch", s.Arch}, at{"machine", s.Machine})
	switch {
	case auto:
		w.open("firmware")
		w.empty("feature", at{"enabled", yn(f.Secure)}, at{"name", "secure-boot"})
		w.close("firmware")
		if p.NVRAM != "" {
			w.text("nvram", p.NVRAM)
		}
	case f.UEFI:
		loader := p.Loader
		if f.Secure {
			loader = p.SecureLoader
		}
		if loader == "" || p.NVRAM == "" {
			return errors.New("the guest boots with UEFI, but this host's policy names no firmware for it; install OVMF and set its paths")
		}
		w.text("loader", loader, at{"readonly", "yes"}, at{"secure", yn(f.Secure)}, at{"type", "pflash"})
		w.text("nvram", p.NVRAM, at{"template", p.NVRAMTemplate})
	}
	if k := s.Kernel; k != nil {
		files, ok := p.AllowKernel[k.Label]
		if !ok {
			return fmt.Errorf("the guest boots a kernel of its host (%q); allow it here by naming this host's files in a table [domain.kernels.%q] of replicad.toml", k.Label, k.Label)
		}
		w.text("kernel", files.Kernel)
		if files.Initrd != "" {
			w.text("initrd", files.Initrd)
		}
		if k.Cmdline != "" {
			w.text("cmdline", k.Cmdline)
		}
	}
	for _, b := range f.Boot {
		w.empty("boot", at{"dev", b})
	}
	if o := r.hw["os"]; o != nil {
		for i := range o.Kids {
			w.node(&o.Kids[i])
		}
	}
	w.close("os")
	return nil
}

func (r *renderer) cpu() error {
	c := r.hw["cpu"]
	if c == nil {
		return nil
	}
	mode := c.Attrs["mode"]
	if r.p.ReplaceCPU == "" || mode != "host-model" && mode != "host-passthrough" {
		r.w.node(c)
		return nil
	}
	if !word(64)(r.p.ReplaceCPU) {
		return fmt.Errorf("the policy's CPU model %q is not allowed", r.p.ReplaceCPU)
	}
	n := SpecNode{Name: "cpu", Attrs: map[string]string{"mode": "custom", "match": "exact"}, Kids: []SpecNode{
		{Name: "model", Attrs: map[string]string{"fallback": "forbid"}, Text: r.p.ReplaceCPU},
	}}
	for _, k := range c.Kids {
		if k.Name != "model" {
			n.Kids = append(n.Kids, k)
		}
	}
	r.w.node(&n)
	return nil
}

func (r *renderer) devices() error {
	w := r.w
	w.open("devices")
	if r.p.Emulator != "" {
		w.text("emulator", r.p.Emulator)
	}
	for i := range r.s.Disks {
		if err := r.disk(&r.s.Disks[i]); err != nil {
			return err
		}
	}
	for i := range r.s.NICs {
		if err := r.nic(&r.s.NICs[i]); err != nil {
			return err
		}
	}
	if t := r.s.TPM; t != nil {
		w.open("tpm", at{"model", t.Model})
		w.empty("backend", at{"type", "emulator"}, at{"version", t.Version})
		w.close("tpm")
	}
	if d := r.hw["devices"]; d != nil {
		for i := range d.Kids {
			r.device(&d.Kids[i])
		}
	}
	w.close("devices")
	return nil
}

// device writes one copied device with its local back end.
func (r *renderer) device(n *SpecNode) {
	w := r.w
	switch n.Name {
	case "graphics":
		w.open("graphics", at{"type", n.Attrs["type"]}, at{"autoport", "yes"})
		w.empty("listen", at{"type", "address"}, at{"address", or(r.p.ListenAddress, "127.0.0.1")})
		w.close("graphics")
	case "rng":
		w.open("rng", at{"model", n.Attrs["model"]})
		w.text("backend", "/dev/urandom", at{"model", "random"})
		for i := range n.Kids {
			w.node(&n.Kids[i])
		}
		w.close("rng")
	case "serial":
		r.serials++
		if r.serials == 1 && r.p.ConsoleLog != "" {
			w.open("serial", at{"type", "file"})
			w.empty("source", at{"path", r.p.ConsoleLog}, at{"append", "on"})
		} else {
			w.open("serial", at{"type", "pty"})
		}
		for i := range n.Kids {
			w.node(&n.Kids[i])
		}
		w.close("serial")
	case "console":
		w.node(n, at{"type", "pty"})
	default:
		w.node(n)
	}
}

func (r *renderer) disk(d *SpecDisk) error {
	w := r.w
	src, has := r.p.Disks[d.Target]
	cdrom := d.Device == "cdrom"
	if !has && !cdrom {
		return fmt.Errorf("disk %s has no source on this host", d.Target)
	}
	kind, source, err := src.element(cdrom && !has)
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.Target, err)
	}
	w.open("disk", at{"type", kind}, at{"device", or(d.Device, "disk")})
	attrs := []at{{"name", "qemu"}, {"type", "raw"}}
	if src.NBD != nil {
		attrs = append(attrs, at{"error_policy", "stop"}, at{"rerror_policy", "stop"})
	}
	for _, k := range sortedKeys(d.Driver) {
		attrs = append(attrs, at{k, d.Driver[k]})
	}
	w.empty("driver", attrs...)
	if source != "" {
		w.indent()
		w.b.WriteString(source + "\n")
	}
	w.empty("target", append([]at{{"dev", d.Target}, {"bus", d.Bus}}, pick(d.Attrs, "removable", "rotation_rate", "tray")...)...)
	if b := pick(d.Attrs, "logical_block_size", "physical_block_size", "discard_granularity"); len(b) > 0 {
		w.empty("blockio", b...)
	}
	if d.ReadOnly || cdrom {
		w.empty("readonly")
	}
	for _, e := range []at{{"serial", d.Serial}, {"wwn", d.WWN}, {"vendor", d.Vendor}, {"product", d.Product}} {
		if e[1] != "" {
			w.text(e[0], e[1])
		}
	}
	r.bootAndAddress(d.BootOrder, d.Address)
	w.close("disk")
	return nil
}

// element is the disk type and its <source>; empty for an empty drive.
func (p PolicySource) element(empty bool) (kind, source string, err error) {
	switch {
	case empty:
		return "file", "", nil
	case p.NBD != nil:
		if err := p.NBD.validate(); err != nil {
			return "", "", err
		}
		return "network", p.NBD.xml(), nil
	case strings.HasPrefix(p.Block, "/"):
		return "block", "<source dev='" + esc(p.Block) + "'/>", nil
	case strings.HasPrefix(p.File, "/"):
		return "file", "<source file='" + esc(p.File) + "'/>", nil
	}
	return "", "", errors.New("the policy gives it no absolute path")
}

func pick(m map[string]string, names ...string) []at {
	var out []at
	for _, n := range names {
		if v, ok := m[n]; ok {
			out = append(out, at{n, v})
		}
	}
	return out
}

func (r *renderer) nic(n *SpecNIC) error {
	w := r.w
	own := r.p.NICs[n.MAC]
	net, ok := r.p.Networks[n.Network]
	switch {
	case own.Network != nil:
		net = *own.Network
	case !ok && r.p.DefaultNetwork == nil:
		return fmt.Errorf("network %q is mapped to none of this host's networks", n.Network)
	case !ok:
		net = *r.p.DefaultNetwork
	}
	switch {
	case net.User:
		w.open("interface", at{"type", "user"})
	case net.Bridge != "":
		w.open("interface", at{"type", "bridge"})
		w.empty("source", at{"bridge", net.Bridge})
	case net.Network != "":
		w.open("interface", at{"type", "network"})
		w.empty("source", at{"network", net.Network})
	default:
		return fmt.Errorf("network %q is mapped to nothing", n.Network)
	}
	if own.MAC != "" || !r.p.NewMACs {
		w.empty("mac", at{"address", or(own.MAC, n.MAC)})
	}
	if n.Model != "" {
		w.empty("model", at{"type", n.Model})
	}
	if n.Queues+n.RxSize+n.TxSize > 0 && !net.User {
		w.empty("driver", at{"queues", nz(n.Queues)}, at{"rx_queue_size", nz(n.RxSize)}, at{"tx_queue_size", nz(n.TxSize)})
	}
	if n.LinkDown || net.Down {
		w.empty("link", at{"state", "down"})
	}
	if n.MTU > 0 && !net.User {
		w.empty("mtu", at{"size", strconv.Itoa(n.MTU)})
	}
	r.bootAndAddress(n.BootOrder, n.Address)
	w.close("interface")
	return nil
}

func (r *renderer) bootAndAddress(order int, a *SpecNode) {
	if order > 0 {
		r.w.empty("boot", at{"order", strconv.Itoa(order)})
	}
	if a != nil {
		r.w.node(a)
	}
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func nz(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func i64(n int64) string { return strconv.FormatInt(n, 10) }

func yn(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
