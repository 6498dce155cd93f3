package session

import (
	"context"
	"crypto/rand"
	"slices"

	"golang.org/x/sync/errgroup"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Sizes of a comparison: one window is read and hashed by both hosts at once;
// what differs is looked at again granule by granule, so that little is sent.
const (
	compareBlock  = 64 << 10
	compareWindow = 64 << 20
	maxWindow     = wire.MaxDigestRanges
)

// verify compares marked ranges with the replica's content and drops the marks
// of what is equal. The marks that stay are shipped next.
func (s *Session) verify(ctx context.Context, a DoVerify) (Event, error) {
	st, err := s.cfg.Source.Status(ctx)
	if err != nil {
		return nil, fromSource(err)
	}
	var ev EvVerified
	var done int64
	all := st.Suspect
	if a.All {
		all = st.Pending
	}
	for _, d := range within(st.Disks, a.Below) {
		for off, end := int64(0), false; !end; {
			s.track("verify", d.Name, done, max(all, done))
			r, err := s.cfg.Source.Ranges(ctx, dataplane.RangesRequest{
				Disk: d.Name, Offset: off, Bytes: compareWindow, Max: maxWindow, Suspect: !a.All,
			})
			if err != nil {
				return EvFailed{Advanced: done > 0}, fromSource(err)
			}
			off, end = r.Next, r.Done || r.Next >= d.Size
			r.Ranges = below(r.Ranges, d.Size)
			res, err := s.window(ctx, a.Pos, d.Name, r.Ranges)
			if err != nil {
				// What was compared before is not suspect any more.
				return EvFailed{Advanced: done > 0}, err
			}
			ev.Equal += res.Cleared
			done += total(r.Ranges)
		}
	}
	ev.Differ = done - ev.Equal
	return ev, nil
}

// scrub compares the next window of everything, marked or not; what differs
// without being marked is a mismatch.
func (s *Session) scrub(ctx context.Context, a DoScrub) (Event, error) {
	st, err := s.cfg.Source.Status(ctx)
	if err != nil {
		return nil, fromSource(err)
	}
	st.Disks = within(st.Disks, a.Below)
	if len(st.Disks) == 0 {
		return EvScrubbed{Done: true}, nil
	}
	i := max(0, slices.IndexFunc(st.Disks, func(d dataplane.DiskStatus) bool { return d.Name == a.From.Disk }))
	d := st.Disks[i]
	off := a.From.Offset
	if d.Name != a.From.Disk || off > d.Size {
		off = 0
	}
	r := wire.Range{Off: off, Len: min(scrubWindow, d.Size-off)}
	res, err := s.window(ctx, a.Pos, d.Name, []wire.Range{r})
	if err != nil {
		return nil, err
	}
	ev := EvScrubbed{Next: Cursor{d.Name, r.Off + r.Len}, Bytes: r.Len, Mismatched: res.Mismatched}
	if r.Off+r.Len >= d.Size {
		if ev.Done = i == len(st.Disks)-1; !ev.Done {
			ev.Next = Cursor{st.Disks[i+1].Name, 0}
		}
	}
	return ev, nil
}

// within are the disks with the sizes up to which the replica has them;
// what it has nothing of is left out.
func within(disks []dataplane.DiskStatus, below map[wire.DiskName]int64) (out []dataplane.DiskStatus) {
	for _, d := range disks {
		if end, joining := below[d.Name]; joining {
			if d.Size = min(d.Size, end); end == 0 {
				continue
			}
		}
		out = append(out, d)
	}
	return out
}

// below is the part of ascending ranges that lies before end.
func below(ranges []wire.Range, end int64) []wire.Range {
	for i, r := range ranges {
		if r.Off >= end {
			return ranges[:i]
		}
		ranges[i].Len = min(r.Len, end-r.Off)
	}
	return ranges
}

// window compares ranges coarsely, then granule by granule where they differ.
func (s *Session) window(ctx context.Context, pos delta.Pos, disk wire.DiskName, ranges []wire.Range) (sum dataplane.CompareResult, err error) {
	for part := range slices.Chunk(split(ranges, compareBlock), maxWindow) {
		equal, differ, id, err := s.compare(ctx, pos, disk, part)
		if err != nil {
			return sum, err
		}
		if err := s.end(ctx, dataplane.CompareEnd{Window: id, Equal: equal}, &sum); err != nil {
			return sum, err
		}
		for fine := range slices.Chunk(split(differ, delta.Granule), maxWindow) {
			equal, differ, id, err := s.compare(ctx, pos, disk, fine)
			if err != nil {
				return sum, err
			}
			if err := s.end(ctx, dataplane.CompareEnd{Window: id, Equal: equal, Differ: differ}, &sum); err != nil {
				return sum, err
			}
		}
	}
	return sum, nil
}

func (s *Session) end(ctx context.Context, e dataplane.CompareEnd, sum *dataplane.CompareResult) error {
	res, err := s.cfg.Source.EndCompare(ctx, e)
	if err != nil {
		return fromSource(err)
	}
	sum.Cleared += res.Cleared
	sum.Mismatched += res.Mismatched
	return nil
}

// compare lets both hosts hash the same ranges with the same fresh key at the
// same time.
func (s *Session) compare(ctx context.Context, pos delta.Pos, disk wire.DiskName, ranges []wire.Range) (equal, differ []wire.Range, id uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, digestTimeout)
	defer cancel()
	k := key()
	var ours dataplane.CompareReply
	var theirs wire.DigestReply
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		ours, err = s.cfg.Source.Compare(gctx, dataplane.CompareRequest{Pos: pos, Disk: disk, Key: k, Ranges: ranges})
		return fromSource(err)
	})
	g.Go(func() (err error) {
		theirs, err = s.cfg.Replica.Digests(gctx, wire.DigestRequest{VM: s.cfg.VM, Pos: pos, Disk: disk, Key: k, Ranges: ranges})
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, nil, 0, err
	}
	if len(ours.Digests) != len(ranges) || len(theirs.Digests) != len(ranges) {
		return nil, nil, 0, &wire.Error{Kind: wire.KindCorrupt, Text: "a digest reply has the wrong length"}
	}
	for i, r := range ranges {
		if ours.Digests[i] == theirs.Digests[i] {
			equal = append(equal, r)
		} else {
			differ = append(differ, r)
		}
	}
	return equal, differ, ours.Window, nil
}

// key is used for one window only, so that a replica must really read.
func key() (k [32]byte) {
	_, _ = rand.Read(k[:]) // never fails
	return k
}

// split cuts ranges at multiples of size.
func split(ranges []wire.Range, size int64) (out []wire.Range) {
	for _, r := range ranges {
		for off, end := r.Off, r.Off+r.Len; off < end; {
			stop := min(end, (off/size+1)*size)
			out = append(out, wire.Range{Off: off, Len: stop - off})
			off = stop
		}
	}
	return out
}

func total(ranges []wire.Range) (n int64) {
	for _, r := range ranges {
		n += r.Len
	}
	return n
}
