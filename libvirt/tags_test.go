package libvirt

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/boundtest"
)

func withMetadata(s string) []byte {
	return []byte(strings.Replace(smallDomain, "<devices>", "<metadata>"+s+"</metadata><devices>", 1))
}

func TestTagsAreReadFromTheirOwnNamespaceOnly(t *testing.T) {
	const ns = "xmlns:k='" + TagsURI + "'"
	for in, want := range map[string][]string{
		``: nil,
		`<k:tags ` + ns + `><tag>gold</tag><tag> web </tag><tag>gold</tag></k:tags>`:                    {"gold", "web"},
		`<tags xmlns='` + TagsURI + `'><tag>gold</tag></tags>`:                                          {"gold"},
		`<k:tags ` + ns + `><k:tag>gold</k:tag><other>x</other></k:tags>`:                               {"gold"},
		`<tags><tag>gold</tag></tags><k:tags xmlns:k='urn:other'><tag>gold</tag></k:tags>`:              nil,
		`<o:x xmlns:o='urn:o'><k:tags ` + ns + `><tag>gold</tag></k:tags></o:x>`:                        nil,
		`<k:tags ` + ns + `><tag/><tag>` + strings.Repeat("x", 65) + `</tag><tag>a&#9;b</tag></k:tags>`: nil,
		`<k:tags ` + ns + `><tag>a &amp; b</tag></k:tags>`:                                              {"a & b"},
	} {
		d, err := ParseDomain(withMetadata(in))
		if diff := cmp.Diff(want, d.Tags); err != nil || diff != "" {
			t.Errorf("%s: %v %s", in, err, diff)
		}
	}
	many := "<tags xmlns='" + TagsURI + "'>"
	for i := range 100 {
		many += "<tag>" + strings.Repeat("t", i%50) + string(rune('a'+i%26)) + "</tag>"
	}
	if d, err := ParseDomain(withMetadata(many + "</tags>")); err != nil || len(d.Tags) != maxTags {
		t.Errorf("%d tags, %v", len(d.Tags), err)
	}
}

// FuzzTags: whatever a domain's metadata is, its tags are few, short and text.
func FuzzTags(f *testing.F) {
	f.Add("<k:tags xmlns:k='" + TagsURI + "'><tag>gold</tag></k:tags>")
	f.Add("<a/><tags xmlns='" + TagsURI + "'><tag>x<b/></tag>")
	f.Fuzz(func(t *testing.T, s string) {
		defer boundtest.Input(t)()
		tags := tagsOf(s)
		if len(tags) > maxTags {
			t.Fatalf("%d tags", len(tags))
		}
		for _, g := range tags {
			if g == "" || len(g) > maxTag || !printable(g) {
				t.Fatalf("%q is a tag", g)
			}
		}
	})
}
