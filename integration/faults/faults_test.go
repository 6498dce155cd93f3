package faults_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/labtest"
	"kvmreplica/integration/oracle"
	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
)

const (
	imageSize = 16 << 20
	patience  = 2 * time.Minute
)

// fault is what strace does to a data plane that runs.
type fault struct {
	call, errno string
	when        string // which of each thread's calls, as strace writes it
}

func (f fault) String() string { return f.call + " " + f.errno + " " + f.when }

// all is the full table; short is what runs every time.
func all() (out []fault) {
	for _, call := range []string{"fdatasync", "pwrite64", "pread64", "openat", "renameat", "fallocate", "fsync"} {
		for _, errno := range []string{"EIO", "ENOSPC"} {
			for _, when := range []string{"1", "3+5", "1+"} {
				out = append(out, fault{call, errno, when})
			}
		}
	}
	return out
}

func short() []fault {
	return []fault{{"fdatasync", "EIO", "1+"}, {"pwrite64", "EIO", "3+5"}, {"openat", "EIO", "1+"}}
}

// TestFailingSystemCallsAreToldAndLoseNothing: a data plane whose tracker and
// replica agree gets the fault while a guest works and epochs are cut, is then
// killed and started again without the fault. Nothing that was flushed is
// missing, no answer was a lie, and wherever image and replica differ the
// tracker says dirty.
func TestFailingSystemCallsAreToldAndLoseNothing(t *testing.T) {
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skipf("needs strace: %v", err)
	}
	bin := filepath.Join(t.TempDir(), "replicad")
	must(t, lab.Build(t.Context(), bin, "./cmd/replicad"))
	faults := short()
	if os.Getenv("KVMREPLICA_FAULTS") == "full" {
		faults = all()
	}
	var table []string
	for i, f := range faults {
		t.Run(f.String(), func(t *testing.T) {
			table = append(table, fmt.Sprintf("%-26s %s", f, suffer(t, bin, f, uint64(i)+1)))
		})
	}
	t.Logf("\n%s", strings.Join(table, "\n"))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// host is a primary with its replica in memory.
type host struct {
	t       *testing.T
	cfg     dataplane.Config
	plane   *dataplane.Client
	disk    *nbd.Client
	replica map[string]*block.Mem
	acked   delta.Pos
	history *oracle.History
}

// suffer is one row: it returns what happened.
func suffer(t *testing.T, bin string, f fault, seed uint64) string {
	h := &host{t: t, cfg: dt.Config(t, imageSize), replica: map[string]*block.Mem{}, history: oracle.NewHistory(1, oracle.Images{make([]byte, imageSize)})}
	h.cfg.Binary = bin
	h.cfg.BootID = "" // the machine's own
	h.start()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := dataplane.Stop(ctx, h.cfg); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	must(t, h.plane.CreateTracker(ctx, dataplane.CreateRequest{Generation: dt.Generation(1)}))
	must(t, h.plane.Export(ctx, dataplane.ExportRequest{On: true}))
	h.connect()
	must(t, h.load(seed, 40))
	must(t, h.epoch(ctx))
	must(t, h.load(seed+100, 40))

	st, err := h.plane.Status(ctx)
	must(t, err)
	before := len(h.history.Ops())
	fault := labtest.Inject(t, st.PID, f.call, f.errno, f.when)
	_ = h.load(seed+200, 60) // errors are in the history
	epochErr, cleanErr := h.epoch(ctx), h.clean(ctx)
	_ = h.load(seed+300, 60)
	h.truthful(f, before)
	during, err := h.plane.Status(ctx)
	if err != nil {
		t.Fatalf("the data plane does not answer under the fault: %v", err)
	}
	fault.End()

	failed, done := 0, 0
	for _, o := range h.history.Ops()[before:] {
		if done++; o.Failed {
			failed++
		}
	}
	dt.Kill(t, during.PID)
	_ = h.disk.Close()
	h.history.GiveUp()
	source := h.recovered(ctx)
	return fmt.Sprintf("%3d of %3d requests refused; epoch: %s; clean step: %s; tracking lost: %q; afterwards: %s",
		failed, done, said(epochErr), said(cleanErr), during.TrackingLost, source)
}

// said shortens an error for the table.
func said(err error) string {
	if err == nil {
		return "well"
	}
	s := err.Error()
	return fmt.Sprintf("%.60q", s)
}

func (h *host) start() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := dataplane.Ensure(ctx, h.cfg)
	must(h.t, err)
	h.t.Cleanup(c.Close)
	h.plane = c
}

