package vm

import (
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/stats"
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

// Figures that lie are worse than none; a lie about the journal of a freeze
// would leave a guest frozen.
func TestDamagedFiguresAreForgottenAndADamagedFreezeStillCounts(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	fsys := fsxtest.NewMem()
	fresh := func() *VM {
		v := &VM{id: testVM, fsys: fsys, deps: &Deps{}, log: slog.New(slog.DiscardHandler)}
		v.deps.Now = func() time.Time { return now }
		v.deps.Statistics = stats.Default()
		return v
	}
	v := fresh()
	v.figures.ledger = stats.New(v.deps.Statistics, now)
	v.figures.ledger.Observe(now, stats.Totals{Since: now, Cycles: 9, RawBytes: 1 << 20, Latency: time.Second}, time.Minute)
	must(t, v.saveFigures(now))
	must(t, v.noteFrozen())
	want := fresh().book().Report()
	if want.Window.RawBytes != 1<<20 {
		t.Fatalf("figures %+v", want.Window)
	}
	none := stats.New(v.deps.Statistics, now).Report()
	for _, name := range []string{figuresFile, frozenFile} {
		whole, err := fsys.Content(name)
		must(t, err)
		refused := 0
		for what, damaged := range fsxtest.Damages(whole) {
			must(t, fsys.Damage(name, func([]byte) []byte { return damaged }))
			if !fresh().wasFrozen() {
				t.Fatalf("%s: %s: the freeze is forgotten", name, what)
			}
			got := fresh().book().Report()
			if cmp.Diff(none, got) == "" {
				refused++
			} else if d := cmp.Diff(want, got); d != "" {
				t.Errorf("%s: %s is believed: %s", name, what, d)
			}
		}
		t.Logf("%s: %d bytes, %d damages refused", name, len(whole), refused)
		must(t, fsys.Damage(name, func([]byte) []byte { return whole }))
	}
}
