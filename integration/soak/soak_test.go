package soak_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/proxy"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

const patience = 5 * time.Minute

// sample is what the processes hold at one moment.
type sample struct {
	at         time.Duration
	goroutines int
	// of this process, which plays both daemons, and of the data planes
	rss, fds           int64
	planeRSS, planeFDs int64
}

// TestThreeVMsOverABadLineHoldNoMoreThanTheyNeed runs for KVMREPLICA_SOAK (a few
// seconds without it): three data planes as processes of their own, three
// guests that write without a pause, sessions and stores joined by the real
// mutual TLS through a proxy that cuts, stalls, slows down and goes away. In the
// end the line is good and every replica equals its guest's disk.
func TestThreeVMsOverABadLineHoldNoMoreThanTheyNeed(t *testing.T) {
	long, seed := length(t)
	bin := filepath.Join(t.TempDir(), "replicad")
	must(t, lab.Build(t.Context(), bin, "./cmd/replicad"))
	h := newHosts(t)
	var vms []*vm
	for i := range 3 {
		vms = append(vms, h.protect(t, bin, i, seed+uint64(i)))
	}
	stopFaults := disturb(h.line, seed)
	var samples []sample
	pids := planes(t, vms)
	begin := time.Now()
	for next := time.Duration(0); time.Since(begin) < long; {
		for _, v := range vms {
			v.guest.Scribble(3)
		}
		if now := time.Since(begin); now >= next {
			samples = append(samples, take(t, now, pids))
			next += long / 40
		}
	}
	stopFaults()
	for _, v := range vms {
		v.settle(t)
	}
	if again := planes(t, vms); !slices.Equal(pids, again) {
		t.Errorf("data planes died: %v became %v", pids, again)
	}
	judge(t, samples)
	for _, v := range vms {
		s := v.session.Status()
		t.Logf("%s: %d cycles (%d empty), %d errors of the line, %d resumed, %d MiB sent, RPO %v median %v max",
			v.cfg.Name, s.Stats.Cycles, s.Stats.Empty, s.Stats.Errors, s.Stats.Resumed, s.Stats.SentBytes>>20, s.Stats.RPOMedian, s.Stats.RPOMax)
	}
}

// length is how long a run lasts, and the seed of its faults.
func length(t *testing.T) (time.Duration, uint64) {
	t.Helper()
	long := 8 * time.Second
	if s := os.Getenv("KVMREPLICA_SOAK"); s != "" {
		var err error
		long, err = time.ParseDuration(s)
		must(t, err)
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KVMREPLICA_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		must(t, err)
	}
	t.Logf("KVMREPLICA_SEED=%d", seed)
	return long, seed
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// disturb plays with the line until the returned function is called, which
// makes it good again.
func disturb(p *proxy.Proxy, seed uint64) func() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	rng := rand.New(rand.NewPCG(seed, 99))
	pause := func(most time.Duration) {
		timer := time.NewTimer(time.Duration(rng.Int64N(int64(most))))
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			pause(2 * time.Second)
			d := []proxy.Direction{proxy.Up, proxy.Down}[rng.IntN(2)]
			switch rng.IntN(6) {
			case 0:
				p.CutAll()
			case 1:
				p.CutAfter(d, rng.Int64N(4<<20))
			case 2:
				p.Stall(d, true)
				pause(2 * time.Second)
				p.Stall(d, false)
			case 3:
				p.SetDown(true)
				pause(3 * time.Second)
				p.SetDown(false)
			case 4:
				p.Rate(d, 1<<(18+rng.IntN(6)))
				pause(3 * time.Second)
				p.Rate(d, 0)
			case 5:
				p.Latency(d, time.Duration(rng.IntN(30))*time.Millisecond)
				pause(3 * time.Second)
				p.Latency(d, 0)
			}
		}
	}()
	return func() { cancel(); <-done }
}

// planes are the data planes' processes.
func planes(t *testing.T, vms []*vm) (pids []int) {
	t.Helper()
	for _, v := range vms {
		st, err := v.plane.Status(t.Context())
		must(t, err)
		pids = append(pids, st.PID)
	}
	return pids
}

// take measures.
func take(t *testing.T, at time.Duration, pids []int) sample {
	t.Helper()
	s := sample{at: at.Round(time.Second), goroutines: runtime.NumGoroutine(), rss: rss(t, os.Getpid()), fds: descriptors(t, os.Getpid())}
	for _, p := range pids {
		s.planeRSS += rss(t, p)
		s.planeFDs += descriptors(t, p)
	}
	return s
}

// rss is the anonymous memory of a process in bytes: the page cache that it maps
// is not its own.
func rss(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 2 && f[0] == "RssAnon:" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			must(t, err)
			return n << 10
		}
	}
	return 0
}

func descriptors(t *testing.T, pid int) int64 {
	t.Helper()
	d, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	return int64(len(d))
}

// judge compares the second quarter of the run with the last one, median with
// median. A short run is not judged: everything is still filling up.
func judge(t *testing.T, all []sample) {
	t.Helper()
	for i := 0; i < len(all); i += max(1, len(all)/8) {
		s := all[i]
		t.Logf("%6v: %4d goroutines, %3d MiB, %3d descriptors; data planes %3d MiB, %3d descriptors", s.at, s.goroutines, s.rss>>20, s.fds, s.planeRSS>>20, s.planeFDs)
	}
	if len(all) < 16 || all[len(all)-1].at < 5*time.Minute {
		return
	}
	for _, g := range growth(t.Logf, all) {
		t.Error(g)
	}
}

// growth says what grew from the second quarter of a run to the last one.
func growth(logf func(string, ...any), all []sample) (grew []string) {
	q := len(all) / 4
	for _, m := range []struct {
		what  string
		of    func(sample) int64
		slack int64
	}{
		{"goroutines", func(s sample) int64 { return int64(s.goroutines) }, 20},
		{"memory", func(s sample) int64 { return s.rss }, 32 << 20},
		{"descriptors", func(s sample) int64 { return s.fds }, 20},
		{"data planes' memory", func(s sample) int64 { return s.planeRSS }, 32 << 20},
		{"data planes' descriptors", func(s sample) int64 { return s.planeFDs }, 10},
	} {
		early, late := median(all[q:2*q], m.of), median(all[3*q:], m.of)
		logf("%s: %d, in the end %d", m.what, early, late)
		if late > early+early/8+m.slack {
			grew = append(grew, fmt.Sprintf("%s grew from %d to %d", m.what, early, late))
		}
	}
	return grew
}

func median(s []sample, of func(sample) int64) int64 {
	s = slices.SortedFunc(slices.Values(s), func(a, b sample) int { return cmp.Compare(of(a), of(b)) })
	return of(s[len(s)/2])
}

// settle ships what is left over a good line and compares.
func (v *vm) settle(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	v.session.Retry()
	pos, err := v.session.SyncFinal(ctx)
	if err != nil {
		t.Fatalf("%s: %v: %+v", v.cfg.Name, err, v.session.Status())
	}
	view, err := v.store.View(pos)
	must(t, err)
	for name, want := range v.guest.Snapshot() {
		d, err := view.Disk(string(name))
		must(t, err)
		dt.SameContent(t, v.cfg.Name+"'s replica", dt.Content(t, d), want)
	}
	must(t, errors.Join(view.Close()))
	v.guest.Check()
}
