package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

func (c *command) dump(target string) error {
	st, err := os.Stat(target)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return c.dumpStream(target)
	}
	s, _, err := c.open(target, true)
	if err != nil {
		return err
	}
	c.summary(s)
	c.dumpPoints(s)
	return s.Close()
}

func (c *command) dumpPoints(s *points.Store) {
	for _, p := range s.Points() {
		fmt.Fprintf(c.out, "point       epoch %d %v cut %v, %d bytes of undo", p.Pos.Epoch, p.Pos, p.Cut, p.Bytes)
		if !slices.Equal(p.Disks, s.Disks()) {
			for _, d := range p.Disks {
				fmt.Fprintf(c.out, ", %s %d bytes", d.Name, d.Size)
			}
		}
		if p.Pinned {
			fmt.Fprint(c.out, ", pinned")
		}
		if p.Damage != nil {
			fmt.Fprintf(c.out, ", damaged: %v", p.Damage)
		}
		fmt.Fprintln(c.out)
	}
}

// dumpStream decodes and verifies a delta stream frame by frame.
func (c *command) dumpStream(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	d := delta.NewDecoder(f)
	h, err := d.Header()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	cd, err := delta.NewChunkDecoder()
	if err != nil {
		return err
	}
	defer cd.Close()
	fmt.Fprintf(c.out, "vm          %v\ngeneration  %v\nepoch       %d\nparent      %v\nseed        %v\n", h.VM, h.Generation, h.Epoch, h.Parent, h.Seed)
	for i, k := range h.Disks {
		fmt.Fprintf(c.out, "disk %d      %s %d bytes\n", i, k.Name, k.Size)
	}
	var tally delta.Tally
	for {
		frame, t, err := d.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil && t == delta.FrameManifest {
			err = c.dumpManifest(frame, &h, &tally)
		} else if err == nil {
			err = c.dumpChunk(frame, &h, &tally, cd)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
}

func (c *command) dumpChunk(frame []byte, h *delta.Header, tally *delta.Tally, cd *delta.ChunkDecoder) error {
	k, err := cd.Decode(frame)
	if err != nil {
		return err
	}
	if err := k.Check(h); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "chunk %-5d disk %d at %d, %d bytes in %d extents, %d raw, %d stored (%v)\n",
		k.Index, k.Disk, k.Extents[0].Off, k.Covered(), len(k.Extents), len(k.Raw), k.Stored, k.Codec)
	return tally.Add(k.Index, k.Digest, k.Covered())
}

func (c *command) dumpManifest(frame []byte, h *delta.Header, tally *delta.Tally) error {
	m, err := delta.ParseManifest(frame)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "manifest    %s, %d bytes, cut %v\nposition    %v\n", count.Of(m.Chunks, "chunk"), m.Covered, m.Cut, m.Pos())
	for _, b := range m.Firmware {
		fmt.Fprintf(c.out, "firmware    %v %d bytes\n", b.Kind, len(b.Data))
	}
	return errors.Join(m.Matches(h), tally.Check(&m))
}
