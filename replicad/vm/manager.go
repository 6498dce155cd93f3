// Package vm owns every protected virtual machine of this host: its durable
// record, its role, and the machinery the role needs - the data plane and a
// session on the primary, the store on the replica.
//
// It guarantees that a role is durable before anything acts on it, that one
// plan at a time changes a VM, that a plan interrupted by a crash is continued
// or taken back at the next start, and that the guest of a host that gave its
// role up, or was told so, is not started.
//
// Callers open one Manager per state directory, call Run, and hand it every
// request of peers (Service methods) and of people (Enable, Planned, …).
package vm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sort"
	"strings"
	"sync"

	"kvmreplica/internal/count"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/mount"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// Manager is the set of all VMs. Safe for concurrent use.
type Manager struct {
	deps Deps
	fsys fsx.FS // the state directory

	mu  sync.Mutex
	vms map[wire.VMID]*VM // guarded by mu
	// broken are records that could not be read, by directory name.
	broken map[string]error // guarded by mu
	// slots are what the VMs that ship to one peer share.
	slots map[wire.HostID]*session.Slots // guarded by mu

	auditMu sync.Mutex // held while a line is appended to the audit log

	background sync.WaitGroup
	ctx        context.Context // ends with Run
}

// Open loads every VM's record; a record that cannot be read is reported by
// Broken and touched by nobody. Nothing runs yet.
func Open(fsys fsx.FS, deps Deps) (*Manager, error) {
	m := &Manager{deps: deps, fsys: fsys, vms: map[wire.VMID]*VM{}, broken: map[string]error{}, slots: map[wire.HostID]*session.Slots{}}
	if err := mount.Clean(mountsDir(deps.RunDir)); err != nil {
		return nil, err
	}
	if err := fsys.MkdirAll("vms"); err != nil {
		return nil, fmt.Errorf("open the VMs' state: %w", err)
	}
	names, err := fsys.List("vms")
	if err != nil {
		return nil, fmt.Errorf("open the VMs' state: %w", err)
	}
	for _, n := range names {
		sub := fsx.Sub(fsys, "vms/"+n)
		r, err := loadRecord(sub)
		if absent(err) {
			continue // a leftover of an enable that never got a record
		}
		if err == nil && string(r.VM) != n {
			err = fmt.Errorf("directory %s holds the record of %s", n, r.VM)
		}
		if err != nil {
			m.broken[n] = err
			continue
		}
		v := m.newVM(r)
		v.loaded, v.starting = true, true
		if v.stuck, err = failover.Load(sub, planFile); err != nil {
			m.broken[n] = err
			continue
		}
		m.vms[r.VM] = v
	}
	return m, nil
}

func (m *Manager) newVM(r Record) *VM {
	v := &VM{
		deps: &m.deps, mgr: m, id: r.VM, fsys: fsx.Sub(m.fsys, "vms/"+string(r.VM)), rec: r,
		log: m.deps.Log.With("vm", r.Name, "id", string(r.VM)), plan: make(chan struct{}, 1),
		facts: guestFacts{running: r.WantRunning}, // until libvirt is heard
	}
	if m.deps.Limiter != nil {
		v.band = m.deps.Limiter()
		v.band.Set(r.Rate)
	}
	return v
}

// slotsTo are the slots of the sessions to a peer; nil = unlimited.
func (m *Manager) slotsTo(peer wire.HostID) *session.Slots {
	if m.deps.ShippingSlots <= 0 {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.slots[peer]
	if s == nil {
		s = session.NewSlots(m.deps.ShippingSlots)
		m.slots[peer] = s
	}
	return s
}

// Broken returns records that could not be read, with the reason.
func (m *Manager) Broken() map[string]error {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string]error, len(m.broken))
	for k, v := range m.broken {
		out[k] = v
	}
	return out
}

// All returns every VM by name.
func (m *Manager) All() []*VM {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*VM, 0, len(m.vms))
	for _, v := range m.vms {
		out = append(out, v)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].record().Name < out[j].record().Name })
	return out
}

// Lookup finds a VM by name or UUID; the error is a wire.Error of KindNotFound.
func (m *Manager) Lookup(name string) (*VM, error) {
	for _, v := range m.All() {
		if r := v.record(); r.Name == name || string(r.VM) == strings.ToLower(name) {
			return v, nil
		}
	}
	return nil, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("VM %q is not protected here", name), Hint: "replicactl vm list; to protect it: replicactl vm enable " + name + " --to PEER"}
}

func (m *Manager) get(id wire.VMID) (*VM, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.vms[id]
	return v, ok
}

