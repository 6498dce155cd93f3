package replicad

import (
	"context"
	"time"

	"kvmreplica/replicad/status"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// Tests and drills are made where the replica is, and kept there; both hosts
// show them. Each asks the other one, and remembers the answer.

// How often the other host is asked, how long it may take, and how long it is
// left alone when it did not answer: a list of many VMs must not wait for a
// dead host once per VM.
const (
	testsFresh  = 3 * time.Second
	testsWithin = time.Second
	testsSilent = 30 * time.Second
)

// heardTests is what a host was last heard to have.
type heardTests struct {
	at    time.Time // of the question
	tests wire.Tests
}

// testsHere is what this host has made of a VM.
func (d *Daemon) testsHere(id wire.VMID) wire.Tests {
	now, last := d.tests.Show(id)
	t := wire.Tests{Copies: len(now), Last: last}
	t.LastDrill, t.Proven = d.tests.ShowDrills(id)
	t.On(d.name)
	return t
}

// Status is this host's view of one VM, with the tests it made of it.
func (s *service) Status(ctx context.Context, id wire.VMID) (wire.PeerVM, error) {
	v, err := s.Manager.Status(ctx, id)
	if err == nil {
		t := s.d.testsHere(id).Clean()
		v.Tests = &t
	}
	return v, err
}

// testsThere is what the other host has, as it was last heard.
func (d *Daemon) testsThere(ctx context.Context, v *vm.VM) wire.Tests {
	now, host := time.Now(), v.Peer()
	d.mu.Lock()
	h := d.heard[v.ID()]
	ask := now.Sub(h.at) >= testsFresh && now.Sub(d.silent[host]) >= testsSilent && !v.Orphaned()
	d.mu.Unlock()
	if !ask {
		return h.tests
	}
	ctx, cancel := context.WithTimeout(ctx, testsWithin)
	defer cancel()
	var p wire.PeerVM
	c, err := d.client(host)
	if err == nil {
		p, err = c.Status(ctx, v.ID())
	}
	if err == nil && p.Tests != nil {
		if err = p.Tests.Validate(); err == nil {
			h.tests = *p.Tests
		}
	}
	h.tests.On(d.peerName(host))
	h.at = now
	d.mu.Lock()
	defer d.mu.Unlock()
	d.heard[v.ID()] = h
	delete(d.silent, host)
	if err != nil {
		d.silent[host] = now
		d.log.Debug("ask for tests and drills", "peer", string(host), "vm", string(v.ID()), "err", err)
	}
	return h.tests
}

// showTests adds to a VM's status what both hosts tested; of each the newest
// counts.
func (d *Daemon) showTests(ctx context.Context, v *vm.VM, s *status.VM) {
	s.Tests, _ = d.tests.Show(v.ID())
	here, there := d.testsHere(v.ID()), d.testsThere(ctx, v)
	s.TestsThere, s.LastTest = there.Copies, here.Last
	if t := there.Last; t != nil && (s.LastTest == nil || t.Started.After(s.LastTest.Started)) {
		s.LastTest = t
	}
	s.LastDrill, s.Proven = newerDrill(here.LastDrill, there.LastDrill), newerDrill(here.Proven, there.Proven)
}

func newerDrill(a, b *status.Drill) *status.Drill {
	if a == nil || b != nil && b.Started.After(a.Started) {
		return b
	}
	return a
}
