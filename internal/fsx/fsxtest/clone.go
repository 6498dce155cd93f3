package fsxtest

import "slices"

// CrashClone returns the file system as a power cut now might have left it, on
// a new machine that is switched on. All of it is durable.
func (m *Mem) CrashClone(choose Chooser) *Mem { return m.CrashCloneOn(NewPower(), choose) }

// CrashCloneOn is CrashClone on the machine p.
func (m *Mem) CrashCloneOn(p *Power, choose Chooser) *Mem {
	c := &Mem{power: p, capacity: m.capacity, torn: m.torn}
	m.power.Locked(func() {
		named := m.survivingNames(choose)
		c.root = m.cutDir(m.root, named, choose)
	})
	return c
}

// KillClone returns the file system as the next process finds it after this
// one died: everything visible is there, what was not synced still is not.
// choose decides how much of a write under way arrived (Newest: all).
func (m *Mem) KillClone(choose Chooser) *Mem { return m.KillCloneOn(NewPower(), choose) }

// KillCloneOn is KillClone on the machine p.
func (m *Mem) KillCloneOn(p *Power, choose Chooser) *Mem {
	c := &Mem{power: p, capacity: m.capacity, torn: m.torn}
	m.power.Locked(func() {
		copied := map[*node]*node{}
		c.root = killNode(m.root, copied, choose)
	})
	return c
}

func killNode(n *node, copied map[*node]*node, choose Chooser) *node {
	if n == nil {
		return nil
	}
	if c := copied[n]; c != nil {
		return c
	}
	c := &node{dir: n.dir}
	copied[n] = c
	if !n.dir {
		c.data = n.data.Kill(choose)
		c.size, c.sizes = n.size, slices.Clone(n.sizes)
		c.blocks = cloneBlocks(n.blocks)
		return c
	}
	c.entries = make(map[string]*entry, len(n.entries))
	for _, name := range sortedNames(n) {
		e := n.entries[name]
		ce := &entry{}
		for _, v := range e.vers {
			ce.vers = append(ce.vers, killNode(v, copied, choose))
		}
		c.entries[name] = ce
	}
	return c
}

// survivingNames decides every directory entry, then takes back the two
// outcomes no file system in use produces: a renamed file with a durable old
// name that is under neither name, and a directory under two names.
func (m *Mem) survivingNames(choose Chooser) map[*entry]*node {
	named := map[*entry]*node{}
	seen := map[*node]bool{}
	var walk func(d *node)
	walk = func(d *node) {
		seen[d] = true
		for _, name := range sortedNames(d) {
			e := d.entries[name]
			vers := distinctNodes(e.vers)
			k := 0
			if len(vers) > 1 {
				k = choose(len(vers))
			}
			n := vers[k]
			if n != nil && n.dir && seen[n] {
				n = nil
			}
			named[e] = n
			if n != nil && n.dir {
				walk(n)
			}
		}
	}
	walk(m.root)
	durable := reach(m.root, func(e *entry) *node { return e.vers[0] })
	visible := reach(m.root, (*entry).shown)
	chosen := func(e *entry) *node { return named[e] }
	survived := reach(m.root, chosen)
	for _, n := range durable.order {
		at, lives := visible.at[n]
		if _, ok := survived.at[n]; ok || !lives {
			continue
		}
		if _, ok := survived.at[at.dir]; !ok && at.dir != m.root {
			at = durable.at[n]
		}
		named[at.e] = n
		if n.dir {
			walk(n)
		}
		survived = reach(m.root, chosen)
	}
	return named
}

// place is where a node was found.
type place struct {
	dir *node
	e   *entry
}

type reached struct {
	at    map[*node]place
	order []*node
}

func reach(root *node, follow func(*entry) *node) reached {
	r := reached{at: map[*node]place{}}
	var walk func(d *node)
	walk = func(d *node) {
		for _, name := range sortedNames(d) {
			e := d.entries[name]
			n := follow(e)
			if n == nil {
				continue
			}
			if _, dup := r.at[n]; dup {
				continue
			}
			r.at[n] = place{d, e}
			r.order = append(r.order, n)
			if n.dir {
				walk(n)
			}
		}
	}
	walk(root)
	return r
}

func (m *Mem) cutDir(d *node, named map[*entry]*node, choose Chooser) *node {
	c := newDir()
	for _, name := range sortedNames(d) {
		n := named[d.entries[name]]
		switch {
		case n == nil:
		case n.dir:
			c.entries[name] = &entry{vers: []*node{m.cutDir(n, named, choose)}}
		default:
			c.entries[name] = &entry{vers: []*node{m.cutFile(n, choose)}}
		}
	}
	return c
}

func (m *Mem) cutFile(n *node, choose Chooser) *node {
	sizes := distinctSizes(n.sizes)
	k := 0
	if len(sizes) > 1 {
		k = choose(len(sizes))
	}
	c := &node{size: sizes[k], sizes: []int64{sizes[k]}, data: n.data.Cut(choose, m.torn), blocks: cloneBlocks(n.blocks)}
	c.data.Zero(c.size, (n.data.end()+1)*SectorSize-c.size, false)
	c.data.Sync()
	for b := range c.blocks {
		if b*blockSize >= c.size {
			delete(c.blocks, b)
		}
	}
	return c
}

func distinctNodes(vers []*node) []*node {
	var out []*node
	for i, v := range vers {
		if !slices.Contains(out, v) || i == len(vers)-1 && len(out) > 1 && out[len(out)-1] != v {
			out = append(out, v)
		}
	}
	return out
}

func distinctSizes(vers []int64) []int64 {
	var out []int64
	for i, v := range vers {
		if !slices.Contains(out, v) || i == len(vers)-1 && len(out) > 1 && out[len(out)-1] != v {
			out = append(out, v)
		}
	}
	return out
}

func cloneBlocks(b map[int64]struct{}) map[int64]struct{} {
	c := make(map[int64]struct{}, len(b))
	for k := range b {
		c[k] = struct{}{}
	}
	return c
}
