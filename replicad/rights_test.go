package replicad

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/peer"
)

// A host that may send may ask, unless somebody said that it may not.
func TestRightsAreWhatWasTyped(t *testing.T) {
	d := &Daemon{cfg: config.Config{StorageRoots: []string{"/srv/a", "/srv/b"}}}
	yes, no := true, false
	for _, c := range []struct {
		title string
		typed api.Rights
		want  peer.Authorisation
	}{
		{"nothing", api.Rights{}, peer.Authorisation{}},
		{"--may-send", api.Rights{MaySend: true}, peer.Authorisation{MaySend: true, StorageRoot: "/srv/a", MaxVMs: defaultMaxVMs, MayRequestReverse: true}},
		{"--may-send --may-ask=false", api.Rights{MaySend: true, MayAsk: &no}, peer.Authorisation{MaySend: true, StorageRoot: "/srv/a", MaxVMs: defaultMaxVMs}},
		{"--may-ask", api.Rights{MayAsk: &yes}, peer.Authorisation{MayRequestReverse: true}},
		{
			"all limits",
			api.Rights{MaySend: true, Root: "/srv/b", MaxVMs: 3, Limit: 1 << 40, Bandwidth: 20 << 20},
			peer.Authorisation{MaySend: true, StorageRoot: "/srv/b", MaxVMs: 3, MaxBytes: 1 << 40, Bandwidth: 20 << 20, MayRequestReverse: true},
		},
	} {
		if diff := cmp.Diff(c.want, d.authorisation(c.typed)); diff != "" {
			t.Errorf("%s: %s", c.title, diff)
		}
	}
}
