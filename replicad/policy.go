package replicad

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// defaultEvery is the interval of a policy that does not say.
const defaultEvery = 30 * time.Second

// What replicas keep is asked of their hosts, of so many at once and so long in
// all.
const (
	comparePointsWithin = 5 * time.Second
	comparePointsAtOnce = 16
)

// domains reads the persistent definitions of this host's domains but test
// copies, which are nobody's to protect, and those that skip names.
func (d *Daemon) domains(ctx context.Context, skip func(uuid string) bool) (out []libvirt.Domain, err error) {
	all, err := d.hyper.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range all {
		if d.tests.Known(s.UUID) || skip != nil && skip(s.UUID) {
			continue
		}
		doc, err := d.hyper.XML(ctx, s.UUID, libvirt.XMLPersistent)
		if errors.Is(err, libvirt.ErrNotFound) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, err
		}
		k, err := libvirt.ParseDomain(doc)
		if err != nil {
			d.log.Warn("read a domain's tags", "domain", s.Name, "err", err)
			k = libvirt.Domain{} // it has its name
		}
		k.Name, k.UUID = s.Name, s.UUID
		k.State, k.Reason = s.State, s.Reason
		out = append(out, k)
	}
	return out, nil
}

// Policies are the host's policies, and all its domains with what they say.
func (d *Daemon) Policies(ctx context.Context) (status.Policies, error) {
	out := status.Policies{Policies: []status.Policy{}, Domains: []status.Domain{}}
	for _, p := range d.conf().Policies {
		out.Policies = append(out.Policies, viewPolicy(p))
	}
	all, err := d.domains(ctx, nil)
	if err != nil {
		return out, d.explain(err, "")
	}
	ctx, cancel := context.WithTimeout(ctx, comparePointsWithin)
	defer cancel()
	out.Domains = make([]status.Domain, len(all))
	var asked errgroup.Group
	asked.SetLimit(comparePointsAtOnce) // each may ask another host
	for i, k := range all {
		asked.Go(func() error { out.Domains[i] = d.viewDomain(ctx, k); return nil })
	}
	return out, asked.Wait()
}

func viewPolicy(p config.Policy) status.Policy {
	v := status.Policy{
		Name: p.Name, Match: p.Match, Tags: p.Tags, Exclude: p.Exclude, To: p.To, Every: p.Every, AppEvery: p.AppEvery, Points: p.Points,
		Bandwidth: p.Bandwidth, Shutdown: p.Shutdown, OnSilent: string(p.OnSilent), Alarm: p.Alarm, AlarmAfter: p.AlarmAfter,
	}
	if p.InitialAt != nil {
		v.Initial = "at " + clockText(*p.InitialAt)
	}
	return v
}

func clockText(d time.Duration) string {
	return fmt.Sprintf("%02d:%02d", int(d.Hours()), int(d.Minutes())%60)
}

// viewDomain says what is protected of a domain, and where that differs from
// the policy that fits it.
func (d *Daemon) viewDomain(ctx context.Context, k libvirt.Domain) status.Domain {
	out := status.Domain{Name: k.Name, ID: wire.VMID(k.UUID), State: string(k.State), Bytes: -1, Tags: k.Tags, Role: status.None}
	p, fits := d.conf().PolicyFor(k.Name, k.Tags)
	if fits {
		out.Policy = p.Name
	}
	v, err := d.vms.Lookup(k.UUID)
	if err != nil {
		out.Bytes = sizeOf(k)
		return out
	}
	out.Role, out.Peer, out.Bytes = status.Primary, d.peerName(v.Peer()), v.Bytes()
	if v.Receives() {
		out.Role = status.Replica
	}
	if !fits || !v.Serves() {
		return out // the settings of a replica are its primary's
	}
	out.Drift, out.Fixed = d.drift(ctx, v, p, out.Peer)
	return out
}

