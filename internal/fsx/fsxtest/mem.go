package fsxtest

import (
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"kvmreplica/internal/fsx"
)

const blockSize = 4096

// Mem is an fsx.FS in memory under the strict model of the package comment.
type Mem struct {
	power    *Power
	root     *node
	capacity int64 // bytes; 0 = unlimited
	torn     bool
}

// node is a file or a directory; names point to nodes.
type node struct {
	dir     bool
	entries map[string]*entry // of a directory

	data   *Sectors
	size   int64
	sizes  []int64            // values the length may have after a cut, oldest first
	blocks map[int64]struct{} // allocated 4 KiB blocks
}

// entry is one name; vers are the nodes it may name after a cut (nil = none).
type entry struct {
	vers []*node
}

var (
	_ fsx.FS   = (*Mem)(nil)
	_ fsx.File = (*file)(nil)
)

// NewMem returns an empty file system of its own machine.
func NewMem() *Mem { return NewMemOn(NewPower()) }

// NewMemOn returns an empty file system of the machine p belongs to.
func NewMemOn(p *Power) *Mem {
	return &Mem{power: p, root: newDir()}
}

// Power is the machine's clock of operations.
func (m *Mem) Power() *Power { return m.power }

// SetCapacity limits the space for file content: writes and allocations that
// need more 4 KiB blocks fail with ENOSPC. 0 is no limit.
func (m *Mem) SetCapacity(bytes int64) { m.power.Locked(func() { m.capacity = bytes }) }

// SetTorn makes CrashClone offer garbage in one sector of the write that was
// under way when the power went.
func (m *Mem) SetTorn(torn bool) { m.power.Locked(func() { m.torn = torn }) }

// Used is the number of bytes in allocated 4 KiB blocks.
func (m *Mem) Used() (n int64) {
	m.power.Locked(func() { n = m.used() })
	return n
}

func newDir() *node { return &node{dir: true, entries: map[string]*entry{}} }

func newFile() *node {
	return &node{data: NewSectors(), sizes: []int64{0}, blocks: map[int64]struct{}{}}
}

func (e *entry) shown() *node {
	if e == nil {
		return nil
	}
	return e.vers[len(e.vers)-1]
}

func (n *node) set(name string, to *node) {
	e := n.entries[name]
	if e == nil {
		e = &entry{vers: []*node{nil}}
		n.entries[name] = e
	}
	if len(e.vers) == maxVersions {
		e.vers = append(e.vers[:1], e.vers[2:]...)
	}
	e.vers = append(e.vers, to)
}

// syncEntries makes the names in a directory durable.
func (n *node) syncEntries() {
	for name, e := range n.entries {
		e.vers = []*node{e.shown()}
		if e.vers[0] == nil {
			delete(n.entries, name)
		}
	}
}

func (n *node) setSize(v int64) {
	if v == n.size {
		return
	}
	if len(n.sizes) == maxVersions {
		n.sizes = append(n.sizes[:1], n.sizes[2:]...)
	}
	n.size, n.sizes = v, append(n.sizes, v)
}

func (m *Mem) lookup(name string) *node {
	n := m.root
	if name == "." {
		return n
	}
	for _, part := range strings.Split(name, "/") {
		if n == nil || !n.dir {
			return nil
		}
		n = n.entries[part].shown()
	}
	return n
}

func (m *Mem) parent(name string) (*node, string) {
	dir := m.lookup(path.Dir(name))
	if dir == nil || !dir.dir {
		return nil, ""
	}
	return dir, path.Base(name)
}

func (m *Mem) used() int64 {
	var n int64
	for _, f := range m.files() {
		n += int64(len(f.blocks)) * blockSize
	}
	return n
}

// files lists all visible file nodes in path order.
func (m *Mem) files() []*node {
	var out []*node
	var walk func(d *node)
	walk = func(d *node) {
		for _, name := range sortedNames(d) {
			switch n := d.entries[name].shown(); {
			case n == nil:
			case n.dir:
				walk(n)
			default:
				out = append(out, n)
			}
		}
	}
	walk(m.root)
	return out
}

