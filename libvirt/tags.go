package libvirt

import (
	"encoding/xml"
	"slices"
	"strings"
)

// TagsURI is the namespace of the element of a domain's metadata that holds its
// tags, one <tag> each: virsh metadata NAME --uri urn:kvmreplica:tags:1 --key
// kvmreplica-tags --set '<tags><tag>gold</tag></tags>' --config.
const TagsURI = "urn:kvmreplica:tags:1"

// Bounds of what is read of a domain's tags.
const (
	maxTags = 64
	maxTag  = 64
)

// tagsOf reads the tags in the content of a domain's <metadata>. White space
// around a tag is not part of it; what is too long, or no text, is no tag.
func tagsOf(metadata string) (tags []string) {
	d := xml.NewDecoder(strings.NewReader(metadata))
	for {
		t, err := d.Token()
		if err != nil {
			return tags // the rest is not ours to judge
		}
		e, ok := t.(xml.StartElement)
		if !ok {
			continue
		}
		if e.Name.Space != TagsURI || e.Name.Local != "tags" {
			if d.Skip() != nil {
				return tags
			}
			continue
		}
		var list struct {
			Tags []string `xml:"tag"`
		}
		if d.DecodeElement(&list, &e) != nil {
			return tags
		}
		for _, s := range list.Tags {
			s = strings.TrimSpace(s)
			if s != "" && len(s) <= maxTag && printable(s) && !slices.Contains(tags, s) && len(tags) < maxTags {
				tags = append(tags, s)
			}
		}
	}
}