// drift is what a policy says and the VM has not: what can be set, and what
// cannot, with the way to it.
func (d *Daemon) drift(ctx context.Context, v *vm.VM, p config.Policy, peer string) (set, fixed []string) {
	set, err := v.PlanSet(settingsOf(p))
	if err != nil {
		fixed = append(fixed, err.Error())
	}
	if p.Bandwidth != nil && *p.Bandwidth != v.Rate() {
		set = append(set, fmt.Sprintf("bandwidth %s -> %s", rateText(v.Rate()), rateText(*p.Bandwidth)))
	}
	if p.To != peer && p.To != string(v.Peer()) {
		return set, append(fixed, otherHost(v.Name(), peer, p.To))
	}
	if p.Points == "" {
		return set, fixed
	}
	kept, err := v.ListPoints(ctx)
	if why := pointsDrift(v.Name(), peer, p.Points, kept.Retention, err); why != "" {
		fixed = append(fixed, why)
	}
	return set, fixed
}

func (d *Daemon) driftSoon(ctx context.Context, v *vm.VM, p config.Policy, peer string) (set, fixed []string) {
	ctx, cancel := context.WithTimeout(ctx, comparePointsWithin)
	defer cancel()
	return d.drift(ctx, v, p, peer)
}

func otherHost(name, peer, to string) string {
	return fmt.Sprintf("to %s -> %s (replicactl vm disable %s; replicactl policy apply %s: everything is copied anew)", peer, to, name, name)
}

// pointsDrift says where what a replica keeps differs from what a policy asks
// for. The replica's host decides; nothing is set from here.
func pointsDrift(name, peer, want, kept string, err error) string {
	if err != nil {
		var we *wire.Error
		if errors.As(err, &we) {
			return "points are not compared: " + we.Text // the hint is for who lists them
		}
		return "points are not compared: " + err.Error()
	}
	w, werr := points.ParsePolicy(want)
	k, kerr := points.ParsePolicy(kept)
	switch {
	case werr != nil:
		return werr.Error()
	case kerr != nil || kept == "":
		return fmt.Sprintf("points are not compared: %s keeps %q", peer, kept)
	case w.String() == k.String():
		return ""
	}
	return fmt.Sprintf("points %s -> %s (on %s: replicactl point keep %s %s)", k, w, peer, name, w)
}

func rateText(n int64) string {
	if n == 0 {
		return "no limit"
	}
	return config.FormatSize(n) + "/s"
}

func settingsOf(p config.Policy) vm.Settings {
	s := vm.Settings{Interval: p.Every, AppEvery: p.AppEvery, Shutdown: p.Shutdown}
	if o := string(p.OnSilent); o != "" {
		s.OnSilent = &o
	}
	return s
}

// sizeOf adds the disks up that would be protected; negative where one's size
// is not to be seen from here.
func sizeOf(k libvirt.Domain) (sum int64) {
	for _, disk := range k.Disks {
		if disk.Device != "disk" || disk.ReadOnly {
			continue
		}
		if disk.Kind != libvirt.SourceFile && disk.Kind != libvirt.SourceBlock || disk.Format != "raw" {
			return -1
		}
		n, err := lengthOf(disk.Path)
		if err != nil {
			return -1
		}
		sum += n
	}
	return sum
}

func lengthOf(name string) (int64, error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	n, err := f.Seek(0, io.SeekEnd)
	return n, errors.Join(err, f.Close())
}

