package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// checklist collects results.
type checklist []wire.Check

func (c *checklist) add(name string, r wire.Result, remedy, format string, a ...any) {
	*c = append(*c, wire.Check{Name: name, Result: r, Detail: fmt.Sprintf(format, a...), Remedy: remedy})
}

// checks answers a peer's prerequisites on this host. It changes nothing.
func (m *Manager) checks(ctx context.Context, p wire.Peer, q wire.CheckRequest) []wire.Check {
	var c checklist
	g, err := m.deps.Grant(p.Host)
	switch {
	case err != nil:
		c.add("Authorisation", wire.Failed, "pair the hosts again", "%v", err)
		return c
	case g.Deaf:
		c.add("Authorisation", wire.Failed, "on the receiving host: receiving = true in /etc/replicad/replicad.toml, then: systemctl reload replicad", "%s does not receive replicas at all", m.deps.HostName)
	case !g.MaySend:
		c.add("Authorisation", wire.Failed, "on the receiving host: replicactl peer allow "+p.Name+" --may-send", "%s may not send replicas to %s", p.Name, m.deps.HostName)
	default:
		c.add("Authorisation", wire.OK, "", "%s may replicate to %s", p.Name, m.deps.HostName)
	}
	if err := m.checkSpace(&c, g, q); err != nil {
		c.add("Free space", wire.Unknown, "", "%v", err)
	}
	info, err := m.deps.Hyper.Info(ctx)
	if err != nil {
		c.add("Hypervisor", wire.Failed, "systemctl status libvirtd on the receiving host", "%v", err)
	} else {
		c.add("Hypervisor", wire.OK, "", "libvirt %s, QEMU %s on %s", info.Libvirt, info.QEMU, m.deps.HostName)
	}
	if len(q.Spec) > 0 {
		m.checkRender(ctx, &c, q)
	}
	if q.For == "planned" || q.For == "reverse" {
		m.checkTakeover(&c, q)
	}
	return c
}

func (m *Manager) checkSpace(c *checklist, g Grant, q wire.CheckRequest) error {
	if g.Root == "" {
		c.add("Storage root", wire.Failed, "on the receiving host: replicactl peer allow PEER --may-send --root DIR", "none is set")
		return nil
	}
	dir := g.Root
	for dir != "/" {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		dir = filepath.Dir(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	free := int64(st.Bavail) * st.Bsize
	if q.Need > free {
		c.add("Free space", wire.Warning, "free space below "+g.Root, "%s are free, the disks are %s when full (replicas are sparse)", status.Bytes(free), status.Bytes(q.Need))
		return nil
	}
	c.add("Free space", wire.OK, "", "%s free in %s", status.Bytes(free), g.Root)
	return nil
}

// checkRender proves that the description can become a domain here.
func (m *Manager) checkRender(ctx context.Context, c *checklist, q wire.CheckRequest) {
	s, err := libvirt.ParseSpec(q.Spec)
	if err != nil {
		c.add("Description", wire.Failed, "", "%v", err)
		return
	}
	v, known := m.get(q.VM)
	if known && v.record().Native {
		c.add("Description", wire.OK, "", "the host has the domain's own definition")
		return
	}
	if !known {
		v = &VM{deps: &m.deps, id: q.VM}
		for _, d := range s.Disks {
			v.rec.Disks = append(v.rec.Disks, Disk{Name: wire.DiskName(d.Target), Kind: "raw", Path: "/nonexistent"})
		}
	}
	if _, err := libvirt.Render(s, v.policy(s)); err != nil {
		c.add("Description", wire.Failed, "", "%v", err)
		return
	}
	c.add("Description", wire.OK, "", "can be defined on %s", m.deps.HostName)
	m.checkNetworks(ctx, c, s, q.For == "planned")
	if known {
		return
	}
	if id, err := m.deps.Hyper.LookupName(ctx, s.Name); err == nil && id != s.UUID {
		c.add("Name", wire.Failed, "rename one of them: virsh domrename "+s.Name+" NEWNAME", "another domain is called %q there", s.Name)
	} else if _, _, err := m.deps.Hyper.DomainState(ctx, s.UUID); err == nil {
		c.add("Name", wire.Failed, "on the receiving host: virsh undefine "+s.UUID+" (its images are never overwritten)", "a domain with this UUID exists there")
	} else if errors.Is(err, libvirt.ErrNotFound) {
		c.add("Name", wire.OK, "", "%q is free", s.Name)
	} else {
		c.add("Name", wire.Unknown, "", "%v", err)
	}
}

func (m *Manager) checkTakeover(c *checklist, q wire.CheckRequest) {
	v, ok := m.get(q.VM)
	if !ok {
		c.add("Replica", wire.Failed, "replicactl vm enable on the primary", "there is no replica of the VM")
		return
	}
	r := v.record()
	st, err := v.storeStatus()
	switch {
	case r.Lineage.State != lineage.Replica:
		c.add("Replica", wire.Failed, "replicactl vm status there", "the other host is %s", r.Lineage.State)
	case r.Lineage.Diverged != nil:
		c.add("Replica", wire.Failed, "replicactl failover reverse", "the copies have diverged")
	case err != nil:
		c.add("Replica", wire.Failed, "", "%v", err)
	case st.Committed.IsZero() || r.Incomplete:
		c.add("Replica", wire.Failed, "wait for the initial copy", "it holds no complete copy yet")
	default:
		c.add("Replica", wire.OK, "", "complete at %v", st.Committed)
	}
	if err == nil {
		if h, err := v.storeHistory(); err == nil { // it was open just now
			v.checkHistory(c, q.KeepPoints, h)
		}
	}
}

// PlanPlanned lists the prerequisites of a planned failover.
func (v *VM) PlanPlanned(ctx context.Context, noReverse, keepPoints bool) ([]wire.Check, error) {
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	r := v.record()
	if !r.Lineage.MayServe() {
		return nil, &wire.Error{Kind: wire.KindRefused, Text: "this host is not the primary of " + r.Name, Hint: "run it there, or: replicactl failover unplanned " + r.Name}
	}
	var c checklist
	st, reason, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	switch {
	case err != nil:
		c.add("Guest", wire.Failed, "systemctl status libvirtd", "%v", err)
	case st == libvirt.StatePaused:
		c.add("Guest", wire.Failed, "virsh resume "+r.Name, "it is paused (%s) and cannot shut down", reason)
	default:
		c.add("Guest", wire.OK, "", "%s", st)
	}
	v.checkPath(&c)
	v.checkCopy(&c)
	v.checkLate(ctx, &c)
	if err := v.notJoining(); err != nil {
		c.add("Disks", wire.Failed, "replicactl vm watch "+r.Name, "%s", said(err))
	}
	p, err := v.peer()
	var h wire.HelloReply
	if err == nil {
		h, err = p.Hello(ctx, wire.HelloRequest{Min: wire.ProtocolMin, Max: wire.ProtocolMax, Host: v.deps.Host, Name: v.deps.HostName, Now: v.deps.Now()})
	}
	if err != nil {
		c.add("Replica host", wire.Failed, "replicactl peer test "+v.mgr.peerName(r.Peer), "%s", said(err))
		return c, nil
	}
	skew := h.Now.Sub(v.deps.Now())
	res := wire.OK
	if skew > maxSkew || skew < -maxSkew {
		res = wire.Warning
	}
	c.add("Clocks", res, "run a time service on both hosts", "they differ by %s", skew.Abs().Round(skewUnit))
	reply, err := p.Check(ctx, wire.CheckRequest{VM: v.id, For: "planned", Spec: r.Spec, KeepPoints: keepPoints})
	if err != nil {
		c.add("Replica host", wire.Failed, "replicactl peer test "+v.mgr.peerName(r.Peer), "%s", said(err))
		return c, nil
	}
	c = append(c, reply.Checks...)
	v.checkReversal(&c, noReverse)
	return c, nil
}

const (
	maxSkew  = 5_000_000_000
	skewUnit = 1_000_000
)

func (v *VM) checkPath(c *checklist) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.bypass() != "":
		c.add("Write path", wire.Failed, health.BypassRemedy, "%s", v.bypass())
	case v.overlay() != "" && v.facts.running:
		c.add("Write path", wire.Failed, "finish the backup (blockcommit)", "a snapshot lies above the export: %s", v.overlay())
	case v.overlay() != "":
		c.add("Write path", wire.Failed, "docs/operations/day2.md (a guest that ended below a snapshot)", "its newest writes lie in a snapshot: %s", v.overlay())
	default:
		c.add("Write path", wire.OK, "", "every disk stands on its export")
	}
}

