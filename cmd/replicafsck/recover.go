package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"kvmreplica/internal/block"
	"kvmreplica/internal/count"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

func (c *command) recover(dir string) error {
	modes := 0
	for _, on := range []bool{c.inPlace, c.outDir != "", c.copyDir != ""} {
		if on {
			modes++
		}
	}
	if modes != 1 {
		return fmt.Errorf("%w: recover wants one of --in-place, --out OUT, --read-only-copy OUT", errUsage)
	}
	dir, err := c.replicaDir(dir)
	if err != nil {
		return err
	}
	c.remember(dir)
	if err := c.endTrial(dir); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	if c.copyDir != "" {
		return c.copyOnly(dir)
	}
	return c.promote(dir)
}

// copyOnly copies a state and changes nothing in the replica.
func (c *command) copyOnly(dir string) (err error) {
	s, _, err := c.open(dir, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	pos, err := c.position(s)
	if err != nil {
		return err
	}
	v, err := s.View(pos)
	if err != nil {
		return err
	}
	ordinal := s.Ordinal()
	for _, p := range s.Points() {
		if p.Pos == pos {
			ordinal = p.Ordinal
		}
	}
	for _, d := range c.whole(v.Disks(), ordinal) {
		dev, err := v.Disk(d.Name)
		if err == nil {
			err = c.copyImage(dev, c.copyDir, d.Name)
		}
		if err != nil {
			return errors.Join(err, v.Close())
		}
	}
	fmt.Fprintf(c.out, "copied      %v; the replica was not promoted\n", pos)
	return v.Close()
}

// position is the point asked for, or the newest committed state.
func (c *command) position(s *points.Store) (delta.Pos, error) {
	if c.point == 0 {
		return s.Committed(), nil
	}
	var found []delta.Pos
	for _, p := range s.Points() {
		if p.Pos.Epoch == c.point {
			found = append(found, p.Pos)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return delta.Pos{}, fmt.Errorf("epoch %d exists in %d generations; keep to the newest state", c.point, len(found))
	case s.Committed().Epoch == c.point:
		return s.Committed(), nil
	}
	return delta.Pos{}, fmt.Errorf("no recovery point of epoch %d; list them with: replicafsck dump DIR", c.point)
}

// promote finishes what is committed, makes the promotion durable and only
// then lets go of the images.
func (c *command) promote(dir string) error {
	s, d, err := c.open(dir, false)
	if err != nil {
		return err
	}
	again := s.Status().Seal != nil // somebody may use the images by now
	seal, err := c.sealed(s)
	disks, absent, ordinal := s.Disks(), s.Status().Absent, s.Ordinal() // as of the seal
	if err := errors.Join(err, s.Close()); err != nil {
		if errors.Is(err, points.ErrDamaged) {
			err = fmt.Errorf("%w\nthe newest readable state can be had with: replicafsck recover %s --read-only-copy OUT", err, dir)
		}
		return err
	}
	fmt.Fprintf(c.out, "promoted    at %v to generation %v (forced); %s ended\n", seal.At, seal.Generation, count.Of(seal.Points, "recovery point"))
	for _, k := range c.whole(disks, ordinal) {
		path := d.ImagePath(k.Name)
		if !again {
			if err := trim(path, k.Size); err != nil {
				return err
			}
		}
		if c.inPlace {
			fmt.Fprintf(c.out, "image       %s %s (raw)\n", k.Name, path)
			continue
		}
		f, err := block.OpenFile(path, block.FileOptions{ReadOnly: true})
		if err == nil {
			err = errors.Join(c.copyImage(f, c.outDir, k.Name), f.Close())
		}
		if err != nil {
			return err
		}
	}
	for _, n := range absent { // only points had them
		if _, err := os.Stat(d.ImagePath(n)); err == nil {
			fmt.Fprintf(c.out, "absent      %s %s may be deleted\n", n, d.ImagePath(n))
		}
	}
	return nil
}

// trim cuts off what an image has behind its disk: the store kept it for points
// that have ended.
func trim(path string, size int64) error {
	f, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		return err
	}
	if f.Size() > size {
		err = f.Resize(size)
	}
	return errors.Join(err, f.Close())
}

func (c *command) sealed(s *points.Store) (points.Seal, error) {
	if st := s.Status(); st.Seal != nil {
		return *st.Seal, nil // by an earlier run
	}
	var g delta.Generation
	if _, err := rand.Read(g[:]); err != nil {
		return points.Seal{}, err
	}
	ctx := context.Background()
	if st := s.Status(); st.State == points.Rolling {
		return s.PromoteAt(ctx, st.Rolling.At, st.Rolling.Generation)
	}
	if err := s.ApplyAll(ctx); err != nil {
		return points.Seal{}, err
	}
	pos, err := c.position(s)
	if err != nil {
		return points.Seal{}, err
	}
	if err := c.keepFirmware(s, pos); err != nil {
		return points.Seal{}, err
	}
	if pos != s.Committed() {
		return s.PromoteAt(ctx, pos, g)
	}
	return s.Promote(g, true)
}

// copyImage writes a device to DIR/NAME.raw, sparse, and makes it durable.
func (c *command) copyImage(dev block.Device, dir, name string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(dir, name+".raw")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err = block.Copy(context.Background(), f, dev, nil); err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("copy disk %s to %s: %w", name, path, err)
	}
	fmt.Fprintf(c.out, "image       %s %s (raw)\n", name, path)
	return nil
}
