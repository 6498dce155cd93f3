package delta_test

import (
	"testing"

	"kvmreplica/internal/boundtest"
	"kvmreplica/replicad/delta"
)

// FuzzText: names of positions in text are written the way they are read.
func FuzzText(f *testing.F) {
	f.Add("01000000000000000000000000000000")
	f.Add("11111111-2222-3333-4444-555555555555")
	f.Add(delta.Digest{7}.String())
	f.Fuzz(func(t *testing.T, s string) {
		defer boundtest.Input(t)()
		var g, g2 delta.Generation
		if g.UnmarshalText([]byte(s)) == nil && (g2.UnmarshalText([]byte(g.String())) != nil || g != g2) {
			t.Fatalf("generation %q", s)
		}
		var d, d2 delta.Digest
		if d.UnmarshalText([]byte(s)) == nil && (d2.UnmarshalText([]byte(d.String())) != nil || d != d2) {
			t.Fatalf("digest %q", s)
		}
		if v, err := delta.ParseVM(s); err == nil {
			if w, err := delta.ParseVM(v.String()); err != nil || v != w {
				t.Fatalf("VM %q", s)
			}
		}
	})
}
