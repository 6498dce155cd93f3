package libvirt

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
)

// maxDropped bounds the list of dropped features.
const maxDropped = 200

// xnode is an element as read, with its namespace.
type xnode struct {
	space, name string
	attrs       []xml.Attr
	text        string
	kids        []*xnode
}

func (x *xnode) attr(name string) string {
	for _, a := range x.attrs {
		if a.Name.Space == "" && a.Name.Local == name {
			return a.Value
		}
	}
	return ""
}

func (x *xnode) kid(name string) *xnode {
	if x != nil {
		for _, k := range x.kids {
			if k.name == name && k.space == "" {
				return k
			}
		}
	}
	return nil
}

// kidText is the text of a child, "" when it is absent.
func (x *xnode) kidText(name string) string {
	if k := x.kid(name); k != nil {
		return k.text
	}
	return ""
}

// readTree reads a document within our limits. External entities and document
// types do not exist for it.
func readTree(doc []byte) (*xnode, error) {
	if len(doc) > maxDocument {
		return nil, fmt.Errorf("the document has %d bytes, more than %d", len(doc), maxDocument)
	}
	d := xml.NewDecoder(bytes.NewReader(doc))
	var root *xnode
	var open []*xnode
	count := 0
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		switch t := t.(type) {
		case xml.Directive:
			return nil, errors.New("a document type declaration is not allowed")
		case xml.StartElement:
			if count++; count > maxElements || len(open) >= maxDepth {
				return nil, errors.New("too many or too deeply nested elements")
			}
			x := &xnode{space: t.Name.Space, name: t.Name.Local, attrs: t.Copy().Attr}
			switch {
			case len(open) > 0:
				p := open[len(open)-1]
				p.kids = append(p.kids, x)
			case root != nil:
				return nil, errors.New("more than one root element")
			default:
				root = x
			}
			open = append(open, x)
		case xml.EndElement:
			x := open[len(open)-1]
			x.text = strings.TrimSpace(x.text)
			open = open[:len(open)-1]
		case xml.CharData:
			if len(open) > 0 {
				open[len(open)-1].text += string(t)
			}
		}
	}
	if root == nil {
		return nil, errors.New("the document is empty")
	}
	return root, nil
}

// specReader collects what a document has and what of it cannot travel.
type specReader struct {
	spec    Spec
	dropped []string
	seen    map[string]bool
}

func (r *specReader) drop(what string) {
	if !r.seen[what] && len(r.dropped) < maxDropped {
		r.seen[what] = true
		r.dropped = append(r.dropped, what)
	}
}

// SpecFromXML describes one of our own domains (persistent document) for a
// peer. dropped lists what the description does not carry and the guest or its
// operator might miss; places and back ends of this host are not listed, for
// every host has its own.
func SpecFromXML(doc []byte) (s Spec, dropped []string, err error) {
	root, err := readTree(doc)
	if err != nil {
		return Spec{}, nil, fmt.Errorf("describe domain: %w", err)
	}
	if root.name != "domain" || root.space != "" {
		return Spec{}, nil, fmt.Errorf("describe domain: the root element is <%s>", clip(root.name))
	}
	r := &specReader{seen: map[string]bool{}}
	r.spec.Version = SpecVersion
	if err := r.readTop(root); err != nil {
		return Spec{}, nil, fmt.Errorf("describe domain: %w", err)
	}
	r.readOS(root.kid("os"))
	r.readRest(root)
	// One machine has one description, whatever the order of its document.
	slices.SortStableFunc(r.spec.Hardware, func(a, b SpecNode) int { return strings.Compare(a.Name, b.Name) })
	if err := r.spec.Validate(); err != nil {
		return Spec{}, r.dropped, err
	}
	return r.spec, r.dropped, nil
}

