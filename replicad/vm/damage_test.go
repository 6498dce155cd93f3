package vm

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
)

// A record that lies is a role nobody gave, or a generation nobody made.
func TestEveryDamageOfTheRecordIsDetectedOrHarmless(t *testing.T) {
	t.Parallel()
	fsys := fsxtest.NewMem()
	gen := delta.Generation{1, 2, 3}
	pos := delta.Pos{Generation: gen, Epoch: 41, Digest: delta.Digest{9}}
	r := Record{
		VM: testVM, Name: "web", Peer: "00000000-0000-4000-8000-00000000000b", Interval: time.Second,
		Lineage: lineage.Lineage{VM: testVM, State: lineage.Primary, Generation: gen, Ancestors: []delta.Pos{{Generation: delta.Generation{7}, Epoch: 3, Digest: delta.Digest{4}}}},
		Disks:   []Disk{{Name: "vda", Size: diskSize, Kind: "raw", Path: "/images/web.raw", Live: libvirt.Disk{Target: "vda"}}},
		Spec:    json.RawMessage(`{"cpus":2}`), Native: true, WantRunning: true, Placed: true, OnSilent: "hold",
		ReleasedBase: pos, Refused: []string{"r1"}, Verified: true,
	}
	must(t, saveRecord(fsys, r))
	want, err := loadRecord(fsys)
	must(t, err)
	whole, err := fsys.Content(recordFile)
	must(t, err)
	refused, harmless := 0, 0
	for what, damaged := range fsxtest.Damages(whole) {
		must(t, fsys.Damage(recordFile, func([]byte) []byte { return damaged }))
		got, err := loadRecord(fsys)
		if err != nil {
			refused++
			continue
		}
		harmless++
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s is believed: %s", what, d)
		}
	}
	t.Logf("%d bytes: %d damages refused, %d harmless", len(whole), refused, harmless)
}
