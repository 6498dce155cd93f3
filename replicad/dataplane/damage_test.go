package dataplane

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/wire"
)

// Choices that lie would open exports that must stay closed, or let QEMU at an
// image beside us.
func TestEveryDamageOfTheChoicesIsDetectedOrHarmless(t *testing.T) {
	fsys := fsxtest.NewMem()
	s, err := openChoices(fsys)
	if err != nil {
		t.Fatal(err)
	}
	err = s.change(func(c *choices) {
		c.Exported["vda"], c.QemuLock["vda"], c.Refuse = true, true, "demoted at 5"
	})
	if err != nil {
		t.Fatal(err)
	}
	whole, err := fsys.Content(choicesFile)
	if err != nil {
		t.Fatal(err)
	}
	judge(t, whole, s.get(), func(damaged []byte) (choices, error) {
		if err := fsys.Damage(choicesFile, func([]byte) []byte { return damaged }); err != nil {
			t.Fatal(err)
		}
		s, err := openChoices(fsys)
		if err != nil {
			return choices{}, err
		}
		return s.get(), nil
	})
}

// What is late and not believed would be forgotten: the copy would differ
// unnoticed.
func TestEveryDamageOfWhatIsLateIsDetectedOrHarmless(t *testing.T) {
	fsys := fsxtest.NewMem()
	want := lateRecord{Version: 1, Disks: map[wire.DiskName]lateDisk{"vda": {Pieces: []int64{0, 3, 70000}}, "vdb": {All: true}}}
	if err := fsx.WriteJSON(fsys, lateFile, want); err != nil {
		t.Fatal(err)
	}
	whole, err := fsys.Content(lateFile)
	if err != nil {
		t.Fatal(err)
	}
	judge(t, whole, want, func(damaged []byte) (lateRecord, error) {
		if err := fsys.Damage(lateFile, func([]byte) []byte { return damaged }); err != nil {
			t.Fatal(err)
		}
		return readLate(fsys)
	})
}

func TestEveryDamageOfTheConfigurationIsDetectedOrHarmless(t *testing.T) {
	dir := t.TempDir()
	uid := 64055
	c := Config{
		VM: "11111111-2222-3333-4444-555555555555", Name: "web", StateDir: "/s", SharedDir: "/h", RunDir: dir, BootID: "b", SocketUID: &uid,
		Disks: []DiskConfig{{Name: "vda", Kind: Raw, Path: "/images/a.raw", QemuLock: true}, {Name: "vdb", Kind: NBD, URI: "nbd://h/x"}},
	}
	if err := c.save(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(c.configFile())
	if err != nil {
		t.Fatal(err)
	}
	want, err := LoadConfig(c.configFile())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "damaged.json")
	judge(t, whole, want, func(damaged []byte) (Config, error) {
		if err := os.WriteFile(file, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		return LoadConfig(file)
	})
}

// judge wants every damage refused or without effect.
func judge[T any](t *testing.T, whole []byte, want T, read func([]byte) (T, error)) {
	t.Helper()
	refused, harmless := 0, 0
	for what, damaged := range fsxtest.Damages(whole) {
		got, err := read(damaged)
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
