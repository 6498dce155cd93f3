package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// serveFile offers a file of 16 MiB and counts what arrives.
func serveFile(t *testing.T) (*server, *nbd.Server) {
	t.Helper()
	dir, err := os.MkdirTemp("", "bench") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "img")
	if err := os.WriteFile(path, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	srv := nbd.NewServer(nbd.Options{})
	if err := srv.Add(nbd.Export{Name: "x", Device: f}); err != nil {
		t.Fatal(err)
	}
	s := &server{name: "ours", socket: filepath.Join(dir, "s"), export: "x", clock: cpuClock(os.Getpid())}
	ln, err := net.Listen("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return s, srv
}

// What the load counts is what the server did, for every kind of workload.
func TestTheLoadCountsWhatTheServerAnswered(t *testing.T) {
	for _, c := range slices.Concat(contests(), []contest{{load: load{Kind: firstTouch, Size: 4 << 10, Depth: 8}}}) {
		t.Run(c.String(), func(t *testing.T) {
			s, srv := serveFile(t)
			cl, err := s.dial(c.load, 16<<20, 1)
			if err != nil {
				t.Fatal(err)
			}
			ops, took, err := cl.run(5 * time.Millisecond)
			if err != nil || ops < c.Depth || took <= 0 {
				t.Fatalf("%d operations in %v: %v", ops, took, err)
			}
			st, _ := srv.Stats("x")
			requests, bytes := uint64(ops), st.BytesRead+st.BytesWritten
			if c.Kind == writeFlush {
				requests *= 2
			}
			if st.Requests != requests || bytes != uint64(ops*c.Size) || st.Errors != 0 {
				t.Fatalf("%d operations, but the server answered %+v", ops, st)
			}
			if err := cl.close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Ratios are made round by round, and what misses its goal is marked.
func TestRatiosAreOfRoundsAndShortfallsAreMarked(t *testing.T) {
	slow, fast := &cell{Server: "slow", rates: []float64{10, 1, 100}, cpus: []float64{2, 2, 2}}, &cell{Server: "fast", rates: []float64{20, 2, 200}, cpus: []float64{1, 1, 1}}
	rep := newReport(options{})
	rep.finish([]*cell{slow, fast})
	r := slow.against("fast")
	if r.Rate != (spread{0.5, 0.5, 0.5}) || r.CPU.Median != 2 {
		t.Fatalf("slow against fast: %+v", r)
	}
	if got := verdict(r, 1, 3); got != "x 0.50* [0.50 0.50] cpu 2.00 (1, 3)" {
		t.Fatalf("verdict: %s", got)
	}
}
