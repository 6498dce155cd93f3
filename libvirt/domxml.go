package libvirt

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// NBDSource is our export as a disk's source.
type NBDSource struct {
	Socket string // absolute path of the unix socket
	Export string
	// Reconnect is QEMU's reconnect-delay in seconds, 0 leaves it out. Older
	// libvirt drops the element silently; error policies stop the guest then.
	Reconnect int
}

// DiskOriginal is what SwapIn replaced: keep it, it is the way back. It is
// plain data (JSON) and holds raw XML of our own host only.
type DiskOriginal struct {
	Target string
	// Type is the raw value of the disk's type attribute; nil: it had none.
	Type *string
	// Source is the whole <source> element.
	Source string
	// HadDriver says whether there was a <driver> element; Driver holds the raw
	// values of the attributes we set, nil for those it did not have.
	HadDriver bool
	Driver    map[string]*string
}

// driverSettings are the driver attributes a disk on our export has: raw
// always, and a guest that stops rather than sees an error.
func driverSettings() []struct{ name, value string } {
	return []struct{ name, value string }{
		{"name", "qemu"}, {"type", "raw"}, {"error_policy", "stop"}, {"rerror_policy", "stop"},
	}
}

// SwapIn points one disk of our own domain document to an export and returns
// what it replaced. Every byte outside the disk's type, the four driver
// attributes and the source stays as it was.
func SwapIn(doc []byte, target string, src NBDSource) ([]byte, DiskOriginal, error) {
	orig := DiskOriginal{Target: target, Driver: map[string]*string{}}
	fail := func(err error) ([]byte, DiskOriginal, error) {
		return nil, DiskOriginal{}, fmt.Errorf("put disk %s on its export: %w", target, err)
	}
	if err := src.validate(); err != nil {
		return fail(err)
	}
	was, err := ParseDomain(doc)
	if err != nil {
		return fail(err)
	}
	if k, _ := was.Disk(target); k.Kind == SourceOther || k.Kind == SourceNone {
		return fail(fmt.Errorf("its source is %q, which cannot be given back", k.Kind))
	}
	disk, err := findDisk(doc, target)
	if err != nil {
		return fail(err)
	}
	source := disk.kid("source")
	if source == nil {
		return fail(errors.New("the disk has no source"))
	}
	orig.Source = string(doc[source.whole.lo:source.whole.hi])
	edits := []splice{{source.whole, src.xml()}}
	orig.Type, edits = setAttr(doc, disk, "type", "network", edits)
	if drv := disk.kid("driver"); drv != nil {
		orig.HadDriver = true
		for _, s := range driverSettings() {
			var old *string
			old, edits = setAttr(doc, drv, s.name, s.value, edits)
			orig.Driver[s.name] = old
		}
	} else {
		var b strings.Builder
		b.WriteString("<driver")
		for _, s := range driverSettings() {
			fmt.Fprintf(&b, " %s='%s'", s.name, s.value)
		}
		b.WriteString("/>")
		edits[0].with = b.String() + edits[0].with
	}
	out, err := apply(doc, edits)
	if err != nil {
		return fail(err)
	}
	d, err := ParseDomain(out)
	if err != nil {
		return fail(err)
	}
	if k, ok := d.Disk(target); !ok || k.Kind != SourceNBD || k.Socket != src.Socket || k.Export != src.Export || k.Format != "raw" {
		return fail(errors.New("the edited document does not say what it should"))
	}
	return out, orig, nil
}

// SwapOut is the way back: it undoes SwapIn on a document that has the disk on
// an export. On SwapIn's own result it restores the exact bytes; changes made
// elsewhere since are kept.
func SwapOut(doc []byte, orig DiskOriginal) ([]byte, error) {
	fail := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("put disk %s back on its own source: %w", orig.Target, err)
	}
	disk, err := findDisk(doc, orig.Target)
	if err != nil {
		return fail(err)
	}
	source := disk.kid("source")
	if source == nil {
		return fail(errors.New("the disk has no source"))
	}
	if r, err := scan([]byte(orig.Source)); err != nil || r.name != "source" {
		return fail(errors.New("the kept source is damaged"))
	}
	edits := []splice{{source.whole, orig.Source}}
	edits = resetAttr(doc, disk, "type", orig.Type, edits)
	if drv := disk.kid("driver"); drv != nil {
		if orig.HadDriver {
			for _, s := range driverSettings() {
				edits = resetAttr(doc, drv, s.name, orig.Driver[s.name], edits)
			}
		} else {
			edits = append(edits, splice{drv.whole, ""})
		}
	}
	out, err := apply(doc, edits)
	if err != nil {
		return fail(err)
	}
	if _, err := ParseDomain(out); err != nil {
		return fail(err)
	}
	return out, nil
}

