package points

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// Dir is a directory of this machine that holds a whole replica: the store's
// files and, as DISK.raw unless Images says otherwise, its images.
type Dir struct {
	Path     string
	Images   map[string]string // paths by disk name, for images elsewhere
	ReadOnly bool

	mu   sync.Mutex
	open map[string]*block.File // the newest device of each disk; guarded by mu
}

// Configure fills in FS, Bases, Identity, Free and ReadOnly.
func (d *Dir) Configure(cfg *Config) error {
	f, err := fsx.OS(d.Path)
	if err != nil {
		return err
	}
	cfg.FS, cfg.Bases, cfg.Identity, cfg.Free, cfg.ReadOnly = f, d.Base, d.Identity, d.Free, d.ReadOnly
	return nil
}

// ImagePath is where a disk's image is.
func (d *Dir) ImagePath(disk string) string {
	if p, ok := d.Images[disk]; ok {
		return p
	}
	return filepath.Join(d.Path, disk+".raw")
}

// Base opens the image of a disk under our lock, creating or growing it
// (sparse) to size.
func (d *Dir) Base(disk string, size int64) (block.Device, error) {
	path := d.ImagePath(disk)
	if !d.ReadOnly {
		if err := makeImage(path, size); err != nil {
			return nil, fmt.Errorf("image %s: %w", path, err)
		}
	}
	f, err := block.OpenFile(path, block.FileOptions{ReadOnly: d.ReadOnly})
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open == nil {
		d.open = map[string]*block.File{}
	}
	d.open[disk] = f
	return f, nil
}

// makeImage makes sure that a regular file is there and long enough; a block
// device must be long enough already.
func makeImage(path string, size int64) error {
	st, err := os.Stat(path)
	if err == nil && (!st.Mode().IsRegular() || st.Size() >= size) {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(size), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Identity is that of the open image.
func (d *Dir) Identity(disk string) (Identity, error) {
	d.mu.Lock()
	f := d.open[disk]
	d.mu.Unlock()
	if f == nil {
		return Identity{}, fmt.Errorf("%w: image of disk %s is not open", ErrState, disk)
	}
	id, err := f.Identity()
	if err != nil {
		return Identity{}, err
	}
	return FileIdentity(id), nil
}

// FileIdentity is the identity of an image on this machine. Everybody who opens
// the same store must use it, or the image looks changed. The change time does
// not count: libvirt gives images to QEMU's user and back. Neither does the
// number of a device where something lasting names the image
// (block.Identity.Lasting).
func FileIdentity(id block.Identity) Identity {
	text := func(id block.Identity) string {
		return fmt.Sprintf("%v/%d/%d/%d/%d", id.Kind, id.Device, id.Inode, id.BirthTime, id.Size)
	}
	old := id
	if id.Kind == block.KindBlockDevice {
		old.Inode = 0
	}
	if id.Lasting() {
		id.Device = 0
	}
	return Identity{File: text(id), Numbered: text(old), State: fmt.Sprintf("%d", id.MtimeNS)}
}

// Free is the free space of the file system in bytes.
func (d *Dir) Free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.Path, &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: d.Path, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}
