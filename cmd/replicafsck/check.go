package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// open opens the replica in dir.
func (c *command) open(dir string, readOnly bool) (*points.Store, *points.Dir, error) {
	d := &points.Dir{Path: dir, Images: c.images, ReadOnly: readOnly}
	var cfg points.Config
	if err := d.Configure(&cfg); err != nil {
		return nil, nil, err
	}
	s, err := points.Open(cfg)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w (is %s the directory of a replica, with all its images? name others with --disk NAME=PATH)", err, dir)
	}
	return s, d, err
}

func (c *command) check(dir string) (err error) {
	if dir, err = c.replicaDir(dir); err != nil {
		return err
	}
	s, _, err := c.open(dir, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	found := 0
	err = s.Check(context.Background(), func(e error) {
		found++
		fmt.Fprintf(c.out, "damage: %v\n", e)
	})
	if err != nil {
		return err
	}
	c.summary(s)
	st := s.Status()
	if st.State == points.Suspect {
		return errors.New("an image was changed from outside; nothing will be applied to it")
	}
	if found > 0 {
		return errFound
	}
	return nil
}

// summary shows what an operator asks first.
func (c *command) summary(s *points.Store) {
	st := s.Status()
	fmt.Fprintf(c.out, "vm          %v\nstate       %s\n", st.VM, st.State)
	for _, d := range st.Disks {
		if st.State == points.Seeding {
			fmt.Fprintf(c.out, "disk        %s %d bytes, %d seeded\n", d.Name, d.Size, st.Seeded[d.Name])
		} else {
			fmt.Fprintf(c.out, "disk        %s %d bytes\n", d.Name, d.Size)
		}
	}
	for _, n := range st.Absent {
		in := 0
		for _, p := range s.Points() {
			if slices.ContainsFunc(p.Disks, func(d delta.Disk) bool { return d.Name == n }) {
				in++
			}
		}
		fmt.Fprintf(c.out, "absent      %s, in %s\n", n, count.Of(in, "recovery point"))
	}
	if st.Seal != nil {
		fmt.Fprintf(c.out, "promoted    at %v to generation %v, forced %v, %v\n", st.Seal.At, st.Seal.Generation, st.Seal.Forced, st.Seal.Time)
		return
	}
	if st.Committed.IsZero() {
		return
	}
	fmt.Fprintf(c.out, "committed   %v (cut %v)\napplied     %v\nbacklog     %s, %d bytes\n", st.Committed, st.Cut, st.Applied, count.Of(st.Backlog, "epoch"), st.Spool)
	if p := st.Partial; p != nil {
		fmt.Fprintf(c.out, "partial     epoch %d, %s\n", p.Epoch, count.Of(p.Chunks, "chunk"))
	}
	if st.VerifyAll != "" {
		fmt.Fprintf(c.out, "verify all  %s\n", st.VerifyAll)
	}
	fmt.Fprintf(c.out, "points      %d, %d bytes of undo\n", st.Points, st.Undo)
}
