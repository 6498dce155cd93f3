package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// flushCosts are what a sync is made to cost, for everybody alike: a flush of
// the storage under a test machine is often nearly free.
func flushCosts() []time.Duration {
	return []time.Duration{time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond}
}

// slowSyncs runs a command so that each of its fsync and fdatasync calls takes
// d longer. Other system calls run undisturbed (seccomp); the command stays our
// child, and strace goes with it. Go's runtime must not preempt by signals: each
// is a stop for strace, and a collection sends them until the thread goes on.
func slowSyncs(d time.Duration) []string {
	return []string{
		"env", "GODEBUG=asyncpreemptoff=1", "strace", "-D", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=fsync,fdatasync",
		"-e", fmt.Sprintf("inject=fsync,fdatasync:delay_enter=%d", d.Microseconds()),
	}
}

// flushLoads are the workloads of section flush.
func flushLoads() []load {
	return []load{
		{Kind: writeFlush, Size: 4 << 10, Depth: 1},
		{Kind: writeFlush, Size: 4 << 10, Depth: 16},
	}
}

// compareFlushes is what costs syncs, at each cost of a sync.
func compareFlushes(ctx context.Context, o *options, r *rig, rep *report) error {
	title("The same with syncs that take longer (strace -e inject=fdatasync:delay_enter, for all alike)")
	fmt.Printf("%-6s %-21s %10s %8s | %-26s | %-26s\n", "sync", "workload", "tracked", "p99", "x qemu-nbd [quartiles]", "x nbdkit [quartiles]")
	for _, cost := range flushCosts() {
		if err := r.flushesAt(ctx, o, rep, cost); err != nil {
			return err
		}
	}
	fmt.Println("\n4 KiB reads at depth 1 beside writes that wait for syncs of 5 ms, on another connection: us p50 / p99 [quartiles of p99]")
	return r.readsBeside(ctx, o, rep)
}

func (r *rig) flushesAt(ctx context.Context, o *options, rep *report, cost time.Duration) (err error) {
	all, err := r.contestants(ctx, slowSyncs(cost)...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopAll(all)) }()
	for _, w := range flushLoads() {
		cells, err := r.takeTurns(ctx, "flush "+cost.String(), all, w, max(3, o.rounds/2), max(o.round, 20*cost))
		if err != nil {
			return err
		}
		for _, c := range cells {
			c.cpus = nil // it is strace's
		}
		rep.finish(cells)
		t := cells[0]
		show := func(r relation) string {
			return fmt.Sprintf("%.2f [%.2f %.2f]", r.Rate.Median, r.Rate.Low, r.Rate.High)
		}
		fmt.Printf("%-6s %-21s %10s %6.1fms | %-26s | %-26s\n", cost, w, rateText(t.Rate.Median, w.Size), t.P99.Median/1e3,
			show(t.against(qemuNBD)), show(t.against(nbdkit)))
	}
	return nil
}

// besideSize is large and sparse: a first touch is one only once per MiB.
const besideSize = 32 << 30

// readsBeside measures reads alone, beside first touches and beside flushes.
func (r *rig) readsBeside(ctx context.Context, o *options, rep *report) error {
	for _, name := range []string{tracked, qemuNBD, nbdkit} {
		sub := *r
		sub.size = besideSize
		sub.dir = filepath.Join(r.dir, "beside-"+name)
		if err := sub.readsBesideOf(ctx, o, rep, name); err != nil {
			return err
		}
	}
	return nil
}

func (r *rig) readsBesideOf(ctx context.Context, o *options, rep *report, name string) (err error) {
	if err := os.Mkdir(r.dir, 0o700); err != nil {
		return err
	}
	img := filepath.Join(r.dir, "disk.img")
	if err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, r.size)); err != nil {
		return err
	}
	s, stop, err := r.startSlow(ctx, o, name, img)
	defer func() { err = errors.Join(err, stop(), os.RemoveAll(r.dir)) }()
	if err != nil {
		return err
	}
	backs := []load{{}, {Kind: writeFlush, Size: 4 << 10, Depth: 8}, {Kind: firstTouch, Size: 4 << 10, Depth: 8}}
	if name != tracked {
		backs = backs[:2]
	}
	fmt.Printf("%-9s", name)
	for _, back := range backs {
		c := &cell{Section: "flush beside", Workload: "reads alone", Server: name}
		if back.Kind != "" {
			c.Workload = "reads beside " + back.String()
		}
		for i := range max(3, o.rounds/2) {
			lat, writes, err := s.beside(ctx, back, max(o.round, 200*time.Millisecond), r.size, uint64(i))
			if err != nil {
				return err
			}
			slices.Sort(lat)
			c.lats[0] = append(c.lats[0], lat[len(lat)/2].Seconds()*1e6)
			c.lats[1] = append(c.lats[1], lat[len(lat)*99/100].Seconds()*1e6)
			c.rates = append(c.rates, writes)
		}
		rep.finish([]*cell{c})
		fmt.Printf(" | %s: %.0f / %.0f [%.0f %.0f]", c.Workload, c.P50.Median, c.P99.Median, c.P99.Low, c.P99.High)
		if back.Kind != "" {
			fmt.Printf(" (%.0f/s)", c.Rate.Median)
		}
	}
	fmt.Println()
	return nil
}

// startSlow starts a server whose syncs take 5 ms; ours is a data plane, whose
// tracker has nothing marked. stop is never nil.
func (r *rig) startSlow(ctx context.Context, o *options, name, img string) (s *server, stop func() error, err error) {
	slow := slowSyncs(5 * time.Millisecond)
	if name == tracked {
		p, err := startPlane(ctx, r.dir, o.replicad, img, r.pinned(slow)...)
		stop = func() error { return p.end(ctx) }
		if err != nil {
			return nil, stop, err
		}
		return &server{name: name, socket: p.cfg.NBDSocket(), export: string(planeDisk)}, stop, nil
	}
	if s, err = r.start(ctx, name, img, slow...); err != nil {
		return nil, func() error { return nil }, err
	}
	return s, s.stop, nil
}

// beside reads one at a time while another connection does back; it returns
// the reads' latencies and what the other connection did per second.
func (s *server) beside(ctx context.Context, back load, d time.Duration, size int64, seed uint64) ([]time.Duration, float64, error) {
	type result struct {
		rate float64
		err  error
	}
	other := make(chan result, 1)
	go func() {
		if back.Kind == "" {
			other <- result{}
			return
		}
		c, err := s.dial(back, size, seed)
		if err != nil {
			other <- result{err: err}
			return
		}
		c.first = int64(seed) * 100003 // no MiB twice
		ops, took, err := c.run(d)
		other <- result{float64(ops) / took.Seconds(), errors.Join(err, c.close())}
	}()
	m, err := s.measure(load{Kind: reads, Size: 4 << 10, Depth: 1}, d, 64<<20, seed, false)
	res := <-other
	if err = errors.Join(err, res.err, ctx.Err()); err == nil && len(m.lat) == 0 {
		err = errors.New("no read was answered")
	}
	return m.lat, res.rate, err
}
