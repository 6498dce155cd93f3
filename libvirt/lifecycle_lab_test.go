package libvirt

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func (g *guest) awaitAgent() {
	g.t.Helper()
	waitFor(g.t, "guest agent", func() bool { return g.host.AgentPing(g.t.Context(), g.uuid) == nil })
}

func TestLabFreezeIsAlwaysThawed(t *testing.T) {
	images := labOnly(t)
	h := startLibvirtd(t, labConfig{})
	img := image(t, h, "d.raw", 256<<20)
	g := defineGuest(t, h, images, "", "lab.ga=1", fileDisk(img, "vda", "virtio", "cache='none'"))
	if err := g.host.AgentPing(t.Context(), g.uuid); !errors.Is(err, ErrState) && !errors.Is(err, ErrAgent) {
		t.Fatalf("agent of a guest that is off: %v", err)
	}
	g.start()
	g.awaitAgent()
	info, err := g.host.GuestInfo(t.Context(), g.uuid)
	must(t, err)
	if len(info) == 0 {
		t.Error("the agent tells nothing")
	}
	t0 := time.Now()
	n, thaw, err := g.host.Quiesce(t.Context(), g.uuid, time.Minute)
	must(t, err)
	t.Logf("froze %d file systems in %v; the agent tells %d values", n, time.Since(t0), len(info))
	if n < 1 {
		t.Fatal("nothing was frozen")
	}
	for range 2 { // twice is fine
		held, err := thaw()
		must(t, err)
		if !held {
			t.Error("the guest was not frozen until the thaw")
		}
	}
	g.awaitRecords()

	// The holder forgets: the watchdog thaws.
	_, thaw, err = g.host.Quiesce(t.Context(), g.uuid, 2*time.Second)
	must(t, err)
	g.awaitRecords()
	if held, err := thaw(); err != nil || held {
		t.Errorf("after the watchdog: held %v, %v", held, err)
	}

	// The caller's deadline is over before the guest has answered.
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, _, err := g.host.Quiesce(ctx, g.uuid, time.Minute); !errors.Is(err, ErrTimeout) {
		t.Fatalf("got %v", err)
	}
	g.awaitRecords()

	// Our process dies while frozen: a new one can thaw.
	_, _, err = g.host.Quiesce(t.Context(), g.uuid, time.Minute)
	must(t, err)
	must(t, h.connect("qemu:///system").Thaw(t.Context(), g.uuid))
	g.awaitRecords()
	g.finish(img)
}

func TestLabAGuestPausedByAnIOErrorIsResumed(t *testing.T) {
	images := labOnly(t)
	h := startLibvirtd(t, labConfig{})
	img := image(t, h, "d.raw", 256<<20)
	g := defineGuest(t, h, images, "", "", fileDisk(img, "vda", "virtio", "cache='none'"))
	s := serve(t, h.dir+"/vm", "e1", img)
	doc, err := g.host.XML(t.Context(), g.uuid, XMLPersistent)
	must(t, err)
	doc, _, err = SwapIn(doc, "vda", s.src)
	must(t, err)
	_, err = g.host.Define(t.Context(), doc)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	events := g.host.Watch(ctx)
	g.start()
	must(t, s.cmd.Process.Kill())
	_ = s.cmd.Wait()
	e := awaitEvents(t, events, EventIOError, EventSuspended)[EventIOError]
	if e.UUID != g.uuid || e.Detail != "pause" {
		t.Fatalf("%+v", e)
	}
	if st, why, err := g.host.DomainState(t.Context(), g.uuid); err != nil || st != StatePaused || why != ReasonIOError {
		t.Fatalf("%s %s %v", st, why, err)
	}
	must(t, os.Remove(s.src.Socket))
	serve(t, h.dir+"/vm", "e1", img)
	rctx, rcancel := context.WithTimeout(t.Context(), patience)
	defer rcancel()
	n, err := g.host.ResumeIOError(rctx, g.uuid)
	must(t, err)
	t.Logf("%d resumes", n)
	g.awaitRecords()
	g.finish(img)
}

