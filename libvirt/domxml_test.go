package libvirt

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"kvmreplica/internal/boundtest"
)

func testSource() NBDSource {
	return NBDSource{Socket: "/run/replicad/vm/vda.sock", Export: "vda & <co>", Reconnect: 86400}
}

const smallDomain = `<?xml version="1.0"?>
<!-- kept by hand -->
<domain type="kvm" xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web&amp;01</name><uuid>deadbeef-0000-4000-8000-000000000001</uuid>
  <devices>
    <disk device='disk'  type = "file"><!-- <source file='/not/this'/> -->
      <driver cache='none' name="qemu" type='raw' discard='unmap' />
      <source file='/img/a "quoted".raw' startupPolicy='optional'><seclabel relabel='no'/></source>
      <target dev='vda' bus='virtio'/><unknown x='1'/>
    </disk>
    <disk type='block' device='disk'><source dev='/dev/vg/b'/><target dev='vdb' bus='virtio'/></disk>
  </devices>
  <qemu:commandline><qemu:arg value='-s'/></qemu:commandline>
</domain>
`

func TestSwapInChangesNothingButTheDisk(t *testing.T) {
	for _, target := range []string{"vda", "vdb"} {
		in, orig, err := SwapIn([]byte(smallDomain), target, testSource())
		if err != nil {
			t.Fatal(err)
		}
		root, err := domainRoot([]byte(smallDomain))
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range root.kid("devices").kids {
			if attrText([]byte(smallDomain), d.kid("target"), "dev") != target {
				continue
			}
			if !bytes.HasPrefix(in, []byte(smallDomain)[:d.whole.lo]) || !bytes.HasSuffix(in, []byte(smallDomain)[d.whole.hi:]) {
				t.Fatalf("bytes outside the disk changed:\n%s", cmp.Diff(smallDomain, string(in)))
			}
		}
		d, err := ParseDomain(in)
		if err != nil {
			t.Fatal(err)
		}
		k, _ := d.Disk(target)
		want := testSource()
		if k.Kind != SourceNBD || k.Socket != want.Socket || k.Export != want.Export || k.Format != "raw" || k.ErrorPolicy != "stop" || k.RErrorPolicy != "stop" || k.Reconnect != 86400 {
			t.Fatalf("%+v", k)
		}
		out, err := SwapOut(in, orig)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(smallDomain, string(out)); diff != "" {
			t.Fatalf("the way back (-want +got):\n%s", diff)
		}
	}
}

func TestSwapOutKeepsWhatWasChangedMeanwhile(t *testing.T) {
	in, orig, err := SwapIn([]byte(smallDomain), "vda", testSource())
	if err != nil {
		t.Fatal(err)
	}
	edited := strings.Replace(strings.Replace(string(in), "cache='none'", "cache='writeback'", 1), "web&amp;01", "web02", 1)
	out, err := SwapOut([]byte(edited), orig)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Replace(strings.Replace(smallDomain, "cache='none'", "cache='writeback'", 1), "web&amp;01", "web02", 1)
	if diff := cmp.Diff(want, string(out)); diff != "" {
		t.Fatalf("(-want +got):\n%s", diff)
	}
}

