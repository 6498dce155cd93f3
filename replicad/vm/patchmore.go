package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// A patch is made when this host gives its writes up, of the blocks that may
// differ then. The other host's guest writes on: what it writes before the first
// cut after the return comes with the first epoch, which nothing can undo. So
// the patch is made again with these blocks, before that epoch is committed. The
// images are as they were until then.

// keepReplaced makes the patch of this return hold everything that the first
// epoch overwrites. It may be repeated; where there is no room the epoch is
// refused, and nothing is overwritten.
func (v *VM) keepReplaced(ctx context.Context, all []points.Replaced) error {
	id := v.record().Given
	if id == "" {
		return nil // nothing was given up block by block
	}
	have := map[wire.DiskName][]wire.Range{}
	h, m, err := walkPatch(v.patchFile(id), func(h *delta.Header, c delta.Chunk) error {
		name := wire.DiskName(h.Disks[c.Disk].Name)
		for _, x := range c.Extents {
			have[name] = append(have[name], wire.Range{Off: x.Off, Len: x.Len})
		}
		return nil
	})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // a person has deleted it
	case errors.As(err, new(*fs.PathError)): // it cannot be read now, which is no damage
		return &wire.Error{Kind: wire.KindUnavailable, Text: "complete the patch " + id + ": " + err.Error(), Hint: "there: look at its storage, or give it up: replicactl failover patch delete " + v.record().Name + " " + id}
	case err != nil:
		v.log.Error("a damaged patch cannot be completed", "patch", id, "err", err)
		return nil // it is listed as damaged and cannot be mounted
	}
	c := content{generation: h.Generation, base: h.Parent, cut: m.Cut, ranges: map[wire.DiskName][]wire.Range{}}
	more := int64(0)
	for _, d := range v.serving() {
		i := slices.IndexFunc(all, func(r points.Replaced) bool { return r.Disk == string(d.Name) })
		if i < 0 {
			return fmt.Errorf("complete the patch %s: the store has no disk %s", id, d.Name)
		}
		old, both := joined(have[d.Name]), slices.Clone(have[d.Name])
		for _, r := range all[i].Ranges {
			both = append(both, wire.Range{Off: r.Off, Len: r.Len})
		}
		c.ranges[d.Name] = joined(within(both, d.Size)) // the survivor's disk may be longer
		more += total(c.ranges[d.Name]) - total(old)
		c.images = append(c.images, all[i].Image)
	}
	if more == 0 {
		return nil
	}
	_, err = v.putPatch(ctx, id+patchSuffix, c)
	if errors.Is(err, unix.ENOSPC) {
		err = &wire.Error{Kind: wire.KindNoSpace, Text: err.Error(), Hint: "there: free space below the state directory, or give the patch up: replicactl failover patch delete " + v.record().Name + " " + id}
	}
	if err == nil {
		v.log.Info("the patch was completed with what the first epoch overwrites", "patch", id, "bytes", more)
	}
	return err
}

// joined sorts ranges and joins neighbours.
func joined(rs []wire.Range) []wire.Range {
	return join(slices.SortedFunc(slices.Values(rs), func(a, b wire.Range) int { return cmp.Compare(a.Off, b.Off) }), 1)
}

func total(rs []wire.Range) (n int64) {
	for _, r := range rs {
		n += r.Len
	}
	return n
}
