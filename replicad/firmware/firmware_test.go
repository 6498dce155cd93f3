package firmware_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/boundtest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/firmware"
)

func blobs(nvram, tpm string) (out []delta.Blob) {
	if nvram != "" {
		out = append(out, delta.Blob{Kind: delta.BlobNVRAM, Data: []byte(nvram)})
	}
	if tpm != "" {
		out = append(out, delta.Blob{Kind: delta.BlobTPM, Data: []byte(tpm)})
	}
	return out
}

func TestThePromotedStateSurvivesAPowerCutAndReplacesTheOneBefore(t *testing.T) {
	t.Parallel()
	mem := fsxtest.NewMem()
	if got, err := firmware.Kept(mem); err != nil || !got.None() {
		t.Fatalf("nothing was kept: %v %v", got, err)
	}
	for _, c := range []struct{ nvram, tpm string }{{"variables", "secrets"}, {"variables 2", ""}, {"", "secrets 2"}, {"", ""}} {
		want, err := firmware.Keep(mem, blobs(c.nvram, c.tpm))
		if err != nil || string(want.NVRAM) != c.nvram || string(want.TPM) != c.tpm {
			t.Fatal(want, err)
		}
		got, err := firmware.Kept(mem.CrashClone(fsxtest.Oldest))
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%+v after a power cut: %v %s", c, err, d)
		}
	}
}

// A guest that starts with other variables may not find its disk, and one with
// another TPM state asks for a recovery key.
func TestNoDamageOfTheKeptFirmwareIsBelieved(t *testing.T) {
	t.Parallel()
	mem := fsxtest.NewMem()
	want, err := firmware.Keep(mem, blobs("variables of the guest", "\x00\x01secrets"))
	if err != nil {
		t.Fatal(err)
	}
	whole, err := mem.Content(firmware.File)
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for what, damaged := range fsxtest.Damages(whole) {
		if err := mem.Damage(firmware.File, func([]byte) []byte { return damaged }); err != nil {
			t.Fatal(err)
		}
		got, err := firmware.Kept(mem)
		if err != nil {
			refused++
			if !strings.Contains(err.Error(), "move that file away") {
				t.Fatalf("%s: no remedy in %v", what, err)
			}
			continue
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s is believed: %s", what, d)
		}
	}
	t.Logf("%d bytes, %d damages refused", len(whole), refused)
}

func TestTheLargestStateIsKept(t *testing.T) {
	t.Parallel()
	mem := fsxtest.NewMem()
	want, err := firmware.Keep(mem, []delta.Blob{{Kind: delta.BlobNVRAM, Data: make([]byte, delta.MaxNVRAM)}, {Kind: delta.BlobTPM, Data: make([]byte, delta.MaxTPM)}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := firmware.Kept(mem); err != nil || len(got.NVRAM) != len(want.NVRAM) || len(got.TPM) != len(want.TPM) {
		t.Fatal(len(got.NVRAM), len(got.TPM), err)
	}
}

// FuzzKept: no bytes in the file crash the reader or exceed its bounds.
func FuzzKept(f *testing.F) {
	f.Add([]byte(`{"version":1,"nvram":"dmFyaWFibGVz"}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		mem := fsxtest.NewMem()
		if err := fsx.WriteAtomic(mem, firmware.File, b); err != nil {
			t.Fatal(err)
		}
		if got, err := firmware.Kept(mem); err == nil && got.None() {
			t.Fatal(errors.New("a file counts as none"))
		}
	})
}