func (r *specReader) readTop(root *xnode) error {
	s := &r.spec
	s.Name, s.UUID = root.kidText("name"), strings.ToLower(root.kidText("uuid"))
	if t := root.kidText("title"); plain(256)(t) {
		s.Title = t
	}
	var err error
	if s.MemoryKiB, err = memoryKiB(root.kid("memory")); err != nil {
		return err
	}
	if s.CurrentKiB, err = memoryKiB(root.kid("currentMemory")); err != nil {
		return err
	}
	if s.CurrentKiB == s.MemoryKiB {
		s.CurrentKiB = 0
	}
	v := root.kid("vcpu")
	if v == nil {
		s.VCPUs = 1
	} else {
		if s.VCPUs, err = strconv.Atoi(v.text); err != nil {
			return fmt.Errorf("read the number of CPUs: %w", err)
		}
		s.CurrentVCPUs, _ = strconv.Atoi(v.attr("current"))
	}
	s.IOThreads, _ = strconv.Atoi(root.kidText("iothreads"))
	if s.IOThreads > maxIOThreads {
		r.drop(fmt.Sprintf("iothreads beyond %d", maxIOThreads))
		s.IOThreads = maxIOThreads
	}
	s.GenID = root.kid("genid") != nil
	return nil
}

func memoryKiB(x *xnode) (int64, error) {
	if x == nil {
		return 0, nil
	}
	n, err := strconv.ParseUint(x.text, 10, 47)
	if err != nil {
		return 0, fmt.Errorf("read the memory size: %w", err)
	}
	return toKiB(uint(n), x.attr("unit")), nil
}

func (r *specReader) readOS(o *xnode) {
	if o == nil {
		return
	}
	s := &r.spec
	if t := o.kid("type"); t != nil {
		s.Arch, s.Machine = t.attr("arch"), t.attr("machine")
	}
	l := o.kid("loader")
	s.Firmware.UEFI = o.attr("firmware") == "efi" || l != nil && l.attr("type") == "pflash"
	s.Firmware.Secure = s.Firmware.UEFI && l != nil && l.attr("secure") == "yes"
	if f := o.kid("firmware"); f != nil {
		for _, k := range f.kids {
			if k.name == "feature" && k.attr("name") == "secure-boot" && k.attr("enabled") == "yes" {
				s.Firmware.Secure = s.Firmware.UEFI
			}
		}
	}
	if l != nil && !s.Firmware.UEFI {
		r.drop("os/loader (a ROM image of this host)")
	}
	for _, k := range o.kids {
		switch k.name {
		case "boot":
			s.Firmware.Boot = append(s.Firmware.Boot, k.attr("dev"))
		case "dtb", "acpi", "shim", "init", "initarg":
			r.drop("os/" + k.name)
		}
	}
	if kernel := o.kidText("kernel"); kernel != "" {
		s.Kernel = &SpecKernel{Label: KernelLabel(kernel, o.kidText("initrd"))}
		if c := o.kidText("cmdline"); plain(maxCmdline)(c) {
			s.Kernel.Cmdline = c
		} else {
			r.drop("os/cmdline (too long or not printable)")
		}
	}
}

// KernelLabel names the kernel and initrd of a guest that boots from files of
// its host: their base names, e.g. "vmlinuz+initrd.gz". It is the key of
// Policy.AllowKernel.
func KernelLabel(kernel, initrd string) string {
	clean := func(p string) string {
		return strings.Map(func(r rune) rune {
			if only(string(r), "._-") {
				return r
			}
			return '_'
		}, path.Base(p))
	}
	label := clean(kernel)
	if initrd != "" {
		label += "+" + clean(initrd)
	}
	label = strings.TrimLeft(label, ".-+")
	return label[:min(len(label), 128)]
}

// readRest goes through everything else once, by the rules.
func (r *specReader) readRest(root *xnode) {
	rules := specRules()
	for _, k := range root.kids {
		if k.space != "" {
			r.drop("extension " + clip(k.space) + " " + clip(k.name))
			continue
		}
		rule, ok := rules[k.name]
		switch {
		case k.name == "devices":
			r.readDevices(k, rule)
		case ok:
			n, ok := r.keep(k.name, k, rule)
			if ok && (len(n.Kids) > 0 || len(n.Attrs) > 0 || n.Text != "") {
				r.spec.Hardware = append(r.spec.Hardware, n)
			}
		case !readElsewhere(k.name):
			r.drop(clip(k.name))
		}
	}
}

