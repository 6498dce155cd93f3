package replicad

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/testcopy"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

var _ testcopy.Hypervisor = (*lazyHost)(nil)

// testDeps is what test copies need, from the configuration.
func (d *Daemon) testDeps(v vm.Deps) (testcopy.Deps, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return testcopy.Deps{}, fmt.Errorf("read the boot id: %w", err)
	}
	deps := testcopy.Deps{
		StateDir: d.cfg.StateDir, RunDir: d.cfg.RunDir, BootID: strings.TrimSpace(string(boot)), Hyper: d.hyper,
		Find: func(id wire.VMID) (testcopy.Subject, bool) {
			s, ok := d.vms.Find(id)
			return s, ok
		},
		Named: func(name string) (testcopy.Subject, bool) {
			s, err := d.vms.Lookup(name)
			return s, err == nil
		},
		Networks: d.testNetwork, Name: d.cfg.Tests.Name, Quota: d.cfg.Tests.Quota, Max: d.cfg.Tests.Max, Reserve: d.cfg.Limits.FreeSpaceReserve,
		LibvirtState: d.cfg.LibvirtState, QEMUOwner: v.QEMUOwner, Now: time.Now, Failpoint: v.Failpoint, Log: d.log,
	}
	for _, p := range d.cfg.Drills {
		if _, err := testcopy.ParseProof(p.Proof); err != nil {
			return deps, fmt.Errorf("the drill of %s in the configuration: %w", p.VM, err)
		}
		deps.Drills = append(deps.Drills, testcopy.Schedule{VM: p.VM, Every: p.Every, At: p.At, Point: p.Point, Network: p.Network, Proof: p.Proof, Timeout: p.Timeout})
	}
	return deps, nil
}

// testNetwork is where the configuration plugs a test copy's card in.
func (d *Daemon) testNetwork(name string, nic libvirt.SpecNIC) testcopy.Mapping {
	n, ok := d.conf().NetworkFor(name, nic.MAC, nic.Network)
	if !ok || n.Test == "" {
		return testcopy.Mapping{}
	}
	net := policyNetwork(n.Test)
	return testcopy.Mapping{Network: &net, IP: n.TestIP}
}

// network is where the configuration plugs a replica's card in.
func (d *Daemon) network(name string, nic libvirt.SpecNIC) (vm.NetworkTo, bool) {
	n, ok := d.conf().NetworkFor(name, nic.MAC, nic.Network)
	if !ok || n.To == "" {
		return vm.NetworkTo{}, false
	}
	return vm.NetworkTo{Network: policyNetwork(n.To), IP: n.IP}, true
}

func policyNetwork(s string) libvirt.PolicyNetwork {
	if b, ok := strings.CutPrefix(s, "bridge:"); ok {
		return libvirt.PolicyNetwork{Bridge: b}
	}
	return libvirt.PolicyNetwork{Network: s}
}

// view is a VM's status with what its tests add to it.
func (d *Daemon) view(ctx context.Context, v *vm.VM) status.VM {
	s := v.Status(ctx, d.peerName(v.Peer()))
	d.showTests(ctx, v, &s)
	f := health.TestFacts{Name: s.Name}
	for _, t := range s.Tests {
		if t.Trouble != "" {
			f.Trouble = append(f.Trouble, t.Name+": "+t.Trouble)
		}
	}
	if l := s.LastDrill; l != nil && !l.OK && l.Host == d.name { // the other host warns itself
		f.DrillFailed, f.Report = l.Failure, l.Report
	}
	s.Conditions, s.Health = health.WithTests(s.Conditions, f)
	if s.Reason == "" && len(s.Conditions) > 0 {
		s.Reason = s.Conditions[0].Text
	}
	return s
}

func testOptions(a api.Action, request string) testcopy.Options {
	o := testcopy.Options{Point: a.Point, Network: a.Network, Isolated: a.Isolated, Name: a.Name, Request: request}
	if a.Quota != nil {
		o.Quota = max(*a.Quota, 1) // 0 is refused as too little
	}
	return o
}

func (d *Daemon) testFailover(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	if !v.Receives() {
		return d.typedThere(v, testCommand(a))
	}
	o := testOptions(a, request)
	release, err := o.Take(v)
	if err != nil {
		return err
	}
	defer release()
	p, err := d.tests.Prepare(ctx, v, o)
	if err != nil {
		return err
	}
	note(emit, "Test failover of %s:", a.VM)
	if failed := emitChecks(p.Checks, emit); failed != nil || a.DryRun {
		return refusedBy(failed)
	}
	c, err := d.tests.Start(ctx, v, o, step)
	if err != nil {
		return err
	}
	note(emit, "The copy is called %s. To take it away: replicactl failover test-stop %s --test %q", c.Name, a.VM, c.Name)
	return d.result(ctx, v, emit)
}

