package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// A patch is what an old primary had in the blocks that the surviving side
// replaces: one file in the delta format, made before the first of them is
// overwritten. Patches outlive the protection; only a person deletes them.

const (
	patchDir    = "patches"
	patchSuffix = ".patch"
)

// Patch is one kept patch.
type Patch struct {
	ID string
	// Made is when, Generation whose writes these are.
	Made       time.Time
	Generation delta.Generation
	// Bytes of the disks are in it, File takes Size bytes.
	Bytes, Size int64
	File        string
	// Damage is why it cannot be read; empty = it can.
	Damage string
}

func (v *VM) patches() fsx.FS {
	return fsx.Sub(v.mgr.fsys, patchDir+"/"+string(v.id))
}

func (v *VM) patchFile(id string) string {
	return filepath.Join(v.deps.StateDir, patchDir, string(v.id), id+patchSuffix)
}

// content is what goes into a patch: of generation, relative to base, made at
// cut; the ranges of the disks as images hold them.
type content struct {
	generation delta.Generation
	base       delta.Pos
	cut        time.Time
	ranges     map[wire.DiskName][]wire.Range
	images     []block.Device // in the order of the record's disks
}

// savePatch keeps what the images hold in the ranges, durably. The data plane
// is down: nobody writes. The same request again replaces its own file.
func (v *VM) savePatch(ctx context.Context, request string, base delta.Pos, ranges map[wire.DiskName][]wire.Range) (bytes int64, err error) {
	g := v.record().Lineage.Generation
	c := content{generation: g, base: base, cut: v.deps.Now().UTC(), ranges: ranges}
	defer func() {
		for _, d := range c.images {
			err = errors.Join(err, d.Close())
		}
	}()
	for _, d := range v.deltaDisks() {
		dev, err := v.openBase(d.Name, d.Size)
		if err != nil {
			return 0, err
		}
		c.images = append(c.images, dev)
	}
	return v.putPatch(ctx, patchName(g, request), c)
}

// putPatch writes a patch, in place of one that has the name.
func (v *VM) putPatch(ctx context.Context, name string, c content) (bytes int64, err error) {
	if err := v.mgr.fsys.MkdirAll(patchDir + "/" + string(v.id)); err != nil {
		return 0, fmt.Errorf("keep what is given up: %w", err)
	}
	f, err := v.patches().Open(name+fsx.TempSuffix, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return 0, fmt.Errorf("keep what is given up: %w", err)
	}
	bytes, err = v.writePatch(ctx, &fileWriter{f: f}, c)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = errors.Join(v.patches().Rename(name+fsx.TempSuffix, name), v.patches().SyncDir("."))
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("keep what is given up: %w", err), v.patches().Remove(name+fsx.TempSuffix))
	}
	return bytes, nil
}

// patchEpoch is the epoch of a patch. No epoch is ever given it, and none from
// it on is received: a patch must not pass for one.
const patchEpoch = 1 << 62

// patchName is unique for a generation and request.
func patchName(g delta.Generation, request string) string {
	return g.String()[:8] + "-" + fileWord(request) + patchSuffix
}

// fileWord makes a correlation id safe as part of a file's name.
func fileWord(request string) string {
	safe := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' {
			return r
		}
		return -1
	}, strings.ToLower(request))
	return safe[:min(len(safe), 64)]
}

// fileWriter appends to a file.
type fileWriter struct {
	f  fsx.File
	at int64
}

func (w *fileWriter) Write(p []byte) (int, error) {
	n, err := w.f.WriteAt(p, w.at)
	w.at += int64(n)
	return n, err
}

func (v *VM) writePatch(ctx context.Context, w io.Writer, p content) (int64, error) {
	vm, err := delta.ParseVM(string(v.id))
	if err != nil {
		return 0, err
	}
	disks := v.deltaDisks()
	comp, err := delta.NewChunkEncoder(delta.ChunkOptions{})
	if err != nil {
		return 0, err
	}
	enc := delta.NewEncoder(w, nil)
	h := delta.Header{VM: vm, Generation: p.generation, Epoch: patchEpoch, Parent: p.base, Disks: disks}
	if err := enc.Header(h, 0); err != nil {
		return 0, err
	}
	var bytes int64
	read := func(disk uint16, b []byte, at int64) (int, error) { return p.images[disk].ReadAt(b, at) }
	for spec, err := range delta.Plan(disks, func(i int) iter.Seq[block.Range] { return blocksOf(p.ranges[wire.DiskName(disks[i].Name)]) }) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return 0, err
		}
		c, err := comp.Encode(spec, read)
		if err == nil {
			err = enc.Chunk(c)
		}
		if err != nil {
			return 0, err
		}
		bytes += c.Covered
	}
	_, err = enc.Manifest(delta.ManifestInfo{Cut: p.cut})
	return bytes, err
}

// blocksOf gives ranges in ascending order.
func blocksOf(rs []wire.Range) iter.Seq[block.Range] {
	sorted := slices.SortedFunc(slices.Values(rs), func(a, b wire.Range) int { return cmp.Compare(a.Off, b.Off) })
	return func(yield func(block.Range) bool) {
		for _, r := range sorted {
			if !yield(block.Range{Off: r.Off, Len: r.Len}) {
				return
			}
		}
	}
}

