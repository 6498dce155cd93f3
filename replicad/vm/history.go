package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
	"kvmreplica/internal/count"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// A promotion ends the replica's recovery points. Whoever wants to keep them
// says so before: the store is copied, images and all, beside the images, and
// the copy is a replica's directory that replicafsck reads. Only a person
// deletes it.

// historyDir is where the copy of a promotion goes.
func (v *VM) historyDir(request string) (string, error) {
	dir := ""
	r := v.record()
	for _, d := range r.Disks {
		if dir == "" && d.Kind == diskRaw {
			dir = filepath.Dir(d.Path)
		}
	}
	if filepath.Base(dir) == string(v.id) {
		dir = filepath.Dir(dir) // ours, and deleted with the replica
	}
	if dir == "" {
		if g, err := v.deps.Grant(r.Peer); err == nil {
			dir = g.Root
		}
	}
	if dir == "" {
		return "", &wire.Error{Kind: wire.KindRefused, Text: "there is no directory for the recovery points: no disk is a file, and no storage root is set", Hint: "replicactl peer allow PEER --may-send --root DIR"}
	}
	return filepath.Join(dir, string(v.id)+".points-"+fileWord(request)), nil
}

// heldPoints are the recovery points that a promotion, or its commit, would end.
type heldPoints struct {
	points, pinned int
	since          string
	// undo and spool are bytes; what lies in the spool is still to be applied.
	undo, spool int64
	// end is what ends the points, in words; while is what goes on during a copy.
	end, while string
}

// text says how many there are.
func (h heldPoints) text() string {
	if h.since == "" {
		return count.Of(h.points, "recovery point")
	}
	return fmt.Sprintf("%s since %s (%d pinned)", count.Of(h.points, "recovery point"), h.since, h.pinned)
}

// storeHistory is the history of the open store.
func (v *VM) storeHistory() (heldPoints, error) {
	s, err := v.store()
	if err != nil {
		return heldPoints{}, err
	}
	st := s.Status()
	h := heldPoints{undo: st.Undo, spool: st.Spool, end: "the failover", while: "while the guest is off"}
	for _, p := range s.Points() {
		if h.points++; h.since == "" {
			h.since = p.TimeText()
		}
		if p.Pinned {
			h.pinned++
		}
	}
	return h, nil
}

// historyCost says what keeping the points would take: room, and whether blocks
// can be shared instead.
func (v *VM) historyCost(h heldPoints) (dir string, need, free int64, shared bool, err error) {
	if dir, err = v.historyDir(""); err != nil {
		return
	}
	dir = filepath.Dir(dir)
	shared = true
	for _, d := range v.record().Disks {
		if d.Kind == diskRaw && canShare(d.Path, dir) {
			continue
		}
		shared = false
		n := d.Size
		if f, err := os.Stat(d.Path); d.Kind == diskRaw && err == nil {
			if st, ok := f.Sys().(*syscall.Stat_t); ok {
				n = min(n, st.Blocks*512)
			}
		}
		need += n
	}
	// What is not applied yet grows the undo, its copy and the image.
	need += h.undo + 3*h.spool
	free, err = overlay.FreeBytes(dir)
	return
}

// canShare says whether a copy of file in dir would share its blocks.
func canShare(file, dir string) bool {
	src, err := os.Open(file)
	if err != nil {
		return false
	}
	defer src.Close()
	// A file without a name: nothing is left whatever happens.
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }() // nothing was written
	return block.CloneFD(fd, int(src.Fd())) == nil
}

// historyRate is what the time of a copy is estimated from, in bytes a second.
const historyRate = 200 << 20

// checkHistory says what becomes of the recovery points.
func (v *VM) checkHistory(c *checklist, keep bool, h heldPoints) {
	if h.points == 0 {
		if keep {
			c.add("Recovery points", wire.OK, "", "there are none to keep")
		}
		return
	}
	what := h.text()
	if !keep {
		c.add("Recovery points", wire.Warning, "to keep them as files there: --keep-points", "END with %s: %s; %s takes new ones once it is the replica", h.end, what, v.mgr.peerName(v.record().Peer))
		return
	}
	dir, need, free, shared, err := v.historyCost(h)
	reserve := v.limits().Reserve
	switch {
	case err != nil:
		c.add("Recovery points", wire.Failed, "leave --keep-points out, or export what matters: replicactl point export "+v.record().Name, "%s", said(err))
	case free-need < reserve:
		c.add("Recovery points", wire.Failed, "free space there, leave --keep-points out, or export what matters: replicactl point export "+v.record().Name,
			"to keep %s takes %d bytes in %s; %d are free, %d of them must stay so", what, need, dir, free, reserve)
	case shared:
		c.add("Recovery points", wire.OK, "", "kept in %s, sharing the images' blocks: %s; %d bytes are copied", dir, what, need)
	default:
		took := time.Duration(need/historyRate+1) * time.Second
		c.add("Recovery points", wire.Warning, "a file system with shared blocks (XFS, btrfs) keeps them at once", "kept in %s: %s; %d bytes are copied %s, about %s", dir, what, need, h.while, took)
	}
}

// keepHistory copies the store before its points end. It is repeated from the
// beginning when it was interrupted.
func (v *VM) keepHistory(ctx context.Context, request string) (string, error) {
	s, err := v.store()
	if err != nil {
		return "", err
	}
	h, err := v.storeHistory()
	if err != nil {
		return "", err
	}
	return v.keepAs(ctx, request, h, s.CopyTo)
}

// keepAs has copyTo, whoever holds the store, make the copy.
func (v *VM) keepAs(ctx context.Context, request string, h heldPoints, copyTo func(ctx context.Context, dir string) (points.Copied, error)) (string, error) {
	if _, need, free, _, err := v.historyCost(h); err != nil {
		return "", err
	} else if reserve := v.limits().Reserve; free-need < reserve {
		return "", &wire.Error{Kind: wire.KindNoSpace, Text: fmt.Sprintf("keeping the recovery points needs %d bytes, %d are free, %d of them must stay so", need, free, reserve), Hint: "free space there, or leave --keep-points out"}
	}
	dir, err := v.historyDir(request)
	if err != nil {
		return "", err
	}
	if err := v.dropHistory(request); err != nil {
		return "", err
	}
	c, err := copyTo(ctx, dir)
	if err != nil {
		return "", fmt.Errorf("keep the recovery points: %w", err)
	}
	detail := fmt.Sprintf("%s kept in %s", count.Of(c.Points, "recovery point"), dir)
	if c.Shared {
		detail += ", sharing the images' blocks"
	}
	v.audit(request, "operator", "recovery points kept", detail)
	return detail, v.update(func(r *Record) error { r.History = detail; return nil })
}

// dropHistory takes a copy away that is not to be.
func (v *VM) dropHistory(request string) error {
	dir, err := v.historyDir(request)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the copy of the recovery points: %w", err)
	}
	return nil
}
