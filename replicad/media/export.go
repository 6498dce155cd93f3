package media

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"filippo.io/age"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// Source is what is exported.
type Source struct {
	VM, Name string
	Disks    []SourceDisk
}

// SourceDisk is one disk; reads may see what the guest is about to write.
type SourceDisk struct {
	Name   string
	Device block.Device
}

func (s Source) disks() (out []Disk) {
	for _, d := range s.Disks {
		out = append(out, Disk{Name: d.Name, Size: d.Device.Size()})
	}
	return out
}

// Options tune an export; the zero value is good.
type Options struct {
	Key      Key
	Piece    int64 // bytes of a disk per file; 0 = 256 MiB
	Now      func() time.Time
	Progress func(done, total int64)
}

// Export writes the disks into f, or goes on with an export of them that was
// interrupted: pieces that are complete stay as they are.
func Export(ctx context.Context, f fsx.FS, s Source, o Options) (Medium, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	m, err := begin(f, s, o)
	if err != nil {
		return m, fmt.Errorf("export %s: %w", s.Name, err)
	}
	e := &exporter{fs: f, m: m, o: o, total: m.Bytes()}
	if err := e.run(ctx, s); err != nil {
		return m, fmt.Errorf("export %s: %w", s.Name, err)
	}
	m.Complete = o.Now().UTC()
	return m, fsx.WriteJSON(f, mediumFile, m)
}

// begin finds the export that is gone on with, or makes a new one.
func begin(f fsx.FS, s Source, o Options) (Medium, error) {
	m, err := Load(f)
	if err == nil {
		if err = m.same(s); err == nil {
			err = m.fits(o.Key)
		}
		if err == nil {
			err = f.SyncDir(".") // its names may be in memory only
		}
		return m, err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	if names, err := f.List("."); err != nil || len(names) > 0 && (len(names) > 1 || names[0] != mediumFile+fsx.TempSuffix) {
		return m, errors.Join(err, fmt.Errorf("%w: there is no %s, but other files", ErrForeign, mediumFile))
	}
	m = Medium{Version: version, VM: s.VM, Name: s.Name, Disks: s.disks(), Piece: o.Piece, Begun: o.Now().UTC()}
	if m.Piece == 0 {
		m.Piece = pieceSize
	}
	if m.ID, err = newID(); err != nil {
		return m, err
	}
	if _, err := m.header(); err != nil {
		return m, err
	}
	if err := m.protect(o.Key); err != nil {
		return m, err
	}
	return m, fsx.WriteJSON(f, mediumFile, m)
}

type exporter struct {
	fs          fsx.FS
	m           Medium
	o           Options
	done, total int64
}

func (e *exporter) run(ctx context.Context, s Source) error {
	h, err := e.m.header()
	if err != nil {
		return err
	}
	comp, err := delta.NewChunkEncoder(delta.ChunkOptions{Discard: true})
	if err != nil {
		return err
	}
	for i, d := range s.Disks {
		for n := range e.m.pieces(e.m.Disks[i]) {
			p := &piece{disk: uint16(i), from: n * e.m.Piece, to: min((n+1)*e.m.Piece, e.m.Disks[i].Size)}
			if err := e.piece(ctx, pieceName(d.Name, n), h, p, comp, d.Device); err != nil {
				return fmt.Errorf("disk %s at %d: %w", d.Name, p.from, err)
			}
		}
	}
	return nil
}

// piece is a range of one disk in a file of its own.
type piece struct {
	disk     uint16
	from, to int64
}

// piece writes one file; it has its name only when it is complete and durable.
func (e *exporter) piece(ctx context.Context, name string, h delta.Header, p *piece, comp *delta.ChunkEncoder, dev block.Device) error {
	there, err := fsx.Exists(e.fs, name)
	if err != nil {
		return err
	}
	if !there {
		if err := e.write(ctx, name, h, p, comp, dev); err != nil {
			return err
		}
	}
	e.done += p.to - p.from
	e.tell(0)
	return nil
}

func (e *exporter) tell(more int64) {
	if e.o.Progress != nil {
		e.o.Progress(e.done+more, e.total)
	}
}

func (e *exporter) write(ctx context.Context, name string, h delta.Header, p *piece, comp *delta.ChunkEncoder, dev block.Device) error {
	tmp := name + fsx.TempSuffix
	f, err := e.fs.Open(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	if err = e.stream(ctx, f, h, p, comp, dev); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := e.fs.Rename(tmp, name); err != nil {
		return err
	}
	return e.fs.SyncDir(".")
}

// stream writes header and chunks, encrypted if the medium is.
func (e *exporter) stream(ctx context.Context, f fsx.File, h delta.Header, p *piece, comp *delta.ChunkEncoder, dev block.Device) error {
	buf := bufio.NewWriterSize(&appender{f: f}, 1<<20)
	var w io.Writer = buf
	var closer io.Closer
	if e.m.Recipient != "" {
		r, err := age.ParseX25519Recipient(e.m.Recipient)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		a, err := age.Encrypt(buf, r)
		if err != nil {
			return err
		}
		w, closer = a, a
	}
	enc := delta.NewEncoder(w, nil)
	if err := enc.Header(h, 0); err != nil {
		return err
	}
	var index uint32
	for off := p.from; off < p.to; off += delta.MaxRaw {
		if err := ctx.Err(); err != nil {
			return err
		}
		spec := delta.ChunkSpec{Index: index, Disk: p.disk, Ranges: []block.Range{{Off: off, Len: min(delta.MaxRaw, p.to-off)}}}
		c, err := comp.Encode(spec, func(_ uint16, b []byte, at int64) (int, error) { return dev.ReadAt(b, at) })
		if err != nil {
			return err
		}
		if err := enc.Chunk(c); err != nil {
			return err
		}
		index++
		e.tell(off + delta.MaxRaw - p.from)
	}
	if closer != nil {
		if err := closer.Close(); err != nil {
			return err
		}
	}
	return buf.Flush()
}

// appender writes a file from its beginning on.
type appender struct {
	f  fsx.File
	at int64
}

// Write implements io.Writer.
func (a *appender) Write(p []byte) (int, error) {
	n, err := a.f.WriteAt(p, a.at)
	a.at += int64(n)
	return n, err
}