// Patches lists what was kept, oldest first.
func (v *VM) Patches() ([]Patch, error) {
	names, err := v.patches().List(".")
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list patches: %w", err)
	}
	var out []Patch
	for _, n := range names {
		id, ok := strings.CutSuffix(n, patchSuffix)
		if !ok {
			continue
		}
		out = append(out, v.readPatch(id))
	}
	slices.SortStableFunc(out, func(a, b Patch) int { return a.Made.Compare(b.Made) })
	return out, nil
}

// readPatch reads a whole patch, as its checksums want.
func (v *VM) readPatch(id string) Patch {
	p := Patch{ID: id, File: v.patchFile(id)}
	if st, err := os.Stat(p.File); err == nil {
		p.Size = st.Size()
	}
	h, m, err := walkPatch(p.File, func(*delta.Header, delta.Chunk) error { return nil })
	if err != nil {
		p.Damage = err.Error()
		return p
	}
	p.Made, p.Generation, p.Bytes = m.Cut, h.Generation, int64(m.Covered)
	return p
}

// walkPatch decodes and verifies a patch, chunk by chunk.
func walkPatch(file string, each func(*delta.Header, delta.Chunk) error) (h delta.Header, m delta.Manifest, err error) {
	f, err := os.Open(file)
	if err != nil {
		return h, m, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	d := delta.NewDecoder(f)
	if h, err = d.Header(); err != nil {
		return h, m, err
	}
	cd, err := delta.NewChunkDecoder()
	if err != nil {
		return h, m, err
	}
	defer cd.Close()
	var tally delta.Tally
	for {
		frame, t, err := d.Next()
		if err != nil {
			return h, m, fmt.Errorf("it ends early: %w", err)
		}
		if t == delta.FrameManifest {
			if m, err = delta.ParseManifest(frame); err == nil {
				err = errors.Join(m.Matches(&h), tally.Check(&m))
			}
			return h, m, err
		}
		c, err := cd.Decode(frame)
		if err == nil {
			err = c.Check(&h)
		}
		if err == nil {
			err = tally.Add(c.Index, c.Digest, c.Covered())
		}
		if err == nil {
			err = each(&h, c)
		}
		if err != nil {
			return h, m, err
		}
	}
}

func (v *VM) findPatch(id string) (Patch, error) {
	all, err := v.Patches()
	if err != nil {
		return Patch{}, err
	}
	for _, p := range all {
		if p.ID == id {
			return p, nil
		}
	}
	return Patch{}, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("there is no patch %.80q on this host; patches lie on the one that was the old primary", id), Hint: "replicactl failover patch list " + v.record().Name}
}

// readablePatch finds a patch that is not damaged.
func (v *VM) readablePatch(id string) (Patch, error) {
	p, err := v.findPatch(id)
	if err == nil && p.Damage != "" {
		err = &wire.Error{Kind: wire.KindCorrupt, Text: "the patch cannot be read: " + p.Damage, Hint: "replicafsck dump " + p.File}
	}
	return p, err
}

// ExportPatch writes a patch as DIR/DISK.raw, sparse, each block at its place,
// and DIR/DISK.map, its ranges as text. It returns the bytes written. Files that
// exist are never written over.
func (v *VM) ExportPatch(ctx context.Context, id, dir string) (int64, error) {
	p, err := v.readablePatch(id)
	if err != nil {
		return 0, err
	}
	if !filepath.IsAbs(dir) {
		return 0, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("directory %.80q is not an absolute path", dir)}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, fmt.Errorf("export the patch: %w", err)
	}
	x := &exporting{dir: dir, files: map[uint16]*exported{}}
	_, _, err = walkPatch(p.File, func(h *delta.Header, c delta.Chunk) error {
		return errors.Join(ctx.Err(), x.chunk(h, c))
	})
	if err := errors.Join(err, x.close()); err != nil {
		return 0, fmt.Errorf("export the patch: %w", err)
	}
	return p.Bytes, nil
}

// exporting is a patch being written to raw files.
type exporting struct {
	dir   string
	files map[uint16]*exported
}

type exported struct{ raw, ranges *os.File }

func (x *exporting) disk(h *delta.Header, i uint16) (*exported, error) {
	if e := x.files[i]; e != nil {
		return e, nil
	}
	d := h.Disks[i]
	path := filepath.Join(x.dir, filepath.Base(d.Name))
	raw, err := os.OpenFile(path+".raw", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	e := &exported{raw: raw}
	x.files[i] = e
	if e.ranges, err = os.OpenFile(path+".map", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, err
	}
	return e, raw.Truncate(d.Size)
}

func (x *exporting) chunk(h *delta.Header, c delta.Chunk) error {
	e, err := x.disk(h, c.Disk)
	if err != nil {
		return err
	}
	return c.Each(func(k delta.Extent, data []byte) error {
		if _, err := fmt.Fprintf(e.ranges, "%d %d\n", k.Off, k.Len); err != nil {
			return err
		}
		if data == nil {
			return nil // zeros: the file is sparse
		}
		_, err := e.raw.WriteAt(data, k.Off)
		return err
	})
}

func (x *exporting) close() error {
	var err error
	for _, e := range x.files {
		for _, f := range []*os.File{e.raw, e.ranges} {
			if f != nil {
				err = errors.Join(err, f.Sync(), f.Close())
			}
		}
	}
	return err
}

// DeletePatch removes a patch for good.
func (v *VM) DeletePatch(id string) error {
	p, err := v.findPatch(id)
	if err != nil {
		return err
	}
	if err := v.patches().Remove(p.ID + patchSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete the patch: %w", err)
	}
	return v.patches().SyncDir(".")
}
