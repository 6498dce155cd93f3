package vm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kvmreplica/replicad/failover"
)

// The whole plan of an unplanned failover to the newest state, from the command
// to the guest's start, by size of the disk and number of recovery points. Run
// with -benchtime 1x. The pretend hypervisor boots no guest, and the dead
// primary refuses the connection; a silent one is waited for forcedAsk.
func BenchmarkAnUnplannedFailover(b *testing.B) {
	for _, size := range []int64{1 << 30, 200 << 30} {
		for _, history := range []int{0, 24} {
			b.Run(fmt.Sprintf("%dGiB/%dpoints", size>>30, history), func(b *testing.B) {
				for range b.N {
					b.StopTimer()
					w := lostAfter(b, size, history)
					b.StartTimer()
					began := time.Now()
					must(b, w.b.do(func(ctx context.Context, _ *Manager, v *VM) error {
						return v.Unplanned(ctx, UnplannedOptions{Force: true, Request: "measure"}, func(e failover.Event) {
							if e.Result != "" {
								b.Logf("%-34s %s", e.Name, e.Took.Round(time.Millisecond))
							}
						})
					}))
					if took := time.Since(began); took > 2*time.Second {
						b.Errorf("%d GiB with %d points took %s, 2 s were promised", size>>30, history, took)
					}
				}
			})
		}
	}
}

// lostAfter is a pair whose primary lost power after so many recovery points of
// a sparse disk.
func lostAfter(b *testing.B, size int64, history int) *pair {
	b.Helper()
	w := newPair(b)
	must(b, os.Truncate(filepath.Join(filepath.Dir(w.a.dir), "web.raw"), size))
	w.protect()
	for range history {
		w.write(w.a, 3)
		w.synced()
		w.pin()
	}
	if n := len(w.list(w.b).Points); n < history {
		b.Fatalf("%d recovery points", n)
	}
	w.powerCutA()
	return w
}
