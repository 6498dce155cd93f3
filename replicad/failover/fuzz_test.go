package failover_test

import (
	"testing"

	"kvmreplica/internal/boundtest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/failover"
)

// FuzzLoad: a journal that is there and cannot be read is an error, never "no
// plan is open".
func FuzzLoad(f *testing.F) {
	f.Add([]byte(`{"Version":1,"Kind":"planned","Request":"r","Phase":"running","Begun":"demote","Finished":["shutdown"],"Started":"2026-01-02T03:04:05Z","Vars":{"a":1}}`))
	f.Add([]byte(`{"Version":1,"Phase":"done"}`))
	f.Add([]byte(`{"Version":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		m := fsxtest.NewMem()
		if err := fsx.WriteAtomic(m, "plan.json", b); err != nil {
			t.Fatal(err)
		}
		j, err := failover.Load(m, "plan.json")
		if err == nil && j != nil && (j.Phase == failover.Done || j.Phase == failover.Undone) {
			t.Fatalf("an ended plan is open: %+v", j)
		}
		if len(b) == 0 && err == nil {
			t.Fatal("an empty journal counts as none")
		}
	})
}
