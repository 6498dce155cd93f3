package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/firmware"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// Overlay is an unplanned failover that can still be taken back, or one whose
// images are still being brought to what the guest wrote.
type Overlay struct {
	// At is the state the guest began with, Cut its time.
	At  delta.Pos `json:"at"`
	Cut time.Time `json:"cut"`
	// Newest is what the replica had committed.
	Newest delta.Pos `json:"newest"`
	// Points end with the commit.
	Points int `json:"points"`
	// Prior is what this host was before.
	Prior lineage.Lineage `json:"prior"`
	// Disks are what the record had then; nil = from a version before sets of
	// disks could change.
	Disks []Disk `json:"disks,omitempty"`
	// Committed: it stays.
	Committed bool `json:"committed,omitempty"`
	// Deadline, if set, is when Then (commit or cancel) is done by itself.
	Deadline time.Time `json:"deadline,omitzero"`
	Then     string    `json:"then,omitempty"`
	// KeepPoints: the commit, however it comes, copies the recovery points first.
	KeepPoints bool `json:"keep_points,omitempty"`
}

// What is done when the time of trial is over.
const (
	thenCommit = "commit"
	thenCancel = "cancel"
)

const overlayDir = "overlay"

func (v *VM) overlayPath() string {
	return filepath.Join(v.deps.StateDir, "vms", string(v.id), overlayDir)
}

// overlayFile holds a disk's writes: beside the image, where there is room for
// them, or with the state of a disk that is no file.
func (v *VM) overlayFile(d Disk) string {
	if d.Kind == diskRaw {
		return d.Path + ".overlay"
	}
	return filepath.Join(v.overlayPath(), string(d.Name)+".data")
}

// choose finds the state a person named, and its time.
func (v *VM) choose(text string, st storeState) (delta.Pos, time.Time, error) {
	s, err := v.store()
	if err != nil {
		return delta.Pos{}, time.Time{}, err
	}
	if st.State == points.Promoted && (text == "" || text == "latest") {
		return st.Committed, st.CutTime, nil // offline: nothing is left to choose
	}
	p, err := s.Choose(text)
	if err != nil {
		return delta.Pos{}, time.Time{}, pointError(err, v.record().Name)
	}
	if p.Latest {
		return p.Pos, st.CutTime, nil
	}
	return p.Pos, p.Cut, nil
}

// trial is how the failover begins: on an overlay, unless a person wants the
// images changed at once or they are promoted already.
func (v *VM) trial(o UnplannedOptions, l Loss) (*Overlay, error) {
	st, err := v.storeStatus()
	if err != nil {
		return nil, err
	}
	if o.InPlace || st.State != points.Replica {
		if l.At != l.Newest {
			return nil, &wire.Error{Kind: wire.KindInvalid, Text: "an older point cannot be started in place", Hint: "leave out --in-place, then: replicactl failover commit " + v.record().Name}
		}
		return nil, nil
	}
	t := &Overlay{At: l.At, Cut: l.Cut, Newest: l.Newest, Points: l.Points, KeepPoints: o.KeepPoints}
	if o.Within <= 0 {
		return t, nil
	}
	if o.Then != thenCommit && o.Then != thenCancel {
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("%.20q after the time of trial", o.Then), Hint: "use commit or cancel"}
	}
	t.Deadline, t.Then = v.deps.Now().Add(o.Within), o.Then
	return t, nil
}

// makeOverlay makes an empty overlay over the chosen state, and keeps what the
// later steps need of the store.
func (v *VM) makeOverlay(p *promoteVars) (string, error) {
	s, err := v.store()
	if err != nil {
		return "", err
	}
	blobs, err := s.Firmware(p.At)
	if err == nil {
		_, err = firmware.Keep(v.fsys, blobs)
	}
	if err != nil {
		return "", fmt.Errorf("read the firmware state: %w", err)
	}
	if err := v.fsys.MkdirAll(overlayDir); err != nil {
		return "", fmt.Errorf("make the overlay: %w", err)
	}
	dir := fsx.Sub(v.fsys, overlayDir)
	if old, err := overlay.Read(dir); err == nil && old.Phase == overlay.Done {
		if err := overlay.Remove(dir); err != nil { // of an earlier failover
			return "", err
		}
	}
	disks, err := v.wholeAt(s, p.At) // an older point may have had others, and other sizes
	if err != nil {
		return "", fmt.Errorf("the disks' sizes at %v: %w", p.At, err)
	}
	r := v.record()
	for _, k := range disks {
		d, _ := r.disk(wire.DiskName(k.Name)) // the store's disks are the record's
		if err := makeOverlayFile(v.overlayFile(d), k.Size); err != nil {
			return "", err
		}
	}
	vm, err := delta.ParseVM(string(v.id))
	if err != nil {
		return "", err
	}
	err = overlay.Create(dir, overlay.Head{VM: vm, Generation: p.Generation, At: p.At, Disks: disks, Created: v.deps.Now().UTC()})
	return "nothing is copied; the guest begins with " + p.At.String(), err
}

