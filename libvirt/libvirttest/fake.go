// Package libvirttest is a hypervisor host in memory for other packages'
// tests: it has the methods of libvirt.Host, remembers every call, and does
// what its script says (delay, fail, hang until the context ends).
//
// It guarantees the order and the errors (libvirt.ErrNotFound, ErrState, …) of
// the real one as far as the state of a domain decides them; it parses
// documents with the same code. It knows nothing of guests: callers say what
// happens in one with SetState, Crash and Emit.
package libvirttest

import (
	"context"
	"fmt"
	"sort"
	"sync"
	"time"

	"kvmreplica/libvirt"
)

// Fake is a scripted host. The zero value is not usable; see New.
type Fake struct {
	mu       sync.Mutex // guards everything below
	info     libvirt.HostInfo
	domains  map[string]*domain
	rules    []*Rule
	calls    []Call
	watchers map[chan libvirt.Event]context.Context
	networks map[string]*network
}

// domain is one machine of a Fake.
type domain struct {
	doc, live  []byte
	name, uuid string
	state      libvirt.State
	reason     libvirt.Reason
	persistent bool
	autostart  bool
	saved      bool
	meta       string
	agent      bool
	frozen     bool
	firmware   libvirt.FirmwareState
	graph      map[string]libvirt.DiskGraph
	inserted   map[string]libvirt.InsertState
	events     []libvirt.Event // of the call in progress
}

// Call is one call that reached the fake.
type Call struct {
	Op, UUID string
	Arg      string
}

// Rule says what a call does instead of working at once.
type Rule struct {
	Op    string // method name
	UUID  string // "" matches every domain
	After int    // matching calls that still work before the rule applies
	Times int    // how often it applies; 0 = always
	Delay time.Duration
	Hang  bool  // until the context ends, then ErrTimeout with Unknown set
	Err   error // returned instead of doing anything
	// Late lets the effect happen although Err is returned: a call that took
	// effect and whose answer was lost.
	Late bool
}

// New makes an empty host.
func New() *Fake {
	return &Fake{
		info:     libvirt.HostInfo{UUID: "11111111-aaaa-4aaa-8aaa-0000000000a1", Hostname: "fake", Libvirt: 9_000_000, QEMU: 7_002_000, Arch: "x86_64", CPUs: 2, MemoryKB: 4 << 20},
		domains:  map[string]*domain{},
		watchers: map[chan libvirt.Event]context.Context{},
	}
}

// On adds a rule to the script; later rules win.
func (f *Fake) On(r Rule) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &r)
}

// Clear empties the script.
func (f *Fake) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = nil
}

// Calls is what was called so far, in order.
func (f *Fake) Calls() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Call(nil), f.calls...)
}

// SetState puts a domain into a state, as if something in the guest or
// somebody else had done it, and emits the event that goes with it.
func (f *Fake) SetState(uuid string, s libvirt.State, r libvirt.Reason) {
	f.mu.Lock()
	d := f.domains[uuid]
	if d == nil {
		f.mu.Unlock()
		return
	}
	e := d.move(s, r)
	f.mu.Unlock()
	f.Emit(e)
}

// SetAgent says whether the guest agent answers.
func (f *Fake) SetAgent(uuid string, answers bool) {
	f.with(uuid, func(d *domain) { d.agent = answers })
}

// SetSaved says whether a managed save image exists.
func (f *Fake) SetSaved(uuid string, saved bool) { f.with(uuid, func(d *domain) { d.saved = saved }) }

// SetFirmware sets the firmware state files.
func (f *Fake) SetFirmware(uuid string, s libvirt.FirmwareState) {
	f.with(uuid, func(d *domain) { d.firmware = s })
}

// SetGraph sets the block graph that Graph reports for a disk.
func (f *Fake) SetGraph(uuid string, g libvirt.DiskGraph) {
	f.with(uuid, func(d *domain) { d.graph[g.Target] = g })
}

