package libvirt

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Limits on documents, ours or derived from a peer's description.
const (
	maxDocument = 4 << 20
	maxDepth    = 64
	maxElements = 50000
)

// span is the byte range [lo, hi) of a document.
type span struct{ lo, hi int }

// elem is one element with its place in the document's bytes.
type elem struct {
	name  string // "prefix:local" as written
	whole span   // from '<' to behind the closing '>'
	tag   span   // the start tag
	inner span   // empty at tag.hi for a self-closing element
	kids  []*elem
}

// selfClosing reports whether the element was written as <a/>.
func (e *elem) selfClosing() bool { return e.whole == e.tag }

// kid returns the first child of that name, or nil.
func (e *elem) kid(name string) *elem {
	for _, k := range e.kids {
		if k.name == name {
			return k
		}
	}
	return nil
}

// scan reads where every element of doc stands. It accepts only one root
// element, no document type, and what encoding/xml takes for well-formed.
func scan(doc []byte) (*elem, error) {
	if len(doc) > maxDocument {
		return nil, fmt.Errorf("the document has %d bytes, more than %d", len(doc), maxDocument)
	}
	d := xml.NewDecoder(bytes.NewReader(doc))
	var root *elem
	var open []*elem
	count := 0
	for {
		at := int(d.InputOffset())
		t, err := d.RawToken()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		end := int(d.InputOffset())
		switch t := t.(type) {
		case xml.Directive:
			return nil, errors.New("a document type declaration is not allowed")
		case xml.StartElement:
			if count++; count > maxElements || len(open) >= maxDepth {
				return nil, errors.New("too many or too deeply nested elements")
			}
			e := &elem{name: rawName(t.Name), whole: span{at, end}, tag: span{at, end}, inner: span{end, end}}
			switch {
			case len(open) > 0:
				p := open[len(open)-1]
				p.kids = append(p.kids, e)
			case root != nil:
				return nil, errors.New("more than one root element")
			default:
				root = e
			}
			open = append(open, e)
		case xml.EndElement:
			if len(open) == 0 || open[len(open)-1].name != rawName(t.Name) {
				return nil, fmt.Errorf("unexpected </%s>", rawName(t.Name))
			}
			e := open[len(open)-1]
			open = open[:len(open)-1]
			e.whole.hi = end
			e.inner.hi = max(e.inner.lo, at)
		}
	}
	if root == nil || len(open) > 0 {
		return nil, errors.New("the document is not complete")
	}
	return root, nil
}

func rawName(n xml.Name) string {
	if n.Space == "" {
		return n.Local
	}
	return n.Space + ":" + n.Local
}

// attr is one attribute inside a document.
type attr struct {
	name  string
	whole span // with the white space in front of it
	value span // between the quotes
}

// attrs finds the attributes of a start tag. The tag was read by encoding/xml,
// so its quoting is sound.
func attrs(doc []byte, tag span) []attr {
	var out []attr
	i := tag.lo + 1
	for i < tag.hi && !isSpace(doc[i]) && doc[i] != '>' && doc[i] != '/' {
		i++
	}
	for {
		lo := i
		for i < tag.hi && isSpace(doc[i]) {
			i++
		}
		if i >= tag.hi || doc[i] == '>' || doc[i] == '/' {
			return out
		}
		n := i
		for i < tag.hi && !isSpace(doc[i]) && doc[i] != '=' {
			i++
		}
		a := attr{name: string(doc[n:i])}
		for i < tag.hi && doc[i] != '"' && doc[i] != '\'' {
			i++
		}
		if i >= tag.hi {
			return out
		}
		q := doc[i]
		i++
		a.value.lo = i
		for i < tag.hi && doc[i] != q {
			i++
		}
		if i >= tag.hi {
			return out
		}
		a.value.hi = i
		i++
		a.whole = span{lo, i}
		out = append(out, a)
	}
}

func findAttr(doc []byte, e *elem, name string) (attr, bool) {
	for _, a := range attrs(doc, e.tag) {
		if a.name == name {
			return a, true
		}
	}
	return attr{}, false
}

// attrText is an attribute's value, unescaped; "" when it is absent.
func attrText(doc []byte, e *elem, name string) string {
	a, ok := findAttr(doc, e, name)
	if !ok {
		return ""
	}
	return unescape(doc[a.value.lo:a.value.hi])
}

// unescape resolves the five named entities and character references; there
// are no others without a document type.
func unescape(b []byte) string {
	s := string(b)
	if !strings.Contains(s, "&") {
		return s
	}
	var out strings.Builder
	for {
		before, rest, found := strings.Cut(s, "&")
		out.WriteString(before)
		if !found {
			return out.String()
		}
		ref, after, closed := strings.Cut(rest, ";")
		r, known := entity(ref)
		if !closed || !known {
			out.WriteByte('&')
			s = rest
			continue
		}
		out.WriteRune(r)
		s = after
	}
}

func entity(ref string) (rune, bool) {
	switch ref {
	case "lt":
		return '<', true
	case "gt":
		return '>', true
	case "amp":
		return '&', true
	case "apos":
		return '\'', true
	case "quot":
		return '"', true
	}
	num, isRef := strings.CutPrefix(ref, "#")
	if !isRef || len(num) > 8 {
		return 0, false
	}
	base := 10
	if hex, isHex := strings.CutPrefix(num, "x"); isHex {
		num, base = hex, 16
	}
	n, err := strconv.ParseUint(num, base, 21)
	return rune(n), err == nil && utf8.ValidRune(rune(n))
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

// esc escapes text for use in an attribute in single quotes or as content.
func esc(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch r {
		case '<':
			b.WriteString("&lt;")
		case '>':
			b.WriteString("&gt;")
		case '&':
			b.WriteString("&amp;")
		case '\'':
			b.WriteString("&apos;")
		case '"':
			b.WriteString("&quot;")
		case '\n':
			b.WriteString("&#xA;")
		case '\r':
			b.WriteString("&#xD;")
		case '\t':
			b.WriteString("&#x9;")
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// splice is one replacement of a byte range.
type splice struct {
	at   span
	with string
}

// apply makes all replacements; everything outside their ranges stays as it
// is. Overlapping ranges are our own mistake.
func apply(doc []byte, edits []splice) ([]byte, error) {
	sort.SliceStable(edits, func(i, j int) bool { return edits[i].at.lo < edits[j].at.lo })
	out := make([]byte, 0, len(doc)+256)
	pos := 0
	for _, e := range edits {
		if e.at.lo < pos || e.at.hi < e.at.lo || e.at.hi > len(doc) {
			return nil, errors.New("overlapping edits of a document")
		}
		out = append(out, doc[pos:e.at.lo]...)
		out = append(out, e.with...)
		pos = e.at.hi
	}
	return append(out, doc[pos:]...), nil
}