// makeOverlayFile makes a sparse file durable. What an earlier try left in it
// does not matter: nothing says that it is there.
func makeOverlayFile(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("make the overlay's file: %w", err)
	}
	err = errors.Join(f.Truncate(size), f.Sync(), f.Close())
	var dir *os.File
	if err == nil {
		dir, err = os.Open(filepath.Dir(path))
	}
	if err == nil {
		err = errors.Join(dir.Sync(), dir.Close())
	}
	if err != nil {
		return fmt.Errorf("make the overlay's file: %w", err)
	}
	return nil
}

// dropOverlay removes the log first: without it the files mean nothing.
func (v *VM) dropOverlay() error {
	if err := v.fsys.MkdirAll(overlayDir); err != nil {
		return fmt.Errorf("drop the overlay: %w", err)
	}
	if err := overlay.Remove(fsx.Sub(v.fsys, overlayDir)); err != nil {
		return err
	}
	for _, d := range v.record().Disks { // also of disks that are left out now
		if err := os.Remove(v.overlayFile(d)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("drop the overlay: %w", err)
		}
	}
	return nil
}

// imagesOnly refuses what needs the images to be all there is.
func (v *VM) imagesOnly(ctx context.Context) error {
	o := v.record().Overlay
	if o == nil {
		return nil
	}
	name := v.record().Name
	if !o.Committed {
		return &wire.Error{Kind: wire.KindRefused, Text: "the failover is not final yet", Hint: fmt.Sprintf("replicactl failover commit %s (or cancel)", name)}
	}
	left, err := v.finishOverlay(ctx)
	if err != nil || left < 0 {
		return err
	}
	return &wire.Error{Kind: wire.KindUnavailable, Text: fmt.Sprintf("the images are still being brought to what the guest wrote: %d bytes are beside them", left), Hint: "repeat the command in a while; replicactl vm status " + name}
}

// finishOverlay ends a committed overlay when the data plane says that the
// images hold everything; it returns what is left, negative for nothing. The
// data plane's next start is told first.
func (v *VM) finishOverlay(ctx context.Context) (left int64, err error) {
	if o := v.record().Overlay; o == nil || !o.Committed {
		return -1, nil
	}
	c, err := v.plane()
	if err != nil {
		return 0, err
	}
	st, err := c.Status(ctx)
	if err != nil {
		return 0, fmt.Errorf("ask the data plane: %w", err)
	}
	if st.Overlay != nil && st.Overlay.Phase != overlay.Done.String() {
		return st.Overlay.Bytes, nil
	}
	if err := v.update(func(r *Record) error { r.Overlay = nil; return nil }); err != nil {
		return 0, err
	}
	cfg := v.planeConfig()
	v.machine.Lock()
	defer v.machine.Unlock()
	if err := dataplane.Reconfigure(cfg); err != nil {
		v.log.Warn("tell the data plane's next start that the overlay has ended", "err", err)
		return -1, nil // its log stays and says the same
	}
	v.mu.Lock()
	if v.ship != nil {
		v.ship.cfg = cfg
	}
	v.mu.Unlock()
	if err := v.dropOverlay(); err != nil {
		v.log.Warn("remove what is left of the overlay", "err", err)
	}
	return -1, nil
}

// middle is what the promotion of an older point took back: M1's second term.
// known is false when it cannot be told; then everything must be compared.
func (v *VM) middle() (ranges map[wire.DiskName][]wire.Range, known bool, why string) {
	l := v.record().Lineage
	if l.Before.IsZero() || l.Before == l.Parent() {
		return nil, true, ""
	}
	rolled, err := points.RolledBack(fsx.Sub(v.fsys, storeDir), l.Parent())
	if err != nil {
		return nil, false, err.Error()
	}
	ranges = map[wire.DiskName][]wire.Range{}
	for disk, rs := range rolled {
		for _, r := range rs {
			ranges[wire.DiskName(disk)] = append(ranges[wire.DiskName(disk)], wire.Range{Off: r.Off, Len: r.Len})
		}
	}
	return ranges, true, ""
}
