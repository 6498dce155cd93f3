package testcopy

import (
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/wire"
)

// A record that lies takes the wrong domain away; a report that lies proves
// what was not shown.
func TestNoDamageOfARecordOrReportIsBelieved(t *testing.T) {
	t.Parallel()
	mem := fsxtest.NewMem()
	m := &Manager{root: mem, fsys: fsx.Sub(mem, testsDir), drills: map[wire.VMID][]Report{}}
	m.deps.Log = slog.New(slog.DiscardHandler)
	for _, d := range []string{testsDir, "c"} {
		if err := mem.MkdirAll(d); err != nil {
			t.Fatal(err)
		}
	}
	sub := fsx.Sub(mem, "c")
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if err := saveCopy(sub, Copy{ID: "0123456789abcdef", VM: "v", Of: "web", Name: "web-test", Disks: []string{"vda"}, Started: now, Pinned: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.remember(Ended{ID: "a", Of: "web", Ended: now, Ran: true}); err != nil {
		t.Fatal(err)
	}
	r := sample()
	if err := m.keepReport(&r); err != nil {
		t.Fatal(err)
	}
	readers := map[string]func() (any, bool){
		"c/" + copyFile:            func() (any, bool) { c, err := loadCopy(sub); return c, err == nil },
		testsDir + "/" + endedFile: func() (any, bool) { e := m.loadEnded(); return e, len(e) > 0 },
		drillsDir + "/" + r.base() + ".json": func() (any, bool) {
			m.drills = map[wire.VMID][]Report{}
			err := m.loadDrills()
			return m.drills[r.VM], err == nil && len(m.drills[r.VM]) > 0
		},
	}
	for name, read := range readers {
		whole, err := mem.Content(name)
		if err != nil {
			t.Fatal(err)
		}
		want, ok := read()
		if !ok {
			t.Fatalf("%s cannot be read", name)
		}
		refused := 0
		for what, damaged := range fsxtest.Damages(whole) {
			if err := mem.Damage(name, func([]byte) []byte { return damaged }); err != nil {
				t.Fatal(err)
			}
			got, ok := read()
			if !ok {
				refused++
			} else if d := cmp.Diff(want, got); d != "" {
				t.Errorf("%s: %s is believed: %s", name, what, d)
			}
		}
		t.Logf("%s: %d bytes, %d damages refused", name, len(whole), refused)
		if err := mem.Damage(name, func([]byte) []byte { return whole }); err != nil {
			t.Fatal(err)
		}
	}
}