func (h *host) connect() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		c, err := nbd.Dial(ctx, "unix", h.cfg.NBDSocket(), nbd.ClientOptions{Export: "vda", Timeout: patience})
		if err == nil {
			h.disk = c
			h.t.Cleanup(func() { _ = c.Close() })
			return
		}
		if ctx.Err() != nil {
			h.t.Fatal(err)
		}
	}
}

// load makes n operations with each of two workers; only a wrong read ends it.
func (h *host) load(seed uint64, n int) error {
	l := oracle.Load{History: h.history, Disks: []oracle.Disk{h.disk}, Stop: func(err error) bool { return errors.Is(err, nbd.ErrDisconnected) }}
	err := l.Run(seed, 2, n)
	if errors.Is(err, oracle.ErrRead) {
		h.t.Fatal(err)
	}
	return err
}

// epoch ships one cut into the replica's memory.
func (h *host) epoch(ctx context.Context) error {
	e, err := h.plane.Freeze(ctx, dataplane.FreezeRequest{Parent: h.acked})
	if err != nil || e.Empty {
		return err
	}
	next := map[string]*block.Mem{}
	for name, d := range h.replica {
		c := block.NewMem(d.Size())
		if _, err := c.WriteAt(dt.Content(h.t, d), 0); err != nil {
			return err
		}
		next[name] = c
	}
	pos, err := h.ship(ctx, e, next)
	if err != nil {
		return errors.Join(err, h.plane.Abandon(ctx, e.Epoch))
	}
	// The replica has committed, whether or not the primary hears of it.
	h.replica, h.acked = next, pos
	return h.plane.Ack(ctx, pos)
}

func (h *host) ship(ctx context.Context, e dataplane.Epoch, to map[string]*block.Mem) (delta.Pos, error) {
	r, err := h.plane.Frames(ctx, e.Epoch, 0)
	if err != nil {
		return delta.Pos{}, err
	}
	defer r.Close()
	d, err := dt.Apply(r, to, new(delta.Tally), 0)
	if err == nil && d.Pos.IsZero() {
		err = io.ErrUnexpectedEOF
	}
	return d.Pos, err
}

func (h *host) clean(ctx context.Context) error {
	_, err := h.plane.Clean(ctx)
	return err
}

// truthful finds answers that cannot be true while every such call fails.
func (h *host) truthful(f fault, before int) {
	h.t.Helper()
	if f.when != "1+" {
		return
	}
	for _, o := range h.history.Ops()[before:] {
		lie := f.call == "fdatasync" && o.Kind == oracle.OpFlush || f.call == "pwrite64" && o.Kind == oracle.OpWrite
		if lie && !o.Failed && o.Done != oracle.Never {
			h.t.Errorf("operation %d (kind %d) was answered well although every %s fails", o.Seq, o.Kind, f.call)
			return
		}
	}
}

// recovered starts the data plane without the fault and judges.
func (h *host) recovered(ctx context.Context) string {
	h.t.Helper()
	h.start()
	h.connect()
	image := make([]byte, imageSize)
	_, err := h.disk.ReadAt(image, 0)
	must(h.t, err)
	must(h.t, oracle.CheckDurable(h.history, oracle.Images{image}))
	dirty := make([]bool, imageSize/delta.Granule)
	for off, done := int64(0), false; !done; {
		a, err := h.plane.Ranges(ctx, dataplane.RangesRequest{Disk: "vda", Offset: off, Bytes: 1 << 40, Max: 4096})
		must(h.t, err)
		for _, r := range a.Ranges {
			for g := r.Off / delta.Granule; g*delta.Granule < r.Off+r.Len; g++ {
				dirty[g] = true
			}
		}
		off, done = a.Next, a.Done
	}
	must(h.t, oracle.CheckSuperset(oracle.Images{image}, oracle.Images{dt.Content(h.t, h.replica["vda"])}, delta.Granule,
		func(_ int, off, n int64) bool {
			for g := off / delta.Granule; g*delta.Granule < off+n; g++ {
				if !dirty[g] {
					return false
				}
			}
			return true
		}))
	// And it works: the next epoch makes both equal.
	st, err := h.plane.Status(ctx)
	must(h.t, err)
	if st.Acked != h.acked { // the handshake would say so
		must(h.t, h.plane.Mark(ctx, dataplane.MarkRequest{Pos: h.acked, Reason: "the replica is elsewhere"}))
	}
	must(h.t, h.epoch(ctx))
	must(h.t, oracle.CheckEqual(oracle.Images{dt.Content(h.t, h.replica["vda"])}, oracle.Images{image}))
	source, _, _ := strings.Cut(st.Recovered, ":")
	return source
}
