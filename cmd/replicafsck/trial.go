package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/standby"
)

// onTrial reads the overlay of a failover that is not final yet; nil when there
// is none. store is the directory of the VM's replica store.
func onTrial(store string) (*overlay.Info, error) {
	dir, err := fsx.OS(trialDir(store))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	info, err := overlay.Read(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Phase == overlay.Done {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &info, nil
}

func trialDir(store string) string {
	return filepath.Join(filepath.Dir(filepath.Clean(store)), "overlay")
}

// endTrial makes a failover final whose guest ran beside the images: they are
// brought to what the guest wrote. Nothing else may be done with such images.
func (c *command) endTrial(store string) error {
	info, err := onTrial(store)
	if err != nil || info == nil {
		return err
	}
	var bytes int64
	for _, n := range info.Bytes {
		bytes += n
	}
	what := fmt.Sprintf("since a failover to %v the guest wrote %d bytes beside the images", info.Head.At, bytes)
	switch {
	case c.copyDir != "":
		fmt.Fprintf(c.out, "warning     %s: they are NOT in the copy\n", what)
		return nil
	case c.point != 0:
		return fmt.Errorf("%s; --point would lose them: copy that point with --read-only-copy OUT", what)
	case !c.keepWrites && info.Phase == overlay.Running:
		return fmt.Errorf("%s; to keep them and make the failover final (all recovery points end): repeat with --keep-writes; to give them up: start replicad and run: replicactl failover cancel", what)
	}
	return c.flatten(store)
}

func (c *command) flatten(store string) (err error) {
	d := &points.Dir{Path: store, Images: c.images}
	var cfg standby.Config
	if err := d.Configure(&cfg.Store); err != nil {
		return err
	}
	vm := filepath.Base(filepath.Dir(filepath.Clean(store)))
	images := map[string]*block.File{}
	defer func() {
		for _, f := range images {
			err = errors.Join(err, f.Close())
		}
	}()
	cfg.Image = func(disk string) (block.Device, error) {
		if f, ok := images[disk]; ok {
			return f, nil
		}
		f, err := block.OpenFile(d.ImagePath(disk), block.FileOptions{})
		if err != nil {
			return nil, fmt.Errorf("%w (if it is the VM's own data plane: shut the guest down, then end the process that keeper.pid in %s/vm/%s names)", err, c.runDir, vm)
		}
		images[disk] = f
		return f, f.LockQEMU()
	}
	cfg.Store.Identity = func(disk string) (points.Identity, error) {
		f, ok := images[disk]
		if !ok {
			return points.Identity{}, fmt.Errorf("disk %s is not open", disk)
		}
		id, err := f.Identity()
		return points.FileIdentity(id), err
	}
	if cfg.Overlay.FS, err = fsx.OS(trialDir(store)); err != nil {
		return err
	}
	cfg.Overlay.Data = func(disk string, _ int64) (block.Device, error) {
		return block.OpenFile(d.ImagePath(disk)+".overlay", block.FileOptions{})
	}
	// What was answered and not flushed lives in boot-scoped memory.
	if shared, serr := fsx.OS(filepath.Join(c.runDir, "shm", vm)); serr == nil {
		boot, berr := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if berr != nil {
			return berr
		}
		cfg.Overlay.Shared, cfg.Overlay.BootID = shared, strings.TrimSpace(string(boot))
	}
	s, err := standby.Open(cfg)
	if err != nil {
		return err
	}
	err = s.Commit()
	if err == nil {
		err = s.Flatten(context.Background(), nil)
	}
	st := s.Status()
	if err = errors.Join(err, s.Close()); err != nil {
		return fmt.Errorf("bring the images to what the guest wrote: %w; repeat the command", err)
	}
	fmt.Fprintf(c.out, "final       the failover to %v; %d bytes were written into the images\n", st.Head.At, st.Moved)
	for _, k := range st.Head.Disks {
		if err := os.Remove(d.ImagePath(k.Name) + ".overlay"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
