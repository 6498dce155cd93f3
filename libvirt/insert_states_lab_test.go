package libvirt

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	lv "github.com/digitalocean/go-libvirt"
	"github.com/google/go-cmp/cmp"
)

// TestLabEveryStateCanBeLeftBothWays stops at every state under load, as a
// crash would, and goes on in either direction.
func TestLabEveryStateCanBeLeftBothWays(t *testing.T) {
	images := labOnly(t)
	h := startLibvirtd(t, labConfig{})
	img := image(t, h, "d.raw", 256<<20)
	g := defineGuest(t, h, images, "<iothreads>1</iothreads>", "", fileDisk(img, "vda", "virtio", "cache='none' discard='unmap' iothread='1'"))
	g.start()
	s := serve(t, h.dir+"/vm", "e1", img)
	req := g.request("vda", s.src)
	step := func(fn func(context.Context, string, InsertRequest) (InsertState, error), until InsertState) {
		t.Helper()
		for {
			st, err := g.host.Probe(t.Context(), g.uuid, req)
			must(t, err)
			if st == until {
				return
			}
			got, err := fn(t.Context(), g.uuid, req)
			must(t, err)
			if got == st {
				t.Fatalf("stuck in %s", st)
			}
		}
	}
	for st := InsertAdded; st < InsertIn; st++ {
		step(g.host.InsertStep, st)
		step(g.host.RemoveStep, InsertOut)
		step(g.host.InsertStep, st)
		step(g.host.InsertStep, InsertIn)
		step(g.host.RemoveStep, st)
		step(g.host.InsertStep, InsertIn)
		step(g.host.RemoveStep, InsertOut)
	}
	g.awaitRecords()
	g.finish(img)
}

// awaitEvent skips events of other kinds.
func awaitEvent(t *testing.T, events <-chan Event, kind EventKind) Event {
	t.Helper()
	return awaitEvents(t, events, kind)[kind]
}

// awaitEvents waits for one event of each kind, in whatever order they come.
func awaitEvents(t *testing.T, events <-chan Event, kinds ...EventKind) map[EventKind]Event {
	t.Helper()
	late := time.NewTimer(patience)
	defer late.Stop()
	got := map[EventKind]Event{}
	for len(got) < len(kinds) {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatalf("of the events %q only %v came", kinds, got)
			}
			t.Logf("event %s %s %s %v", e.Kind, e.Name, e.Detail, e.Err)
			if slices.Contains(kinds, e.Kind) {
				got[e.Kind] = e
			}
		case <-late.C:
			t.Fatalf("of the events %q only %v came within %v", kinds, got, patience)
		}
	}
	return got
}

// TestLabLibvirtStaysRightAfterAnInsertion: libvirt's own view of the disk and
// a restart of the daemon.
func TestLabLibvirtStaysRightAfterAnInsertion(t *testing.T) {
	images := labOnly(t)
	h := startLibvirtd(t, labConfig{})
	img := image(t, h, "d.raw", 256<<20)
	g := defineGuest(t, h, images, "", "", fileDisk(img, "vda", "virtio", "cache='none'"))
	g.start()
	s := serve(t, h.dir+"/vm", "e1", img)
	req := g.request("vda", s.src)
	must(t, g.host.InsertDisks(t.Context(), g.uuid, []InsertRequest{req}))
	ctx, cancel := context.WithCancel(t.Context())
	events := g.host.Watch(ctx)
	next := func(kind EventKind) Event { t.Helper(); return awaitEvent(t, events, kind) }
	next(EventSync)
	capacity := func() uint64 {
		t.Helper()
		c, err := onDomain(t.Context(), g.host, "block info", g.uuid, func(l *lv.Libvirt, d lv.Domain) (uint64, error) {
			_, c, _, err := l.DomainGetBlockInfo(d, "vda", 0)
			return c, err
		})
		must(t, err)
		return c
	}
	if c := capacity(); c != 256<<20 {
		t.Fatalf("domblkinfo says %d bytes", c)
	}
	h.killLibvirtd()
	if e := next(EventLost); e.Err == nil {
		t.Fatal("lost without a reason")
	}
	e := next(EventSync)
	if len(e.List) != 1 || e.List[0].State != StateRunning || e.List[0].UUID != g.uuid {
		t.Fatalf("after the restart: %+v", e.List)
	}
	cancel()
	for range events { // ends
	}
	if c := capacity(); c != 256<<20 {
		t.Fatalf("after libvirtd's restart domblkinfo says %d bytes", c)
	}
	if st, err := g.host.Probe(t.Context(), g.uuid, req); err != nil || st != InsertIn {
		t.Fatalf("after libvirtd's restart: %v %v", st, err)
	}
	g.awaitRecords()
	must(t, g.host.RemoveDisks(t.Context(), g.uuid, []InsertRequest{req}))
	g.finish(img)
}

