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

// BenchmarkApplyWithPoints is what a changed GiB costs to apply, without points
// and with 24 hourly ones: wall time, and bytes written to images and undo per
// changed byte. Each of 24 epochs changes a quarter of the disk, in scattered
// granules; receiving writes the spool once more in either case.
func BenchmarkApplyWithPoints(b *testing.B) {
	const size, epochs = 16 << 20, 24
	for _, policy := range []string{"0", "24"} {
		b.Run(policy+" points", func(b *testing.B) {
			var applying time.Duration
			var changed, undo int64
			for b.Loop() {
				b.StopTimer()
				s, spec, now := pointStore(b, size, policy)
				rng := rand.New(rand.NewPCG(7, 7))
				for range epochs {
					*now = now.Add(time.Hour)
					spec.Changed = [][]block.Range{quarter(rng, size)}
					spec.Header.Epoch++
					e, err := spec.Build()
					must(b, err)
					spec.Header.Parent, err = receive(s, e, 0)
					must(b, err)
					b.StartTimer()
					start := time.Now()
					must(b, settle(s))
					applying += time.Since(start)
					b.StopTimer()
					for _, r := range spec.Changed[0] {
						changed += r.Len
					}
				}
				undo += s.Status().Undo
				if n := s.Status().Points; policy == "24" && n < 24 || policy == "0" && n != 0 {
					b.Fatalf("%d points", n)
				}
				must(b, s.Close())
				b.StartTimer()
			}
			gib := float64(changed) / (1 << 30)
			b.ReportMetric(applying.Seconds()/gib, "s/GiB")
			b.ReportMetric(float64(changed+undo)/float64(changed), "written/changed")
		})
	}
}

// quarter draws scattered granules, a quarter of the disk.
func quarter(rng *rand.Rand, size int64) []block.Range {
	var out []block.Range
	for off := int64(0); off < size; off += 4096 {
		if rng.IntN(4) == 0 {
			out = append(out, block.Range{Off: off, Len: 4096})
		}
	}
	return out
}

// pointStore is a seeded store in a real directory with a clock of its own.
func pointStore(b *testing.B, size int64, policy string) (*points.Store, delta.Spec, *time.Time) {
	b.Helper()
	d := &points.Dir{Path: b.TempDir()}
	cfg := points.Config{VM: delta.VM{1}}
	must(b, d.Configure(&cfg))
	now := time.Unix(1_700_000_000, 0)
	cfg.Now = func() time.Time { return now }
	var err error
	cfg.Policy, err = points.ParsePolicy(policy)
	must(b, err)
	disks := []delta.Disk{{Name: "vda", Size: size}}
	s, err := points.Create(cfg, disks)
	must(b, err)
	must(b, s.SeedAssume("vda"))
	content := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < len(content); i += 4 {
		content[i] = byte(rng.Uint32())
	}
	return s, delta.Spec{
		Header:  delta.Header{VM: cfg.VM, Generation: delta.Generation{2}, Nonce: 1, Disks: disks},
		Content: [][]byte{content}, Info: delta.ManifestInfo{Cut: time.Unix(1, 0)},
	}, &now
}
