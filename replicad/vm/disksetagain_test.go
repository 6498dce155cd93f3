package vm

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
)

// A disk taken out while it joins and added again with another size, before the
// replica saw an epoch between, must become whole on both hosts.
func TestADiskAddedAgainWithAnotherSizeWhileItJoinedBecomesWhole(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	image := w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("joining", "joining")
	must(t, w.a.do(setDisk(true)))
	must(t, os.WriteFile(image, bytes.Repeat([]byte("big!"), 2<<20), 0o600))
	must(t, w.a.do(setDisk(false)))
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Resume() }))
	w.write(w.a, 3)
	w.secondIs("member", "member")
}

// Taken out and added again, changed meanwhile, with no epoch between.
func TestADiskRemovedChangedAndAddedAgainHasTheNewContent(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	image := w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(setDisk(false)))
	w.secondIs("member", "member")
	w.holds(w.b, "old!")
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(true)))
	must(t, os.WriteFile(image, bytes.Repeat([]byte("new!"), secondSize/4), 0o600))
	must(t, w.a.do(setDisk(false)))
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Resume() }))
	w.write(w.a, 3)
	w.secondIs("member", "member")
	w.holds(w.b, "new!")
}

// The replica's own record counts, whatever its primary believes.
func TestAReplicaThatLacksADiskDeclinesAPlannedFailover(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protectFirst()
	w.shipped(w.b)
	must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error { return v.Pause() }))
	must(t, w.a.do(setDisk(false)))
	w.secondIs("joining", "joining")
	if why := w.b.vm().mayPromote(w.b.vm().keepStore(t).Committed()); !strings.Contains(why, "still being added") {
		t.Fatalf("it would take over without the disk: %q", why)
	}
}
