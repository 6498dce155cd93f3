package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/integration/oracle"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

const vmID wire.VMID = "deadbeef-0000-4000-8000-0000000000aa"

// disk is one disk of the VM: two regions, one of them partial, and a small
// one whose last granule is short.
type disk struct {
	name string
	size int64
}

func disks() []disk {
	return []disk{{"vda", 1<<20 + 3*4096}, {"vdb", 40<<10 + 512}}
}

func deltaDisks() (out []delta.Disk) {
	for _, d := range disks() {
		out = append(out, delta.Disk{Name: d.name, Size: d.size})
	}
	return out
}

// host is one machine: storage that outlives processes, processes that do not.
type host struct {
	w    *World
	name string
	id   wire.HostID
	m    *blocktest.Host
	shm  string // boot-scoped memory: a folder, "" = none
	boot int

	up   bool // the daemon and the data plane run
	rec  record
	held string // why no guest may start here
	// The rest dies with the processes.
	closed     bool // no epoch is taken: a promotion looks at where we stand
	allowed    delta.Generation
	asker      delta.Generation // of the last handshake
	succession []delta.Pos      // ancestors of asker
	plane      *dataplane.Plane
	client     *dataplane.Client
	store      *points.Store
	ship       *ship
	asked      int // how often the silent peer was asked after this boot
	booted     bool

	guest  *guest
	hist   *oracle.History // of the images while this host owns them
	doubt  bool            // a sync of an image failed: nobody knows what it holds
	wanted bool            // writes of the guest are held and the tracker must be ended
	// heldNow is closed with that; straggler ends with a write that was held in
	// the middle of a read.
	heldNow, straggler chan struct{}
	saved              map[string][]byte
	arm                *armed
	copy               *blocktest.Host // what opSnapshot kept
	unmade             bool            // a new copy was begun here and is not made yet
	tried              *commitTry      // the epoch that was being received last
	frozen             map[delta.Generation]map[uint64]cutMark
	acks               *oracle.Acks
}

// commitTry is an epoch on its way into the store: a crash may leave it
// committed although nobody was told.
type commitTry struct {
	key    wire.EpochKey
	before delta.Pos
}

// armed is a crash that waits for its moment.
type armed struct {
	kill  bool
	point int // persistence operation
	seed  uint64
}

var errDown = errors.New("the host is down")

func newHost(w *World, name string) *host {
	h := &host{w: w, name: name, id: wire.HostID("00000000-0000-4000-8000-00000000000" + name), m: blocktest.NewHost(), boot: 1, acks: oracle.NewAcks(), heldNow: make(chan struct{})}
	if w.opt.Shared {
		h.shm = filepath.Join(w.dir, name)
		if err := os.Mkdir(h.shm, 0o700); err != nil {
			panic(err)
		}
	}
	h.settings()
	return h
}

// settings are what a new incarnation of the storage needs.
func (h *host) settings() {
	h.m.Power.DropOnSyncError(h.w.opt.DropOnSyncError)
	h.m.FS.SetTorn(h.w.opt.Torn) // the guest's own sectors are atomic
}

func (h *host) other() *host {
	if h == h.w.hosts[0] {
		return h.w.hosts[1]
	}
	return h.w.hosts[0]
}

func (h *host) fs(dir string) fsx.FS { return fsx.Sub(h.m.FS, dir) }

// content is what the images show now.
func (h *host) content() oracle.Images {
	var out oracle.Images
	for _, d := range disks() {
		out = append(out, h.m.Disk(d.name, d.size).Content())
	}
	return out
}

func (h *host) images(d dataplane.DiskConfig) (block.Device, func() (block.Identity, error), error) {
	for _, x := range disks() {
		if x.name == string(d.Name) {
			return &disturbed{dev: h.m.Disk(x.name, x.size), h: h, disk: x.name}, nil, nil
		}
	}
	return nil, nil, fmt.Errorf("no disk %s", d.Name)
}

// planeConfig is the data plane's; the folders are never opened.
func (h *host) planeConfig() dataplane.Config {
	c := dataplane.Config{
		AnyClient: true, VM: vmID, Name: "web", StateDir: "/none", SharedDir: "/none", RunDir: "/none",
		BootID: fmt.Sprintf("%s-boot-%d", h.name, h.boot), CaptureBytes: h.w.opt.Capture,
	}
	for _, d := range disks() {
		c.Disks = append(c.Disks, dataplane.DiskConfig{Name: wire.DiskName(d.name), Kind: dataplane.Raw, Path: "/none/" + d.name, Size: d.size})
	}
	return c
}

func (h *host) openPlane() error {
	if h.plane != nil {
		return nil
	}
	if err := h.m.FS.MkdirAll("plane"); err != nil {
		return err
	}
	log := slog.New(heldHandler{h})
	p, err := dataplane.OpenOn(context.Background(), h.planeConfig(), dataplane.Parts{
		State: h.fs("plane"), Image: h.images, Now: func() time.Time { return h.w.now },
		Tracker: func(c *cbt.Config) {
			c.SharedDir, c.Idle, c.IdleEpochs, c.PremarkRegions = h.shm, -1, -1, -1
			c.RetryEvery = time.Hour
		},
	}, log)
	if err != nil {
		return fmt.Errorf("open the data plane: %w", err)
	}
	h.plane, h.client = p, p.Client()
	if st, err := h.client.Status(context.Background()); err == nil && st.Recovered != "" {
		h.w.count("recovered " + firstWord(st.Recovered))
	}
	return nil
}

func (h *host) closePlane() error {
	if h.plane == nil {
		return nil
	}
	p := h.plane
	h.plane, h.client = nil, nil
	return p.Close()
}

