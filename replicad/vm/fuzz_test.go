package vm

import (
	"encoding/json"
	"testing"
	"time"

	"kvmreplica/internal/boundtest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// FuzzRecord: a record that is accepted has a valid lineage of its own VM, and
// survives being written and read again.
func FuzzRecord(f *testing.F) {
	const id wire.VMID = "11111111-2222-3333-4444-555555555555"
	b, err := json.Marshal(Record{
		Version: recordVersion, VM: id, Name: "web", Lineage: lineage.Lineage{VM: id, State: lineage.Primary, Generation: delta.Generation{1}},
		Disks: []Disk{{Name: "vda", Size: 1 << 20, Kind: "raw", Path: "/images/web.raw"}}, Created: time.Unix(1_700_000_000, 0).UTC(),
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		m := fsxtest.NewMem()
		if err := fsx.WriteAtomic(m, recordFile, b); err != nil {
			t.Fatal(err)
		}
		r, err := loadRecord(m)
		if err != nil {
			return
		}
		if r.Lineage.VM != r.VM || r.Lineage.Validate() != nil {
			t.Fatalf("accepted %+v", r.Lineage)
		}
		if err := saveRecord(m, r); err != nil {
			return // a time no JSON can hold, for example
		}
		if _, err := loadRecord(m); err != nil {
			t.Fatalf("what was read cannot be written and read again: %v", err)
		}
	})
}
