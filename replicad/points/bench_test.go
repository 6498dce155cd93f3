package points_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// benchStore is a seeded store in a real directory.
func benchStore(b *testing.B, size int64) (*points.Store, delta.Spec) {
	b.Helper()
	d := &points.Dir{Path: b.TempDir()}
	cfg := points.Config{VM: delta.VM{1}}
	must(b, d.Configure(&cfg))
	disks := []delta.Disk{{Name: "vda", Size: size}}
	s, err := points.Create(cfg, disks)
	must(b, err)
	b.Cleanup(func() { must(b, s.Close()) })
	must(b, s.SeedAssume("vda"))
	content := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < len(content); i += 4 {
		content[i] = byte(rng.Uint32())
	}
	return s, delta.Spec{
		Header:  delta.Header{VM: cfg.VM, Generation: delta.Generation{2}, Nonce: 1, Disks: disks},
		Content: [][]byte{content}, Info: delta.ManifestInfo{Cut: time.Unix(1, 0)},
	}
}

// Estimate per 64 MiB epoch: decode and hash 0.1 s, write 64 MiB 0.1 s, sync;
// apply: read old 64 MiB, write undo 64 MiB, sync, decode again, write, sync.
func BenchmarkReceiveAndApply64MiB(b *testing.B) {
	const size = 64 << 20
	for name, scattered := range map[string]bool{"sequential": false, "scattered 4 KiB": true} {
		b.Run(name, func(b *testing.B) {
			s, spec := benchStore(b, size)
			var rs []block.Range
			for off := int64(0); off < size; off += 8192 {
				if scattered {
					rs = append(rs, block.Range{Off: off, Len: 4096})
				}
			}
			if !scattered {
				rs = []block.Range{{Off: 0, Len: size}}
			}
			spec.Changed = [][]block.Range{rs}
			var receiving, applying time.Duration
			var bytes int64
			for b.Loop() {
				spec.Header.Epoch++
				e, err := spec.Build()
				must(b, err)
				start := time.Now()
				spec.Header.Parent, err = receive(s, e, 0)
				must(b, err)
				mid := time.Now()
				must(b, s.ApplyAll(b.Context()))
				receiving, applying = receiving+mid.Sub(start), applying+time.Since(mid)
				for _, r := range rs {
					bytes += r.Len
				}
			}
			b.ReportMetric(float64(bytes)/1e6/receiving.Seconds(), "receive-MB/s")
			b.ReportMetric(float64(bytes)/1e6/applying.Seconds(), "apply-MB/s")
		})
	}
}