func (h *host) storeConfig() points.Config {
	vm, err := delta.ParseVM(string(vmID))
	if err != nil {
		panic(err)
	}
	return points.Config{
		FS: h.fs("store"), VM: vm, Now: func() time.Time { return h.w.now },
		Bases: func(name string, size int64) (block.Device, error) { return h.m.Disk(name, size), nil },
		Policy: points.Policy{
			MinDistance: h.w.opt.Distance, Max: 6,
			Grid: []points.Row{{Every: 0, For: 10 * time.Minute}, {Every: 5 * time.Minute, For: 24 * time.Hour}},
		},
		Limits: points.Limits{SpoolStep: 64 << 10, KeepSpool: 256 << 10, SeedStep: 512 << 10, BacklogAge: backlogAge},
	}
}

// backlogAge is how old a committed epoch may be before the next one waits.
const backlogAge = 10 * time.Minute

func (h *host) openStore() error {
	if h.store != nil {
		return nil
	}
	s, err := points.Open(h.storeConfig())
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	h.store = s
	return nil
}

func (h *host) closeStore() error {
	if h.store == nil {
		return nil
	}
	s := h.store
	h.store = nil
	return s.Close()
}

// lost reports that the machine has stopped in the middle of something.
func (h *host) lost() bool { return h.m.Power.Lost() }

// armCrash lets the machine stop at the n-th persistence operation from now.
func (h *host) armCrash(kill bool, n int, seed uint64) {
	_, at := h.m.Power.Counts()
	h.arm = &armed{kill: kill, point: at + n, seed: seed}
	h.m.Power.CrashAt(h.arm.point)
	h.m.Power.SetTrace(func(op fsxtest.Op) {
		if op.Point == at+n {
			h.saved = h.w.readShared(h) // what the process had in memory then
		}
	})
}

// crash is the end of all processes here, or of the machine. What is left is
// a choice of the seed.
func (h *host) crash(kill bool, seed uint64) error {
	choose := fsxtest.Random(seed)
	switch seed % 8 {
	case 0:
		choose = fsxtest.Oldest
	case 1:
		choose = fsxtest.Newest
	}
	if h.saved == nil {
		h.saved = h.w.readShared(h)
	}
	var next *blocktest.Host
	if kill {
		next = h.m.Kill(choose)
	} else {
		next = h.m.Cut(choose)
	}
	h.m.Power.Cut() // the old processes reach nothing any more
	h.bury()
	h.m, h.arm = next, nil
	h.settings()
	if kill {
		h.w.writeShared(h, h.saved)
		h.w.count("kill")
	} else {
		h.w.writeShared(h, nil)
		h.boot++
		h.booted, h.asked = false, 0
		h.w.count("power cut")
	}
	h.saved = nil
	return h.afterCrash(kill)
}

// bury ends the old objects; their storage is gone already.
func (h *host) bury() {
	h.up, h.closed, h.allowed, h.succession, h.ship, h.held = false, false, delta.Generation{}, nil, nil, ""
	_ = h.closePlane() // fails: the power is off
	if h.straggler != nil {
		<-h.straggler
		h.straggler, h.w.busy = nil, false
	}
	h.heldNow = make(chan struct{})
	_ = h.closeStore()
	h.frozen = nil
}

// afterCrash judges what the guest finds.
func (h *host) afterCrash(kill bool) error {
	if h.doubt || h.hist == nil {
		if h.doubt && !kill {
			h.doubt, h.hist = false, nil
		}
		if !kill {
			h.stopGuest()
		}
		return nil
	}
	h.hist.GiveUp()
	if kill {
		return oracle.CheckVisible(h.hist, h.content())
	}
	h.stopGuest()
	err := oracle.CheckDurable(h.hist, h.content())
	h.hist = nil // what is there now is durable
	return err
}

// readShared copies a host's boot-scoped memory.
func (w *World) readShared(h *host) map[string][]byte {
	out := map[string][]byte{}
	if h.shm == "" {
		return out
	}
	files, err := os.ReadDir(h.shm)
	if err != nil {
		return out
	}
	for _, f := range files {
		if b, err := os.ReadFile(filepath.Join(h.shm, f.Name())); err == nil {
			out[f.Name()] = b
		}
	}
	return out
}

// writeShared puts a copy back and removes what is not in it.
func (w *World) writeShared(h *host, files map[string][]byte) {
	if h.shm == "" {
		return
	}
	_ = os.RemoveAll(h.shm)
	if err := os.Mkdir(h.shm, 0o700); err != nil {
		panic(err)
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(h.shm, name), b, 0o600); err != nil {
			panic(err)
		}
	}
}

// heldHandler ends a data plane whose writes are held: there is nobody who
// could wait for the disk to come back.
type heldHandler struct{ h *host }

// Enabled implements slog.Handler.
func (heldHandler) Enabled(context.Context, slog.Level) bool { return true }

// WithAttrs implements slog.Handler.
func (l heldHandler) WithAttrs([]slog.Attr) slog.Handler { return l }

// WithGroup implements slog.Handler.
func (l heldHandler) WithGroup(string) slog.Handler { return l }

// Handle implements slog.Handler.
func (l heldHandler) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "writes are held" && l.h.plane != nil && !l.h.wanted {
		l.h.wanted = true
		close(l.h.heldNow)
		l.h.m.Power.Cut()
		p := l.h.plane
		go func() { _ = p.Close() }() // frees the write that waits
	}
	return nil
}

func firstWord(s string) string {
	for i, c := range s {
		if c == ':' || c == ' ' {
			return s[:i]
		}
	}
	return s
}
