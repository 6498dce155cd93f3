package libvirt

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNetworkDocumentsSayWhereTheyLead(t *testing.T) {
	for doc, want := range map[string]Network{
		"<network><name>a</name><bridge name='virbr1'/></network>": {Name: "a", Bridge: "virbr1"},
		"<network><name>b</name><forward/><bridge name='virbr0'/><ip address='10.0.0.1'><dhcp><range start='10.0.0.2' end='10.0.0.9'/></dhcp></ip></network>": {Name: "b", Bridge: "virbr0", Forward: "nat", DHCP: true},
		"<network><name>c</name><forward mode='bridge'/><bridge name='br0'/></network>":                                                                       {Name: "c", Bridge: "br0", Forward: "bridge"},
	} {
		got, err := parseNetwork([]byte(doc))
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%s: %v %s", doc, err, d)
		}
	}
}

func TestReservationsAreCheckedBeforeTheyReachLibvirt(t *testing.T) {
	ok := Reservation{MAC: "52:54:00:AA:00:01", Name: "web & test", IP: "10.0.0.5"}
	got, err := ok.xml()
	if want := "<host mac='52:54:00:aa:00:01' name='web---test' ip='10.0.0.5'/>"; err != nil || got != want {
		t.Errorf("%s, %v", got, err)
	}
	for _, r := range []Reservation{{MAC: ok.MAC, IP: "10.0.0"}, {MAC: "x'/><forward/>", IP: ok.IP}, {MAC: ok.MAC, IP: "fe80::1%eth0"}} {
		if s, err := r.xml(); err == nil {
			t.Errorf("%+v became %s", r, s)
		}
	}
	doc := "<network><ip><dhcp><host mac='52:54:00:aa:00:01' ip='10.0.0.5'/></dhcp></ip></network>"
	if !reserved([]byte(doc), ok) || reserved([]byte(doc), Reservation{MAC: ok.MAC, IP: "10.0.0.6"}) {
		t.Error("an entry is not told from another")
	}
}

func TestTheGenerationIDIsReplacedAndNeverAdded(t *testing.T) {
	const id = "0f0e0d0c-0b0a-4908-8706-050403020100"
	for doc, want := range map[string]string{
		"<domain><name>a</name><genid/></domain>":                                            "<domain><name>a</name><genid>" + id + "</genid></domain>",
		"<domain><name>a</name><genid>11111111-1111-4111-8111-111111111111</genid></domain>": "<domain><name>a</name><genid>" + id + "</genid></domain>",
		"<domain><name>a</name></domain>":                                                    "<domain><name>a</name></domain>",
	} {
		got, err := SetGenID([]byte(doc), id)
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v", doc, got, err)
		}
	}
	if _, err := SetGenID([]byte("<domain><genid/></domain>"), "'/>"); err == nil {
		t.Error("an odd id is accepted")
	}
}

func TestACardsOwnPolicyWinsAndACopysSMBIOSHasNoForeignUUID(t *testing.T) {
	s := Spec{
		Version: SpecVersion, Name: "web", UUID: "deadbeef-0000-4000-8000-0000000000aa", Arch: "x86_64", Machine: "pc", MemoryKiB: 1 << 20, VCPUs: 1,
		NICs: []SpecNIC{{MAC: "52:54:00:00:00:01", Network: "lan"}, {MAC: "52:54:00:00:00:02", Network: "lan"}},
		Hardware: []SpecNode{{Name: "sysinfo", Attrs: map[string]string{"type": "smbios"}, Kids: []SpecNode{{Name: "system", Kids: []SpecNode{
			{Name: "entry", Attrs: map[string]string{"name": "uuid"}, Text: "deadbeef-0000-4000-8000-0000000000aa"},
			{Name: "entry", Attrs: map[string]string{"name": "serial"}, Text: "17"},
		}}}}},
	}
	p := Policy{
		Type: "qemu", Name: "web-test", UUID: "deadbeef-0000-4000-8000-0000000000bb", NewMACs: true, Networks: map[string]PolicyNetwork{"lan": {Network: "lan"}},
		NICs: map[string]PolicyNIC{"52:54:00:00:00:01": {MAC: "52:54:00:00:00:aa", Network: &PolicyNetwork{Bridge: "br0"}}},
	}
	doc, err := Render(s, p)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"52:54:00:00:00:aa", "bridge='br0'", "network='lan'", ">17<"} {
		if !strings.Contains(string(doc), want) {
			t.Errorf("%q is missing in %s", want, doc)
		}
	}
	for _, bad := range []string{"52:54:00:00:00:01", "52:54:00:00:00:02", "0000000000aa"} {
		if strings.Contains(string(doc), bad) {
			t.Errorf("%q is in %s", bad, doc)
		}
	}
}
