package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/peer"
	"kvmreplica/replicad/session"
)

// What is shipped: 5 % of a disk, as blocks of 64 KiB at random places.
const (
	shipSize   = 2 << 30
	shipBlock  = 64 << 10
	shipBlocks = shipSize / shipBlock / 20
)

// shipping is a primary and a replica, processes of their own, and the floors.
type shipping struct {
	dir     string
	plane   *plane
	guest   *nbd.Client
	replica *exec.Cmd
	peer    *peer.Client
	sess    *session.Session
	changed chan session.Status
	stop    func()
	floors  []*floor
}

// measureShipping ships the same number of changed blocks by the product and by
// the floors, in turns.
func measureShipping(ctx context.Context, o *options, r *rig, rep *report) (err error) {
	s := &shipping{dir: filepath.Join(r.dir, "ship"), changed: make(chan session.Status, 1)}
	defer func() { err = errors.Join(err, s.close(context.WithoutCancel(ctx))) }()
	if err := s.start(ctx, o); err != nil {
		return err
	}
	title("Shipping %d changed blocks of 64 KiB (5 %% of %d GiB, random content), cut to acknowledged commit", shipBlocks, shipSize>>30)
	took := map[string][]float64{}
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range max(3, o.rounds/2) + 1 {
		ranges, err := s.change(rng)
		if err != nil {
			return err
		}
		d, cpu, err := s.cycle(ctx)
		if err != nil {
			return err
		}
		if round > 0 { // the first fills caches and makes files
			took["product"] = append(took["product"], d.Seconds())
			took["cpu"] = append(took["cpu"], cpu.Seconds())
		}
		for _, f := range s.floors {
			begun := time.Now()
			if err := f.ship(ranges); err != nil {
				return fmt.Errorf("floor over %s: %w", f.mode, err)
			}
			if round > 0 {
				took[f.mode] = append(took[f.mode], time.Since(begun).Seconds())
			}
		}
	}
	s.report(rep, took)
	return nil
}

func (s *shipping) report(rep *report, took map[string][]float64) {
	line := func(name string, v []float64) {
		t := spreadOf(v)
		fmt.Printf("%-44s %.3f s [%.3f %.3f]  %.0f MB/s\n", name, t.Median, t.Low, t.High, shipBlocks*shipBlock/1e6/t.Median)
		rep.value("ship", name, "s", t, 0)
	}
	line("product (mutual TLS 1.3, digests, durable)", took["product"])
	line("floor: dirty list known, TCP + crc32c", took["tcp"])
	line("floor: the same over TLS 1.3", took["tls"])
	cpu := spreadOf(took["cpu"])
	fmt.Printf("%-44s %.3f s\n", "CPU of data plane and replica together", cpu.Median)
	rep.value("ship", "CPU of data plane and replica", "s", cpu, 0)
	for _, f := range []struct {
		name string
		must float64
	}{{"tcp", 2.5}, {"tls", 0}} {
		x := ratios(took["product"], took[f.name])
		mark := ""
		if f.must > 0 {
			mark = fmt.Sprintf(" (must: at most %g)", f.must)
			if x.Median > f.must {
				mark += " *"
			}
		}
		fmt.Printf("time against the floor over %-17s x %.2f [%.2f %.2f]%s\n", f.name, x.Median, x.Low, x.High, mark)
		rep.value("ship", "time against the floor over "+f.name, "x", x, f.must)
	}
}

// start makes images, keeper, data plane, replica, session and floors.
func (s *shipping) start(ctx context.Context, o *options) (err error) {
	image := filepath.Join(s.dir, "disk.img")
	if err := errors.Join(os.Mkdir(s.dir, 0o700), os.WriteFile(image, nil, 0o600), os.Truncate(image, shipSize)); err != nil {
		return err
	}
	me, err := openHost(s.dir, "primary")
	if err != nil {
		return err
	}
	if s.replica, err = startChild("replica", s.dir); err != nil {
		return err
	}
	address, err := readAddress(ctx, s.dir)
	if err != nil {
		return err
	}
	other, err := openHost(s.dir, "replica")
	if err != nil {
		return err
	}
	if err := me.trust(other, address); err != nil {
		return err
	}
	if s.peer, err = peer.NewClient(peer.ClientConfig{Identity: me.id, Store: me.known, Host: other.id.Host()}); err != nil {
		return err
	}
	if s.plane, err = startPlane(ctx, s.dir, o.replicad, image); err != nil {
		return err
	}
	if s.guest, err = nbd.Dial(ctx, "unix", s.plane.cfg.NBDSocket(), nbd.ClientOptions{Export: string(planeDisk)}); err != nil {
		return err
	}
	for _, mode := range []string{"tcp", "tls"} {
		f, err := startFloor(ctx, s.dir, image, mode)
		if f != nil {
			s.floors = append(s.floors, f)
		}
		if err != nil {
			return err
		}
	}
	return s.startSession(ctx)
}