// readElsewhere: read into fields, or this host's own business.
func readElsewhere(name string) bool {
	switch name {
	case "name", "uuid", "title", "description", "metadata", "memory", "currentMemory", "vcpu", "iothreads", "genid", "resource", "seclabel":
		return true
	}
	return false
}

// keep copies what the rule allows and lists the rest.
func (r *specReader) keep(where string, x *xnode, rule specRule) (SpecNode, bool) {
	n := SpecNode{Name: x.name}
	for _, a := range x.attrs {
		if a.Name.Space != "" || a.Name.Local == "xmlns" {
			continue
		}
		if ok := rule.attrs[a.Name.Local]; ok != nil && ok(a.Value) {
			if n.Attrs == nil {
				n.Attrs = map[string]string{}
			}
			n.Attrs[a.Name.Local] = a.Value
		} else if !ownBusiness(where, "@"+a.Name.Local) {
			r.drop(where + "@" + clip(a.Name.Local))
		}
	}
	if x.text != "" {
		if rule.text == nil || !rule.text(x.text) {
			r.drop(where + " (its text)")
			return n, false
		}
		n.Text = x.text
	}
	for _, k := range x.kids {
		kr, ok := rule.kids[k.name]
		if k.space != "" || !ok {
			if !ownBusiness(where, k.name) {
				r.drop(where + "/" + clip(k.name))
			}
			continue
		}
		if c, ok := r.keep(where+"/"+k.name, k, kr); ok {
			n.Kids = append(n.Kids, c)
		}
	}
	return n, true
}

// ownBusiness: places and back ends every host has its own of; dropping them
// is no loss.
func ownBusiness(where, what string) bool {
	switch what {
	case "alias":
		return true
	case "@type", "source", "protocol", "log", "@tty", "@path":
		return strings.HasPrefix(where, "devices/serial") || strings.HasPrefix(where, "devices/console") || strings.HasPrefix(where, "devices/channel")
	case "backend":
		return where == "devices/rng"
	case "listen", "@port", "@autoport", "@listen", "@tlsPort", "@websocket", "@keymap", "@sharePolicy", "image", "gl":
		return where == "devices/graphics"
	case "@placement", "audio":
		return true
	case "@state":
		return where == "devices/channel/target"
	case "type", "loader", "nvram", "kernel", "initrd", "cmdline", "boot", "firmware", "@firmware", "dtb", "acpi", "shim", "init", "initarg":
		return where == "os" // read, or listed, by readOS
	}
	return false
}

func (r *specReader) readDevices(devs *xnode, rule specRule) {
	out := SpecNode{Name: "devices"}
	for _, k := range devs.kids {
		switch {
		case k.space != "":
			r.drop("devices/" + clip(k.name) + " (extension)")
		case k.name == "disk":
			r.readDisk(k)
		case k.name == "interface":
			r.readNIC(k)
		case k.name == "tpm":
			r.readTPM(k)
		case k.name == "emulator", k.name == "audio":
		case k.name == "console" && k.kid("target") != nil && k.kid("target").attr("type") == "serial":
			// libvirt makes it again from the first serial port
		default:
			kr, ok := rule.kids[k.name]
			if !ok {
				r.drop("devices/" + clip(k.name))
				continue
			}
			n, ok := r.keepDevice(k, kr)
			if ok {
				out.Kids = append(out.Kids, n)
			}
		}
	}
	r.spec.Hardware = append(r.spec.Hardware, out)
}

// keepDevice keeps one device; one of a type that is not carried is dropped
// whole, for half a device is another device.
func (r *specReader) keepDevice(x *xnode, rule specRule) (SpecNode, bool) {
	where := "devices/" + x.name
	for _, a := range []string{"type", "model"} {
		v := x.attr(a)
		if ok := rule.attrs[a]; v != "" && ok != nil && !ok(v) {
			r.drop(fmt.Sprintf("%s of %s %q", where, a, clip(v)))
			return SpecNode{}, false
		}
	}
	return r.keep(where, x, rule)
}