func (s NBDSource) validate() error {
	switch {
	case !strings.HasPrefix(s.Socket, "/") || len(s.Socket) > 107:
		return fmt.Errorf("socket path %q must be absolute and at most 107 bytes", s.Socket)
	case s.Export == "" || len(s.Export) > 255:
		return fmt.Errorf("export name %q must have 1 to 255 bytes", s.Export)
	case !printable(s.Socket) || !printable(s.Export):
		return errors.New("socket path and export name must be printable")
	case s.Reconnect < 0:
		return errors.New("negative reconnect delay")
	}
	return nil
}

func (s NBDSource) xml() string {
	r := ""
	if s.Reconnect > 0 {
		r = "<reconnect delay='" + strconv.Itoa(s.Reconnect) + "'/>"
	}
	return fmt.Sprintf("<source protocol='nbd' name='%s'><host transport='unix' socket='%s'/>%s</source>", esc(s.Export), esc(s.Socket), r)
}

// printable: valid UTF-8 without control characters.
func printable(s string) bool {
	for _, r := range s {
		if r < 0x20 || r == 0x7f || r == utf8.RuneError {
			return false
		}
	}
	return utf8.ValidString(s)
}

func domainRoot(doc []byte) (*elem, error) {
	root, err := scan(doc)
	if err != nil {
		return nil, fmt.Errorf("read domain XML: %w", err)
	}
	if root.name != "domain" {
		return nil, fmt.Errorf("read domain XML: the root element is <%s>", root.name)
	}
	return root, nil
}

func findDisk(doc []byte, target string) (*elem, error) {
	root, err := domainRoot(doc)
	if err != nil {
		return nil, err
	}
	var found *elem
	if devs := root.kid("devices"); devs != nil {
		for _, k := range devs.kids {
			if k.name != "disk" {
				continue
			}
			if t := k.kid("target"); t != nil && attrText(doc, t, "dev") == target {
				if found != nil {
					return nil, fmt.Errorf("two disks are called %q", target)
				}
				found = k
			}
		}
	}
	if found == nil {
		return nil, fmt.Errorf("there is no disk %q", target)
	}
	return found, nil
}

// setAttr makes an edit that gives attribute name the value; old is the raw
// value it had, nil when it was absent.
func setAttr(doc []byte, e *elem, name, value string, edits []splice) (old *string, out []splice) {
	if a, ok := findAttr(doc, e, name); ok {
		raw := string(doc[a.value.lo:a.value.hi])
		return &raw, append(edits, splice{a.value, value})
	}
	return nil, append(edits, splice{span{attrEnd(doc, e), attrEnd(doc, e)}, fmt.Sprintf(" %s='%s'", name, value)})
}

// resetAttr makes an edit that gives attribute name its old raw value, or
// removes it when old is nil.
func resetAttr(doc []byte, e *elem, name string, old *string, edits []splice) []splice {
	a, ok := findAttr(doc, e, name)
	switch {
	case ok && old != nil:
		return append(edits, splice{a.value, *old})
	case ok:
		return append(edits, splice{a.whole, ""})
	case old != nil:
		return append(edits, splice{span{attrEnd(doc, e), attrEnd(doc, e)}, fmt.Sprintf(" %s='%s'", name, *old)})
	}
	return edits
}

// attrEnd is where another attribute can be put: behind the last one.
func attrEnd(doc []byte, e *elem) int {
	as := attrs(doc, e.tag)
	if len(as) > 0 {
		return as[len(as)-1].whole.hi
	}
	return e.tag.lo + 1 + len(e.name)
}

