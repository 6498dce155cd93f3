package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
	"kvmreplica/internal/count"
	"kvmreplica/internal/fsx"
	"kvmreplica/nbd"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/firmware"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// keeping is the replica's machinery.
type keeping struct {
	store  *points.Store // guarded by VM.mu while apply runs
	cancel context.CancelFunc
	done   chan struct{}
}

const storeDir = "store"

// storeConfig describes the store around this host's images.
func (v *VM) storeConfig() points.Config {
	id, err := delta.ParseVM(string(v.id))
	if err != nil {
		v.log.Error("the VM's id", "err", err) // cannot happen: checked at the edge
	}
	dir := filepath.Join(v.deps.StateDir, "vms", string(v.id), storeDir)
	return points.Config{
		FS: fsx.Sub(v.fsys, storeDir), VM: id, Log: v.log, Now: v.deps.Now,
		Limits: v.limits(), Policy: v.retention(),
		Bases:    v.openBase,
		Set:      v.setOf,
		Identity: v.baseIdentity,
		Free:     func() (int64, error) { return overlay.FreeBytes(dir) },
	}
}

// makeBase is openBase for a new replica's image: there is none yet, or an
// earlier try made it.
func (v *VM) makeBase(disk string, size int64) (block.Device, error) {
	r := v.record()
	if d, ok := r.disk(wire.DiskName(disk)); ok && d.Kind == diskRaw {
		if err := makeImage(d.Path); err != nil {
			return nil, err
		}
	}
	return v.openBase(disk, size)
}

// openBase opens a replica's image under both locks. One that is missing is an
// error: its file system may not be mounted.
func (v *VM) openBase(disk string, size int64) (block.Device, error) {
	r := v.record()
	d, ok := r.disk(wire.DiskName(disk))
	if !ok {
		return nil, fmt.Errorf("the VM has no disk %q", disk)
	}
	if d.Kind == diskRaw {
		uid, gid := v.qemuOwner()
		if err := ensureImage(d.Path, size, uid, gid); err != nil {
			return nil, err
		}
	}
	if d.Kind == diskNBD {
		return openNBDBase(d, size)
	}
	f, err := block.OpenFile(d.Path, block.FileOptions{})
	if err != nil {
		return nil, err
	}
	if err := f.LockQEMU(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if f.Size() < size {
		return nil, errors.Join(fmt.Errorf("image %s has %d bytes, the disk needs %d", d.Path, f.Size(), size), f.Close())
	}
	return f, nil
}

// openNBDBase connects to the server of a replica's disk. The connection is not
// made anew when it is lost: what the server had not made durable would be
// missing unseen. The store fails instead, is opened again and applies again.
func openNBDBase(d Disk, size int64) (block.Device, error) {
	ctx, cancel := context.WithTimeout(context.Background(), nbdTimeout)
	defer cancel()
	c, err := nbd.DialURI(ctx, d.URI, nbd.ClientOptions{})
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", d.Name, err)
	}
	if c.Size() < size {
		return nil, errors.Join(fmt.Errorf("%s has %d bytes, the disk needs %d", d.URI, c.Size(), size), c.Close())
	}
	return c, nil
}

// makeImage makes an empty image. A link where the VM's directory would be leads
// somewhere else than the storage root this peer was given.
func makeImage(path string) error {
	dir := filepath.Dir(path)
	err := os.MkdirAll(filepath.Dir(dir), 0o711)
	if err == nil {
		if err = os.Mkdir(dir, 0o711); errors.Is(err, fs.ErrExist) {
			var st fs.FileInfo
			if st, err = os.Lstat(dir); err == nil && !st.IsDir() {
				err = fmt.Errorf("%s is no directory (%s); move it away", dir, st.Mode().Type())
			}
		}
	}
	if err != nil {
		return fmt.Errorf("make the replica's directory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("make the replica's image: %w", err)
	}
	return f.Close()
}

// ensureImage grows a sparse image to its size; it never shrinks one.
func ensureImage(path string, size int64, uid, gid *int) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("open the replica's image: %w (is its file system mounted?)", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", path)
	}
	if uid != nil && gid != nil {
		if err := f.Chown(*uid, *gid); err != nil {
			return fmt.Errorf("give the image to QEMU's user: %w", err)
		}
	}
	if st.Size() >= size {
		return nil
	}
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("size the replica's image: %w", err)
	}
	return f.Sync()
}

