package lineage

import (
	"testing"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// halves enumerates both halves over a small world: three generations in every
// kinship, epochs on both sides of every bound, every flag.
func halves(try func(p wire.HandshakeRequest, r wire.HandshakeReply)) (cells int) {
	none := delta.Pos{}
	bools := []bool{false, true}
	for _, base := range []delta.Pos{none, at(1, 9), at(2, 5), at(1, 4)} {
		for _, acked := range []delta.Pos{none, at(2, 7)} {
			for _, highest := range []uint64{0, 8} {
				for _, running := range bools {
					for _, diverged := range bools {
						p := wire.HandshakeRequest{
							VM: vm, Generation: gen(2), Ancestors: []delta.Pos{at(1, 9)}, Base: base, Acked: acked,
							Highest: highest, Running: running, Diverged: diverged, Disks: disks("vda"),
						}
						cells += replies(func(r wire.HandshakeReply) { try(p, r) })
					}
				}
			}
		}
	}
	return cells
}

func replies(try func(wire.HandshakeReply)) (cells int) {
	chains := map[byte][][]delta.Pos{
		0: {nil},
		1: {nil},                  // ancestor of P
		2: {{at(1, 9)}},           // P's own
		3: {{at(2, 7), at(1, 9)}}, // descendant
		4: {{at(1, 8)}, nil},      // fork, unrelated
	}
	for g, list := range chains {
		for _, chain := range list {
			for _, epoch := range []uint64{0, 4, 6, 7, 8, 9, 10} {
				for flags := range 128 {
					r := wire.HandshakeReply{
						Generation: gen(g), Ancestors: chain, Sealed: flags&1 != 0, Diverged: flags&2 != 0,
						Running: flags&4 != 0, Tracked: flags&8 != 0,
					}
					r.Role = []string{RoleReplica, RolePrimary, RoleNone, "other"}[flags>>4&3]
					if g == 0 {
						r.Generation = delta.Generation{}
					}
					if flags&64 != 0 {
						r.Discard = r.Generation
						r.Base = delta.Pos{Generation: r.Generation, Epoch: 5}
					}
					if epoch > 0 && g > 0 {
						r.Committed = at(g, epoch)
					}
					if epoch == 0 {
						r.Seeding = map[wire.DiskName]int64{"vda": 4096}
					}
					try(r)
					cells++
				}
			}
		}
	}
	return cells
}

func TestEveryCellObeysTheRules(t *testing.T) {
	bad := 0
	fail := func(p wire.HandshakeRequest, r wire.HandshakeReply, d Decision, why string) {
		if bad++; bad <= 10 {
			t.Errorf("%s\nrow %s, %v: %s\np %+v\nr %+v", why, d.Row, d.Outcome, d.Reason, p, r)
		}
	}
	seen := map[Outcome]int{}
	cells := halves(func(p wire.HandshakeRequest, r wire.HandshakeReply) {
		d := Decide(p, r)
		seen[d.Outcome]++
		incremental := d.Outcome == Incremental || d.Outcome == ReverseIncremental
		switch {
		case p.Diverged && d.MayShip():
			fail(p, r, d, "ships although diverged is recorded")
		case r.Diverged && r.Discard.IsZero() && d.MayShip():
			fail(p, r, d, "ships although the other side diverged and nobody agreed to discard it")
		case p.Running && r.Running && d.MayShip():
			fail(p, r, d, "ships although the VM runs on both hosts")
		case r.Running && d.MayShip():
			fail(p, r, d, "ships into a running VM")
		case r.Role != RoleReplica && d.MayShip() && r.Discard.IsZero():
			fail(p, r, d, "ships to a host that is not a replica")
		case incremental && r.Committed.IsZero():
			fail(p, r, d, "incremental onto nothing")
		case incremental && d.Parent != r.Committed:
			fail(p, r, d, "incremental from another position than the replica's")
		case incremental && r.Generation == p.Generation && r.Committed.Epoch > p.Highest:
			fail(p, r, d, "incremental onto an epoch the primary never froze")
		case incremental && before(r.Committed, p.Base), incremental && before(r.Committed, p.Acked):
			fail(p, r, d, "incremental although bits since the replica's position were dropped")
		case incremental && r.Generation != p.Generation && p.Base != r.Committed:
			fail(p, r, d, "incremental across generations with a tracker relative to something else")
		case incremental && r.Generation != gen(1) && r.Generation != gen(2):
			fail(p, r, d, "incremental onto a generation that is not on the chain")
		case d.Outcome == VerifyUnion && (r.Discard.IsZero() || !r.Tracked || p.Base != at(1, 9)):
			fail(p, r, d, "partial compare although a set is not proven")
		case (d.Outcome == SplitBrain || d.Outcome == Stop) && !d.Diverged:
			fail(p, r, d, "split brain that is not persisted")
		case d.Outcome == Stale && (p.Running || d.MayRun(P)):
			fail(p, r, d, "stale primary may run")
		case !d.MayShip() && d.Reason == "":
			fail(p, r, d, "a refusal without a reason")
		case d.Idle(p.Acked, 1), d.Idle(delta.Pos{}, 0):
			fail(p, r, d, "idle with a dirty set, or with nothing ever acknowledged")
		}
	})
	if cells < 300_000 {
		t.Fatalf("only %d cells", cells)
	}
	for o := Refused; o <= Stop; o++ {
		if seen[o] == 0 {
			t.Errorf("outcome %v never occurred", o)
		}
	}
	t.Logf("%d cells: %v", cells, seen)
}

// host is one side's durable state, from which both of its halves follow.
type host struct {
	gen       byte
	ancestors []delta.Pos
	running   bool
	diverged  bool
}

func (h host) request() wire.HandshakeRequest {
	return wire.HandshakeRequest{VM: vm, Generation: gen(h.gen), Ancestors: h.ancestors, Running: h.running, Diverged: h.diverged, Base: parentOf(h)}
}

func (h host) reply() wire.HandshakeReply {
	return wire.HandshakeReply{VM: vm, Role: RolePrimary, Generation: gen(h.gen), Ancestors: h.ancestors, Running: h.running, Diverged: h.diverged}
}

func parentOf(h host) delta.Pos {
	if len(h.ancestors) == 0 {
		return delta.Pos{}
	}
	return h.ancestors[0]
}

func TestTwoHostsThatBothThinkThemselvesPrimaryReadMirroredAnswers(t *testing.T) {
	mirror := map[Outcome]Outcome{
		SplitBrain: SplitBrain, Unrelated: Unrelated, Stop: Stop,
		Stale: OperatorDecides, OperatorDecides: Stale,
	}
	lines := []host{
		{gen: 1},
		{gen: 2, ancestors: []delta.Pos{at(1, 9)}},
		{gen: 3, ancestors: []delta.Pos{at(2, 7), at(1, 9)}},
		{gen: 4, ancestors: []delta.Pos{at(1, 8)}},
		{gen: 5, ancestors: []delta.Pos{forged(at(1, 9))}},
		{gen: 7},
	}
	var all []host
	for _, l := range lines {
		for _, running := range []bool{false, true} {
			for _, diverged := range []bool{false, true} {
				l.running, l.diverged = running, diverged
				all = append(all, l)
			}
		}
	}
	for _, x := range all {
		for _, y := range all {
			xy, yx := Decide(x.request(), y.reply()), Decide(y.request(), x.reply())
			if mirror[xy.Outcome] != yx.Outcome {
				t.Errorf("%+v asks %+v: %v (%s); the other way round %v (%s)", x, y, xy.Outcome, xy.Row, yx.Outcome, yx.Row)
			}
			if xy.MayShip() || yx.MayShip() {
				t.Errorf("%+v and %+v: data would travel between two primaries", x, y)
			}
			if xy.Diverged != yx.Diverged {
				t.Errorf("%+v and %+v: only one side persists the split", x, y)
			}
		}
	}
}
