package libvirt

import (
	"encoding/json"
	"testing"

	"kvmreplica/internal/boundtest"
)

// FuzzParseDomain: no domain definition brings us down or costs much.
func FuzzParseDomain(f *testing.F) {
	f.Add([]byte(smallDomain))
	f.Add(readDoc(f, "testdata/q35-windows.xml"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		defer boundtest.Input(t)()
		d, err := ParseDomain(doc)
		if err == nil && len(d.Disks) > len(doc) {
			t.Fatalf("%d disks from %d bytes", len(d.Disks), len(doc))
		}
		_, _ = SetNameUUID(doc, "web", "11111111-2222-3333-4444-555555555555")
	})
}

// FuzzMonitorReply: an answer of QEMU's monitor is a result or an error.
func FuzzMonitorReply(f *testing.F) {
	f.Add([]byte(`{"return":[{"device":"d","inserted":{"node-name":"n"}}],"id":"libvirt-1"}`))
	f.Add([]byte(`{"error":{"class":"GenericError","desc":"no"}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		var out []map[string]any
		var any json.RawMessage
		if decodeReply("query-block", b, &any) != nil && decodeReply("query-block", b, &out) == nil {
			t.Fatalf("%q is an answer and is not", b)
		}
	})
}
