package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/breakglass"
	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/firmware"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

const (
	testID  = "5eed0000-0000-4000-8000-000000000001"
	testDoc = `<domain type='qemu'><name>g</name><uuid>` + testID + `</uuid><devices>` +
		`<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='/img/a.raw'/><target dev='vda' bus='virtio'/></disk>` +
		`</devices></domain>`
)

// fakeHost is a libvirt with one domain; steps records what was changed.
type fakeHost struct {
	doc       []byte
	state     libvirt.State
	saved     bool
	autostart bool
	fail      error // of Define
	before    func(step string)
}

func (f *fakeHost) LookupName(context.Context, string) (string, error) { return testID, nil }

func (f *fakeHost) DomainState(context.Context, string) (libvirt.State, libvirt.Reason, error) {
	return f.state, libvirt.ReasonNone, nil
}

func (f *fakeHost) XML(context.Context, string, libvirt.XMLKind) ([]byte, error) { return f.doc, nil }

func (f *fakeHost) Define(_ context.Context, doc []byte) (string, error) {
	f.before("define")
	if f.fail != nil {
		return "", f.fail
	}
	f.doc = doc
	return testID, nil
}

func (f *fakeHost) SetAutostart(_ context.Context, _ string, on bool) error {
	f.before("autostart")
	f.autostart = on
	return nil
}

func (f *fakeHost) Domain(context.Context, string) (libvirt.Domain, error) {
	return libvirt.ParseDomain(f.doc)
}

func (f *fakeHost) HasSaved(context.Context, string) (bool, error) { return f.saved, nil }

func (f *fakeHost) Metadata(context.Context, string) (string, error) {
	return "", &libvirt.Error{Kind: libvirt.KindNotFound}
}

// scene is a protected VM's state directory and its domain, on our export.
type scene struct {
	t    *testing.T
	cmd  *command
	out  *bytes.Buffer
	host *fakeHost
	rec  vm.Record
}

func newScene(t *testing.T, change func(*vm.Record)) *scene {
	t.Helper()
	dir := t.TempDir()
	s := &scene{t: t, out: &bytes.Buffer{}}
	s.cmd = &command{out: s.out, images: map[string]string{}, stateDir: filepath.Join(dir, "state"), runDir: filepath.Join(dir, "run")}
	doc, orig, err := libvirt.SwapIn([]byte(testDoc), "vda", libvirt.NBDSource{Socket: "/run/replicad/vm/" + testID + "/nbd.sock", Export: "vda"})
	if err == nil {
		doc, err = libvirt.InsertMetadata(doc, "{}")
	}
	if err != nil {
		t.Fatal(err)
	}
	s.host = &fakeHost{doc: doc, state: libvirt.StateOff, before: func(string) {}}
	s.rec = vm.Record{
		Version: 1, VM: testID, Name: "g", Native: true, Autostart: true, Placed: true,
		Lineage: lineage.New(testID, delta.Generation{1}),
		Disks:   []vm.Disk{{Name: "vda", Size: 1 << 20, Kind: "raw", Path: "/img/a.raw", Original: &orig}},
	}
	if change != nil {
		change(&s.rec)
	}
	b, err := json.Marshal(s.rec)
	if err != nil {
		t.Fatal(err)
	}
	s.write("state/vms/"+testID+"/record.json", string(b))
	s.write("state/hook/"+testID, "ask\n")
	s.write("run/hook/"+testID, "allow\n")
	return s
}

func (s *scene) path(name string) string { return filepath.Join(filepath.Dir(s.cmd.stateDir), name) }

