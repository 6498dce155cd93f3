package media

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"

	"filippo.io/age"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// state is how far an import into a directory has come.
type state struct {
	Version int              `json:"version"`
	Medium  string           `json:"medium"` // its id
	Done    map[string]int64 `json:"done"`   // durable pieces by disk
}

const (
	stateFile   = "import.json"
	imageSuffix = ".raw"
	partSuffix  = ".raw.part"
)

// Import makes the raw images DISK.raw in the directory to of what is on the
// medium, or goes on with it. None has its name before all are durable.
func Import(ctx context.Context, from, to fsx.FS, k Key, progress func(done, total int64)) (Medium, error) {
	m, err := Load(from)
	if err != nil {
		return m, fmt.Errorf("import: %w", err)
	}
	if m.Complete.IsZero() {
		return m, fmt.Errorf("import %s: %w", m.Name, ErrIncomplete)
	}
	i := &importer{from: from, to: to, m: m, progress: progress, total: m.Bytes()}
	if i.ids, err = m.unlock(k); err == nil {
		err = i.begin()
	}
	if err == nil {
		err = i.run(ctx)
	}
	if err != nil {
		return m, fmt.Errorf("import %s: %w", m.Name, err)
	}
	return m, nil
}

type importer struct {
	from, to    fsx.FS
	m           Medium
	ids         []age.Identity
	st          state
	dec         *delta.ChunkDecoder
	progress    func(done, total int64)
	done, total int64
}

// begin finds what an interrupted import of the same medium left, else begins
// anew.
func (i *importer) begin() error {
	err := fsx.ReadJSON(i.to, stateFile, maxMedium, &i.st)
	if err == nil && i.st.Version == version && i.st.Medium == i.m.ID {
		return i.to.SyncDir(".") // its names may be in memory only
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fsx.ErrSum) {
		return err
	}
	for _, d := range i.m.Disks {
		if there, err := fsx.Exists(i.to, d.Name+imageSuffix); err != nil {
			return err
		} else if there {
			return fmt.Errorf("%w: %s; it is never overwritten", ErrExists, d.Name+imageSuffix)
		}
	}
	i.st = state{Version: version, Medium: i.m.ID, Done: map[string]int64{}}
	return fsx.WriteJSON(i.to, stateFile, i.st)
}

func (i *importer) run(ctx context.Context) error {
	h, err := i.m.header()
	if err != nil {
		return err
	}
	if i.dec, err = delta.NewChunkDecoder(); err != nil {
		return err
	}
	defer i.dec.Close()
	for n, d := range i.m.Disks {
		if err := i.disk(ctx, h, uint16(n), d); err != nil {
			return err
		}
	}
	for _, d := range i.m.Disks {
		err := i.to.Rename(d.Name+partSuffix, d.Name+imageSuffix)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // an earlier try renamed it
			return err
		}
		if there, err := fsx.Exists(i.to, d.Name+imageSuffix); err != nil || !there {
			return errors.Join(err, fmt.Errorf("%s went away during the import; remove %s and repeat", d.Name+partSuffix, stateFile))
		}
	}
	if err := i.to.SyncDir("."); err != nil {
		return err
	}
	if err := i.to.Remove(stateFile); err != nil {
		return err
	}
	return i.to.SyncDir(".")
}

// disk writes what is missing of one image.
func (i *importer) disk(ctx context.Context, h delta.Header, n uint16, d Disk) error {
	have, total := i.st.Done[d.Name], i.m.pieces(d)
	i.done += min(have*i.m.Piece, d.Size)
	if have >= total {
		return nil
	}
	flag := os.O_RDWR
	if have == 0 {
		flag |= os.O_CREATE | os.O_TRUNC // what else is there may not be zero
	}
	f, err := i.to.Open(d.Name+partSuffix, flag)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s went away during the import; remove %s and repeat", d.Name+partSuffix, stateFile)
	}
	if err != nil {
		return err
	}
	if err = f.Truncate(d.Size); err == nil {
		err = i.to.SyncDir(".")
	}
	for p := have; p < total && err == nil; p++ {
		err = i.piece(ctx, f, h, d, piece{disk: n, from: p * i.m.Piece, to: min((p+1)*i.m.Piece, d.Size)}, p)
	}
	return errors.Join(err, f.Close())
}

// piece verifies and writes one piece; then it counts.
func (i *importer) piece(ctx context.Context, f fsx.File, h delta.Header, d Disk, p piece, n int64) error {
	name := pieceName(d.Name, n)
	src, err := i.from.Open(name, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s is missing", ErrDamaged, name)
	}
	if err != nil {
		return err
	}
	err = i.read(ctx, src, f, h, p)
	if cerr := src.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	i.st.Done[d.Name] = n + 1
	i.done += p.to - p.from
	i.tell(0)
	return fsx.WriteJSON(i.to, stateFile, i.st)
}

func (i *importer) tell(more int64) {
	if i.progress != nil {
		i.progress(i.done+more, i.total)
	}
}

// read takes a piece apart; whatever is wrong with it is damage.
func (i *importer) read(ctx context.Context, src, dst fsx.File, h delta.Header, p piece) error {
	damaged := func(err error) error { return fmt.Errorf("%w: %w", ErrDamaged, err) }
	var r io.Reader = bufio.NewReaderSize(io.NewSectionReader(src, 0, math.MaxInt64), 1<<20)
	if len(i.ids) > 0 {
		var err error
		var none *age.NoIdentityMatchError
		if r, err = age.Decrypt(r, i.ids...); errors.As(err, &none) {
			return fmt.Errorf("%w: %w", ErrKey, err)
		} else if err != nil {
			return damaged(err)
		}
	}
	d := delta.NewDecoder(r)
	head, err := d.Header()
	if err != nil {
		return damaged(err)
	}
	if head.Digest() != h.Digest() {
		return damaged(errors.New("it belongs to another export"))
	}
	at := p.from
	for index := uint32(0); ; index++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		frame, _, err := d.Next()
		if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return damaged(err)
		}
		c, err := i.dec.Decode(frame)
		if err == nil {
			err = c.Check(&h)
		}
		if err == nil && (c.Disk != p.disk || c.Index != index) {
			err = delta.ErrOrder
		}
		if err != nil {
			return damaged(err)
		}
		if at, err = put(&c, dst, at, p.to); err != nil {
			return err
		}
		i.tell(at - p.from)
	}
	if at != p.to {
		return damaged(fmt.Errorf("it ends at byte %d, not %d", at, p.to))
	}
	return nil
}

// put writes a chunk that must begin at byte at; what is zero is a hole.
func put(c *delta.Chunk, dst fsx.File, at, limit int64) (int64, error) {
	err := c.Each(func(x delta.Extent, data []byte) error {
		if x.Off != at || x.End() > limit {
			return fmt.Errorf("%w: %w", ErrDamaged, delta.ErrOrder)
		}
		at = x.End()
		if data == nil {
			return nil
		}
		_, err := dst.WriteAt(data, x.Off)
		return err
	})
	return at, err
}
