package cbt_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// nullDev accepts everything; so that only tracking is measured.
type nullDev struct{ size int64 }

func (n nullDev) ReadAt(p []byte, off int64) (int, error) {
	return len(p), block.Check(off, int64(len(p)), n.size)
}

func (n nullDev) WriteAt(p []byte, off int64) (int, error) {
	return len(p), block.Check(off, int64(len(p)), n.size)
}
func (n nullDev) ZeroAt(off, l int64, _ bool) error { return block.Check(off, l, n.size) }
func (n nullDev) Sync() error                       { return nil }
func (n nullDev) Size() int64                       { return n.size }
func (n nullDev) Close() error                      { return nil }

func benchGroup(b testing.TB, fs fsx.FS, disks int, dir string) *cbt.Group {
	b.Helper()
	cfg := cbt.Config{FS: fs, VMID: "vm", BootID: "boot", SharedDir: dir}
	for i := range disks {
		cfg.Disks = append(cfg.Disks, cbt.DiskConfig{Name: fmt.Sprintf("vd%c", 'a'+i), Device: nullDev{100 << 30}})
	}
	g, err := cbt.Create(cfg, cbt.Start{Generation: gen1, Dirty: cbt.DirtyNone})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = g.Close(ctx) })
	return g
}

func BenchmarkTryWriteMarked4K(b *testing.B) {
	g := benchGroup(b, fsxtest.NewMem(), 1, shmDir(b))
	d := g.Disk("vda")
	p := make([]byte, 4096)
	for r := range int64(64) {
		if _, err := d.WriteAt(p, r<<20); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	i := int64(0)
	for b.Loop() {
		i += 4096 * 7
		if _, err := d.TryWriteAt(p, i%(64<<20)&^4095); err != nil {
			b.Fatal(err)
		}
	}
}

func TestTheDataPathDoesNotAllocate(t *testing.T) {
	g := benchGroup(t, fsxtest.NewMem(), 1, shmDir(t))
	d := g.Disk("vda")
	p := make([]byte, 4096)
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	for name, fn := range map[string]func(){
		"try":   func() { _, _ = d.TryWriteAt(p, 4096) },
		"write": func() { _, _ = d.WriteAt(p, 8192) },
		"zero":  func() { _ = d.ZeroAt(0, 4096, true) },
		"read":  func() { _, _ = d.ReadAt(p, 0) },
	} {
		if n := testing.AllocsPerRun(200, fn); n != 0 {
			t.Errorf("%s: %v allocations per request", name, n)
		}
	}
}

// BenchmarkFreezeGate is the longest a writer is kept out by a freeze of disks
// with 100,000 dirty granules each.
func BenchmarkFreezeGate(b *testing.B) {
	for _, disks := range []int{1, 16} {
		b.Run(fmt.Sprintf("disks=%d", disks), func(b *testing.B) { freezeGate(b, disks) })
	}
}

func freezeGate(b *testing.B, disks int) {
	g := benchGroup(b, fsxtest.NewMem(), disks, "")
	p := make([]byte, 4096)
	dirty := func() {
		for i := range disks {
			if err := g.Disk(fmt.Sprintf("vd%c", 'a'+i)).ZeroAt(0, 400<<20, false); err != nil {
				b.Fatal(err)
			}
		}
	}
	var worst []time.Duration
	for b.Loop() {
		dirty()
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Add(1)
		var longest time.Duration
		ready := make(chan struct{})
		go func() {
			defer wg.Done()
			d := g.Disk("vda")
			for i := 0; ; i++ {
				t0 := time.Now()
				// Behind the dirty part: nothing frozen, marked, so only the gate counts.
				_, _ = d.WriteAt(p, 399<<20+int64(i%4)*4096+1<<20)
				if dt := time.Since(t0); i > 10 && dt > longest {
					longest = dt
				}
				if i == 20 {
					close(ready)
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		}()
		<-ready
		e, err := g.Freeze(ctx)
		close(stop)
		wg.Wait()
		if err != nil {
			b.Fatal(err)
		}
		worst = append(worst, longest)
		if err := e.Drain(ctx); err != nil {
			b.Fatal(err)
		}
		if err := e.Ack(cbt.Position{Generation: gen1, Epoch: e.Number()}); err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(worst)
	b.ReportMetric(float64(worst[len(worst)/2].Nanoseconds()), "p50-stall-ns")
	b.ReportMetric(float64(worst[len(worst)-1].Nanoseconds()), "max-stall-ns")
}

// BenchmarkReadsWhileFirstTouchesWait reads while every write is a first touch
// that waits for a map sync of 5 ms.
func BenchmarkReadsWhileFirstTouchesWait(b *testing.B) {
	h := blocktest.NewHost()
	g := benchGroup(b, h.FS, 1, "")
	h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Sync {
			<-time.After(5 * time.Millisecond)
		}
		return nil
	})
	d := g.Disk("vda")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	writes := 0
	for k := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p := make([]byte, 4096)
			rnd := rand.New(rand.NewPCG(1, uint64(k)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, _ = d.WriteAt(p, rnd.Int64N(100<<10)<<20)
				mu.Lock()
				writes++
				mu.Unlock()
			}
		}()
	}
	p := make([]byte, 4096)
	var lat []time.Duration
	for b.Loop() {
		t0 := time.Now()
		if _, err := d.ReadAt(p, 4096); err != nil {
			b.Fatal(err)
		}
		lat = append(lat, time.Since(t0))
	}
	close(stop)
	wg.Wait()
	slices.Sort(lat)
	b.ReportMetric(float64(lat[len(lat)*99/100].Nanoseconds()), "p99-read-ns")
	b.ReportMetric(float64(lat[len(lat)*999/1000].Nanoseconds()), "p99.9-read-ns")
	b.ReportMetric(float64(writes), "writes")
	b.ReportMetric(float64(g.Status().Disks[0].IntentSyncs), "map-syncs")
}
