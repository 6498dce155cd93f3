package upgrade_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/integration/oracle"
	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

func TestMain(m *testing.M) { os.Exit(dt.Main(m)) }

// patience bounds every wait for something that must happen.
const patience = 2 * time.Minute

const (
	disks    = 2
	workers  = 4 // each with a connection per disk
	diskSize = 4 << 20
	seed     = 20261
)

// world is one VM under verified load whose epochs are shipped all the time.
type world struct {
	t     *testing.T
	cfg   dataplane.Config
	plane *dataplane.Client
	hist  *oracle.History
	paths []string // of the images, whoever serves them

	stop       chan struct{}
	wg         sync.WaitGroup
	errs       chan error
	ops        atomic.Int64
	reconnects atomic.Int64
	worst      atomic.Int64 // nanoseconds between a request and its answer
	epochs     atomic.Int64
	lost       atomic.Int64 // epochs that an upgrade ended

	// of the shipper, and of the test once that has ended
	replica map[string]*block.Mem
	at      delta.Pos
}

// newWorld starts keeper, data plane, load and shipper. The images are files of
// the data plane's own, or below another NBD server.
func newWorld(t *testing.T, below string) *world {
	t.Helper()
	cfg := dt.Config(t, diskSize, diskSize)
	paths := make([]string, disks)
	for i := range cfg.Disks {
		paths[i] = cfg.Disks[i].Path
		if below != "" {
			cfg.Disks[i] = serve(t, below, cfg.Disks[i])
		}
	}
	w := &world{
		paths: paths,
		t:     t, cfg: cfg, stop: make(chan struct{}), errs: make(chan error, 64), replica: map[string]*block.Mem{},
		hist: oracle.NewHistory(1, oracle.Images{make([]byte, diskSize), make([]byte, diskSize)}),
	}
	w.plane = dt.Ensure(t, &w.cfg) // ended before what it stands on
	ctx := context.Background()
	if err := w.plane.CreateTracker(ctx, dataplane.CreateRequest{Generation: dt.Generation(1)}); err != nil {
		t.Fatal(err)
	}
	if err := w.plane.Export(ctx, dataplane.ExportRequest{On: true}); err != nil {
		t.Fatal(err)
	}
	for n := range workers {
		load := &oracle.Load{History: w.hist}
		for _, d := range w.cfg.Disks {
			g := &guestDisk{w: w, name: d.Name}
			if err := g.dial(); err != nil {
				t.Fatal(err)
			}
			load.Disks = append(load.Disks, g)
		}
		w.wg.Go(func() { w.run(load, uint32(n)) })
	}
	w.wg.Go(w.ship)
	t.Cleanup(w.end)
	return w
}

func (w *world) fail(err error) {
	select {
	case w.errs <- err:
	default: // there are enough
	}
}

// run is one worker. It pauses now and then: a history that grows for ever is
// slow to judge.
func (w *world) run(load *oracle.Load, worker uint32) {
	defer func() {
		for _, d := range load.Disks {
			d.(*guestDisk).close()
		}
	}()
	r := rand.New(rand.NewPCG(seed, uint64(worker)))
	tick := time.NewTicker(4 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-w.stop:
			return
		case <-tick.C:
		}
		if err := load.Step(r, worker); err != nil {
			w.fail(fmt.Errorf("worker %d: %w", worker, err))
			return
		}
		w.ops.Add(1)
	}
}

// end stops load and shipper; twice is harmless.
func (w *world) end() {
	select {
	case <-w.stop:
	default:
		close(w.stop)
	}
	w.wg.Wait()
}

// guestDisk is one connection of one worker. A lost connection is made anew and
// the request sent again, as QEMU does, and counted.
type guestDisk struct {
	w    *world
	name wire.DiskName
	c    *nbd.Client
}

func (g *guestDisk) dial() error {
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		g.c, err = nbd.Dial(ctx, "unix", g.w.cfg.NBDSocket(), nbd.ClientOptions{Export: string(g.name)})
		cancel()
		if err == nil {
			return nil
		}
	}
	return err
}

func (g *guestDisk) close() {
	if g.c != nil {
		_ = g.c.Close()
	}
}

func (g *guestDisk) do(f func(c *nbd.Client) error) error {
	begun := time.Now()
	defer func() {
		took := int64(time.Since(begun))
		for old := g.w.worst.Load(); took > old && !g.w.worst.CompareAndSwap(old, took); old = g.w.worst.Load() {
		}
	}()
	for {
		err := f(g.c)
		if !errors.Is(err, nbd.ErrDisconnected) {
			return err
		}
		g.w.reconnects.Add(1)
		_ = g.c.Close()
		if err := g.dial(); err != nil {
			return err
		}
	}
}

func (g *guestDisk) ReadAt(p []byte, off int64) (n int, err error) {
	err = g.do(func(c *nbd.Client) (err error) { n, err = c.ReadAt(p, off); return err })
	return n, err
}

func (g *guestDisk) WriteAt(p []byte, off int64) (n int, err error) {
	err = g.do(func(c *nbd.Client) (err error) { n, err = c.WriteAt(p, off); return err })
	return n, err
}

func (g *guestDisk) ZeroAt(off, n int64, punch bool) error {
	return g.do(func(c *nbd.Client) error { return c.ZeroAt(off, n, punch) })
}

func (g *guestDisk) Sync() error { return g.do(func(c *nbd.Client) error { return c.Sync() }) }

