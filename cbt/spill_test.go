package cbt_test

import (
	"errors"
	"os"
	"testing"

	"kvmreplica/cbt"
	"kvmreplica/internal/block/blocktest"
)

// A guest that overwrites everything during every epoch, with memory for a
// fraction of it.
func rewriting(t *testing.T, dir string) *world {
	t.Helper()
	w := newWorld(one(6 << 20))
	w.edit = func(c *cbt.Config) { c.SpillDir = dir } // 1 MiB of memory
	if err := w.create(blocktest.NewHost()); err != nil {
		t.Fatal(err)
	}
	return w
}

// tries ships until an epoch is acknowledged and returns how many it took.
func tries(t *testing.T, w *world, limit int) int {
	t.Helper()
	for n := 1; n <= limit; n++ {
		if err := w.fill("vda", 0, 6<<20, byte(n)); err != nil {
			t.Fatal(err)
		}
		err := w.cycle(func() error { return w.fill("vda", 0, 6<<20, byte(n+100)) })
		if err == nil {
			return n
		}
		if !errors.Is(err, cbt.ErrOverrun) {
			t.Fatal(err)
		}
	}
	return 0
}

func TestAGuestThatRewritesEverythingIsShippedInTheThirdEpochAtTheLatest(t *testing.T) {
	if n := tries(t, rewriting(t, ""), 8); n != 0 {
		t.Fatalf("without a spill file the epoch of try %d was kept: the test proves nothing", n)
	}
	dir := t.TempDir()
	w := rewriting(t, dir)
	for round := range 3 {
		if n := tries(t, w, 8); n != 3 {
			t.Fatalf("round %d: shipped at try %d", round, n)
		}
		// w.cycle compares nothing: the content at the cut is the first fill's.
		for i, b := range w.content["vda"] {
			if b != 3 {
				t.Fatalf("round %d: byte %d of the replica is %d", round, i, b)
			}
		}
		if st := w.g.Status(); st.SpilledBytes != 0 || st.CaptureBytes != 0 {
			t.Fatalf("round %d: %d bytes are kept, %d of them spilled", round, st.CaptureBytes, st.SpilledBytes)
		}
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Fatalf("files are left: %v %v", names, err)
	}
}

func TestWithoutRoomToSpillTheEpochIsLostAndTheGuestGoesOn(t *testing.T) {
	w := rewriting(t, "/nowhere/at/all")
	if n := tries(t, w, 6); n != 0 {
		t.Fatalf("shipped at try %d", n)
	}
	if w.guestErr != nil {
		t.Fatal(w.guestErr)
	}
}
