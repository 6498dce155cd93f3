package powerfail_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"kvmreplica/integration/oracle"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/session/sessiontest"
	"kvmreplica/replicad/wire"
)

const (
	vmID      wire.VMID = "11111111-2222-3333-4444-555555555555"
	imageSize           = 24 << 20
	workers             = 4
)

// primaryLife keeps the replica of a data plane that lives in the machine.
type primaryLife struct {
	*world
	gen     delta.Generation
	history *oracle.History
	store   *points.Store
	replica *sessiontest.Replica
	plane   *dataplane.Client
	disk    *nbd.Client

	mu      sync.Mutex
	windows map[uint64]oracle.Window // freezes of this history, by epoch
	acked   delta.Pos
}

func newPrimaryLife(w *world) (*primaryLife, error) {
	l := &primaryLife{world: w, history: oracle.NewHistory(1, oracle.Images{make([]byte, imageSize)}), windows: map[uint64]oracle.Window{}}
	for i := range l.gen {
		l.gen[i] = byte(w.rng.Uint32())
	}
	vm, err := delta.ParseVM(string(vmID))
	if err != nil {
		return nil, err
	}
	cfg := points.Config{VM: vm, Limits: points.Limits{SpoolStep: 1 << 20, SeedStep: 1 << 20}}
	dir := filepath.Join(w.dir, "replica")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	if err := (&points.Dir{Path: dir}).Configure(&cfg); err != nil {
		return nil, err
	}
	if l.store, err = points.Create(cfg, []delta.Disk{{Name: "vda", Size: imageSize}}); err != nil {
		return nil, err
	}
	l.replica = &sessiontest.Replica{Get: func() (*points.Store, error) { return l.store, nil }, Generation: l.gen}
	return l, nil
}

func (l *primaryLife) close() error { return l.store.Close() }

// run is a life of n cuts.
func (l *primaryLife) run(cuts int) error {
	for i := range cuts + 1 {
		if err := l.boot(); err != nil {
			return err
		}
		if err := l.serve(i == 0); err != nil {
			return err
		}
		if i > 0 {
			if err := l.recovered(); err != nil {
				return fmt.Errorf("after cut %d: %w", i, err)
			}
		}
		if i == cuts {
			return l.disk.Close()
		}
		if err := l.work(); err != nil {
			return err
		}
		l.survive()
		l.history.GiveUp()
	}
	return nil
}

// serve starts keeper and data plane as the daemon does, and connects.
func (l *primaryLife) serve(first bool) error {
	ctx, cancel := context.WithTimeout(l.ctx, patience)
	defer cancel()
	cfg := dataplane.Config{
		AnyClient: true,
		VM:        vmID, Name: "guest", StateDir: "/data/track", SharedDir: "/dev/shm/vm", RunDir: "/run/vm",
		Disks: []dataplane.DiskConfig{{Name: "vda", Kind: dataplane.Raw, Path: "/data/vda.raw"}},
		Idle:  -1, // forget marks as early as can be
	}
	file, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	prepare := "mkdir -p /data/track /dev/shm/vm /run/vm"
	if first { // enabling made the image durable long ago
		prepare += fmt.Sprintf(" && truncate -s %d /data/vda.raw && sync", imageSize)
	}
	if _, err := l.vm.Exec(ctx, "/bin/busybox", "sh", "-c", prepare); err != nil {
		return err
	}
	if err := l.vm.Put(ctx, "/run/vm/config.json", file, 0o600); err != nil {
		return err
	}
	if _, err := l.vm.Exec(ctx, "/bin/busybox", "sh", "-c", "/bin/replicad keeper --detach --config /run/vm/config.json >/run/vm/log 2>&1"); err != nil {
		return err
	}
	sock, err := l.vm.Forward(cfg.ControlSocket())
	if err != nil {
		return err
	}
	l.plane = dataplane.NewClient(sock)
	if err := l.answers(ctx); err != nil {
		log, _ := l.vm.Exec(ctx, "/bin/busybox", "cat", "/run/vm/log")
		return violated("the data plane does not start: %w\n%s", err, log)
	}
	if first {
		if err := l.plane.CreateTracker(ctx, dataplane.CreateRequest{Generation: l.gen}); err != nil {
			return err
		}
		if err := l.plane.Export(ctx, dataplane.ExportRequest{On: true}); err != nil {
			return err
		}
	}
	c, err := l.vm.Dial(ctx, cfg.NBDSocket())
	if err != nil {
		return err
	}
	if l.disk, err = nbd.NewClient(ctx, c, nbd.ClientOptions{Export: "vda", Timeout: patience}); err != nil {
		return violated("the export that was open before the cut is not: %w", err)
	}
	return nil
}

