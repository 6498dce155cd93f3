package testcopy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/wire"
)

// Manager is the set of all test copies of this host. Safe for concurrent use.
type Manager struct {
	deps Deps
	root fsx.FS // the state directory
	fsys fsx.FS // tests/

	mu      sync.Mutex
	copies  map[string]*copied      // guarded by mu; by id
	ended   []Ended                 // guarded by mu; oldest first
	drills  map[wire.VMID][]Report  // guarded by mu; oldest first
	drilled map[wire.VMID]time.Time // guarded by mu; the last scheduled try
	// drilling: a scheduled drill is under way; conducted are copies of drills.
	drilling  bool            // guarded by mu
	conducted map[string]bool // guarded by mu
	unread    int             // guarded by mu; records that could not be read
	ctx       context.Context // guarded by mu; ends with Run, nil before

	background sync.WaitGroup
}

// copied is one test copy.
//
// Locks, in this order: plan (one start, end or look at a time), mu.
type copied struct {
	id   string
	fsys fsx.FS
	plan chan struct{} // one token

	mu       sync.Mutex
	rec      Copy      // guarded by mu; the file is never newer
	served   *served   // guarded by mu
	state    string    // guarded by mu; what the guest was last seen to do
	taps     []nicTap  // guarded by mu; as last seen
	proven   time.Time // guarded by mu; when isolation was last proven
	trouble  string    // guarded by mu
	resuming bool      // guarded by mu
}

// Open loads what the state directory holds. Nothing runs yet.
func Open(fsys fsx.FS, deps Deps) (*Manager, error) {
	if deps.Quota <= 0 {
		deps.Quota = defaultQuota
	}
	if deps.Max <= 0 {
		deps.Max = defaultMax
	}
	if deps.Name == "" {
		deps.Name = defaultName
	}
	m := &Manager{
		deps: deps, root: fsys, fsys: fsx.Sub(fsys, testsDir), copies: map[string]*copied{},
		drills: map[wire.VMID][]Report{}, drilled: map[wire.VMID]time.Time{}, conducted: map[string]bool{},
	}
	if err := fsys.MkdirAll(testsDir); err != nil {
		return nil, fmt.Errorf("open the test copies: %w", err)
	}
	names, err := m.fsys.List(".")
	if err != nil {
		return nil, fmt.Errorf("open the test copies: %w", err)
	}
	for _, n := range names {
		if err := m.load(n); err != nil {
			return nil, err
		}
	}
	m.ended = m.loadEnded()
	return m, m.loadDrills()
}

// load takes up one directory.
func (m *Manager) load(id string) error {
	if id == endedFile || strings.HasSuffix(id, fsx.TempSuffix) {
		return nil
	}
	sub := fsx.Sub(m.fsys, id)
	rec, err := loadCopy(sub)
	if absent(err) {
		return m.sweep(id) // nothing was made for it yet, or all is taken away
	}
	if err == nil && rec.ID != id {
		err = fmt.Errorf("it is the record of %s", rec.ID)
	}
	if err != nil {
		// Whoever wrote it knows what was made; we must not guess.
		m.unread++
		m.deps.Log.Error("a test copy's record cannot be read; its domain and network are left alone", "directory", filepath.Join(m.deps.StateDir, testsDir, id), "err", err)
		return nil
	}
	m.copies[id] = newCopied(id, sub, rec)
	return nil
}

func newCopied(id string, fsys fsx.FS, rec Copy) *copied {
	return &copied{id: id, fsys: fsys, plan: make(chan struct{}, 1), rec: rec}
}

// sweep removes the directory of a copy.
func (m *Manager) sweep(id string) error {
	if err := os.RemoveAll(filepath.Join(m.deps.StateDir, testsDir, id)); err != nil {
		return fmt.Errorf("remove what is left of a test copy: %w", err)
	}
	return nil
}

func (c *copied) record() Copy {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec
}