func (v *VM) baseIdentity(disk string) (points.Identity, error) {
	r := v.record()
	d, ok := r.disk(wire.DiskName(disk))
	if !ok {
		return points.Identity{}, fmt.Errorf("the VM has no disk %q", disk)
	}
	if d.Kind == diskNBD {
		return points.Identity{File: d.URI}, nil // nobody can tell whether it was touched
	}
	f, err := block.OpenFile(d.Path, block.FileOptions{ReadOnly: true, NoLock: true})
	if err != nil {
		return points.Identity{}, err
	}
	defer f.Close()
	id, err := f.Identity()
	if err != nil {
		return points.Identity{}, err
	}
	return points.FileIdentity(id), nil
}

// startKeeping opens the store and applies in the background.
func (v *VM) startKeeping(ctx context.Context) error {
	v.machine.Lock()
	defer v.machine.Unlock()
	v.mu.Lock()
	have := v.keep != nil
	v.mu.Unlock()
	if have {
		return nil
	}
	st, err := points.Open(v.storeConfig())
	if err != nil {
		return fmt.Errorf("open the replica store: %w", err)
	}
	if err := v.followDisks(st.Disks(), st.Ordinal()); err != nil {
		return errors.Join(fmt.Errorf("follow the newest state's disks: %w", err), st.Close())
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	k := &keeping{store: st, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(k.done)
		v.apply(run, k)
	}()
	v.mu.Lock()
	v.keep = k
	v.mu.Unlock()
	return nil
}

// stopKeeping closes the store; what was committed and not applied stays.
func (v *VM) stopKeeping() error {
	v.endMounts("this host stops keeping the replica")
	v.machine.Lock()
	defer v.machine.Unlock()
	v.mu.Lock()
	k := v.keep
	v.keep = nil
	v.mu.Unlock()
	if k == nil {
		return nil
	}
	v.endMounts("this host stops keeping the replica") // made since
	k.cancel()
	<-k.done
	if err := k.store.Close(); err != nil {
		return fmt.Errorf("close the replica store: %w", err)
	}
	return nil
}

// store returns the open store.
func (v *VM) store() (*points.Store, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.keep == nil {
		return nil, &wire.Error{Kind: wire.KindUnavailable, Text: "this host does not keep a replica of the VM now", Hint: "replicactl vm status " + v.rec.Name}
	}
	return v.keep.store, nil
}

// storeState is what plans ask of the store.
type storeState struct {
	points.Status
	CutTime time.Time
}

func (v *VM) storeStatus() (storeState, error) {
	s, err := v.store()
	if err != nil {
		return storeState{}, err
	}
	st := s.Status()
	out := storeState{Status: st, CutTime: st.Cut}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.facts.beat.After(out.CutTime) && v.facts.beatAt == st.Committed {
		out.CutTime = v.facts.beat
	}
	return out, nil
}

// createStore makes an empty store for a VM that is to be seeded.
func (v *VM) createStore() error {
	cfg := v.storeConfig()
	cfg.Bases = v.makeBase
	s, err := points.Create(cfg, v.deltaDisks())
	if errors.Is(err, points.ErrExists) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("make the replica store: %w", err)
	}
	return s.Close()
}

// adoptBase makes a store around images that are exactly at pos, or, with
// assume, around images that are nearly good: what differs must be sent before
// anything counts as committed.
func (v *VM) adoptBase(pos delta.Pos, assume bool) error {
	if err := v.stopKeeping(); err != nil {
		return err
	}
	cfg := v.storeConfig()
	if old, err := points.Open(cfg); err == nil {
		st := old.Status()
		if err := old.Close(); err != nil {
			return err
		}
		if st.State == points.Replica && st.Committed == pos && !assume {
			return nil // an earlier try got this far
		}
	}
	if !assume {
		s, err := points.CreateAt(cfg, pos, v.deltaDisks())
		if err != nil {
			return fmt.Errorf("make the replica store: %w", err)
		}
		return s.Close()
	}
	if err := points.Remove(fsx.Sub(v.fsys, storeDir)); err != nil {
		return err
	}
	s, err := points.Create(cfg, v.deltaDisks())
	if err != nil {
		return fmt.Errorf("make the replica store: %w", err)
	}
	for _, d := range v.deltaDisks() {
		if err := s.SeedAssume(d.Name); err != nil {
			return errors.Join(err, s.Close())
		}
	}
	return s.Close()
}

