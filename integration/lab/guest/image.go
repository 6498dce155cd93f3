package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
)

// BlankImage makes a sparse raw image of the given size; the guest formats it
// at its first boot.
func BlankImage(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// RootImage makes a raw image whose ext4 file system is a root of its own,
// with labinit as /sbin/init. Boot it with Domain.Root.
func RootImage(ctx context.Context, files Files, path string, size int64) error {
	dir, err := os.MkdirTemp(filepath.Dir(path), "root-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	t := newTree()
	t.file("/sbin/init", files.Init, 0o755)
	if err := t.userland(); err != nil {
		return err
	}
	t.content("/etc/fstab", []byte("/dev/vda / ext4 defaults 0 1\n"), 0o644)
	t.content("/etc/hostname", []byte("lab-guest\n"), 0o644)
	t.dir("/lab")
	if err := t.extract(dir); err != nil {
		return err
	}
	if err := BlankImage(path, size); err != nil {
		return err
	}
	_, err = in(ctx, "/", "mke2fs", "-q", "-t", "ext4", "-F", "-d", dir, path)
	return err
}