// SetNameUUID returns the document under another name and UUID; empty values
// leave the old ones. Nothing else changes.
func SetNameUUID(doc []byte, name, uuid string) ([]byte, error) {
	root, err := domainRoot(doc)
	if err != nil {
		return nil, err
	}
	var edits []splice
	for _, s := range []struct{ elem, value string }{{"name", name}, {"uuid", uuid}} {
		if s.value == "" {
			continue
		}
		k := root.kid(s.elem)
		if k == nil || k.selfClosing() || !printable(s.value) {
			return nil, fmt.Errorf("set the domain's %s: the document has none, or the new one is not printable", s.elem)
		}
		edits = append(edits, splice{k.inner, esc(s.value)})
	}
	return apply(doc, edits)
}

// metadataElement is our element with text inside.
func metadataElement(text string) string {
	return "<" + MetadataPrefix + ":vm xmlns:" + MetadataPrefix + "='" + MetadataURI + "'>" + esc(text) + "</" + MetadataPrefix + ":vm>"
}

// metadataText reads the text out of our element as libvirt returns it.
func metadataText(doc string) (string, error) {
	root, err := scan([]byte(doc))
	if err != nil {
		return "", fmt.Errorf("read our metadata: %w", err)
	}
	return unescape([]byte(doc)[root.inner.lo:root.inner.hi]), nil
}

// InsertMetadata puts our element into a document, replacing one that is
// there. RemoveMetadata takes it out and restores the exact bytes.
func InsertMetadata(doc []byte, text string) ([]byte, error) {
	doc, err := RemoveMetadata(doc)
	if err != nil {
		return nil, err
	}
	root, err := domainRoot(doc)
	if err != nil {
		return nil, err
	}
	el := metadataElement(text)
	m := root.kid("metadata")
	switch {
	case m == nil:
		after := root.kid("uuid")
		if after == nil {
			after = root.kid("name")
		}
		if after == nil {
			return nil, errors.New("insert metadata: the document has no name")
		}
		return apply(doc, []splice{{span{after.whole.hi, after.whole.hi}, "<metadata>" + el + "</metadata>"}})
	case m.selfClosing():
		return apply(doc, []splice{{m.whole, "<metadata>" + el + "</metadata >"}})
	}
	return apply(doc, []splice{{span{m.inner.hi, m.inner.hi}, "\n" + el}})
}

// RemoveMetadata takes our element out of a document, and a <metadata> that
// holds nothing but blanks then. A document without it comes back as it is.
func RemoveMetadata(doc []byte) ([]byte, error) {
	root, err := domainRoot(doc)
	if err != nil {
		return nil, err
	}
	m := root.kid("metadata")
	if m == nil {
		return doc, nil
	}
	for _, k := range m.kids {
		if !isOurs(doc, k) {
			continue
		}
		alone := m.inner == k.whole
		switch {
		case alone && bytes.HasSuffix(doc[:m.whole.hi], []byte("</metadata >")):
			return apply(doc, []splice{{m.whole, "<metadata/>"}})
		case alone:
			return apply(doc, []splice{{m.whole, ""}})
		}
		at := k.whole
		if at.lo > m.inner.lo && doc[at.lo-1] == '\n' {
			at.lo--
		}
		rest := append(append([]byte(nil), doc[m.inner.lo:at.lo]...), doc[at.hi:m.inner.hi]...)
		if len(rest) > 0 && len(bytes.TrimSpace(rest)) == 0 {
			// libvirt made the wrapper for us and indented it.
			lo := m.whole.lo
			for lo > 0 && isSpace(doc[lo-1]) {
				lo--
			}
			return apply(doc, []splice{{span{lo, m.whole.hi}, ""}})
		}
		return apply(doc, []splice{{at, ""}})
	}
	return doc, nil
}

// isOurs reports whether an element is in our namespace, which libvirt always
// declares on the element itself.
func isOurs(doc []byte, e *elem) bool {
	prefix, _, has := strings.Cut(e.name, ":")
	decl := "xmlns"
	if has {
		decl = "xmlns:" + prefix
	}
	return attrText(doc, e, decl) == MetadataURI
}