// typedThere refuses a command about the replica's host that was typed on the
// primary, naming the whole command: a copy takes that host's memory, network
// and storage, and a proof runs its programs, so that only its own
// administrator begins one.
func (d *Daemon) typedThere(v *vm.VM, command string) error {
	there := d.peerName(v.Peer())
	return &wire.Error{
		Kind: wire.KindRefused, Text: "this host is the primary of " + v.Name() + "; its recovery points are on " + there + ", and so are its tests and drills",
		Hint: "on " + there + ": replicactl " + command,
	}
}

// testCommand is what a person typed, spelled out.
func testCommand(a api.Action) string {
	words := []string{map[api.Verb]string{api.FailoverTest: "failover test", api.TestStop: "failover test-stop", api.Drill: "drill"}[a.Verb], quoted(a.VM)}
	value := func(flag, v, unless string) {
		if v != unless {
			words = append(words, flag, quoted(v))
		}
	}
	flag := func(name string, on bool) {
		if on {
			words = append(words, name)
		}
	}
	if a.Point != "" {
		value("--point", a.Point, "latest")
	}
	value("--network", a.Network, "")
	flag("--isolated", a.Isolated)
	value(map[bool]string{true: "--test", false: "--name"}[a.Verb == api.TestStop], a.Name, "")
	if a.Quota != nil {
		value("--quota", strconv.FormatInt(*a.Quota, 10), "")
	}
	if a.Verb == api.Drill {
		if a.Proof != "" {
			value("--proof", a.Proof, "agent")
		}
		if a.Timeout > 0 {
			value("--timeout", a.Timeout.String(), testcopy.DefaultDrill.String())
		}
	}
	flag("--all", a.All)
	flag("--dry-run", a.DryRun)
	return strings.Join(words, " ")
}

// quoted is a word as a shell reads it.
func quoted(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && !strings.ContainsRune("-_.:,/@+=", r)
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func (d *Daemon) testStop(ctx context.Context, v *vm.VM, a api.Action, step func(failover.Event), emit func(api.Event)) error {
	switch tests, _ := d.tests.Show(v.ID()); {
	case len(tests) == 0 && !v.Receives():
		return d.typedThere(v, testCommand(a))
	case len(tests) > 1 && a.Name == "" && !a.All:
		return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("%s has %d test copies", a.VM, len(tests)), Hint: "name one with --test, or end all: --all"}
	}
	ended, err := d.tests.Stop(ctx, v.ID(), a.Name, step)
	if err != nil {
		return err
	}
	if len(ended) == 0 {
		note(emit, "There is no such test copy; nothing had to be taken away.")
	}
	for _, n := range ended {
		note(emit, "The test copy %s is gone.", n)
	}
	return nil
}

func (d *Daemon) drill(ctx context.Context, v *vm.VM, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	if !v.Receives() {
		return d.typedThere(v, testCommand(a))
	}
	o := testcopy.DrillOptions{Options: testOptions(a, request), Proof: a.Proof, Timeout: a.Timeout}
	note(emit, "Drill of %s:", a.VM)
	r, err := d.tests.Drill(ctx, v, o, step)
	if r.File != "" {
		note(emit, "Report: %s", r.File)
	}
	if err != nil {
		return err
	}
	note(emit, "The copy of %s worked %s after the command (%s).", a.VM, r.RTO.Round(time.Millisecond), r.Proof)
	s := r.Show()
	emit(api.Event{Drill: &s})
	return nil
}

// Drills are the kept reports of a VM, oldest first.
func (d *Daemon) Drills(_ context.Context, name string) ([]status.Drill, error) {
	v, err := d.vms.Lookup(name)
	if err != nil {
		return nil, err
	}
	all := d.tests.Drills(v.ID())
	if len(all) == 0 && !v.Receives() {
		return nil, d.typedThere(v, "drill list "+quoted(name))
	}
	out := []status.Drill{}
	for _, r := range all {
		out = append(out, r.Show())
	}
	return out, nil
}

// DrillReport is one of them as text; empty when = the newest.
func (d *Daemon) DrillReport(_ context.Context, name, when string) (api.Text, error) {
	v, err := d.vms.Lookup(name)
	if err != nil {
		return api.Text{}, err
	}
	all := d.tests.Drills(v.ID())
	for i := len(all) - 1; i >= 0; i-- {
		if r := all[i]; when == "" || strings.HasPrefix(r.Started.UTC().Format(time.RFC3339), when) {
			return api.Text{Text: r.Markdown()}, nil
		}
	}
	if !v.Receives() {
		return api.Text{}, d.typedThere(v, "drill report "+quoted(name))
	}
	return api.Text{}, &wire.Error{Kind: wire.KindNotFound, Text: "no such drill of " + name, Hint: "replicactl drill list " + name + "; to run one: replicactl drill " + name}
}