// byPolicy completes an enable that names no peer with the policy that fits the
// domain; what was typed counts instead of what the policy says.
func (d *Daemon) byPolicy(ctx context.Context, a api.Action, emit func(api.Event)) (api.Action, error) {
	k, err := d.domainNamed(ctx, a.VM)
	if err != nil {
		return a, err
	}
	p, ok := d.conf().PolicyFor(k.Name, k.Tags)
	if !ok {
		return a, &wire.Error{
			Kind: wire.KindInvalid, Text: fmt.Sprintf("no policy of this host fits %s, and --to PEER is missing", k.Name),
			Hint: "replicactl vm enable " + k.Name + " --to PEER (replicactl peer list), or: replicactl policy list",
		}
	}
	a.Peer, a.Interval = p.To, defaultEvery
	for _, s := range []api.Settings{api.Settings(settingsOf(p)), typed(a.Set)} {
		pick(&a.Interval, s.Interval)
		pick(&a.AppEvery, s.AppEvery)
		pick(&a.Shutdown, s.Shutdown)
		pick(&a.OnSilent, s.OnSilent)
	}
	pick(&a.Rate, p.Bandwidth)
	if a.Retention == "" {
		a.Retention = p.Points
	}
	if p.InitialAt != nil && !a.Initial {
		a.StartAt = nextAt(time.Now(), *p.InitialAt)
	}
	note(emit, "Policy %s: to %s, every %s.", p.Name, p.To, a.Interval)
	return a, nil
}

func typed(s *api.Settings) api.Settings {
	if s == nil {
		return api.Settings{}
	}
	return *s
}

func pick[T any](dst *T, src *T) {
	if src != nil {
		*dst = *src
	}
}

// nextAt is the next time of day at, on this host's clock.
func nextAt(now time.Time, at time.Duration) time.Time {
	day := func(days int) time.Time {
		return time.Date(now.Year(), now.Month(), now.Day()+days, int(at.Hours()), int(at.Minutes())%60, 0, 0, now.Location())
	}
	if t := day(0); t.After(now) {
		return t
	}
	return day(1)
}

func (d *Daemon) domainNamed(ctx context.Context, name string) (libvirt.Domain, error) {
	all, err := d.hyper.List(ctx)
	if err != nil {
		return libvirt.Domain{}, err
	}
	for _, s := range all {
		if s.Name != name && s.UUID != strings.ToLower(name) {
			continue
		}
		doc, err := d.hyper.XML(ctx, s.UUID, libvirt.XMLPersistent)
		if err != nil {
			return libvirt.Domain{}, err
		}
		return libvirt.ParseDomain(doc)
	}
	return libvirt.Domain{}, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("libvirt has no domain %q", name), Hint: "virsh list --all"}
}

// applyPolicy protects one domain as the policy that fits it says, or sets what
// differs. It never ends a protection, and does nothing where all is as it says.
func (d *Daemon) applyPolicy(ctx context.Context, a api.Action, request string, step func(failover.Event), emit func(api.Event)) error {
	k, err := d.domainNamed(ctx, a.VM)
	if err != nil {
		return err
	}
	p, ok := d.conf().PolicyFor(k.Name, k.Tags)
	if !ok {
		return &wire.Error{Kind: wire.KindRefused, Text: "no policy of this host fits " + k.Name, Hint: "replicactl policy list; or: replicactl vm enable " + k.Name + " --to PEER"}
	}
	v, err := d.vms.Lookup(k.UUID)
	if err != nil {
		return d.enable(ctx, api.Action{Verb: api.VMEnable, VM: k.UUID, DryRun: a.DryRun}, request, step, emit)
	}
	peer := d.peerName(v.Peer())
	if !v.Serves() {
		note(emit, "%s is protected, from %s to this host: its settings are set there.", k.Name, peer)
		return nil
	}
	set, fixed := d.driftSoon(ctx, v, p, peer)
	for _, f := range fixed {
		note(emit, "%s differs and cannot be set: %s.", k.Name, f)
	}
	if len(set) == 0 && len(fixed) > 0 {
		return nil
	}
	if len(set) == 0 {
		note(emit, "%s is as policy %s says.", k.Name, p.Name)
		return nil
	}
	if a.DryRun {
		for _, s := range set {
			note(emit, "%s: would set: %s", k.Name, s)
		}
		return nil
	}
	if _, err := v.Set(ctx, settingsOf(p)); err != nil {
		return err
	}
	if p.Bandwidth != nil && *p.Bandwidth != v.Rate() {
		if err := v.SetRate(*p.Bandwidth); err != nil {
			return err
		}
	}
	for _, s := range set {
		note(emit, "%s: set: %s", k.Name, s)
	}
	return nil
}
