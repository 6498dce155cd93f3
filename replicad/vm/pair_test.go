package vm

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/libvirt/libvirttest"
	"kvmreplica/nbd"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

type position = delta.Pos

const (
	testVM   wire.VMID = "deadbeef-0000-4000-8000-0000000000aa"
	diskSize           = 4 << 20

	testInterval = 20 * time.Millisecond
)

// pair is two hosts that know only each other, and one VM.
type pair struct {
	t    testing.TB
	a, b *side
	// counter is the highest value the guest was told to be durable.
	counter atomic.Uint64
	// lossy: an operator accepted a loss, the counter may go back.
	lossy atomic.Bool
	// forced: an operator forced a promotion; two guests may run.
	forced atomic.Bool
	// waited is how long a caller meant to wait for an answer that hung.
	waited atomic.Int64
	// carried is what the bodies of epochs had, in bytes.
	carried atomic.Int64

	mu     sync.Mutex
	faults map[string]fault // guarded by mu; one-shot, by SIDE/METHOD
	calls  map[string]int   // guarded by mu; messages that arrived, by METHOD
	broken []string         // guarded by mu; violations seen
	rows   map[string]int   // guarded by mu; rows of the handshake table met
	// committed is called when a host has committed an epoch and its answer is on
	// its way; nil = nothing is.
	committed func() // guarded by mu
}

func (w *pair) metRow(row string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rows[row]++
}

func (w *pair) onCommit(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.committed = f
}

func (w *pair) fault(key string) fault {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.faults[key]
	delete(w.faults, key)
	return f
}

func (w *pair) arrived(method string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls[method]++
}

func (w *pair) inject(key string, f fault) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults[key] = f
}

func (w *pair) violation(format string, a ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken = append(w.broken, fmt.Sprintf(format, a...))
}

// booted checks what a starting guest finds; its hypervisor holds its lock.
func (w *pair) booted(s *side, c *nbd.Client) {
	if s.other.hyper.alive.Load() && !w.forced.Load() {
		w.violation("the guest starts on %s while it runs on %s", s.name, s.other.name)
	}
	var b [512]byte
	if _, err := c.ReadAt(b[:], 0); err != nil {
		w.violation("the guest on %s cannot read: %v", s.name, err)
		return
	}
	n, want := binary.LittleEndian.Uint64(b[:]), w.counter.Load()
	if n < want && !w.lossy.Load() {
		w.violation("the guest on %s finds %d, %d was durable", s.name, n, want)
	}
	w.counter.Store(n)
}