// answers waits for the data plane.
func (l *primaryLife) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		_, err := l.plane.Status(ctx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		l.await(50 * time.Millisecond)
	}
}

// watched notes what the history must know of a data plane's epochs.
type watched struct {
	*dataplane.Client
	l *primaryLife
}

func (w watched) Freeze(ctx context.Context, r dataplane.FreezeRequest) (e dataplane.Epoch, err error) {
	win, err := w.l.history.During("freeze", 0, func() (err error) {
		e, err = w.Client.Freeze(ctx, r)
		return err
	})
	if err == nil && !e.Empty {
		w.l.mu.Lock()
		w.l.windows[e.Epoch] = win
		w.l.mu.Unlock()
	}
	return e, err
}

func (w watched) Ack(ctx context.Context, p delta.Pos) error {
	err := w.Client.Ack(ctx, p)
	if err == nil {
		w.l.mu.Lock()
		w.l.acked = p
		w.l.mu.Unlock()
	}
	return err
}

// session starts shipping and returns what ends it.
func (l *primaryLife) session(interval time.Duration) (*session.Session, func() error) {
	s := session.New(session.Config{
		VM: vmID, Name: "guest", Source: watched{l.plane, l}, Replica: l.replica, Interval: interval, Verified: true,
		Rand: rand.New(rand.NewPCG(l.rng.Uint64(), 5)),
	})
	ctx, cancel := context.WithCancel(l.ctx)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return s, sync.OnceValue(func() error {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	})
}

// work lets load, shipping and clean steps run until the power goes.
func (l *primaryLife) work() error {
	moment, writes, seed := l.moment(5*time.Second), l.rng.IntN(60), l.rng.Uint64()
	_, stop := l.session(time.Duration(l.rng.IntN(200)) * time.Millisecond)
	ctx, cancel := context.WithCancel(l.ctx)
	var wg sync.WaitGroup
	pause := 20 + l.rng.IntN(200)
	wg.Go(func() { // the clean step forgets marks: the more often, the more it can lose
		tick := time.NewTicker(time.Duration(pause) * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				_, _ = l.plane.Clean(ctx) // the next one may succeed
			}
		}
	})
	loaded := make(chan error, 1)
	go func() { loaded <- l.load(seed) }()
	l.powerGoes(moment, writes)
	cancel()
	err := <-loaded
	wg.Wait()
	_ = l.disk.Close() // its connection is gone
	l.plane.Close()
	if errors.Is(err, oracle.ErrRead) {
		return wrong{errors.Join(err, stop())}
	}
	return stop()
}