func sortedNames(d *node) []string {
	names := make([]string, 0, len(d.entries))
	for name := range d.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func pathErr(op, name string, err error) error {
	if err == nil || err == ErrPowerLost {
		return err
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// Open implements fsx.FS.
func (m *Mem) Open(name string, flag int) (fsx.File, error) {
	if err := fsx.CheckName(name); err != nil {
		return nil, err
	}
	kind := Open
	m.power.Locked(func() {
		if n := m.lookup(name); n == nil && flag&os.O_CREATE != 0 {
			kind = Create
		}
	})
	var f *file
	trunc := false
	err := m.power.Do(Op{Kind: kind, Path: name}, func(fault error, _ bool) error {
		if fault != nil {
			return fault
		}
		n := m.lookup(name)
		switch {
		case n == nil && flag&os.O_CREATE == 0:
			return fs.ErrNotExist
		case n == nil:
			dir, base := m.parent(name)
			if dir == nil {
				return fs.ErrNotExist
			}
			n = newFile()
			dir.set(base, n)
		case n.dir:
			return syscall.EISDIR
		case flag&os.O_CREATE != 0 && flag&os.O_EXCL != 0:
			return fs.ErrExist
		}
		trunc = flag&os.O_TRUNC != 0 && n.size > 0
		f = &file{m: m, n: n, path: name, writable: flag&(os.O_RDWR|os.O_WRONLY) != 0}
		return nil
	})
	if err != nil {
		return nil, pathErr("open", name, err)
	}
	if trunc {
		if err := f.truncate(0); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// Rename implements fsx.FS.
func (m *Mem) Rename(old, name string) error {
	if err := fsx.CheckName(old); err != nil {
		return err
	}
	if err := fsx.CheckName(name); err != nil {
		return err
	}
	return pathErr("rename", name, m.power.Do(Op{Kind: Rename, Path: name}, func(fault error, _ bool) error {
		if fault != nil {
			return fault
		}
		from, a := m.parent(old)
		to, b := m.parent(name)
		if from == nil || to == nil || from.entries[a].shown() == nil {
			return fs.ErrNotExist
		}
		n, over := from.entries[a].shown(), to.entries[b].shown()
		if over != nil && (over.dir != n.dir || over.dir) && over != n {
			return fs.ErrExist
		}
		if n.dir && strings.HasPrefix(name+"/", old+"/") && old != name {
			return syscall.EINVAL
		}
		if n != over {
			to.set(b, n)
			from.set(a, nil)
		}
		return nil
	}))
}

// Remove implements fsx.FS.
func (m *Mem) Remove(name string) error {
	if err := fsx.CheckName(name); err != nil {
		return err
	}
	return pathErr("remove", name, m.power.Do(Op{Kind: Remove, Path: name}, func(fault error, _ bool) error {
		if fault != nil {
			return fault
		}
		dir, base := m.parent(name)
		if dir == nil || dir.entries[base].shown() == nil {
			return fs.ErrNotExist
		}
		if n := dir.entries[base].shown(); n.dir {
			for _, e := range n.entries {
				if e.shown() != nil {
					return syscall.ENOTEMPTY
				}
			}
		}
		dir.set(base, nil)
		return nil
	}))
}

// List implements fsx.FS.
func (m *Mem) List(dir string) ([]string, error) {
	if err := fsx.CheckDir(dir); err != nil {
		return nil, err
	}
	out := []string{}
	err := m.power.Do(Op{Kind: List, Path: dir}, func(fault error, _ bool) error {
		if fault != nil {
			return fault
		}
		n := m.lookup(dir)
		switch {
		case n == nil:
			return fs.ErrNotExist
		case !n.dir:
			return syscall.ENOTDIR
		}
		for _, name := range sortedNames(n) {
			if n.entries[name].shown() != nil {
				out = append(out, name)
			}
		}
		return nil
	})
	return out, pathErr("list", dir, err)
}

// MkdirAll implements fsx.FS.
func (m *Mem) MkdirAll(dir string) error {
	if err := fsx.CheckDir(dir); err != nil {
		return err
	}
	if dir == "." {
		return nil
	}
	parts := strings.Split(dir, "/")
	for i := range parts {
		name := strings.Join(parts[:i+1], "/")
		var have *node
		m.power.Locked(func() { have = m.lookup(name) })
		if have != nil && !have.dir {
			return pathErr("mkdir", name, syscall.ENOTDIR)
		}
		if have == nil {
			if err := m.mkdir(name); err != nil {
				return err
			}
		}
		if err := m.SyncDir(path.Dir(name)); err != nil {
			return err
		}
	}
	return nil
}

func (m *Mem) mkdir(name string) error {
	return pathErr("mkdir", name, m.power.Do(Op{Kind: Mkdir, Path: name}, func(fault error, _ bool) error {
		if fault != nil {
			return fault
		}
		dir, base := m.parent(name)
		if dir == nil {
			return fs.ErrNotExist
		}
		if dir.entries[base].shown() == nil {
			dir.set(base, newDir())
		}
		return nil
	}))
}

// SyncDir implements fsx.FS.
func (m *Mem) SyncDir(dir string) error {
	if err := fsx.CheckDir(dir); err != nil {
		return err
	}
	return pathErr("syncdir", dir, m.power.Do(Op{Kind: SyncDir, Path: dir}, func(fault error, dying bool) error {
		n := m.lookup(dir)
		switch {
		case n == nil:
			return fs.ErrNotExist
		case !n.dir:
			return syscall.ENOTDIR
		case !dying && fault == nil:
			n.syncEntries()
		}
		return fault
	}))
}
