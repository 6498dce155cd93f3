package dataplane

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/wire"
)

// image is the real storage of one disk, locked.
type image struct {
	cfg      DiskConfig
	dev      block.Device
	under    block.Device                   // the image itself while dev is an overlay above it, else nil
	file     *block.File                    // nil for kind nbd
	upstream *upstream                      // nil but for kind nbd
	ident    func() (block.Identity, error) // nil: ask file
	locked   atomic.Bool                    // QEMU's lock bytes are held
}

// openImages opens and locks every image, or none.
func openImages(ctx context.Context, cfg Config, parts Parts, chosen map[wire.DiskName]bool) (_ []*image, err error) {
	var all []*image
	defer func() {
		if err != nil {
			err = errors.Join(err, closeImages(all))
		}
	}()
	for _, d := range cfg.Disks {
		img, err := parts.image(ctx, d, cfg.DirtyBytes)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Name, err)
		}
		all = append(all, img)
		want := d.QemuLock
		if v, ok := chosen[d.Name]; ok {
			want = v
		}
		if want {
			if err := img.lock(); err != nil {
				return nil, fmt.Errorf("disk %s: %w", d.Name, err)
			}
		}
	}
	return all, nil
}

func openImage(ctx context.Context, d DiskConfig, dirty int64) (*image, error) {
	img := &image{cfg: d}
	if d.Kind == NBD {
		u, err := dialUpstream(ctx, d.URI, nbd.ClientOptions{ReadOnly: d.ReadOnly})
		if err != nil {
			return nil, err
		}
		img.dev, img.upstream = u, u
	} else {
		f, err := block.OpenFile(d.Path, block.FileOptions{ReadOnly: d.ReadOnly, DirtyLimit: dirty})
		if err != nil {
			return nil, err
		}
		img.dev, img.file = f, f
		if err := img.checkKind(); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	// Longer is fine: the tracker takes up what is new.
	if n := img.dev.Size(); n < d.Size && d.Overlay == "" {
		return nil, errors.Join(&wire.Error{
			Kind: wire.KindRefused,
			Text: fmt.Sprintf("the image has %d bytes, %d are configured", n, d.Size),
			Hint: fmt.Sprintf("bring it back to its size: qemu-img resize -f raw %s %d; what was cut off is zeros then: replicactl vm resync. Or disable and enable the protection", d.Path, d.Size),
		}, img.dev.Close())
	}
	return img, nil
}

// grown is what the image has behind size, in bytes.
func (i *image) grown(size int64) int64 {
	if i.file == nil || i.under != nil {
		return 0
	}
	id, err := i.file.Identity()
	if err != nil {
		return 0
	}
	return max(0, id.Size-size)
}

func (i *image) checkKind() error {
	id, err := i.file.Identity()
	if err != nil {
		return err
	}
	if is := id.Kind == block.KindBlockDevice; is != (i.cfg.Kind == Block) {
		return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("%s is a %s, kind %s is configured", i.cfg.Path, id.Kind, i.cfg.Kind)}
	}
	return nil
}

// identity tells the tracker whether somebody touched the image; an NBD
// server's storage cannot be asked.
func (i *image) identity() func() (block.Identity, error) {
	if i.ident != nil {
		return i.ident
	}
	if i.file == nil {
		return nil
	}
	return i.file.Identity
}

// lock takes QEMU's lock bytes; other servers' storage has none.
func (i *image) lock() error {
	if i.file == nil || i.locked.Load() {
		return nil
	}
	if err := i.file.LockQEMU(); err != nil {
		return &inUse{&wire.Error{Kind: wire.KindRefused, Text: err.Error(), Hint: "stop that program, then repeat the command"}, err}
	}
	i.locked.Store(true)
	return nil
}

func (i *image) unlock() error {
	if i.file == nil || !i.locked.Load() {
		return nil
	}
	if err := i.file.UnlockQEMU(); err != nil {
		return err
	}
	i.locked.Store(false)
	return nil
}

// trustsHoles reports whether SEEK_DATA may be believed after a sync: only on
// file systems known to tell the truth.
func (i *image) trustsHoles() bool {
	if i.file == nil || i.under != nil {
		return false
	}
	fd, ok := i.file.ReadFD()
	if !ok {
		return false
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC:
		return true
	}
	return false
}

func closeImages(all []*image) error {
	var errs []error
	for _, i := range all {
		if err := i.dev.Close(); err != nil {
			errs = append(errs, fmt.Errorf("disk %s: %w", i.cfg.Name, err))
		}
		if i.under == nil {
			continue
		}
		if err := i.under.Close(); err != nil {
			errs = append(errs, fmt.Errorf("disk %s: %w", i.cfg.Name, err))
		}
	}
	return errors.Join(errs...)
}
