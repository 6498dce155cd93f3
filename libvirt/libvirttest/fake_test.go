package libvirttest_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/libvirt/libvirttest"
)

// host is what the fake shares with the real one.
type host interface {
	Info(context.Context) (libvirt.HostInfo, error)
	List(context.Context) ([]libvirt.Summary, error)
	LookupName(context.Context, string) (string, error)
	Domain(context.Context, string) (libvirt.Domain, error)
	DomainState(context.Context, string) (libvirt.State, libvirt.Reason, error)
	XML(context.Context, string, libvirt.XMLKind) ([]byte, error)
	Metadata(context.Context, string) (string, error)
	SetMetadata(context.Context, string, string) error
	Define(context.Context, []byte) (string, error)
	Undefine(context.Context, string, libvirt.UndefineOptions) error
	Start(context.Context, string, libvirt.StartOptions) error
	Shutdown(context.Context, string, libvirt.ShutdownOptions) error
	Destroy(context.Context, string, bool) error
	Suspend(context.Context, string) error
	Resume(context.Context, string) error
	ResumeIOError(context.Context, string) (int, error)
	SetAutostart(context.Context, string, bool) error
	Autostart(context.Context, string) (bool, error)
	HasSaved(context.Context, string) (bool, error)
	AgentPing(context.Context, string) error
	GuestInfo(context.Context, string) (map[string]string, error)
	Quiesce(context.Context, string, time.Duration) (int, func() (bool, error), error)
	Thaw(context.Context, string) error
	Firmware(context.Context, string, string) (libvirt.FirmwareState, error)
	Graph(context.Context, string, map[string]libvirt.NBDSource) (map[string]libvirt.DiskGraph, error)
	Probe(context.Context, string, libvirt.InsertRequest) (libvirt.InsertState, error)
	InsertStep(context.Context, string, libvirt.InsertRequest) (libvirt.InsertState, error)
	RemoveStep(context.Context, string, libvirt.InsertRequest) (libvirt.InsertState, error)
	InsertDisks(context.Context, string, []libvirt.InsertRequest) error
	RemoveDisks(context.Context, string, []libvirt.InsertRequest) error
	Watch(context.Context) <-chan libvirt.Event
	Close() error
}

var (
	_ host = (*libvirt.Host)(nil)
	_ host = (*libvirttest.Fake)(nil)
)

const (
	uuid = "deadbeef-0000-4000-8000-000000000001"
	doc  = "<domain type='kvm'><name>web</name><uuid>" + uuid + "</uuid><memory>1048576</memory><devices><disk type='file' device='disk'><driver type='raw'/><source file='/a.raw'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
)

func TestTheFakeLivesLikeADomain(t *testing.T) {
	f, ctx := libvirttest.New(), t.Context()
	if err := f.Start(ctx, uuid, libvirt.StartOptions{}); !errors.Is(err, libvirt.ErrNotFound) {
		t.Fatalf("got %v", err)
	}
	events := f.Watch(ctx)
	if e := <-events; e.Kind != libvirt.EventSync {
		t.Fatalf("%+v", e)
	}
	steps := []struct {
		do   func() error
		want libvirt.EventKind
	}{
		{func() error { _, err := f.Define(ctx, []byte(doc)); return err }, libvirt.EventDefined},
		{func() error { return f.Start(ctx, uuid, libvirt.StartOptions{Paused: true}) }, libvirt.EventStarted},
		{func() error { return f.Resume(ctx, uuid) }, libvirt.EventResumed},
		{func() error { return f.Suspend(ctx, uuid) }, libvirt.EventSuspended},
		{func() error { return f.Resume(ctx, uuid) }, libvirt.EventResumed},
		{func() error { return f.Shutdown(ctx, uuid, libvirt.ShutdownOptions{}) }, libvirt.EventStopped},
		{func() error { return f.Undefine(ctx, uuid, libvirt.UndefineOptions{}) }, libvirt.EventUndefined},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Fatal(err)
		}
		if e := <-events; e.Kind != s.want || e.UUID != uuid {
			t.Fatalf("want %s, got %+v", s.want, e)
		}
	}
}

func TestTheFakeFollowsItsScript(t *testing.T) {
	f, ctx := libvirttest.New(), t.Context()
	if _, err := f.Define(ctx, []byte(doc)); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	f.On(libvirttest.Rule{Op: "Start", Times: 1, Err: boom, Late: true})
	if err := f.Start(ctx, uuid, libvirt.StartOptions{}); !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if st, _, _ := f.DomainState(ctx, uuid); st != libvirt.StateRunning {
		t.Fatal("a late failure had no effect")
	}
	if err := f.Start(ctx, uuid, libvirt.StartOptions{}); !errors.Is(err, libvirt.ErrState) {
		t.Fatalf("the rule applied twice: %v", err)
	}
	f.On(libvirttest.Rule{Op: "Suspend", Hang: true})
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if err := f.Suspend(short, uuid); !errors.Is(err, libvirt.ErrTimeout) {
		t.Fatalf("got %v", err)
	}
}

func TestTheFakeInsertsAllOrNone(t *testing.T) {
	f, ctx := libvirttest.New(), t.Context()
	if _, err := f.Define(ctx, []byte(doc)); err != nil {
		t.Fatal(err)
	}
	if err := f.Start(ctx, uuid, libvirt.StartOptions{}); err != nil {
		t.Fatal(err)
	}
	src := libvirt.NBDSource{Socket: "/s", Export: "vda"}
	boom := errors.New("boom")
	var released, reopened int
	req := libvirt.InsertRequest{
		Disk: libvirt.Disk{Target: "vda"}, Source: src,
		AfterRelease: func(context.Context) error { released++; return nil },
		AfterReopen:  func(context.Context) error { reopened++; return nil },
	}
	position := func() libvirt.Position {
		g, err := f.Graph(ctx, uuid, map[string]libvirt.NBDSource{"vda": src})
		if err != nil {
			t.Fatal(err)
		}
		return g["vda"].Position
	}
	f.On(libvirttest.Rule{Op: "InsertStep", After: 4, Times: 1, Err: boom})
	if err := f.InsertDisks(ctx, uuid, []libvirt.InsertRequest{req}); !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if position() != libvirt.PositionAbsent || released != 1 || reopened != 1 {
		t.Fatalf("%s, released %d, reopened %d", position(), released, reopened)
	}
	if err := f.InsertDisks(ctx, uuid, []libvirt.InsertRequest{req}); err != nil || position() != libvirt.PositionTop {
		t.Fatalf("%v, %s", err, position())
	}
	if err := f.RemoveDisks(ctx, uuid, []libvirt.InsertRequest{req}); err != nil || position() != libvirt.PositionAbsent {
		t.Fatalf("%v, %s", err, position())
	}
}
