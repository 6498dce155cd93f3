package failover_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/failover"
)

// A journal that lies would continue, or take back, what was not begun.
func TestEveryDamageOfTheJournalIsDetectedOrHarmless(t *testing.T) {
	t.Parallel()
	fsys := fsxtest.NewMem()
	r := &failover.Runner{FS: fsys, Path: "plan.json", Now: time.Now}
	if err := r.Begin(failover.Planned, "req", map[string]any{"At": "f00d/7", "Start": true}); err != nil {
		t.Fatal(err)
	}
	want, err := failover.Load(fsys, "plan.json")
	if err != nil || want == nil {
		t.Fatal(want, err)
	}
	whole, err := fsys.Content("plan.json")
	if err != nil {
		t.Fatal(err)
	}
	refused, harmless := 0, 0
	for what, damaged := range fsxtest.Damages(whole) {
		if err := fsys.Damage("plan.json", func([]byte) []byte { return damaged }); err != nil {
			t.Fatal(err)
		}
		got, err := failover.Load(fsys, "plan.json")
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
