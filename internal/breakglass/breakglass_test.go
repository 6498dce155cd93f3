package breakglass_test

import (
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