func (v *VM) checkCopy(c *checklist) {
	s := v.session()
	name := v.record().Name
	if s == nil {
		c.add("Replication", wire.Failed, "replicactl vm status "+name, "nothing is shipped")
		return
	}
	st := s.Status()
	switch {
	case st.Stop != nil:
		c.add("Replication", wire.Failed, strings.ReplaceAll(st.Stop.Hint, "NAME", name), "it has stopped: %s", st.Stop.Reason)
	case !st.Protected:
		c.add("Replication", wire.Failed, "replicactl vm watch "+name, "the replica holds no consistent copy yet")
	case st.Failures > 0:
		c.add("Replication", wire.Failed, "replicactl peer test "+v.mgr.peerName(v.record().Peer), "the last cycle failed: %s", st.LastError)
	case st.Paused:
		c.add("Replication", wire.Warning, "", "it is paused; the failover sends the pending %s all the same", status.Bytes(st.Pending))
	default:
		c.add("Replication", wire.OK, "", "%s pending", status.Bytes(st.Pending))
	}
}

// checkLate warns of what the server of a disk may still carry out: that would
// change the disk after its last cut, and nobody would know.
func (v *VM) checkLate(ctx context.Context, c *checklist) {
	p, err := v.plane()
	if err != nil {
		return // checkCopy says so
	}
	st, err := p.Status(ctx)
	if err != nil {
		return
	}
	c.late(st.Disks, v.record().Name)
}

func (c *checklist) late(disks []dataplane.DiskStatus, name string) {
	for _, d := range disks {
		if d.Late {
			c.add("Late writes", wire.Warning, "wait; or afterwards, on the new primary: replicactl vm resync "+name+" --background",
				"disk %s: a connection to its NBD server ended less than 20 minutes ago; what was under way may still be carried out there, after the last cut", d.Name)
		}
	}
}

func (v *VM) checkReversal(c *checklist, noReverse bool) {
	if noReverse {
		c.add("Reversal", wire.Warning, "", "not asked for: the VM will be unprotected after the failover")
		return
	}
	r := v.record()
	g, err := v.deps.Grant(r.Peer)
	switch {
	case err != nil:
		c.add("Reversal", wire.Failed, "pair the hosts again", "%v", err)
	case !g.MaySend:
		c.add("Reversal", wire.Failed, "on this host: replicactl peer allow "+g.Name+" --may-send (or use --no-reverse)", "%s may not send replicas to this host", g.Name)
	default:
		c.add("Reversal", wire.OK, "", "this host accepts the way back")
	}
}

// said is an error's text without the hint that is shown apart from it.
func said(err error) string {
	var w *wire.Error
	if errors.As(err, &w) && w.Hint != "" {
		return strings.TrimSuffix(err.Error(), " ("+w.Hint+")")
	}
	return err.Error()
}