// TestLabRenderedGuestRunsAndIsTheSame takes a guest to another host's policy
// and back through libvirt itself.
func TestLabRenderedGuestRunsAndIsTheSame(t *testing.T) {
	images := labOnly(t)
	needs(t, "virsh")
	h := startLibvirtd(t, labConfig{})
	img := image(t, h, "d.raw", 256<<20)
	g := defineGuest(t, h, images, "<iothreads>1</iothreads>", "lab.ga=1", fileDisk(img, "vda", "virtio", "cache='none' discard='unmap' iothread='1'"))
	doc, err := g.host.XML(t.Context(), g.uuid, XMLPersistent)
	must(t, err)
	s, dropped, err := SpecFromXML(doc)
	must(t, err)
	if len(dropped) > 0 {
		t.Errorf("dropped: %v", dropped)
	}
	p := Policy{
		Type: "qemu", Disks: map[string]PolicySource{"vda": {File: img}}, ConsoleLog: "/var/log/libvirt/qemu/lv.console",
		AllowKernel: map[string]PolicyKernel{s.Kernel.Label: {Kernel: "/var/lib/libvirt/boot/vmlinuz", Initrd: "/var/lib/libvirt/boot/rd.gz"}},
	}
	out, err := Render(s, p)
	must(t, err)
	native := func(doc []byte) string {
		t.Helper()
		f := filepath.Join(h.dir, "x.xml")
		must(t, os.WriteFile(f, doc, 0o644))
		b, err := exec.Command("virsh", "-c", "qemu:///system?socket="+h.sock, "domxml-to-native", "qemu-argv", f).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		return string(b)
	}
	// The console log is appended to; the guest cannot see that.
	if a, b := native(doc), strings.ReplaceAll(native(out), ",append=on", ""); a != b {
		t.Errorf("QEMU's arguments differ (-want +got):\n%s", cmp.Diff(strings.Split(a, " -"), strings.Split(b, " -")))
	}
	must(t, g.host.Undefine(t.Context(), g.uuid, UndefineOptions{}))
	_, err = g.host.Define(t.Context(), out)
	must(t, err)
	g.start()
	g.awaitAgent()
	must(t, g.host.Shutdown(t.Context(), g.uuid, ShutdownOptions{Within: patience}))
	again, err := g.host.XML(t.Context(), g.uuid, XMLPersistent)
	must(t, err)
	s2, _, err := SpecFromXML(again)
	must(t, err)
	if a, b := asJSON(t, s), asJSON(t, s2); a != b {
		t.Errorf("described differently:\n%s\n---\n%s", a, b)
	}
}

func TestLabFirmwareStateIsRead(t *testing.T) {
	labOnly(t)
	h := startLibvirtd(t, labConfig{})
	host := h.connect("qemu:///system")
	const uuid = "deadbeef-0000-4000-8000-0000000000f3"
	s := Spec{
		Version: 1, Name: "uefi", UUID: uuid, Arch: "x86_64", Machine: "q35", MemoryKiB: 256 << 10, VCPUs: 1, Firmware: SpecFirmware{UEFI: true},
		Hardware: []SpecNode{{Name: "features", Kids: []SpecNode{{Name: "acpi"}}}, {Name: "devices", Kids: []SpecNode{{Name: "memballoon", Attrs: map[string]string{"model": "none"}}}}},
	}
	code, vars := "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
	if _, err := os.Stat(code); err != nil {
		t.Skipf("needs OVMF: %v", err)
	}
	nvram := filepath.Join(h.dir, "vm", "vars.fd")
	doc, err := Render(s, Policy{Type: "qemu", Loader: code, NVRAM: nvram, NVRAMTemplate: vars})
	must(t, err)
	_, err = host.Define(t.Context(), doc)
	must(t, err)
	if f, err := host.Firmware(t.Context(), uuid, ""); err != nil || f.NVRAM != nil || f.TPM != nil {
		t.Fatalf("before the first start: %d bytes, %v", len(f.NVRAM), err)
	}
	must(t, host.Start(t.Context(), uuid, StartOptions{Paused: true}))
	f, err := host.Firmware(t.Context(), uuid, "")
	must(t, err)
	want, err := os.ReadFile(vars)
	must(t, err)
	if !bytes.Equal(f.NVRAM, want) {
		t.Fatalf("%d bytes, the template has %d", len(f.NVRAM), len(want))
	}
	must(t, host.Destroy(t.Context(), uuid, false))
	if err := host.Undefine(t.Context(), uuid, UndefineOptions{}); err == nil || !strings.Contains(err.Error(), "nvram") {
		t.Fatalf("undefined with NVRAM left: %v", err)
	}
	must(t, host.Undefine(t.Context(), uuid, UndefineOptions{KeepNVRAM: true}))
	if _, err := os.Stat(nvram); err != nil {
		t.Fatal("the NVRAM is gone")
	}
}
