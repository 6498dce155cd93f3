package nbd_test

import (
	"testing"

	"kvmreplica/internal/boundtest"
	"kvmreplica/nbd"
)

// FuzzParseURI: an accepted address says where to connect.
func FuzzParseURI(f *testing.F) {
	for _, s := range []string{"nbd://h/x", "nbd://[::1]:10809/", "nbd+unix:///e?socket=/s", "nbd+unix://?socket=", "nbds://h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		defer boundtest.Input(t)()
		u, err := nbd.ParseURI(s)
		if err == nil && (u.Address == "" || u.Network != "unix" && u.Network != "tcp") {
			t.Fatalf("%q became %+v", s, u)
		}
	})
}
