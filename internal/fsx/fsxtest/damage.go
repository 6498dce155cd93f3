package fsxtest

import (
	"errors"
	"io/fs"
)

// Damage changes the content of name at rest: fn gets all of it and returns
// what is there from now on, durably. It is not an operation of the machine.
// The content passed to fn may be altered in place.
func (m *Mem) Damage(name string, fn func(content []byte) []byte) error {
	err := error(nil)
	m.power.Locked(func() {
		n := m.lookup(name)
		if n == nil || n.dir {
			err = pathErr("damage", name, fs.ErrNotExist)
			return
		}
		b := make([]byte, n.size)
		n.data.ReadAt(b, 0)
		b = fn(b)
		n.data = NewSectors()
		n.data.WriteAt(b, 0, false)
		n.data.Sync()
		n.size, n.sizes = int64(len(b)), []int64{int64(len(b))}
		n.blocks = map[int64]struct{}{}
		for i := int64(0); i*blockSize < n.size; i++ {
			n.blocks[i] = struct{}{}
		}
	})
	return err
}

// Content returns what a read of name shows, also when the power is gone and
// without counting as an operation.
func (m *Mem) Content(name string) ([]byte, error) {
	var b []byte
	err := error(nil)
	m.power.Locked(func() {
		n := m.lookup(name)
		if n == nil || n.dir {
			err = pathErr("content", name, fs.ErrNotExist)
			return
		}
		b = make([]byte, n.size)
		n.data.ReadAt(b, 0)
	})
	return b, err
}

// Files lists the paths of all visible files, sorted, without counting as an
// operation.
func (m *Mem) Files() []string {
	var out []string
	var walk func(d *node, prefix string)
	walk = func(d *node, prefix string) {
		for _, name := range sortedNames(d) {
			switch n := d.entries[name].shown(); {
			case n == nil:
			case n.dir:
				walk(n, prefix+name+"/")
			default:
				out = append(out, prefix+name)
			}
		}
	}
	m.power.Locked(func() { walk(m.root, "") })
	return out
}

// errDamage: the damage asked for lies outside the file.
var errDamage = errors.New("damage outside the file")

// FlipBit flips one bit of name.
func (m *Mem) FlipBit(name string, off int64, bit uint) error {
	return m.SetByte(name, off, func(b byte) byte { return b ^ 1<<(bit%8) })
}

// SetByte replaces the byte at off.
func (m *Mem) SetByte(name string, off int64, fn func(byte) byte) error {
	bad := false
	err := m.Damage(name, func(c []byte) []byte {
		if bad = off < 0 || off >= int64(len(c)); !bad {
			c[off] = fn(c[off])
		}
		return c
	})
	return orOutside(err, bad)
}

// TruncateAt cuts name off at n bytes, as a lost size update does.
func (m *Mem) TruncateAt(name string, n int64) error {
	bad := false
	err := m.Damage(name, func(c []byte) []byte {
		if bad = n < 0 || n > int64(len(c)); bad {
			return c
		}
		return c[:n]
	})
	return orOutside(err, bad)
}

// ZeroBlock zeros 4 KiB block i of name (the last one may be shorter).
func (m *Mem) ZeroBlock(name string, i int64) error {
	return m.onBlocks(name, i, i, func(a, _ []byte) { clear(a) })
}

// SwapBlocks exchanges two 4 KiB blocks of name: two misdirected writes.
func (m *Mem) SwapBlocks(name string, i, j int64) error {
	return m.onBlocks(name, i, j, func(a, b []byte) {
		for k := range min(len(a), len(b)) {
			a[k], b[k] = b[k], a[k]
		}
	})
}

// CopyBlock puts block from into block to: one misdirected write.
func (m *Mem) CopyBlock(name string, from, to int64) error {
	return m.onBlocks(name, from, to, func(a, b []byte) { copy(b, a) })
}

// StaleBlock puts block i of name back to what it is in an older state of the
// file system: a write that was acknowledged and lost.
func (m *Mem) StaleBlock(name string, i int64, older *Mem) error {
	old, err := older.Content(name)
	if err != nil {
		return err
	}
	return m.onBlocks(name, i, i, func(a, _ []byte) {
		clear(a)
		if off := i * blockSize; off < int64(len(old)) {
			copy(a, old[off:])
		}
	})
}

func (m *Mem) onBlocks(name string, i, j int64, fn func(a, b []byte)) error {
	bad := false
	err := m.Damage(name, func(c []byte) []byte {
		n := (int64(len(c)) + blockSize - 1) / blockSize
		if bad = i < 0 || j < 0 || i >= n || j >= n; bad {
			return c
		}
		part := func(i int64) []byte { return c[i*blockSize : min((i+1)*blockSize, int64(len(c)))] }
		fn(part(i), part(j))
		return c
	})
	return orOutside(err, bad)
}

func orOutside(err error, bad bool) error {
	if err == nil && bad {
		return errDamage
	}
	return err
}