func TestSwapInRefusesWhatItCannotDoRight(t *testing.T) {
	cases := map[string]struct {
		doc, target string
		src         NBDSource
	}{
		"no such disk":    {smallDomain, "vdz", testSource()},
		"relative socket": {smallDomain, "vda", NBDSource{Socket: "x", Export: "e"}},
		"long socket":     {smallDomain, "vda", NBDSource{Socket: "/" + strings.Repeat("x", 107), Export: "e"}},
		"newline":         {smallDomain, "vda", NBDSource{Socket: "/x", Export: "e\ne"}},
		"no export":       {smallDomain, "vda", NBDSource{Socket: "/x"}},
		"twice":           {strings.Replace(smallDomain, "vdb", "vda", 1), "vda", testSource()},
		"empty drive":     {"<domain><devices><disk type='file'><target dev='vda'/></disk></devices></domain>", "vda", testSource()},
		"doctype":         {"<!DOCTYPE domain [<!ENTITY x 'y'>]>" + smallDomain[21:], "vda", testSource()},
		"not a domain":    {"<network/>", "vda", testSource()},
		"cut off":         {smallDomain[:len(smallDomain)-20], "vda", testSource()},
		"two roots":       {"<domain/><domain/>", "vda", testSource()},
		"too deep":        {strings.Repeat("<a>", 100) + strings.Repeat("</a>", 100), "vda", testSource()},
	}
	for name, c := range cases {
		if _, _, err := SwapIn([]byte(c.doc), c.target, c.src); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// anyDomain draws a domain document with all the freedom XML gives.
func anyDomain(t *rapid.T) string {
	ws := rapid.SampledFrom([]string{"", " ", "\n  ", "\t"})
	q := rapid.SampledFrom([]string{"'", `"`})
	at := func(k, v string) string {
		c := q.Draw(t, "quote")
		eq := rapid.SampledFrom([]string{"=", " = ", "= "}).Draw(t, "eq")
		return rapid.SampledFrom([]string{" ", "\n   "}).Draw(t, "sep") + k + eq + c + v + c
	}
	noise := rapid.SampledFrom([]string{"", "<!-- <disk> -->", "<x/>", "<metadata><app:a xmlns:app='urn:a'><![CDATA[</domain>]]></app:a></metadata>", "<y a='&gt;\"'>text</y>", "<?pi x?>"})
	var b strings.Builder
	b.WriteString("<domain" + at("type", "kvm") + ">" + ws.Draw(t, "w") + "<name>n</name>" + noise.Draw(t, "n1") + "<devices>" + noise.Draw(t, "n2"))
	for i := range rapid.IntRange(1, 4).Draw(t, "disks") {
		b.WriteString(ws.Draw(t, "w") + "<disk")
		kind := rapid.SampledFrom([]string{"file", "block"}).Draw(t, "kind")
		typed := rapid.Bool().Draw(t, "typed") || kind == "block"
		if typed {
			b.WriteString(at("type", kind))
		}
		b.WriteString(at("device", "disk") + ">")
		if rapid.Bool().Draw(t, "driver") {
			b.WriteString("<driver")
			for _, a := range rapid.Permutation([]string{"name", "type", "cache", "error_policy", "io"}).Draw(t, "attrs")[:rapid.IntRange(0, 5).Draw(t, "k")] {
				b.WriteString(at(a, map[string]string{"name": "qemu", "type": "raw", "cache": "none", "error_policy": "report", "io": "native"}[a]))
			}
			b.WriteString(rapid.SampledFrom([]string{"/>", " />", "></driver>", "><iotune/></driver >"}).Draw(t, "end"))
		}
		attr := map[string]string{"file": "file", "block": "dev"}[kind]
		b.WriteString(ws.Draw(t, "w") + "<source" + at(attr, "/d/&quot;"+fmt.Sprint(i)) + rapid.SampledFrom([]string{"/>", ">\n<seclabel model='dac'/></source>"}).Draw(t, "srcend"))
		b.WriteString(noise.Draw(t, "n3") + "<target" + at("bus", "virtio") + at("dev", "vd"+string(rune('a'+i))) + "/></disk>")
	}
	return b.String() + "</devices>" + noise.Draw(t, "n4") + "</domain>" + ws.Draw(t, "w")
}

func TestSwapRoundTripRestoresTheExactDocument(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		doc := anyDomain(t)
		d, err := ParseDomain([]byte(doc))
		if err != nil {
			t.Fatalf("the generator is wrong: %v\n%s", err, doc)
		}
		cur := []byte(doc)
		var origs []DiskOriginal
		for _, k := range d.Disks {
			next, orig, err := SwapIn(cur, k.Target, testSource())
			if err != nil {
				t.Fatalf("%v\n%s", err, doc)
			}
			sameOutside(t, cur, next, k.Target)
			cur, origs = next, append(origs, orig)
		}
		if cur, err = InsertMetadata(cur, "m<&"); err != nil {
			t.Fatal(err)
		}
		if cur, err = RemoveMetadata(cur); err != nil {
			t.Fatal(err)
		}
		for _, i := range rapid.Permutation(origs).Draw(t, "order") {
			if cur, err = SwapOut(cur, i); err != nil {
				t.Fatalf("%v\n%s", err, doc)
			}
		}
		if diff := cmp.Diff(doc, string(cur)); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	})
}

// sameOutside compares everything but the disk in question, byte for byte.
func sameOutside(t *rapid.T, a, b []byte, target string) {
	da, err := findDisk(a, target)
	if err != nil {
		t.Fatal(err)
	}
	db, err := findDisk(b, target)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a[:da.whole.lo], b[:db.whole.lo]) || !bytes.Equal(a[da.whole.hi:], b[db.whole.hi:]) {
		t.Fatalf("bytes outside disk %s changed", target)
	}
}

func TestMetadataComesAndGoesWithoutATrace(t *testing.T) {
	for _, doc := range []string{
		"<domain><name>a</name></domain>",
		"<domain><name>a</name><uuid>u</uuid>\n</domain>",
		"<domain><metadata/><name>a</name></domain>",
		"<domain><metadata></metadata><name>a</name></domain>",
		"<domain>\n <metadata>\n  <app:x xmlns:app='urn:x'>1</app:x>\n </metadata>\n<name>a</name></domain>",
	} {
		in, err := InsertMetadata([]byte(doc), `{"k":"<>&'\""}`)
		if err != nil {
			t.Fatal(err)
		}
		if err := xml.Unmarshal(in, new(struct{ XMLName xml.Name })); err != nil {
			t.Fatalf("%v\n%s", err, in)
		}
		twice, err := InsertMetadata(in, "again")
		if err != nil || strings.Count(string(twice), MetadataURI) != 1 {
			t.Fatalf("%v\n%s", err, twice)
		}
		for _, d := range [][]byte{in, twice} {
			out, err := RemoveMetadata(d)
			if err != nil || string(out) != doc {
				t.Fatalf("%v\nwant %q\ngot  %q", err, doc, out)
			}
		}
	}
}

func TestSetNameUUIDChangesOnlyThose(t *testing.T) {
	got, err := SetNameUUID([]byte(smallDomain), "a<b", "deadbeef-0000-4000-8000-000000000009")
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Replace(strings.Replace(smallDomain, "web&amp;01", "a&lt;b", 1), "000000000001", "000000000009", 1)
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Fatal(diff)
	}
}

func FuzzSwap(f *testing.F) {
	f.Add([]byte(smallDomain), "vda")
	for _, n := range []string{"testdata/q35-windows.xml", "testdata/pc-plain.xml"} {
		b, err := os.ReadFile(n)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, "sda")
	}
	f.Fuzz(func(t *testing.T, doc []byte, target string) {
		defer boundtest.Input(t)()
		in, orig, err := SwapIn(doc, target, testSource())
		if err != nil {
			return
		}
		out, err := SwapOut(in, orig)
		if err != nil {
			t.Fatalf("in, but not out: %v\n%s", err, in)
		}
		if !bytes.Equal(doc, out) {
			t.Fatalf("the way back differs:\n%q\n%q", doc, out)
		}
	})
}