// update changes the record; durable when it returns nil, unchanged otherwise.
func (c *copied) update(change func(*Copy)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.rec
	change(&r)
	if err := saveCopy(c.fsys, r); err != nil {
		return err
	}
	c.rec = r
	return nil
}

// lock takes the plan token.
func (c *copied) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case c.plan <- struct{}{}:
		return func() { <-c.plan }, nil
	case <-ctx.Done():
		return nil, &wire.Error{Kind: wire.KindConflict, Text: "the test copy " + c.record().Name + " is being worked on", Hint: "replicactl vm status " + c.record().Of}
	}
}

// tryLock takes it if nobody has it.
func (c *copied) tryLock() (unlock func(), ok bool) {
	select {
	case c.plan <- struct{}{}:
		return func() { <-c.plan }, true
	default:
		return nil, false
	}
}

func (m *Manager) all() []*copied {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*copied, 0, len(m.copies))
	for _, c := range m.copies {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b *copied) int {
		if n := a.record().Started.Compare(b.record().Started); n != 0 {
			return n
		}
		return strings.Compare(a.id, b.id)
	})
	return out
}

// of returns a VM's copies, oldest first.
func (m *Manager) of(id wire.VMID) []*copied {
	return slices.DeleteFunc(m.all(), func(c *copied) bool { return c.record().VM != id })
}

// Run takes up the copies of an earlier life of the daemon, watches all of them
// and runs the drills that are due, until ctx ends. Guests go on without it,
// and wait for their disks.
func (m *Manager) Run(ctx context.Context) error {
	m.mu.Lock()
	m.ctx = ctx
	m.mu.Unlock()
	m.sweepNetworks(ctx)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		for _, c := range m.all() {
			m.look(ctx, c)
		}
		m.runDue(ctx)
		select {
		case <-ctx.Done():
			m.background.Wait()
			return m.closeAll()
		case <-tick.C:
		}
	}
}

// living is ctx that also ends with Run.
func (m *Manager) living(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	m.mu.Lock()
	run := m.ctx
	m.mu.Unlock()
	if run == nil {
		return ctx, cancel
	}
	stop := context.AfterFunc(run, cancel)
	return ctx, func() { stop(); cancel() }
}

// closeAll ends the exports and leaves the rest as it is.
func (m *Manager) closeAll() error {
	var errs []error
	for _, c := range m.all() {
		unlock, err := c.lock(context.Background()) // a start or an end stops at the end of Run
		if err != nil {
			return err
		}
		c.mu.Lock()
		s := c.served
		c.served = nil
		c.mu.Unlock()
		if s != nil {
			errs = append(errs, s.close())
		}
		unlock()
	}
	return errors.Join(errs...)
}

// sweepNetworks ends isolated networks of copies that nobody knows: their state
// was lost with the state directory.
func (m *Manager) sweepNetworks(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	names, err := m.deps.Hyper.Networks(ctx)
	if err != nil {
		m.deps.Log.Warn("look for networks of forgotten test copies", "err", err)
		return
	}
	m.mu.Lock()
	unread := m.unread
	m.mu.Unlock()
	if unread > 0 {
		return // one of them may be in use
	}
	known := map[string]bool{}
	for _, c := range m.all() {
		for _, n := range c.record().NICs {
			known[n.Network] = true
		}
	}
	for _, n := range names {
		if !strings.HasPrefix(n, networkPrefix) || known[n] {
			continue
		}
		m.deps.Log.Warn("a network of a test copy is left over, its copy is not known here; it is removed", "network", n)
		if err := m.deps.Hyper.DestroyNetwork(ctx, n); err != nil {
			m.deps.Log.Error("remove a network that is left over", "network", n, "err", err)
		}
	}
}

// pending returns the unfinished plan of a file.
func (c *copied) pending(file string) (*failover.Journal, error) { return failover.Load(c.fsys, file) }

// gone reports that a domain does not exist.
func gone(err error) bool { return errors.Is(err, libvirt.ErrNotFound) }
