package points

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// Copied is what CopyTo did.
type Copied struct {
	Points int   // recovery points in the copy, besides the newest state
	Bytes  int64 // copied, not shared
	Shared bool  // the images share their blocks with the store's
}

// CopyTo writes the whole store, images and all, into the directory dir, which
// must not exist: a Dir that anybody may open. Everything must be applied. Where
// the file system can, blocks are shared. The copy is durable when CopyTo
// returns; a copy that failed is removed. Nothing is received, applied or
// thinned meanwhile.
func (s *Store) CopyTo(ctx context.Context, dir string) (Copied, error) {
	s.maint.Lock()
	defer s.maint.Unlock()
	s.recv.Lock()
	defer s.recv.Unlock()
	c, err := s.copyTo(ctx, dir)
	if err != nil {
		return Copied{}, noSpace("copy the replica store", err)
	}
	return c, nil
}

func (s *Store) copyTo(ctx context.Context, dir string) (c Copied, err error) {
	c.Points = len(s.Points())
	s.mu.Lock()
	err = s.receiving()
	sup, behind := s.sup.clone(), len(s.epochs)
	s.mu.Unlock()
	if err != nil {
		return c, err
	}
	if sup.role != roleReplica || behind > 0 {
		return c, fmt.Errorf("%w: %d committed epochs are not applied", ErrState, behind)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return c, err
	}
	if err := s.fill(ctx, dir, sup, &c); err != nil {
		return c, errors.Join(err, os.RemoveAll(dir))
	}
	return c, nil
}

// fill writes the superblock last: a directory without it is no store.
func (s *Store) fill(ctx context.Context, dir string, sup *super, c *Copied) error {
	dst := &Dir{Path: dir}
	out, err := fsx.OS(dir)
	if err != nil {
		return err
	}
	for _, sub := range []string{spoolDir, undoDir, fwDir} {
		if err := out.MkdirAll(sub); err != nil {
			return err
		}
	}
	c.Shared = true
	for i := range sup.disks {
		d := &sup.disks[i]
		if d.size == 0 && s.undoLimit(i) == 0 {
			continue // removed, and nothing has it
		}
		dev, err := s.base(i)
		if err == nil {
			err = copyImage(ctx, dst.ImagePath(d.name), dev, c)
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.name, err)
		}
		if d.size == 0 {
			continue // points only are read from it
		}
		if err := identifyCopy(dst, d); err != nil {
			return err
		}
	}
	var names []string
	for _, g := range s.segs {
		names = append(names, g.name())
	}
	for _, f := range []string{fwDir + "/", pinsName} {
		more, err := s.filesIn(f)
		if err != nil {
			return err
		}
		names = append(names, more...)
	}
	for _, n := range names {
		if err := errors.Join(ctx.Err(), s.copyFile(n, filepath.Join(dir, n), c)); err != nil {
			return err
		}
	}
	for _, sub := range []string{spoolDir, undoDir, fwDir, "."} {
		if err := out.SyncDir(sub); err != nil {
			return err
		}
	}
	sup.flags |= superClean
	sup.seq = 1
	if err := createSuper(out, sup); err != nil {
		return err
	}
	parent, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return err
	}
	return errors.Join(parent.Sync(), parent.Close())
}

// filesIn lists a directory of the store, or names one file, if they are there.
func (s *Store) filesIn(name string) ([]string, error) {
	dir, file := filepath.Split(name)
	if dir == "" {
		dir = "."
	}
	found, err := s.cfg.FS.List(filepath.Clean(dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if file != "" {
		if slices.Contains(found, file) {
			return []string{name}, nil
		}
		return nil, nil
	}
	for i := range found {
		found[i] = dir + found[i]
	}
	return found, nil
}

// cloner is an image that may share its blocks; *block.File is one.
type cloner interface {
	Clone(dst *os.File) error
}

// copyImage copies one image, or shares it.
func copyImage(ctx context.Context, path string, src block.Device, c *Copied) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = block.ErrNoClone
	if img, ok := src.(cloner); ok {
		err = img.Clone(f)
	}
	if errors.Is(err, block.ErrNoClone) {
		c.Shared = false
		last := int64(0)
		err = block.Copy(ctx, f, src, func(n int64) { c.Bytes, last = c.Bytes+n-last, n })
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// identifyCopy records what an image's copy looks like.
func identifyCopy(dst *Dir, d *superDiskInfo) error {
	f, err := block.OpenFile(dst.ImagePath(d.name), block.FileOptions{ReadOnly: true, NoLock: true})
	if err != nil {
		return err
	}
	id, err := f.Identity()
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	i := FileIdentity(id)
	d.file, d.identity = blockDigest([]byte(i.File)), blockDigest([]byte(i.State))
	return nil
}

// copyFile copies a file of the store.
func (s *Store) copyFile(name, to string, c *Copied) error {
	in, err := s.cfg.FS.Open(name, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // read only
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(out, io.NewSectionReader(in, 0, 1<<62))
	c.Bytes += n
	if err == nil {
		err = out.Sync()
	}
	return errors.Join(err, out.Close())
}