// ship freezes, ships, judges and acknowledges one epoch after the other. What
// an upgrade or a kill ends is begun again.
func (w *world) ship() {
	for {
		select {
		case <-w.stop:
			return
		default:
		}
		if err := w.cycle(); err != nil {
			if fatal(err) {
				w.fail(fmt.Errorf("ship: %w", err))
				return
			}
			w.lost.Add(1)
		}
	}
}

// fatal says that an error of the data plane is no upgrade's doing.
func fatal(err error) bool {
	var v *wire.Error
	if !errors.As(err, &v) {
		return !errors.Is(err, io.ErrUnexpectedEOF)
	}
	return v.Kind != wire.KindUnavailable && v.Kind != wire.KindNotFound && v.Kind != wire.KindConflict
}

// cycle ships one epoch. What the replica holds is kept before the ack, as a
// commit is: an ack that is lost is made good by the next freeze's parent.
func (w *world) cycle() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var e dataplane.Epoch
	var ferr error
	win, _ := w.hist.During("freeze", 0, func() error {
		e, ferr = w.plane.Freeze(ctx, dataplane.FreezeRequest{Parent: w.at})
		return ferr
	})
	if ferr != nil {
		if st, err := w.plane.Status(ctx); err == nil && st.Frozen != nil {
			_ = w.plane.Abandon(ctx, st.Frozen.Epoch) // one whose answer was lost
		}
		return ferr
	}
	if e.Empty {
		return nil
	}
	next, pos, err := w.receive(ctx, e)
	if err != nil {
		_ = w.plane.Abandon(ctx, e.Epoch) // unknown after an upgrade: a no-op
		return err
	}
	if err := oracle.CheckCut(w.hist, images(w, next), win); err != nil {
		w.fail(fmt.Errorf("epoch %d: %w", e.Epoch, err))
	}
	w.replica, w.at = next, pos
	w.epochs.Add(1)
	return w.plane.Ack(ctx, pos)
}

// receive applies an epoch to a copy of the replica.
func (w *world) receive(ctx context.Context, e dataplane.Epoch) (map[string]*block.Mem, delta.Pos, error) {
	r, err := w.plane.Frames(ctx, e.Epoch, 0)
	if err != nil {
		return nil, delta.Pos{}, err
	}
	defer r.Close()
	next := map[string]*block.Mem{}
	for n, d := range w.replica {
		next[n] = block.NewMem(d.Size())
		b := make([]byte, d.Size())
		if _, err := d.ReadAt(b, 0); err != nil {
			return nil, delta.Pos{}, err
		}
		if _, err := next[n].WriteAt(b, 0); err != nil {
			return nil, delta.Pos{}, err
		}
	}
	d, err := dt.Apply(r, next, new(delta.Tally), 0)
	if err == nil && d.Pos.IsZero() {
		err = io.ErrUnexpectedEOF
	}
	return next, d.Pos, err
}

func images(w *world, m map[string]*block.Mem) oracle.Images {
	var out oracle.Images
	for _, d := range w.cfg.Disks {
		b := make([]byte, diskSize)
		if v := m[string(d.Name)]; v != nil {
			if _, err := v.ReadAt(b, 0); err != nil {
				w.fail(err)
			}
		}
		out = append(out, b)
	}
	return out
}

// status asks until the data plane answers.
func (w *world) status() dataplane.Status {
	w.t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		var st dataplane.Status
		st, err = w.plane.Status(ctx)
		cancel()
		if err == nil {
			return st
		}
	}
	w.t.Fatalf("the data plane does not answer: %v", err)
	return dataplane.Status{}
}

// goesOn waits until the guest has made n more operations.
func (w *world) goesOn(n int64) {
	w.t.Helper()
	w.until(fmt.Sprintf("the guest makes %d more operations", n), func(from int64) func() bool {
		return func() bool { return w.ops.Load() >= from+n || len(w.errs) > 0 }
	}(w.ops.Load()))
}

// until waits for a condition that others bring about.
func (w *world) until(what string, f func() bool) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(patience)
	for !f() {
		if time.Now().After(deadline) {
			w.t.Fatalf("not in %v: %s", patience, what)
		}
		<-tick.C
	}
}

// judge ends the load and checks everything: no error, the disks show what was
// written, and what is shipped last makes the replica equal to them.
func (w *world) judge() {
	w.t.Helper()
	w.end()
	for {
		select {
		case err := <-w.errs:
			w.t.Error(err)
			continue
		default:
		}
		break
	}
	st := w.status()
	if st.Suspect != 0 || st.TrackingLost != "" {
		w.t.Errorf("the tracker is not exact: %d suspect bytes, %s", st.Suspect, st.TrackingLost)
	}
	w.until("the last epoch is shipped", func() bool {
		err := w.cycle()
		if err != nil && fatal(err) {
			w.t.Fatal(err)
		}
		return err == nil
	})
	now := oracle.Images{}
	for _, p := range w.paths {
		b, err := os.ReadFile(p)
		if err != nil {
			w.t.Fatal(err)
		}
		now = append(now, b)
	}
	if err := oracle.CheckVisible(w.hist, now); err != nil {
		w.t.Error("the disks: ", err)
	}
	if err := oracle.CheckEqual(images(w, w.replica), now); err != nil {
		w.t.Error("the replica misses a change: ", err)
	}
}

// planes lists the processes that are data planes of this VM.
func (w *world) planes() (pids []int) {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, name := range all {
		b, err := os.ReadFile(name)
		args := strings.Split(string(b), "\x00")
		if err != nil || len(args) < 3 || args[1] != "dataplane" || !strings.Contains(string(b), w.cfg.RunDir+"/") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