func TestLabColdStartOnTheExportAndOut(t *testing.T) {
	images := labOnly(t)
	h := startLibvirtd(t, labConfig{})
	img := image(t, h, "d.raw", 256<<20)
	g := defineGuest(t, h, images, "", "", fileDisk(img, "vda", "virtio", "cache='none' discard='unmap'"))
	plain, err := g.host.XML(t.Context(), g.uuid, XMLPersistent)
	must(t, err)
	before, err := ParseDomain(plain)
	must(t, err)
	s := serve(t, h.dir+"/vm", "e1", img)
	s.src.Reconnect = ReconnectDelay
	doc, orig, err := SwapIn(plain, "vda", s.src)
	must(t, err)
	_, err = g.host.Define(t.Context(), doc)
	must(t, err)
	must(t, g.host.SetMetadata(t.Context(), g.uuid, `{"a":"<&'\" ü"}`))
	g.start()
	own, _ := before.Disk("vda")
	req := InsertRequest{Disk: own, Source: s.src}
	if st, err := g.host.Probe(t.Context(), g.uuid, req); err != nil || st != InsertIn {
		t.Fatalf("cold started: %v %v", st, err)
	}
	must(t, g.host.RemoveDisks(t.Context(), g.uuid, []InsertRequest{req}))
	if p := g.position("vda", s.src); p.Position != PositionAbsent {
		t.Fatalf("%+v", p)
	}
	if m, err := g.host.Metadata(t.Context(), g.uuid); err != nil || m != `{"a":"<&'\" ü"}` {
		t.Fatalf("metadata: %q %v", m, err)
	}
	now, err := g.host.XML(t.Context(), g.uuid, XMLPersistent)
	must(t, err)
	back, err := SwapOut(now, orig)
	must(t, err)
	back, err = RemoveMetadata(back)
	must(t, err)
	_, err = g.host.Define(t.Context(), back)
	must(t, err)
	if _, err := g.host.Metadata(t.Context(), g.uuid); !errors.Is(err, ErrNotFound) {
		t.Fatalf("removed metadata: %v", err)
	}
	again, err := g.host.XML(t.Context(), g.uuid, XMLPersistent)
	must(t, err)
	if string(again) != string(plain) {
		t.Fatalf("the definition did not come back as it was (-want +got):\n%s", cmp.Diff(string(plain), string(again)))
	}
	g.finish(img)
}

func TestLabAnOverlayIsToldFromABypass(t *testing.T) {
	images := labOnly(t)
	needs(t, "virsh")
	h := startLibvirtd(t, labConfig{})
	img := image(t, h, "d.raw", 256<<20)
	g := defineGuest(t, h, images, "", "", fileDisk(img, "vda", "virtio", "cache='none'"))
	g.start()
	s := serve(t, h.dir+"/vm", "e1", img)
	req := g.request("vda", s.src)
	must(t, g.host.InsertDisks(t.Context(), g.uuid, []InsertRequest{req}))
	virsh := func(args ...string) {
		t.Helper()
		out, err := exec.Command("virsh", append([]string{"-c", "qemu:///system?socket=" + h.sock}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("virsh %v: %v: %s", args, err, out)
		}
	}
	over := filepath.Join(h.dir, "vm", "over.qcow2")
	virsh("snapshot-create-as", "lv", "--disk-only", "--no-metadata", "--diskspec", "vda,file="+over)
	p := g.position("vda", s.src)
	if p.Position != PositionBelowOverlay || len(p.Overlays) != 1 || p.Overlays[0] != over {
		t.Fatalf("with an external snapshot: %+v", p)
	}
	g.awaitRecords()
	virsh("blockcommit", "lv", "vda", "--active", "--pivot", "--wait")
	if p := g.position("vda", s.src); p.Position != PositionTop {
		t.Fatalf("after blockcommit: %+v", p)
	}
	g.awaitRecords()
	must(t, g.host.RemoveDisks(t.Context(), g.uuid, []InsertRequest{req}))
	g.finish(img)
}

// TestLabAQEMUThatMayNotConnectIsToldWhatToChange: QEMU runs as libvirt-qemu,
// the socket is root's alone.
func TestLabAQEMUThatMayNotConnectIsToldWhatToChange(t *testing.T) {
	images := labOnly(t)
	h := startLibvirtd(t, labConfig{NonRoot: true})
	img := image(t, h, "d.raw", 256<<20)
	g := defineGuest(t, h, images, "", "", fileDisk(img, "vda", "virtio", "cache='none'"))
	g.start()
	dir := filepath.Join(h.dir, "vm", "sock")
	must(t, os.Mkdir(dir, 0o755))
	s := serve(t, dir, "e1", img)
	must(t, os.Chmod(s.src.Socket, 0o600))
	req := g.request("vda", s.src)
	err := g.host.InsertDisks(t.Context(), g.uuid, []InsertRequest{req})
	var ce *ConnectError
	if !errors.As(err, &ce) || !strings.Contains(ce.Remedy, "64055") || !strings.Contains(ce.Remedy, "qemu_user") {
		t.Fatalf("got %v", err)
	}
	t.Logf("told: %v", ce)
	if st, err := g.host.Probe(t.Context(), g.uuid, req); err != nil || st != InsertOut {
		t.Fatalf("left in %v %v", st, err)
	}
	out, err := exec.Command("chgrp", "kvm", s.src.Socket).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	must(t, os.Chmod(s.src.Socket, 0o660))
	must(t, g.host.InsertDisks(t.Context(), g.uuid, []InsertRequest{req}))
	g.awaitRecords()
	must(t, g.host.RemoveDisks(t.Context(), g.uuid, []InsertRequest{req}))
	g.finish(img)
}
