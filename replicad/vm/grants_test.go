package vm

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/replicad/wire"
)

// What the replica's host grants is an exact bound: one more VM, disk or byte is
// refused before anything is made, and what just fits is taken.
func TestAHostTakesWhatItGrantedAndNotOneMore(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	const id = wire.VMID("deadbeef-0000-4000-8000-0000000000cc")
	image := filepath.Join(w.a.dir, "..", "more.raw")
	must(t, os.WriteFile(image, make([]byte, diskSize), 0o600))
	_, err := w.a.hyper.Define(t.Context(), domainDoc("more", id, image))
	must(t, err)
	enable := func(g Grant) error {
		g.Name, g.MaySend, g.Root = "peer", true, w.b.root
		w.b.mu.Lock()
		w.b.grant = g
		w.b.mu.Unlock()
		return w.a.do(func(ctx context.Context, m *Manager, _ *VM) error {
			_, err := m.Enable(ctx, EnableOptions{Name: "more", Peer: w.b.host, Interval: time.Second, Request: "more"}, nil)
			return err
		})
	}
	for says, g := range map[string]Grant{
		"may send 1 VM and":     {MaxVMs: 1},
		"with this VM it would": {MaxBytes: 2*diskSize - 1},
	} {
		if err := enable(g); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v", g, err)
		}
		if len(w.a.manager().All()) != 1 || len(w.b.manager().All()) != 1 {
			t.Fatalf("%+v: something was left behind", g)
		}
	}
	must(t, enable(Grant{MaxVMs: 2, MaxDisks: 1, MaxBytes: 2 * diskSize}))
}