// completeStore makes anew what a crash left half-made: the empty store of a
// new replica, or the one around an old primary's images that gave its writes
// up. Neither holds anything that was committed.
func (v *VM) completeStore(ctx context.Context) error {
	r := v.record()
	fresh := r.Lineage.Generation.IsZero() && r.Next == nil
	released := r.Incomplete && !r.Lineage.Discard.IsZero() && r.Next == nil
	v.mu.Lock()
	open := v.keep != nil
	v.mu.Unlock()
	if open || !fresh && !released {
		return nil
	}
	if fresh && r.Existing {
		return v.takeGiven()
	}
	s, err := points.Open(v.storeConfig())
	if err == nil {
		st := s.Status()
		for _, d := range v.deltaDisks() {
			if released && st.State == points.Seeding {
				err = errors.Join(err, s.SeedAssume(d.Name))
			}
		}
		if err = errors.Join(err, s.Close()); err != nil || st.State != points.Promoted || fresh {
			return err
		}
	} else if !absent(err) {
		return fmt.Errorf("open the replica store: %w", err)
	}
	if released {
		return v.adoptBase(delta.Pos{}, true)
	}
	if err := v.createStore(); err != nil {
		return err
	}
	_, err = v.defineReplica(ctx)
	return err
}

func (v *VM) deltaDisks() []delta.Disk {
	var out []delta.Disk
	r := v.record()
	for _, d := range r.served() {
		out = append(out, delta.Disk{Name: string(d.Name), Size: d.Size})
	}
	return out
}

func (v *VM) applyAll(ctx context.Context) (string, error) {
	s, err := v.store()
	if err != nil {
		return "", err
	}
	before := s.Status()
	if err := s.ApplyAll(ctx); err != nil {
		return "", fmt.Errorf("apply what was received: %w", err)
	}
	return fmt.Sprintf("%s, %d bytes", count.Of(before.Backlog, "epoch"), before.Spool), nil
}

// sealStore ends the store's history at the promoted position. It keeps what
// the later steps need of it.
func (v *VM) sealStore(p *promoteVars) (string, error) {
	if p.Overlay != nil {
		return fmt.Sprintf("nothing ends before the commit, which ends %s", count.Of(p.Overlay.Points, "recovery point")), v.stopKeeping()
	}
	if err := v.startKeeping(context.Background()); err != nil {
		if errors.Is(err, points.ErrPromoted) {
			return "", nil
		}
		return "", err
	}
	s, err := v.store()
	if err != nil {
		return "", err
	}
	if err := v.followDisks(s.Disks(), s.Ordinal()); err != nil { // they are cut to what the record says
		return "", fmt.Errorf("follow the disks' sizes: %w", err)
	}
	blobs, err := s.Firmware(p.At)
	if err != nil && !errors.Is(err, points.ErrPromoted) {
		return "", fmt.Errorf("read the firmware state: %w", err)
	}
	if err == nil {
		if _, err := firmware.Keep(v.fsys, blobs); err != nil {
			return "", err
		}
	}
	if s.Status().State == points.Promoted {
		return "", nil
	}
	v.endMounts("the recovery points end with the promotion")
	seal, err := s.Promote(p.Generation, v.record().Lineage.Forced)
	if err != nil {
		return "", fmt.Errorf("end the replica's history: %w", err)
	}
	if seal.At != p.At {
		return "", fmt.Errorf("the replica's history ended at %v, the promotion is at %v: its images hold more than was decided for", seal.At, p.At)
	}
	return count.Of(seal.Points, "recovery point") + " ended", nil
}
