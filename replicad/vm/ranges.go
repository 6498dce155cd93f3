package vm

import (
	"cmp"
	"context"
	"slices"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// maxAlso bounds what one request carries.
const maxAlso = 8192

// fewer sorts ranges and joins neighbours until at most n are left.
func fewer(rs []wire.Range, n int) []wire.Range {
	slices.SortFunc(rs, func(a, b wire.Range) int { return cmp.Compare(a.Off, b.Off) })
	for gap := int64(1); ; gap = max(64<<10, gap*2) {
		if rs = join(rs, gap); len(rs) <= max(n, 1) {
			return rs
		}
	}
}

// markAll marks many ranges of a disk, in requests the data plane takes.
func markAll(ctx context.Context, c *dataplane.Client, disk wire.DiskName, rs []wire.Range, why string) error {
	const most = 16384
	for len(rs) > 0 {
		n := min(len(rs), most)
		if err := c.Mark(ctx, dataplane.MarkRequest{Disk: disk, Ranges: rs[:n], Reason: why}); err != nil {
			return err
		}
		rs = rs[n:]
	}
	return nil
}

// maxReleased bounds the ranges told; more are joined until they fit.
const maxReleased = 32768

// allRanges lists what is marked of a disk, joined where there is too much.
func allRanges(ctx context.Context, c *dataplane.Client, disk wire.DiskName) ([]wire.Range, error) {
	var out []wire.Range
	for off := int64(0); ; {
		a, err := c.Ranges(ctx, dataplane.RangesRequest{Disk: disk, Offset: off, Bytes: 1 << 62, Max: 4096})
		if err != nil {
			return nil, err
		}
		out = append(out, a.Ranges...)
		for gap := int64(64 << 10); len(out) > maxReleased; gap *= 2 {
			out = join(out, gap)
		}
		if a.Done {
			return out, nil
		}
		off = a.Next
	}
}

// join merges neighbours closer than gap.
func join(rs []wire.Range, gap int64) []wire.Range {
	out := rs[:0]
	for _, r := range rs {
		if n := len(out); n > 0 && r.Off-(out[n-1].Off+out[n-1].Len) < gap {
			out[n-1].Len = max(out[n-1].Len, r.Off+r.Len-out[n-1].Off)
			continue
		}
		out = append(out, r)
	}
	return out
}

// behind is what lies between two ends of a disk, with the granule at the seam.
func behind(end, size int64) wire.Range {
	off := end / delta.Granule * delta.Granule
	return wire.Range{Off: off, Len: size - off}
}

// within cuts ranges off at a disk's end.
func within(rs []wire.Range, size int64) (out []wire.Range) {
	for _, r := range rs {
		if r.Len = min(r.Len, size-r.Off); r.Len > 0 {
			out = append(out, r)
		}
	}
	return out
}
