package breakglass_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/breakglass"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

func TestAMarkSurvivesAPowerCutAndADamagedOneStillCounts(t *testing.T) {
	t.Parallel()
	mem := fsxtest.NewMem()
	if _, ok := breakglass.Read(mem); ok {
		t.Fatal("a mark where none was set")
	}
	want := breakglass.Mark{Version: 1, At: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), By: "test"}
	if err := breakglass.Set(mem, want); err != nil {
		t.Fatal(err)
	}
	for _, cut := range []fsxtest.Chooser{fsxtest.Oldest, fsxtest.Newest} {
		got, ok := breakglass.Read(mem.CrashClone(cut))
		if diff := cmp.Diff(want, got); !ok || diff != "" {
			t.Errorf("after a power cut: %v %s", ok, diff)
		}
	}
	if err := fsx.WriteAtomic(mem, breakglass.File, []byte("{")); err != nil {
		t.Fatal(err)
	}
	if m, ok := breakglass.Read(mem); !ok || m.By == "" {
		t.Errorf("a damaged mark: %v %+v", ok, m)
	}
	if err := breakglass.Clear(mem); err != nil {
		t.Fatal(err)
	}
	if err := breakglass.Clear(mem); err != nil {
		t.Fatal(err)
	}
	if _, ok := breakglass.Read(mem.CrashClone(fsxtest.Oldest)); ok {
		t.Error("the mark came back")
	}
}

// The mark counts whatever it holds; what it says is shown to people.
func TestNoDamageOfAMarkHidesItOrIsShownAsItsWord(t *testing.T) {
	t.Parallel()
	mem := fsxtest.NewMem()
	want := breakglass.Mark{Version: 1, At: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), By: "test", Recovered: true}
	if err := breakglass.Set(mem, want); err != nil {
		t.Fatal(err)
	}
	whole, err := mem.Content(breakglass.File)
	if err != nil {
		t.Fatal(err)
	}
	for what, damaged := range fsxtest.Damages(whole) {
		if err := mem.Damage(breakglass.File, func([]byte) []byte { return damaged }); err != nil {
			t.Fatal(err)
		}
		got, ok := breakglass.Read(mem)
		if !ok {
			t.Fatalf("%s: no mark", what)
		}
		if d := cmp.Diff(want, got); d != "" && !strings.Contains(got.By, "cannot be read") {
			t.Errorf("%s is believed: %s", what, d)
		}
	}
}
