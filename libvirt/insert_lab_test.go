package libvirt

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// request is a disk's insertion as the daemon would ask for it.
func (g *guest) request(target string, src NBDSource) InsertRequest {
	g.t.Helper()
	d, err := g.host.Domain(g.t.Context(), g.uuid)
	must(g.t, err)
	k, ok := d.Disk(target)
	if !ok {
		g.t.Fatalf("no disk %s", target)
	}
	return InsertRequest{Disk: k, Source: src}
}

func (g *guest) position(target string, src NBDSource) DiskGraph {
	g.t.Helper()
	v, err := g.host.Graph(g.t.Context(), g.uuid, map[string]NBDSource{target: src})
	must(g.t, err)
	return v[target]
}

// trip says what a round trip is made with.
type trip struct {
	extra   string // in <domain>
	devices string // in <devices>
	driver  string // attributes of <driver>
	target  string
	bus     string
	cmdline string
	block   bool // the image is behind a block device
}

// roundTrip inserts and removes an export under load, twice, and checks the
// guest's data afterwards.
func roundTrip(t *testing.T, c trip) {
	images := labOnly(t)
	h := startLibvirtd(t, labConfig{})
	img := image(t, h, "d.raw", 256<<20)
	target := c.target
	disk := fileDisk(img, target, c.bus, c.driver)
	if c.block {
		img = loopDevice(t, img)
		disk.xml = strings.Replace(strings.Replace(disk.xml, "type='file'", "type='block'", 1), "<source file=", "<source dev=", 1)
		disk.xml = strings.Replace(disk.xml, h.dir+"/vm/d.raw", img, 1)
	}
	disk.xml += c.devices
	g := defineGuest(t, h, images, c.extra, c.cmdline, disk)
	g.start()
	s := serve(t, h.dir+"/vm", "e1", img)
	req := g.request(target, s.src)
	var order []string
	note := func(what string) func(context.Context) error {
		return func(context.Context) error { order = append(order, what); return nil }
	}
	req.AfterRelease, req.BeforeReopen, req.AfterReopen = note("released"), note("before-reopen"), note("reopened")

	for round := range 2 {
		t0 := time.Now()
		must(t, g.host.InsertDisks(t.Context(), g.uuid, []InsertRequest{req}))
		in := time.Since(t0)
		if p := g.position(target, s.src); p.Position != PositionTop {
			t.Fatalf("after the insertion: %+v", p)
		}
		before := s.writes(t)
		g.awaitRecords()
		if after := s.writes(t); after <= before {
			t.Fatalf("the guest writes, but not to the export (%d, then %d)", before, after)
		}
		t0 = time.Now()
		must(t, g.host.RemoveDisks(t.Context(), g.uuid, []InsertRequest{req}))
		out := time.Since(t0)
		if p := g.position(target, s.src); p.Position != PositionAbsent {
			t.Fatalf("after the removal: %+v", p)
		}
		before = s.writes(t)
		g.awaitRecords()
		if after := s.writes(t); after != before {
			t.Fatalf("the export is removed but still written to (%d, then %d)", before, after)
		}
		t.Logf("round %d: in %v, out %v, callbacks %v", round, in, out, order)
	}
	g.finish(img)
}

// loopDevice puts a block device in front of a file.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	needs(t, "losetup")
	out, err := exec.Command("losetup", "--show", "-f", file).Output()
	if err != nil {
		t.Skipf("needs a loop device: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev).Run() })
	return dev
}

func TestLabVirtioDiskGoesInAndOutUnderLoad(t *testing.T) {
	roundTrip(t, trip{driver: "cache='none' discard='unmap'", target: "vda", bus: "virtio"})
}

func TestLabVirtioDiskWithIOThreadGoesInAndOutUnderLoad(t *testing.T) {
	roundTrip(t, trip{extra: "<iothreads>1</iothreads>", driver: "cache='none' discard='unmap' iothread='1'", target: "vda", bus: "virtio"})
}

func TestLabDefaultDriverOptionsGoInAndOut(t *testing.T) {
	roundTrip(t, trip{target: "vda", bus: "virtio"})
}

func TestLabBlockDeviceGoesInAndOutUnderLoad(t *testing.T) {
	roundTrip(t, trip{driver: "cache='none' io='native' discard='unmap' detect_zeroes='unmap'", target: "vda", bus: "virtio", block: true})
}

func TestLabSCSIDiskGoesInAndOutUnderLoad(t *testing.T) {
	roundTrip(t, trip{driver: "cache='none' discard='unmap'", target: "sda", bus: "scsi", devices: "<controller type='scsi' index='0' model='virtio-scsi'/>", cmdline: "lab.dev=sd"})
}

func TestLabInsertionOfTwoDisksIsAllOrNone(t *testing.T) {
	images := labOnly(t)
	h := startLibvirtd(t, labConfig{})
	a, b := image(t, h, "a.raw", 256<<20), image(t, h, "b.raw", 64<<20)
	g := defineGuest(t, h, images, "", "", fileDisk(a, "vda", "virtio", "cache='none'"), fileDisk(b, "vdb", "virtio", "cache='none'"))
	g.start()
	sa, sb := serve(t, h.dir+"/vm", "ea", a), serve(t, h.dir+"/vm", "eb", b)
	boom := errors.New("no lock")
	ra, rb := g.request("vda", sa.src), g.request("vdb", sb.src)
	rb.AfterRelease = func(context.Context) error { return boom }
	err := g.host.InsertDisks(t.Context(), g.uuid, []InsertRequest{ra, rb})
	if !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	for _, r := range []InsertRequest{ra, rb} {
		st, err := g.host.Probe(t.Context(), g.uuid, r)
		must(t, err)
		if st != InsertOut {
			t.Fatalf("%s is left in state %s", r.Disk.Target, st)
		}
	}
	g.awaitRecords()
	rb.AfterRelease = nil
	must(t, g.host.InsertDisks(t.Context(), g.uuid, []InsertRequest{ra, rb}))
	g.awaitRecords()
	must(t, g.host.RemoveDisks(t.Context(), g.uuid, []InsertRequest{ra, rb}))
	g.finish(a)
}