// load runs until the power goes. Each worker stays in one region of the intent
// map for a while and then leaves it, so that regions become clean.
func (l *primaryLife) load(seed uint64) error {
	const sectors = (1 << 20) / oracle.SectorSize
	load := &oracle.Load{History: l.history, Disks: []oracle.Disk{l.disk}}
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range uint32(workers) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			for errs[w] == nil {
				region := r.Uint64N(imageSize >> 20)
				for range 10 + r.IntN(60) {
					n := 1 + r.Uint64N(32)
					at := region*sectors + r.Uint64N(sectors-n)
					switch k := r.IntN(40); {
					case k < 30:
						errs[w] = load.Write(w, 0, at, n)
					case k < 33:
						errs[w] = load.Zero(w, 0, at, n, k == 32)
					case k < 34:
						errs[w] = load.Flush(w)
					default:
						errs[w] = load.Read(0, at, n)
					}
					if errs[w] != nil {
						break
					}
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// recovered judges the data plane as it was found, lets it ship, and judges
// again.
func (l *primaryLife) recovered() error {
	ctx, cancel := context.WithTimeout(l.ctx, patience)
	defer cancel()
	image := make([]byte, imageSize)
	if _, err := l.disk.ReadAt(image, 0); err != nil {
		return err
	}
	if err := oracle.CheckDurable(l.history, oracle.Images{image}); err != nil {
		return wrong{err}
	}
	st, err := l.plane.Status(ctx)
	if err != nil {
		return err
	}
	l.t.Logf("%s: recovered from %q, %d KiB pending, %d KiB suspect", l.fs, st.Recovered, st.Pending>>10, st.Suspect>>10)
	if committed := l.store.Committed(); !committed.IsZero() {
		if err := l.compare(ctx, st, image, committed); err != nil {
			return err
		}
	}
	s, stop := l.session(time.Hour)
	defer func() { _ = stop() }() // judged below
	pos, err := s.SyncFinal(ctx)
	if err != nil {
		return violated("shipping after the cut: %w: %+v", err, s.Status())
	}
	after := s.Status()
	if after.Mismatched != 0 || after.Stop != nil {
		return violated("shipping after the cut: %+v", after)
	}
	got, err := l.replicaAt(pos)
	if err != nil {
		return err
	}
	if err := oracle.CheckEqual(oracle.Images{got}, oracle.Images{image}); err != nil {
		return violated("image and replica after recovery: %w", err)
	}
	l.history = l.history.Restart(oracle.Images{image})
	l.mu.Lock()
	l.windows = map[uint64]oracle.Window{}
	l.mu.Unlock()
	return stop()
}

// compare judges the replica as the cut left it, and what the tracker says of
// the difference.
func (l *primaryLife) compare(ctx context.Context, st dataplane.Status, image []byte, committed delta.Pos) error {
	l.mu.Lock()
	win, ours := l.windows[committed.Epoch]
	acked := l.acked
	l.mu.Unlock()
	if acked.Epoch > committed.Epoch {
		return violated("epoch %v was acknowledged, the replica is at %v", acked, committed)
	}
	replica, err := l.replicaAt(committed)
	if err != nil {
		return err
	}
	if ours {
		if err := oracle.CheckCut(l.history, oracle.Images{replica}, win); err != nil {
			return wrong{err}
		}
	}
	if st.Base.IsZero() && st.Acked.IsZero() {
		// It does not know that anything arrived: the handshake decides.
		l.t.Logf("%s: the tracker knows of no position, the replica is at %v", l.fs, committed)
		return nil
	}
	dirty := make([]bool, imageSize/delta.Granule)
	for off := int64(0); ; {
		a, err := l.plane.Ranges(ctx, dataplane.RangesRequest{Disk: "vda", Offset: off, Bytes: 1 << 40, Max: 4096})
		if err != nil {
			return err
		}
		for _, r := range a.Ranges {
			for g := r.Off / delta.Granule; g < (r.Off+r.Len+delta.Granule-1)/delta.Granule; g++ {
				dirty[g] = true
			}
		}
		if a.Done {
			break
		}
		off = a.Next
	}
	err = oracle.CheckSuperset(oracle.Images{image}, oracle.Images{replica}, delta.Granule, func(_ int, off, n int64) bool {
		for g := off / delta.Granule; g < (off+n+delta.Granule-1)/delta.Granule; g++ {
			if !dirty[g] {
				return false
			}
		}
		return true
	})
	if err != nil {
		return violated("a missed block: %w (base %v, acked %v, replica %v)", err, st.Base, st.Acked, committed)
	}
	return nil
}

// replicaAt reads the replica's disk.
func (l *primaryLife) replicaAt(pos delta.Pos) ([]byte, error) {
	v, err := l.store.View(pos)
	if err != nil {
		return nil, violated("the replica at %v: %w", pos, err)
	}
	defer v.Close()
	d, err := v.Disk("vda")
	if err != nil {
		return nil, err
	}
	b := make([]byte, imageSize)
	_, err = d.ReadAt(b, 0)
	return b, err
}
