package cbt

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/zeebo/blake3"

	"kvmreplica/internal/fsx"
)

// The exact file of a clean stop: the dirty granules of every disk as run
// lengths, proven by the digest in the superblock.
const exactMagic = "KVREXA1\n"

// atWriter writes a file front to back and digests it.
type atWriter struct {
	f   fsx.File
	off int64
	h   *blake3.Hasher
}

func (w *atWriter) Write(p []byte) (int, error) {
	n, err := w.f.WriteAt(p, w.off)
	w.off += int64(n)
	_, _ = w.h.Write(p[:n]) // a hash never fails
	return n, err
}

// writeExact makes the dirty set durable in a new file. Nothing may be dirtied
// meanwhile.
func (g *Group) writeExact(set id16) (ref exactRef, err error) {
	if ref.id, err = newID(); err != nil {
		return ref, err
	}
	f, err := g.cfg.FS.Open(exactName(ref.id), os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return ref, err
	}
	w := &atWriter{f: f, h: blake3.New()}
	buf := bufio.NewWriterSize(w, 1<<20)
	if err := g.encodeExact(buf, set); err != nil {
		return ref, errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return ref, errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return ref, err
	}
	ref.length = uint64(w.off)
	copy(ref.digest[:], w.h.Sum(nil))
	return ref, g.cfg.FS.SyncDir(".")
}

func (g *Group) encodeExact(w *bufio.Writer, set id16) error {
	put := func(v uint64) {
		_, _ = w.Write(binary.AppendUvarint(w.AvailableBuffer(), v)) // Flush reports
	}
	_, _ = w.WriteString(exactMagic)
	_, _ = w.Write(set[:])
	put(uint64(len(g.disks)))
	for _, d := range g.disks {
		st := d.st.Load()
		_, _ = w.Write(d.id[:])
		put(uint64(st.size))
		var at uint64
		for s := range st.fine[g.slot].runs() {
			put(s.hi - s.lo)
			put(s.lo - at)
			at = s.hi
		}
		put(0) // no run is empty: end of the disk
	}
	return w.Flush()
}

// atReader reads a file front to back and digests it.
type atReader struct {
	f   fsx.File
	off int64
	h   *blake3.Hasher
}

func (r *atReader) Read(p []byte) (int, error) {
	n, err := r.f.ReadAt(p, r.off)
	r.off += int64(n)
	_, _ = r.h.Write(p[:n]) // a hash never fails
	return n, err
}

// readExact proves the exact file first and decodes it then; found is called
// with runs of granules per disk in the superblock's order. An error means
// that the file cannot be believed; what was found before it counts nothing.
func readExact(fsys fsx.FS, sb *super, found func(disk int, s span)) (err error) {
	f, err := fsys.Open(exactName(sb.exact.id), os.O_RDONLY)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if n, err := f.Size(); err != nil || uint64(n) != sb.exact.length {
		return errors.Join(fmt.Errorf("%w: exact file has %d bytes, want %d", errDamaged, n, sb.exact.length), err)
	}
	r := &atReader{f: f, h: blake3.New()}
	if _, err := io.Copy(io.Discard, io.LimitReader(r, int64(sb.exact.length))); err != nil {
		return err
	}
	if [32]byte(r.h.Sum(nil)) != sb.exact.digest {
		return fmt.Errorf("%w: exact file digest", errDamaged)
	}
	return decodeExact(bufio.NewReaderSize(&atReader{f: f, h: blake3.New()}, 1<<20), sb, found)
}

func decodeExact(r *bufio.Reader, sb *super, found func(disk int, s span)) error {
	head := make([]byte, 8+16)
	if _, err := io.ReadFull(r, head); err != nil {
		return err
	}
	if string(head[:8]) != exactMagic || id16(head[8:]) != sb.set {
		return fmt.Errorf("%w: not this tracker's exact file", errDamaged)
	}
	n, err := binary.ReadUvarint(r)
	if err != nil || n != uint64(len(sb.disks)) {
		return errors.Join(fmt.Errorf("%w: exact file has %d disks, want %d", errDamaged, n, len(sb.disks)), err)
	}
	for i := range sb.disks {
		if err := decodeExactDisk(r, &sb.disks[i], func(s span) { found(i, s) }); err != nil {
			return fmt.Errorf("disk %s: %w", sb.disks[i].name, err)
		}
	}
	return nil
}

func decodeExactDisk(r *bufio.Reader, d *superDisk, found func(span)) error {
	var id id16
	if _, err := io.ReadFull(r, id[:]); err != nil {
		return err
	}
	size, err := binary.ReadUvarint(r)
	if err != nil || id != d.id || size != uint64(d.size) {
		return errors.Join(fmt.Errorf("%w: other disk or size", errDamaged), err)
	}
	granules := (size + GranuleSize - 1) >> granuleShift
	for at := uint64(0); ; {
		n, err := binary.ReadUvarint(r)
		if err != nil || n == 0 {
			return err
		}
		gap, err := binary.ReadUvarint(r)
		if err != nil {
			return err
		}
		if gap > granules-at || n > granules-at-gap {
			return fmt.Errorf("%w: run outside the disk", errDamaged)
		}
		found(span{at + gap, at + gap + n})
		at += gap + n
	}
}