// check looks at both roles at this moment.
func (w *pair) check() {
	w.t.Helper()
	var serving []string
	gens := map[delta.Generation]string{}
	for _, s := range []*side{w.a, w.b} {
		v := s.vm()
		if v == nil {
			continue
		}
		l := v.record().Lineage
		if !l.MayServe() {
			continue
		}
		if o := gens[l.Generation]; o != "" {
			w.violation("%s and %s both serve generation %.8s", o, s.name, l.Generation)
		}
		gens[l.Generation] = s.name
		serving = append(serving, s.name)
	}
	if len(serving) > 1 && !w.forced.Load() {
		w.violation("both hosts serve and nobody forced it")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range w.broken {
		w.t.Error(b)
	}
	if len(w.broken) > 0 {
		w.t.FailNow()
	}
}

// newPair makes two hosts and a protected VM that runs on A, with a complete copy on B.
func newPair(t testing.TB) *pair {
	t.Helper()
	w := &pair{t: t, faults: map[string]fault{}, calls: map[string]int{}, rows: map[string]int{}}
	dir, err := os.MkdirTemp("", "vmp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w.a, w.b = newSide(t, w, dir, "A"), newSide(t, w, dir, "B")
	w.a.other, w.b.other = w.b, w.a
	t.Cleanup(func() {
		for _, s := range []*side{w.a, w.b} {
			s.kill()
			s.hyper.halt()
			s.stopPlane()
		}
	})
	image := filepath.Join(dir, "web.raw")
	if err := os.WriteFile(image, make([]byte, diskSize), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := w.a.hyper.Define(t.Context(), domainDoc("web", testVM, image)); err != nil {
		t.Fatal(err)
	}
	w.a.start()
	w.b.start()
	return w
}

// domainDoc is a definition with one disk.
func domainDoc(name string, id wire.VMID, image string) []byte {
	return []byte("<domain type='qemu'><name>" + name + "</name><uuid>" + string(id) + "</uuid><genid>11111111-1111-4111-8111-111111111111</genid><memory>1048576</memory><vcpu>1</vcpu>" +
		"<os><type arch='x86_64' machine='pc'>hvm</type></os><devices><disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='" +
		image + "'/><target dev='vda' bus='virtio'/></disk>" +
		"<interface type='network'><mac address='52:54:00:00:00:01'/><source network='lan'/><model type='virtio'/></interface></devices></domain>")
}

func newSide(t testing.TB, w *pair, dir, name string) *side {
	s := &side{t: t, w: w, name: name, host: wire.HostID("00000000-0000-4000-8000-00000000000" + name), dir: filepath.Join(dir, name)}
	s.root = filepath.Join(s.dir, "images")
	s.hyper = &guestHost{Fake: libvirttest.New(), s: s}
	s.hyper.SetNetwork(libvirt.Network{Name: "lan", Bridge: "virbr0", Forward: "nat", Active: true, DHCP: true})
	s.grant = Grant{Name: "peer", MaySend: true, Root: s.root}
	for _, d := range []string{"state", "run"} {
		if err := os.MkdirAll(filepath.Join(s.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// protect enables the VM on A towards B, boots it and waits for a complete copy.
func (w *pair) protect() { w.protectWhile(func() {}) }

// protectWhile calls poll while it waits for the first complete copy.
func (w *pair) protectWhile(poll func()) {
	w.t.Helper()
	err := w.a.do(func(ctx context.Context, m *Manager, _ *VM) error {
		_, err := m.Enable(ctx, EnableOptions{Name: "web", Peer: w.b.host, Interval: testInterval, Request: "enable"}, nil)
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.until("a complete copy", func() error { poll(); return w.copied(w.a, w.b) })
	if err := w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }); err != nil {
		w.t.Fatal(err)
	}
	w.write(w.a, 3)
}

func (w *pair) write(s *side, n int) {
	w.t.Helper()
	for range n {
		if err := s.hyper.write(); err != nil {
			w.t.Fatalf("guest on %s: %v", s.name, err)
		}
	}
}

// copied says why to does not hold all of from.
func (w *pair) copied(from, to *side) error {
	p, r := from.vm(), to.vm()
	if p == nil || r == nil {
		return fmt.Errorf("a side is down")
	}
	s := p.session()
	if s == nil {
		return fmt.Errorf("%s does not ship", from.name)
	}
	st := s.Status()
	if !st.Protected || st.Committed.IsZero() {
		return fmt.Errorf("session: %+v", st)
	}
	rs, err := r.storeStatus()
	if err != nil {
		return err
	}
	if rs.State != points.Replica && rs.State != points.Seeding {
		return fmt.Errorf("the replica is %s", rs.State) // what both say was true before
	}
	rec := r.record()
	if rs.Committed != st.Committed || rec.Incomplete {
		return fmt.Errorf("replica at %v, primary at %v, incomplete %t", rs.Committed, st.Committed, rec.Incomplete)
	}
	if rec.Lineage.Generation != p.record().Lineage.Generation {
		return fmt.Errorf("the replica's record follows another generation")
	}
	return nil
}

const patience = 2 * time.Minute

// until polls a condition that must come true.
func (w *pair) until(what string, f func() error) {
	w.t.Helper()
	end := time.NewTimer(patience)
	defer end.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-end.C:
			w.t.Fatalf("waited for %s: %v\nA: %s\nB: %s", what, err, w.a.describe(), w.b.describe())
		case <-tick.C:
		}
	}
}

func (s *side) describe() string {
	v := s.vm()
	if v == nil {
		return "unknown VM"
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	j := "none"
	if v.stuck != nil {
		j = fmt.Sprintf("%s/%s committed=%t: %s", v.stuck.Kind, v.stuck.Begun, v.stuck.Committed, v.stuck.Failure)
	}
	return fmt.Sprintf("%s noreverse=%t held=%q trouble=%q running=%t plan=%s", v.rec.Lineage.State, v.rec.NoReverse, v.held, v.trouble, s.hyper.runs(), j)
}

// owner is the one side that serves; nil when there is none.
func (w *pair) owner() *side {
	for _, s := range []*side{w.a, w.b} {
		if v := s.vm(); v != nil && v.record().Lineage.MayServe() {
			return s
		}
	}
	return nil
}

// settled says why the pair is not at rest: one serves and runs, the other
// follows, no plan is open.
func (w *pair) settled() error {
	o := w.owner()
	if o == nil {
		return fmt.Errorf("nobody serves")
	}
	for _, s := range []*side{w.a, w.b} {
		v := s.vm()
		v.mu.Lock()
		open, running := v.stuck != nil, v.running != nil
		v.mu.Unlock()
		if open || running {
			return fmt.Errorf("a plan of %s is open", s.name)
		}
	}
	if st := o.other.vm().record().Lineage.State; st != lineage.Replica {
		return fmt.Errorf("%s is %s", o.other.name, st)
	}
	if !o.hyper.runs() {
		return fmt.Errorf("the guest does not run on %s", o.name)
	}
	return w.copied(o, o.other)
}

// revive starts daemons that died.
func (w *pair) revive() { w.reviveBut(nil) }

// reviveBut does so, but for a host that is off.
func (w *pair) reviveBut(lost *side) {
	for _, s := range []*side{w.a, w.b} {
		if s != lost && s.died() {
			s.restart()
		}
	}
}

// planOpen: a plan of this side runs or is interrupted.
func (s *side) planOpen() bool {
	v := s.vm()
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.stuck != nil || v.running != nil
}

// rest drives the pair to quiescence and checks it.
func (w *pair) rest() *side {
	w.t.Helper()
	w.until("the pair to be at rest", func() error {
		w.check()
		w.revive()
		return w.settled()
	})
	o := w.owner()
	w.write(o, 2)
	wrote := time.Now()
	w.until("the last writes to be copied", func() error {
		w.revive()
		if err := w.settled(); err != nil {
			return err
		}
		n := o.vm().session().Status()
		if n.Pending > 0 || n.LastCut.Before(wrote) { // what is pending is as of the last cycle
			return fmt.Errorf("%d pending, the last cut %v after the last write", n.Pending, n.LastCut.Sub(wrote))
		}
		return w.settled()
	})
	return o
}

func planned(ctx context.Context, _ *Manager, v *VM) error {
	return v.Planned(ctx, PlannedOptions{Request: fmt.Sprintf("planned-%d", time.Now().UnixNano())}, nil)
}