// add registers a new VM whose record is durable.
func (m *Manager) add(r Record) (*VM, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.vms[r.VM]; ok {
		return nil, &wire.Error{Kind: wire.KindConflict, Text: "VM " + r.Name + " is protected already", Hint: "replicactl vm status " + r.Name}
	}
	if n := m.deps.MaxVMs; n > 0 && len(m.vms) >= n {
		return nil, &wire.Error{
			Kind: wire.KindRefused, Text: fmt.Sprintf("%s holds %s, its limit", m.deps.HostName, count.Of(n, "VM")),
			Hint: "on that host: limits.max_vms in replicad.toml, or replicactl vm disable for one of them",
		}
	}
	dir := "vms/" + string(r.VM)
	if err := m.fsys.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("make the VM's state directory: %w", err)
	}
	v := m.newVM(r)
	v.noteBoot() // it was not here when the host booted: nothing is to be started for that
	if err := saveRecord(v.fsys, r); err != nil {
		return nil, errors.Join(err, removeTree(m.fsys, dir))
	}
	m.vms[r.VM] = v
	if m.ctx != nil {
		m.background.Add(1)
		go func() { defer m.background.Done(); v.tend(v.mgr.lifetime()) }()
	}
	return v, nil
}

// remove forgets a VM whose relationship ended; its directory is deleted.
func (m *Manager) remove(v *VM) error {
	v.clearGate()
	if err := removeTree(m.fsys, "vms/"+string(v.id)); err != nil {
		return fmt.Errorf("remove the VM's state: %w", err)
	}
	cfg := v.planeConfig()
	if err := errors.Join(os.RemoveAll(cfg.RunDir), os.RemoveAll(cfg.SharedDir)); err != nil {
		v.log.Warn("remove what the data plane left behind", "err", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.vms, v.id)
	v.mu.Lock()
	v.gone = true
	v.mu.Unlock()
	return nil
}

// removeTree deletes the record first: without it the rest is a leftover that
// Open ignores.
func removeTree(fsys fsx.FS, dir string) error {
	names, err := fsys.List(dir)
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	sort.Slice(names, func(i, j int) bool { return names[i] == recordFile })
	for _, n := range names {
		p := dir + "/" + n
		if err := fsys.Remove(p); err == nil || absent(err) {
			if n == recordFile {
				if err := fsys.SyncDir(dir); err != nil {
					return err
				}
			}
			continue
		}
		if err := removeTree(fsys, p); err != nil {
			return err
		}
	}
	if err := fsys.Remove(dir); err != nil && !absent(err) {
		return err
	}
	return nil
}

// Run brings every VM into its role, settles interrupted plans and watches the
// guests until ctx ends. Data planes of running guests outlive it.
func (m *Manager) Run(ctx context.Context) error {
	m.mu.Lock()
	m.ctx = ctx
	vms := slices.Collect(maps.Values(m.vms))
	m.mu.Unlock()
	for _, v := range vms {
		if v.wasFrozen() {
			v.thawLater()
		}
		m.background.Add(1)
		go func() {
			defer m.background.Done()
			if !v.loaded { // made since Open: whoever made it brings it up
				v.tend(ctx)
				return
			}
			if !v.begin(ctx) {
				return
			}
			m.background.Add(1)
			go func() { defer m.background.Done(); v.bootDecision(ctx) }()
			v.tend(ctx)
		}()
	}
	<-ctx.Done()
	m.background.Wait()
	var errs []error
	for _, v := range m.All() {
		errs = append(errs, v.down(context.WithoutCancel(ctx), true))
	}
	return errors.Join(errs...)
}

// tend watches the guest and continues interrupted plans until ctx ends or
// the relationship does.
func (v *VM) tend(ctx context.Context) {
	done := make(chan struct{})
	go func() { defer close(done); v.mend(ctx) }()
	v.watch(ctx)
	<-done
}

// begin settles an interrupted plan, then starts the role; what fails is tried
// again until it works. It reports false when ctx or the relationship ended.
func (v *VM) begin(ctx context.Context) bool {
	defer v.tried()
	for pause := newPause(); !v.forgotten(); {
		err := v.settle(ctx)
		if err != nil && v.returning() {
			v.log.Warn("the return is tried again later", "err", err)
			err = nil // it waits for the other host, this one's role does not
		}
		if err == nil && v.over() {
			if err = v.mgr.remove(v); err == nil {
				return false
			}
		}
		if err == nil {
			err = v.reclaim(ctx)
		}
		if err == nil {
			err = v.resume(ctx)
		}
		switch {
		case err == nil:
			v.setTrouble("")
			return !v.forgotten()
		case errors.Is(err, errReleased), busy(err):
			v.setTrouble("")
		default:
			v.setTrouble(err.Error())
			v.log.Error("bring the VM into its role", "err", err)
		}
		v.tried()
		if !pause.wait(ctx) {
			return false
		}
	}
	return false
}

// returning: a return of the old primary is in the journal. It changes nothing
// of this host's role.
func (v *VM) returning() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.stuck != nil && v.stuck.Kind == failover.Reverse
}

// over reports that nothing of a relationship is left but its record: enabling
// was taken back, or disabling came to its end.
func (v *VM) over() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.stuck == nil && (v.rec.Ended || v.rec.Native && !v.rec.Placed)
}