func (s *scene) write(name, text string) {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Dir(s.path(name)), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(s.path(name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *scene) gate(name string) string {
	b, err := os.ReadFile(s.path(name + "/hook/" + testID))
	if err != nil {
		return "absent"
	}
	return strings.TrimSpace(string(b))
}

func (s *scene) marked() bool {
	s.t.Helper()
	state, err := fsx.OS(s.cmd.stateDir)
	if err != nil {
		s.t.Fatal(err)
	}
	_, ok := breakglass.Read(fsx.Sub(state, "vms/"+testID))
	return ok
}

func (s *scene) release() error {
	s.t.Helper()
	all, err := records(s.cmd.stateDir)
	if err != nil || len(all) != 1 {
		s.t.Fatalf("%d records, %v", len(all), err)
	}
	return s.cmd.releaseOne(s.t.Context(), s.host, all[0])
}

func TestTheDaemonsRecordIsRead(t *testing.T) {
	t.Parallel()
	s := newScene(t, nil)
	all, err := records(s.cmd.stateDir)
	if err != nil {
		t.Fatal(err)
	}
	d := s.rec.Disks[0]
	want := []vmRecord{{
		Version: 1, VM: s.rec.VM, Name: "g", Lineage: s.rec.Lineage, Native: true, Autostart: true,
		Disks: []vmDisk{{Name: d.Name, Kind: d.Kind, Path: d.Path, Original: d.Original, Size: d.Size}},
	}}
	if diff := cmp.Diff(want, all); diff != "" {
		t.Error(diff)
	}
}

func TestAReleaseMarksFirstAndRestoresTheExactDefinition(t *testing.T) {
	t.Parallel()
	s := newScene(t, nil)
	s.host.before = func(step string) {
		if !s.marked() || s.gate("state") != "refuse it is being released" || s.gate("run") != "refuse it is being released" {
			t.Errorf("at %s: marked %v, gates %q and %q", step, s.marked(), s.gate("state"), s.gate("run"))
		}
	}
	for range 2 { // repeating it is harmless
		if err := s.release(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(testDoc, string(s.host.doc)); diff != "" {
			t.Error(diff)
		}
		if !s.host.autostart || s.gate("state") != "absent" || s.gate("run") != "absent" || !s.marked() {
			t.Errorf("autostart %v, gates %q and %q, marked %v", s.host.autostart, s.gate("state"), s.gate("run"), s.marked())
		}
	}
}

// A disk that is being added, or that the state failed over to did not have, may
// not stand on an export: that is no reason to leave the others on theirs.
func TestADiskThatNeverStoodOnAnExportIsNoObstacle(t *testing.T) {
	t.Parallel()
	for name, d := range map[string]vm.Disk{
		"being added": {Name: "vdb", Size: 1 << 20, Kind: "raw", Path: "/img/b.raw", State: "joining"},
		"left":        {Name: "vdb", Size: 1 << 20, Kind: "raw", Path: "/img/b.raw", State: "left"},
		"away":        {Name: "vdb", Size: 1 << 20, Kind: "raw", Path: "/img/b.raw", Out: true},
	} {
		s := newScene(t, func(r *vm.Record) { r.Disks = append(r.Disks, d) })
		if err := s.release(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(testDoc, string(s.host.doc)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestAFailedReleaseLeavesTheGateShutAndSaysSo(t *testing.T) {
	t.Parallel()
	s := newScene(t, nil)
	s.host.fail = errors.New("no space left")
	err := s.release()
	if err == nil || !strings.Contains(err.Error(), "replicafsck release g") || !s.marked() || s.gate("state") == "absent" {
		t.Errorf("%v; marked %v, gate %q", err, s.marked(), s.gate("state"))
	}
	s.host.fail = nil
	if err := s.release(); err != nil || s.gate("state") != "absent" {
		t.Errorf("repeated: %v, gate %q", err, s.gate("state"))
	}
}

func TestWhatMayNotBeReleasedIsRefusedUnchanged(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		record func(*vm.Record)
		host   func(*fakeHost)
		word   string
	}{
		"running": {nil, func(f *fakeHost) { f.state = libvirt.StateRunning }, "virsh shutdown g"},
		"paused":  {nil, func(f *fakeHost) { f.state = libvirt.StatePaused }, "virsh shutdown g"},
		"saved":   {nil, func(f *fakeHost) { f.saved = true }, "managedsave-remove"},
		"handed over": {func(r *vm.Record) {
			r.Lineage.State, r.Lineage.Sealed = lineage.Demoted, delta.Pos{Generation: r.Lineage.Generation, Epoch: 1}
		}, nil, "failover resume"},
		"diverged":     {func(r *vm.Record) { r.Lineage.Diverged = &lineage.Divergence{Reason: "both ran"} }, nil, "--force"},
		"replica":      {func(r *vm.Record) { r.Lineage = lineage.New(wire.VMID(testID), delta.Generation{}) }, nil, "store"},
		"superseded":   {func(r *vm.Record) { r.Superseded = "the replica was promoted" }, nil, "--force"},
		"never placed": {func(r *vm.Record) { r.Disks[0].Original = nil }, nil, "never completed"},
	} {
		s := newScene(t, c.record)
		if c.host != nil {
			c.host(s.host)
		}
		s.host.before = func(step string) { t.Errorf("%s: %s was called", name, step) }
		if err := s.release(); err == nil || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%s: %v; want a refusal with %q", name, err, c.word)
		}
		if s.marked() || s.gate("state") != "ask" || s.gate("run") != "allow" {
			t.Errorf("%s: something was changed: marked %v, gates %q and %q", name, s.marked(), s.gate("state"), s.gate("run"))
		}
	}
}

func TestAReleaseIsRefusedWhileTheDaemonRuns(t *testing.T) {
	t.Parallel()
	s := newScene(t, nil)
	unlock, err := s.cmd.claim()
	if err != nil {
		t.Fatal(err)
	}
	other := *s.cmd
	if _, err := other.claim(); err == nil || !strings.Contains(err.Error(), "replicad runs") {
		t.Errorf("claimed twice: %v", err)
	}
	other.force = true
	if free, err := other.claim(); err != nil || !strings.Contains(s.out.String(), "warning") {
		t.Errorf("with --force: %v, said %q", err, s.out)
	} else {
		free()
	}
	unlock()
	if free, err := s.cmd.claim(); err != nil {
		t.Errorf("after its end: %v", err)
	} else {
		free()
	}
}

func TestARecoveredGuestGetsItsFirmwareStateOnce(t *testing.T) {
	t.Parallel()
	s := newScene(t, nil)
	vars := s.path("vars.fd")
	s.host.doc = []byte(strings.Replace(testDoc, "<devices>", "<os><type arch='x86_64'>hvm</type><loader readonly='yes' type='pflash'>/ovmf</loader><nvram>"+vars+"</nvram></os><devices>", 1))
	s.write("vars.fd", "old")
	vmDir, err := fsx.OS(s.path("state/vms/" + testID))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := firmware.Keep(vmDir, []delta.Blob{{Kind: delta.BlobNVRAM, Data: []byte("recovered")}}); err != nil {
		t.Fatal(err)
	}
	all, err := records(s.cmd.stateDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"recovered", "the guest's own"} { // the second time there is nothing to write
		if err := s.cmd.writeFirmware(t.Context(), s.host, all[0]); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(vars); err != nil || string(b) != want {
			t.Errorf("firmware state %q, %v; want %q", b, err, want)
		}
		s.write("vars.fd", "the guest's own")
	}
}