// startSession ships for the first time.
func (s *shipping) startSession(ctx context.Context) error {
	s.sess = session.New(session.Config{
		VM: planeVM, Name: "bench", Source: s.plane.Client, Replica: s.peer, Interval: 24 * time.Hour, Verified: true,
		OnChange: func(st session.Status) {
			select { // the latest wins
			case <-s.changed:
			default:
			}
			s.changed <- st
		},
	})
	run, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.sess.Run(run) }()
	s.stop = func() { cancel(); <-done }
	return s.until(ctx, func(st session.Status) bool { return st.Protected && st.Phase == session.Waiting })
}

// until waits for a status.
func (s *shipping) until(ctx context.Context, ok func(session.Status) bool) error {
	limit := time.After(4 * patience)
	for {
		st := s.sess.Status()
		if ok(st) {
			return nil
		}
		select {
		case <-s.changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-limit:
			return fmt.Errorf("session does not get on: %+v", st)
		}
	}
}

// change writes new content to a random choice of blocks, as a guest does.
func (s *shipping) change(rng *rand.Rand) ([]block.Range, error) {
	places := rng.Perm(shipSize / shipBlock)[:shipBlocks]
	slices.Sort(places)
	p := make([]byte, shipBlock)
	ranges := make([]block.Range, 0, len(places))
	for _, at := range places {
		for i := 0; i < len(p); i += 8 {
			v := rng.Uint64()
			for k := range 8 {
				p[i+k] = byte(v >> (8 * k))
			}
		}
		r := block.Range{Off: int64(at) * shipBlock, Len: shipBlock}
		if _, err := s.guest.WriteAt(p, r.Off); err != nil {
			return nil, err
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

// cycle ships what changed; took is the time from cut to commit, cpu what data
// plane and replica used.
func (s *shipping) cycle(ctx context.Context) (took, cpu time.Duration, err error) {
	st, err := s.plane.Status(ctx)
	if err != nil {
		return 0, 0, err
	}
	was := s.sess.Status().Stats
	used := cpuOf(st.PID) + cpuOf(s.replica.Process.Pid)
	begun := time.Now()
	s.sess.TriggerNow()
	err = s.until(ctx, func(st session.Status) bool { return st.Stats.Cycles > was.Cycles && st.Phase == session.Waiting })
	now := s.sess.Status().Stats
	took = now.TotalLatency - was.TotalLatency
	if whole := time.Since(begun); err == nil && (took <= 0 || took > whole) {
		err = fmt.Errorf("cut to commit took %v within %v", took, whole)
	}
	if got := now.RawBytes - was.RawBytes; err == nil && got != shipBlocks*shipBlock {
		err = fmt.Errorf("%d bytes were shipped, %d had changed", got, shipBlocks*shipBlock)
	}
	return took, cpuOf(st.PID) + cpuOf(s.replica.Process.Pid) - used, err
}

// close ends everything that was started.
func (s *shipping) close(ctx context.Context) error {
	var errs []error
	if s.stop != nil {
		s.stop()
	}
	for _, f := range s.floors {
		errs = append(errs, f.Close())
	}
	if s.guest != nil {
		errs = append(errs, s.guest.Close())
	}
	errs = append(errs, s.plane.end(ctx))
	if s.peer != nil {
		errs = append(errs, s.peer.Close())
	}
	if s.replica != nil {
		_ = s.replica.Process.Signal(syscall.SIGTERM)
		_ = s.replica.Wait()
	}
	return errors.Join(errs...)
}
