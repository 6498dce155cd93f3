package breakglass_test

import (
	"testing"

	"kvmreplica/internal/boundtest"
	"kvmreplica/internal/breakglass"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// FuzzRead: whatever the file holds, a mark that is there is seen.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"version":1,"at":"2026-01-02T03:04:05Z","by":"replicafsck","recovered":true}`))
	f.Add([]byte{})
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		m := fsxtest.NewMem()
		if err := fsx.WriteAtomic(m, breakglass.File, b); err != nil {
			t.Fatal(err)
		}
		if _, there := breakglass.Read(m); !there {
			t.Fatal("a damaged mark counts as none")
		}
	})
}
