package lineage

import (
	"testing"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

func gen(n byte) delta.Generation { return delta.Generation{n, 0xaa} }

// at is position e of generation n with the one digest that belongs to it.
func at(n byte, e uint64) delta.Pos {
	return delta.Pos{Generation: gen(n), Epoch: e, Digest: delta.Digest{n, byte(e), 1}}
}

func forged(p delta.Pos) delta.Pos {
	p.Digest[31]++
	return p
}

const vm = wire.VMID("11111111-2222-3333-4444-555555555555")

func disks(names ...wire.DiskName) (all []wire.Disk) {
	for _, n := range names {
		all = append(all, wire.Disk{Name: n, Size: 1 << 20, Format: "raw"})
	}
	return all
}

// primary is P in generation 2 (parent: epoch 9 of generation 1), base 5,
// acknowledged 10, frozen 11.
func primary(change ...func(*wire.HandshakeRequest)) wire.HandshakeRequest {
	p := wire.HandshakeRequest{
		VM: vm, Generation: gen(2), Ancestors: []delta.Pos{at(1, 9)},
		Base: at(2, 5), Acked: at(2, 10), Highest: 11, Disks: disks("vda"), Running: true,
	}
	for _, c := range change {
		c(&p)
	}
	return p
}

// fresh is P just promoted at epoch 9 of generation 1.
func fresh(change ...func(*wire.HandshakeRequest)) wire.HandshakeRequest {
	return primary(append([]func(*wire.HandshakeRequest){func(p *wire.HandshakeRequest) {
		p.Base, p.Acked, p.Highest, p.Before = at(1, 9), delta.Pos{}, 0, at(1, 9)
	}}, change...)...)
}

func replica(c delta.Pos, change ...func(*wire.HandshakeReply)) wire.HandshakeReply {
	r := wire.HandshakeReply{Role: RoleReplica, Generation: c.Generation, Committed: c, VM: vm, Disks: []wire.DiskName{"vda"}}
	if c.Generation == gen(2) {
		r.Ancestors = []delta.Pos{at(1, 9)}
	}
	for _, f := range change {
		f(&r)
	}
	return r
}

func seeding(g delta.Generation, cursor int64) wire.HandshakeReply {
	return replica(delta.Pos{}, func(r *wire.HandshakeReply) {
		r.Generation, r.Seeding = g, map[wire.DiskName]int64{"vda": cursor}
	})
}

func other(role string, g byte, ancestors ...delta.Pos) wire.HandshakeReply {
	return wire.HandshakeReply{Role: role, Generation: gen(g), Ancestors: ancestors, VM: vm, Disks: []wire.DiskName{"vda"}}
}

// oldPrimary is R of generation 1 after P was promoted, with an operator's
// consent to lose its writes.
func oldPrimary(change ...func(*wire.HandshakeReply)) wire.HandshakeReply {
	r := other(RoleReplica, 1)
	r.Discard, r.Base, r.Tracked = gen(1), at(1, 7), true
	for _, c := range change {
		c(&r)
	}
	return r
}

type example struct {
	row  string
	p    wire.HandshakeRequest
	r    wire.HandshakeReply
	want Outcome
	also func(Decision) bool
}

func examples() []example {
	req := func(f func(*wire.HandshakeRequest)) func(*wire.HandshakeRequest) { return f }
	parent := func(p delta.Pos) func(Decision) bool { return func(d Decision) bool { return d.Parent == p } }
	alarm := func(d Decision) bool { return d.Alarm }
	sticky := func(d Decision) bool { return d.Alarm && d.Diverged }
	return []example{
		{"no-generation", primary(req(func(p *wire.HandshakeRequest) { p.Generation = delta.Generation{} })), replica(at(2, 10)), Refused, nil},
		{"unknown-role", primary(), other("witness", 2), Refused, nil},
		{"other-vm", primary(), replica(at(2, 10), func(r *wire.HandshakeReply) { r.VM = "x" }), Unrelated, alarm},
		{"malformed-position", primary(), replica(at(2, 10), func(r *wire.HandshakeReply) { r.Generation = gen(1) }), Refused, nil},
		{"discards-our-generation", primary(zeroBase), func() wire.HandshakeReply {
			r := seeding(gen(2), 4096)
			r.Discard = gen(2)
			return r
		}(), Refused, sticky},
		{"promotion-discarded", primary(), func() wire.HandshakeReply {
			r := other(RoleReplica, 3, at(2, 10), at(1, 9))
			r.Discard = gen(3)
			return r
		}(), VerifyAll, func(d Decision) bool { return d.SaveLosing }},
		{"one-name-two-contents", primary(), replica(forged(at(2, 10))), Stop, sticky},
		{"one-name-two-contents", primary(req(func(p *wire.HandshakeRequest) { p.Known = []delta.Pos{at(2, 11)} })), replica(forged(at(2, 11))), Stop, sticky},
		{"one-name-two-contents", primary(), other(RolePrimary, 3, forged(at(1, 9))), Stop, sticky},
		{"marked-diverged", primary(req(func(p *wire.HandshakeRequest) { p.Diverged = true })), replica(at(2, 10)), SplitBrain, sticky},
		{"marked-diverged", primary(), replica(at(2, 10), func(r *wire.HandshakeReply) { r.Diverged = true }), SplitBrain, sticky},
		{"two-primaries-one-generation", primary(), other(RolePrimary, 2), Stop, sticky},
		{"unrelated-primary", primary(), other(RolePrimary, 7), Unrelated, alarm},
		{"both-run", primary(), replica(at(2, 10), func(r *wire.HandshakeReply) { r.Running = true }), SplitBrain, sticky},
		{"no-replica", primary(), other(RoleNone, 0), Unrelated, alarm},
		{"promoted-while-we-run", primary(), other(RolePrimary, 3, at(2, 10), at(1, 9)), SplitBrain, sticky},
		{"promoted", primary(req(func(p *wire.HandshakeRequest) { p.Running = false })), other(RolePrimary, 3, at(2, 10), at(1, 9)), Stale, alarm},
		{"forked", primary(req(func(p *wire.HandshakeRequest) { p.Running = false })), other(RolePrimary, 3, at(1, 8)), SplitBrain, sticky},
		{"forked-discard", primary(), func() wire.HandshakeReply {
			r := other(RoleReplica, 3, at(1, 8))
			r.Discard, r.Diverged = gen(3), true
			return r
		}(), VerifyAll, func(d Decision) bool { return d.SaveLosing }},
		{"old-primary-runs", fresh(req(func(p *wire.HandshakeRequest) { p.Running = false })), func() wire.HandshakeReply {
			r := other(RolePrimary, 1)
			r.Running = true
			return r
		}(), SplitBrain, sticky},
		{"replica-runs", primary(req(func(p *wire.HandshakeRequest) { p.Running = false })), replica(at(2, 10), func(r *wire.HandshakeReply) { r.Running = true }), OperatorDecides, alarm},
		{"other-disks", primary(), replica(at(2, 10), func(r *wire.HandshakeReply) { r.Disks = []wire.DiskName{"vda", "vdb"} }), Unrelated, alarm},
		{"other-disks", primary(req(func(p *wire.HandshakeRequest) { p.Disks = disks("vda", "vdc") })), replica(at(2, 10)), Unrelated, alarm},
		{"seed-from-the-future", primary(), func() wire.HandshakeReply {
			r := seeding(gen(3), 100)
			r.Ancestors = []delta.Pos{at(2, 10)}
			return r
		}(), OperatorDecides, alarm},
		{"seed-from-existing-images", primary(zeroBase), func() wire.HandshakeReply {
			r := seeding(delta.Generation{}, 4096)
			r.VerifyAll = "it was given existing images"
			return r
		}(), VerifyAll, func(d Decision) bool { return d.Parent.IsZero() && !d.Restart }},
		{"seed-after-ack", primary(), seeding(gen(2), 4096), SeedContinue, func(d Decision) bool { return d.Restart && d.Alarm && d.Cursors == nil }},
		{"seeding", primary(zeroBase), seeding(gen(2), 4096), SeedContinue, func(d Decision) bool { return !d.Restart && d.Cursors["vda"] == 4096 }},
		{"seeding", primary(zeroBase), seeding(delta.Generation{}, 0), SeedContinue, func(d Decision) bool { return !d.Restart }},
		{"seed-of-another-generation", primary(zeroBase), seeding(gen(7), 4096), SeedContinue, func(d Decision) bool { return d.Restart && d.Cursors == nil }},
		{"replica-of-newer-generation", primary(), replica(at(3, 1), func(r *wire.HandshakeReply) { r.Ancestors = []delta.Pos{at(2, 10)} }), OperatorDecides, alarm},
		{"unrelated", primary(), replica(at(7, 1)), Unrelated, alarm},
		{"old-primary", fresh(), other(RolePrimary, 1), OperatorDecides, alarm},
		{"old-primary-discards", fresh(), oldPrimary(), VerifyUnion, func(d Decision) bool {
			return d.SaveLosing && *d.Union == Union{RBase: at(1, 7), Promoted: at(1, 9), Before: at(1, 9)}
		}},
		{"sealed-at-parent", fresh(), replica(at(1, 9), func(r *wire.HandshakeReply) { r.Sealed = true }), ReverseIncremental, parent(at(1, 9))},
		{"sealed-at-parent", primary(), replica(at(1, 9), func(r *wire.HandshakeReply) { r.Sealed = true }), VerifyAll, alarm},
		{"replica-at-parent", fresh(), replica(at(1, 9)), Incremental, parent(at(1, 9))},
		{"replica-at-parent", primary(), replica(at(1, 9)), VerifyAll, alarm},
		{"beyond-the-fork", fresh(), replica(at(1, 10)), OperatorDecides, alarm},
		{"behind-the-fork", fresh(), replica(at(1, 8)), VerifyAll, alarm},
		{"sealed-in-our-generation", primary(), replica(at(2, 10), func(r *wire.HandshakeReply) { r.Sealed = true }), Refused, sticky},
		{"newer-than-ever-frozen", primary(), replica(at(2, 12)), OperatorDecides, alarm},
		{"before-base", primary(), replica(at(2, 4)), VerifyAll, alarm},
		{"before-acked", primary(), replica(at(2, 9)), VerifyAll, alarm},
		{"foreign-base", primary(req(func(p *wire.HandshakeRequest) { p.Base = at(1, 8) })), replica(at(2, 10)), VerifyAll, alarm},
		{"equal-position", primary(), replica(at(2, 10)), Incremental, func(d Decision) bool { return d.Parent == at(2, 10) && !d.LostAck }},
		{"lost-ack", primary(), replica(at(2, 11)), Incremental, func(d Decision) bool { return d.Parent == at(2, 11) && d.LostAck }},
		{"lost-ack", primary(func(p *wire.HandshakeRequest) { p.Acked = delta.Pos{} }), replica(at(2, 7)), Incremental, parent(at(2, 7))},
	}
}

func zeroBase(p *wire.HandshakeRequest) { p.Base, p.Acked, p.Highest = delta.Pos{}, delta.Pos{}, 0 }

func TestEveryRowOfTheTableDecidesItsExample(t *testing.T) {
	hit := map[string]bool{}
	for _, e := range examples() {
		d := Decide(e.p, e.r)
		if d.Row != e.row || d.Outcome != e.want {
			t.Errorf("%s: got row %s outcome %v (%s), want %v", e.row, d.Row, d.Outcome, d.Reason, e.want)
			continue
		}
		if e.also != nil && !e.also(d) {
			t.Errorf("%s: particulars are wrong: %+v", e.row, d)
		}
		if d.Reason == "" {
			t.Errorf("%s: no reason given", e.row)
		}
		hit[d.Row] = true
	}
	for _, r := range rows() {
		if !hit[r.name] {
			t.Errorf("row %s has no example", r.name)
		}
	}
}

func TestReplicaThatDoubtsItselfIsComparedWhole(t *testing.T) {
	doubt := func(r *wire.HandshakeReply) { r.VerifyAll = "base was touched" }
	for _, c := range []struct {
		p wire.HandshakeRequest
		r wire.HandshakeReply
	}{
		{primary(), replica(at(2, 10), doubt)},
		{primary(), replica(at(2, 11), doubt)},
		{fresh(), replica(at(1, 9), doubt)},
		{fresh(), oldPrimary(doubt)},
	} {
		if d := Decide(c.p, c.r); d.Outcome != VerifyAll || d.Union != nil {
			t.Errorf("row %s: got %v, want verify-all", d.Row, d.Outcome)
		}
	}
}

func TestFailbackAfterAnOlderPointNeedsAllThreeSets(t *testing.T) {
	older := func(p *wire.HandshakeRequest) { p.Before, p.Between = at(1, 12), true }
	late := func(r *wire.HandshakeReply) { r.Base = at(1, 11) }
	d := Decide(fresh(older), oldPrimary(late))
	want := Union{RBase: at(1, 11), Promoted: at(1, 9), Before: at(1, 12)}
	if d.Outcome != VerifyUnion || *d.Union != want {
		t.Fatalf("promotion at an older point: got %v %+v", d.Outcome, d.Union)
	}
	for name, c := range map[string]struct {
		p func(*wire.HandshakeRequest)
		r func(*wire.HandshakeReply)
	}{
		"a segment is missing":                 {func(p *wire.HandshakeRequest) { p.Before = at(1, 12) }, late},
		"the old primary's set is not proven":  {older, func(r *wire.HandshakeReply) { r.Tracked = false }},
		"its base is past what we held":        {older, func(r *wire.HandshakeReply) { r.Base = at(1, 13) }},
		"its base is in another generation":    {older, func(r *wire.HandshakeReply) { r.Base = at(6, 1) }},
		"our set is not relative to the point": {func(p *wire.HandshakeRequest) { older(p); p.Base = at(2, 1) }, late},
		"we had an acknowledged epoch since":   {func(p *wire.HandshakeRequest) { older(p); p.Acked, p.Highest = at(2, 3), 3 }, late},
		"the record contradicts itself":        {func(p *wire.HandshakeRequest) { older(p); p.Before = at(1, 8) }, func(r *wire.HandshakeReply) { r.Base = at(1, 7) }},
		"a role change lies between":           {func(p *wire.HandshakeRequest) { older(p); p.Ancestors = []delta.Pos{at(5, 4), at(1, 9)} }, late},
	} {
		if d := Decide(fresh(c.p), oldPrimary(c.r)); d.Outcome != VerifyAll || !d.SaveLosing {
			t.Errorf("%s: got %v (%s), want verify-all", name, d.Outcome, d.Reason)
		}
	}
}

func TestConsentNamesTheGenerationItGivesUp(t *testing.T) {
	wrong := oldPrimary(func(r *wire.HandshakeReply) { r.Role, r.Discard = RolePrimary, gen(4) })
	if d := Decide(fresh(), wrong); d.Outcome != OperatorDecides {
		t.Fatalf("consent for another generation: got %v", d.Outcome)
	}
}
