package fsxtest_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"testing"

	"kvmreplica/internal/fsx/fsxtest"
)

// randomOp makes one operation on one of a few names; errors about names that
// are not there, or are there, are part of the game.
func randomOp(m *fsxtest.Mem, r *rand.Rand) error {
	names := []string{"a", "b", "d/a", "d/b", "e/c"}
	name, other := names[r.IntN(len(names))], names[r.IntN(len(names))]
	dir := []string{".", "d", "e"}[r.IntN(3)]
	switch r.IntN(9) {
	case 0:
		return m.MkdirAll([]string{"d", "e"}[r.IntN(2)])
	case 1:
		return m.Rename(name, other)
	case 2:
		return m.Remove(name)
	case 3, 4:
		return m.SyncDir(dir)
	}
	f, err := m.Open(name, os.O_RDWR|[]int{0, os.O_CREATE, os.O_CREATE | os.O_TRUNC}[r.IntN(3)])
	if err != nil {
		return err
	}
	switch r.IntN(5) {
	case 0, 1:
		_, err = f.WriteAt(sectors(string(rune('a'+r.IntN(26)))), r.Int64N(4)*300)
	case 2:
		err = f.Truncate(r.Int64N(3) * 700)
	case 3:
		err = f.Allocate(r.Int64N(2)*512, 512)
	case 4:
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func TestNothingIsLostWhenEverythingSurvives(t *testing.T) {
	for seed := range uint64(300) {
		m := fsxtest.NewMem()
		r := rand.New(rand.NewPCG(seed, 0))
		for i := range 60 {
			if err := randomOp(m, r); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
				t.Fatalf("seed %d, operation %d: %v", seed, i, err)
			}
			want := show(t, m)
			if got := show(t, m.CrashClone(fsxtest.Newest)); got != want {
				t.Fatalf("seed %d, operation %d: a cut that loses nothing left %q, want %q", seed, i, got, want)
			}
			if got := show(t, m.KillClone(fsxtest.Newest)); got != want {
				t.Fatalf("seed %d, operation %d: a kill left %q, want %q", seed, i, got, want)
			}
		}
	}
}

func TestWhatWasSyncedIsInEverySurvivor(t *testing.T) {
	checked := 0
	for seed := range uint64(200) {
		m := fsxtest.NewMem()
		r := rand.New(rand.NewPCG(seed, 7))
		must(t, m.MkdirAll("d"))
		for range 40 {
			_ = randomOp(m, r) // whatever state it leaves
		}
		f, err := m.Open("d/kept", os.O_RDWR|os.O_CREATE)
		must(t, err)
		_, err = f.WriteAt(sectors("kept"), 0)
		must(t, err)
		must(t, f.Sync())
		must(t, m.SyncDir("d"))
		for range 20 {
			_ = randomOp(m, r)
		}
		for i := range uint64(8) {
			c := m.CrashClone(fsxtest.Random(seed*100 + i))
			got, err := c.Content("d/kept")
			if err != nil || string(got) != string(sectors("kept")) {
				t.Fatalf("seed %d, survivor %d: %d bytes, %v", seed, i, len(got), err)
			}
			if again := show(t, c.CrashClone(fsxtest.Oldest)); again != show(t, c) {
				t.Fatalf("seed %d, survivor %d: what survived is not durable: %q, then %q", seed, i, show(t, c), again)
			}
			checked++
		}
	}
	t.Log(fmt.Sprint(checked, " survivors checked"))
}
