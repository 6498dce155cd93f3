package libvirt

import (
	"context"
	"errors"
	"strings"
	"testing"
)

// The test driver of a real libvirtd: no QEMU, but the real RPC.

func TestDomainsOfTheTestDriver(t *testing.T) {
	h := startLibvirtd(t, labConfig{})
	host := h.connect("test:///default")
	ctx := t.Context()

	info, err := host.Info(ctx)
	must(t, err)
	if info.Hostname != "kvm-lv.test" || info.Libvirt < 1_000_000 || info.Arch == "" || info.CPUs == 0 {
		t.Fatalf("%+v", info)
	}
	list, err := host.List(ctx)
	must(t, err)
	if len(list) != 1 || list[0].Name != "test" || list[0].State != StateRunning {
		t.Fatalf("%+v", list)
	}
	id, err := host.LookupName(ctx, "test")
	must(t, err)
	if id != list[0].UUID {
		t.Fatalf("%s, but listed as %s", id, list[0].UUID)
	}
	if _, err := host.LookupName(ctx, "nobody"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v", err)
	}
	if _, err := host.Domain(ctx, "deadbeef-0000-4000-8000-00000000dead"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v", err)
	}
	d, err := host.Domain(ctx, id)
	must(t, err)
	if d.Name != "test" || d.UUID != id || d.State != StateRunning || !d.Persistent || d.MemoryKiB == 0 {
		t.Fatalf("%+v", d)
	}
	must(t, host.SetAutostart(ctx, id, true))
	if on, err := host.Autostart(ctx, id); err != nil || !on {
		t.Fatalf("autostart %v %v", on, err)
	}
	must(t, host.Suspend(ctx, id))
	if st, why, err := host.DomainState(ctx, id); err != nil || st != StatePaused || why != ReasonUser {
		t.Fatalf("%s %s %v", st, why, err)
	}
	if err := host.Shutdown(ctx, id, ShutdownOptions{}); !errors.Is(err, ErrState) {
		t.Fatalf("shutting down a paused guest: %v", err)
	}
	if n, err := host.ResumeIOError(ctx, id); !errors.Is(err, ErrState) || n != 0 {
		t.Fatalf("a guest somebody paused was resumed: %d %v", n, err)
	}
	must(t, host.Resume(ctx, id))
	must(t, host.Destroy(ctx, id, false))
	must(t, host.Destroy(ctx, id, false)) // twice is fine
	if err := host.Start(ctx, id, StartOptions{}); err != nil {
		t.Fatal(err)
	}
	must(t, host.Destroy(ctx, id, false))

	doc := strings.Replace(strings.Replace(string(readDoc(t, "testdata/pc-plain.xml")), "type='kvm'", "type='test'", 1), "<emulator>/usr/bin/qemu-system-x86_64</emulator>", "", 1)
	bad := strings.Replace(doc, "<name>db1</name>", "", 1)
	if _, err := host.Define(ctx, []byte(bad)); err == nil {
		t.Fatal("a document without a name was defined")
	}
	got, err := host.Define(ctx, []byte(doc))
	if err != nil {
		t.Skipf("the test driver takes no such document here: %v", err)
	}
	must(t, host.Undefine(ctx, got, UndefineOptions{}))
	must(t, host.Undefine(ctx, got, UndefineOptions{})) // twice is fine
}

func TestWatchSyncsThenTellsWhatHappens(t *testing.T) {
	h := startLibvirtd(t, labConfig{})
	host := h.connect("test:///default")
	ctx, cancel := context.WithCancel(t.Context())
	events := host.Watch(ctx)
	e := awaitEvent(t, events, EventSync)
	if len(e.List) != 1 {
		t.Fatalf("%+v", e)
	}
	id := e.List[0].UUID
	must(t, host.Suspend(ctx, id))
	if e := awaitEvent(t, events, EventSuspended); e.UUID != id || e.Detail != "paused" {
		t.Fatalf("%+v", e)
	}
	must(t, host.Resume(ctx, id))
	awaitEvent(t, events, EventResumed)
	must(t, host.Destroy(ctx, id, false))
	if e := awaitEvent(t, events, EventStopped); e.Detail != "destroyed" {
		t.Fatalf("%+v", e)
	}
	cancel()
	for range events { // closes
	}
}