// Frozen reports whether the guest's file systems are frozen.
func (f *Fake) Frozen(uuid string) bool {
	var v bool
	f.with(uuid, func(d *domain) { v = d.frozen })
	return v
}

func (f *Fake) with(uuid string, fn func(*domain)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if d := f.domains[uuid]; d != nil {
		fn(d)
	}
}

// Emit sends an event to all watchers.
func (f *Fake) Emit(e libvirt.Event) {
	f.mu.Lock()
	type sink struct {
		ch  chan libvirt.Event
		ctx context.Context
	}
	var to []sink
	for ch, ctx := range f.watchers {
		to = append(to, sink{ch, ctx})
	}
	f.mu.Unlock()
	for _, s := range to {
		select {
		case s.ch <- e:
		case <-s.ctx.Done():
		}
	}
}

// Watch emits one sync and then what Emit and state changes say.
func (f *Fake) Watch(ctx context.Context) <-chan libvirt.Event {
	in := make(chan libvirt.Event, 64)
	out := make(chan libvirt.Event)
	f.mu.Lock()
	first := libvirt.Event{Kind: libvirt.EventSync, List: f.list()}
	f.watchers[in] = ctx
	f.mu.Unlock()
	go func() {
		defer close(out)
		defer func() {
			f.mu.Lock()
			delete(f.watchers, in)
			f.mu.Unlock()
		}()
		for e := first; ; {
			select {
			case out <- e:
			case <-ctx.Done():
				return
			}
			select {
			case e = <-in:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// begin logs a call and follows the script. done is true when the rule decided
// the result; late asks the caller to do its work first.
func (f *Fake) begin(ctx context.Context, op, uuid, arg string) (late bool, err error) {
	f.mu.Lock()
	f.calls = append(f.calls, Call{op, uuid, arg})
	var hit *Rule
	for i := len(f.rules) - 1; i >= 0 && hit == nil; i-- {
		r := f.rules[i]
		if r.Op != op || r.UUID != "" && r.UUID != uuid || r.Times < 0 {
			continue
		}
		if r.After > 0 {
			r.After--
			continue
		}
		hit = r
		if r.Times == 1 {
			r.Times = -1
		} else if r.Times > 1 {
			r.Times--
		}
	}
	f.mu.Unlock()
	if hit == nil {
		return false, ctx.Err()
	}
	if hit.Delay > 0 {
		t := time.NewTimer(hit.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return false, timeout(op, ctx)
		}
	}
	if hit.Hang {
		<-ctx.Done()
		return hit.Late, timeout(op, ctx)
	}
	return hit.Late, hit.Err
}

func timeout(op string, ctx context.Context) error {
	return &libvirt.Error{Op: op, Kind: libvirt.KindTimeout, Msg: "scripted", Unknown: true, Err: ctx.Err()}
}

// on runs fn on one domain as the script allows.
func (f *Fake) on(ctx context.Context, op, uuid, arg string, fn func(*domain) error) error {
	late, err := f.begin(ctx, op, uuid, arg)
	if err != nil && !late {
		return err
	}
	f.mu.Lock()
	d := f.domains[uuid]
	var e error
	if d == nil {
		e = &libvirt.Error{Op: op, Kind: libvirt.KindNotFound, Msg: "no domain " + uuid}
	} else {
		e = fn(d)
	}
	var ev []libvirt.Event
	if d != nil {
		ev = d.takeEvents()
	}
	f.mu.Unlock()
	for _, v := range ev {
		f.Emit(v)
	}
	if err != nil {
		return err
	}
	return e
}

// list is the summary of all domains. Called with mu held.
func (f *Fake) list() []libvirt.Summary {
	var out []libvirt.Summary
	for _, d := range f.domains {
		out = append(out, libvirt.Summary{Name: d.name, UUID: d.uuid, State: d.state, Reason: d.reason})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

func wrongState(op string, d *domain) error {
	return &libvirt.Error{Op: op, Kind: libvirt.KindState, Msg: fmt.Sprintf("%s is %s", d.name, d.state)}
}
