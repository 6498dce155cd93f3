package points_test

import (
	"bytes"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/replicad/points"
)

// keptMem is a sparse image that outlives Close.
type keptMem struct{ *block.Mem }

func (keptMem) Close() error { return nil }

// TestAViewsHolesAreZerosWhateverIsAppliedMeanwhile: what Map calls a hole of a
// point reads as zeros there, and most of an empty disk is one.
func TestAViewsHolesAreZerosWhateverIsAppliedMeanwhile(t *testing.T) {
	p, h := newPrimary(31), blocktest.NewHost()
	const size = 4 << 20
	p.disks[0].Size = size
	p.content[0] = make([]byte, size)
	images := map[string]keptMem{}
	for _, d := range p.disks {
		images[d.Name] = keptMem{block.NewMem(d.Size)}
	}
	cfg := p.config(h)
	cfg.Bases = func(disk string, _ int64) (block.Device, error) { return images[disk], nil }
	s, err := points.Create(cfg, p.disks)
	must(t, err)
	must(t, p.seed(s))
	var views []*points.View
	for i := range 6 {
		must(t, p.epochs(s, 1, 20*time.Second, i%2 == 0))
		v, err := s.View(s.Committed())
		must(t, err)
		views = append(views, v)
		must(t, settle(s))
		for _, v := range views {
			must(t, p.same(v))
			holes(t, p, v)
		}
	}
	for _, v := range views {
		must(t, v.Close())
	}
	must(t, s.Close())
}

func holes(t *testing.T, p *primary, v *points.View) {
	t.Helper()
	var free int64
	for i, d := range p.disks {
		dev, err := v.Disk(d.Name)
		must(t, err)
		for _, r := range []block.Range{{Off: 0, Len: d.Size}, {Off: 4096, Len: 5000}, {Off: 777, Len: 20000}} {
			at := r.Off
			must(t, dev.(block.Mapper).Map(r.Off, r.Len, func(e block.Extent) bool {
				if e.Off != at || e.Len <= 0 {
					t.Fatalf("%v: extent %v, want one at %d", v.Pos(), e, at)
				}
				at = e.End()
				if e.Zero && len(bytes.Trim(p.cuts[v.Pos()][i][e.Off:e.End()], "\x00")) > 0 {
					t.Fatalf("%v: disk %s: %v is not zero", v.Pos(), d.Name, e)
				}
				if e.Zero {
					free += e.Len
				}
				return true
			}))
			if at != r.End() {
				t.Fatalf("%v: the map of %v ends at %d", v.Pos(), r, at)
			}
		}
	}
	if free < 1<<20 {
		t.Errorf("%v: %d bytes are holes of a disk that is nearly empty", v.Pos(), free)
	}
}
