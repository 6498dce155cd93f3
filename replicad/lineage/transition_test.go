package lineage

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

func TestOnlyTheTransitionsOfTheTableArePossible(t *testing.T) {
	want := map[State]string{
		Primary:  "demote>demoting discard>replica diverge>primary force-promote>primary keep>primary",
		Demoting: "diverge>demoting force-take-back>primary keep>demoting seal>demoted take-back>primary",
		Demoted:  "discard>replica diverge>demoted follow>replica force-take-back>primary keep>demoted take-back>primary",
		Replica:  "discard>replica diverge>replica follow>replica force-promote>promoted keep>replica promote>promoted",
		Promoted: "cancel>replica commit>primary discard>replica diverge>promoted keep>promoted",
	}
	events := []Event{Cancel, Commit, Demote, Discard, Diverge, Follow, ForcePromote, ForceTakeBack, Keep, Promote, Seal, TakeBack}
	for from, list := range want {
		got := ""
		for _, e := range events {
			to, err := Transition(from, e)
			if err != nil {
				var te *TransitionError
				if !errors.As(err, &te) || te.From != from || te.Event != e {
					t.Errorf("%s in %s: error %v does not say so", e, from, err)
				}
				continue
			}
			if got != "" {
				got += " "
			}
			got += string(e) + ">" + string(to)
		}
		if d := cmp.Diff(list, got); d != "" {
			t.Errorf("from %s: %s", from, d)
		}
	}
}

// must applies changes in order.
func must(t *testing.T, l Lineage, changes ...Change) Lineage {
	t.Helper()
	for _, c := range changes {
		n, err := l.Apply(c)
		if err != nil {
			t.Fatalf("%s in %s: %v", c.Event, l.State, err)
		}
		l = n
	}
	return l
}

func TestPlannedFailoverThereAndBackKeepsOneServingSide(t *testing.T) {
	a, b := New(vm, gen(1)), New(vm, delta.Generation{})
	one := func(step string, serving string) {
		t.Helper()
		got := ""
		if a.MayServe() {
			got += "a"
		}
		if b.MayServe() {
			got += "b"
		}
		if got != serving {
			t.Fatalf("after %s: serving %q, want %q", step, got, serving)
		}
	}
	b = must(t, b, Change{Event: Follow, Generation: gen(1)})
	one("seed", "a")
	a = must(t, a, Change{Event: Demote})
	one("demote", "")
	a = must(t, a, Change{Event: Seal, At: at(1, 9)})
	one("seal", "")
	b = must(t, b, Change{Event: Promote, Generation: gen(2), At: at(1, 9)})
	one("promote", "b")
	a = must(t, a, Change{Event: Follow, Generation: gen(2), Ancestors: b.Ancestors})
	b = must(t, b, Change{Event: Commit})
	one("follow", "b")
	if a.Sealed != at(1, 9) {
		t.Fatal("the seal that proves where the old primary stands is gone")
	}
	d := Decide(wire.HandshakeRequest{VM: vm, Generation: b.Generation, Ancestors: b.Ancestors, Base: b.Parent()},
		wire.HandshakeReply{Role: a.Role(), Generation: gen(1), Committed: at(1, 9), Sealed: a.Sealed == at(1, 9)})
	if d.Outcome != ReverseIncremental {
		t.Fatalf("handshake after planned failover: %v (%s)", d.Outcome, d.Reason)
	}
	b = must(t, b, Change{Event: Demote}, Change{Event: Seal, At: at(2, 4)})
	a = must(t, a, Change{Event: Promote, Generation: gen(3), At: at(2, 4)}, Change{Event: Commit})
	b = must(t, b, Change{Event: Follow, Generation: gen(3), Ancestors: a.Ancestors})
	one("failback", "a")
	if want := []delta.Pos{at(2, 4), at(1, 9)}; !cmp.Equal(a.Ancestors, want) {
		t.Fatalf("ancestors %v, want %v", a.Ancestors, want)
	}
}

func TestTakeBackAfterTheSealNeedsThePeersWord(t *testing.T) {
	demoted := must(t, New(vm, gen(1)), Change{Event: Demote}, Change{Event: Seal, At: at(1, 9)})
	if _, err := demoted.Apply(Change{Event: TakeBack}); err == nil {
		t.Fatal("taken back without the peer's answer")
	}
	back := must(t, demoted, Change{Event: TakeBack, PeerConfirmed: true})
	if back.Generation != gen(1) || back.Forced || !back.Sealed.IsZero() {
		t.Fatalf("taken back as %+v", back)
	}
	if _, err := demoted.Apply(Change{Event: ForceTakeBack, At: at(1, 9)}); err == nil {
		t.Fatal("forced without a new generation: the peer may have gone on from the same one")
	}
	forced := must(t, demoted, Change{Event: ForceTakeBack, Generation: gen(6), At: at(1, 9)})
	if !forced.Forced || forced.Parent() != at(1, 9) {
		t.Fatalf("force is not recorded: %+v", forced)
	}
}

func TestForcedGenerationOnBothSidesIsFoundAsAFork(t *testing.T) {
	demoted := must(t, New(vm, gen(1)), Change{Event: Demote}, Change{Event: Seal, At: at(1, 9)})
	a := must(t, demoted, Change{Event: ForceTakeBack, Generation: gen(6), At: at(1, 9)})
	b := must(t, New(vm, delta.Generation{}), Change{Event: Follow, Generation: gen(1)}, Change{Event: ForcePromote, Generation: gen(2), At: at(1, 9)})
	d := Decide(wire.HandshakeRequest{VM: vm, Generation: a.Generation, Ancestors: a.Ancestors},
		wire.HandshakeReply{Role: b.Role(), Generation: b.Generation, Ancestors: b.Ancestors})
	if d.Outcome != SplitBrain || !d.Diverged {
		t.Fatalf("got %v", d.Outcome)
	}
}

func TestDivergenceStaysUntilASideIsNamed(t *testing.T) {
	l := must(t, New(vm, gen(1)), Change{Event: Diverge, Diverged: &Divergence{Row: "forked", Reason: "x"}})
	if l.MayServe() {
		t.Fatal("a diverged copy may be started")
	}
	again := must(t, l, Change{Event: Diverge, Diverged: &Divergence{Row: "later"}})
	if again.Diverged.Row != "forked" {
		t.Fatal("the first finding was overwritten")
	}
	for _, e := range []Event{Demote, ForcePromote} {
		if _, err := l.Apply(Change{Event: e, Generation: gen(9), At: at(1, 3)}); err == nil {
			t.Errorf("%s went through although the copies diverged", e)
		}
	}
	if k := must(t, l, Change{Event: Keep}); !k.MayServe() || !k.Discard.IsZero() {
		t.Fatalf("kept side: %+v", k)
	}
	d := must(t, l, Change{Event: Discard})
	if d.State != Replica || d.Discard != gen(1) || d.MayServe() {
		t.Fatalf("discarded side: %+v", d)
	}
	if f := must(t, d, Change{Event: Follow, Generation: gen(2)}); !f.Discard.IsZero() {
		t.Fatal("the consent outlives the first epoch of the new generation")
	}
}

func TestPromotionAtAnOlderPointRemembersWhatItHeld(t *testing.T) {
	r := must(t, New(vm, delta.Generation{}), Change{Event: Follow, Generation: gen(1)})
	p := must(t, r, Change{Event: ForcePromote, Generation: gen(2), At: at(1, 5), Before: at(1, 9)})
	if p.Parent() != at(1, 5) || p.Before != at(1, 9) || !p.Forced {
		t.Fatalf("promoted: %+v", p)
	}
	c := must(t, p, Change{Event: Cancel, At: at(1, 9)})
	if c.Generation != gen(1) || len(c.Ancestors) != 0 || c.Forced || c.MayServe() {
		t.Fatalf("cancelled: %+v", c)
	}
	for name, bad := range map[string]Change{
		"nothing complete":  {Event: Promote, Generation: gen(2)},
		"no new generation": {Event: Promote, Generation: gen(1), At: at(1, 5)},
		"foreign position":  {Event: Promote, Generation: gen(2), At: at(8, 5)},
	} {
		if _, err := r.Apply(bad); err == nil {
			t.Errorf("%s: promoted", name)
		}
	}
}

func TestAPointOfAnOlderGenerationCutsTheChain(t *testing.T) {
	r := must(t, New(vm, delta.Generation{}), Change{Event: Follow, Generation: gen(3), Ancestors: []delta.Pos{at(2, 7), at(1, 9)}})
	p := must(t, r, Change{Event: ForcePromote, Generation: gen(4), At: at(2, 3)})
	if want := []delta.Pos{at(2, 3), at(1, 9)}; !cmp.Equal(p.Ancestors, want) {
		t.Fatalf("ancestors %v, want %v", p.Ancestors, want)
	}
}

func TestAncestryIsBoundedAndSurvivesJSON(t *testing.T) {
	l := New(vm, gen(0))
	l.State = Primary
	l.Generation = gen(200)
	for i := byte(0); i < 100; i++ {
		l = must(t, l, Change{Event: ForcePromote, Generation: gen(i), At: delta.Pos{Generation: l.Generation, Epoch: uint64(i) + 1}})
	}
	if len(l.Ancestors) != wire.MaxAncestors {
		t.Fatalf("%d ancestors", len(l.Ancestors))
	}
	data, err := json.Marshal(l)
	if err != nil {
		t.Fatal(err)
	}
	var back Lineage
	if err := json.Unmarshal(data, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(l, back); d != "" {
		t.Fatal(d)
	}
	if err := back.Validate(); err != nil {
		t.Fatal(err)
	}
}

func TestApplyLeavesItsReceiverAlone(t *testing.T) {
	l := New(vm, gen(1))
	l.Ancestors = []delta.Pos{at(7, 1)}
	before, _ := json.Marshal(l)
	n := must(t, l, Change{Event: ForcePromote, Generation: gen(2), At: at(1, 5)})
	n.Ancestors[0].Epoch = 99
	if after, _ := json.Marshal(l); !bytes.Equal(before, after) {
		t.Fatalf("%s became %s", before, after)
	}
}

func TestImpossibleRecordsAreRefused(t *testing.T) {
	for name, l := range map[string]Lineage{
		"unknown state":           {State: "king", Generation: gen(1)},
		"primary of nothing":      {State: Primary},
		"demoted without a seal":  {State: Demoted, Generation: gen(1)},
		"sealed elsewhere":        {State: Demoted, Generation: gen(1), Sealed: at(2, 1)},
		"its own ancestor":        {State: Primary, Generation: gen(1), Ancestors: []delta.Pos{at(1, 1)}},
		"ancestor without a name": {State: Primary, Generation: gen(1), Ancestors: []delta.Pos{{Epoch: 1}}},
		"endless ancestry":        {State: Replica, Ancestors: make([]delta.Pos, wire.MaxAncestors+1)},
	} {
		if l.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestGenerationsAreRandomAndNeverZero(t *testing.T) {
	if _, err := NewGeneration(bytes.NewReader(make([]byte, 16))); err == nil {
		t.Error("a zero generation was made")
	}
	if _, err := NewGeneration(bytes.NewReader(make([]byte, 15))); err == nil {
		t.Error("a short read was accepted")
	}
	g, err := NewGeneration(bytes.NewReader(bytes.Repeat([]byte{7}, 16)))
	if err != nil || g != delta.Generation(bytes.Repeat([]byte{7}, 16)) {
		t.Errorf("got %v, %v", g, err)
	}
}

// A divergence must not keep a planned failover from ending: neither host can
// take the operator's choice before. It stays marked, and nobody serves.
func TestADivergedDemotionCanBeTakenBackAndStaysMarked(t *testing.T) {
	mark := Change{Event: Diverge, Diverged: &Divergence{Row: "forked"}}
	begun := must(t, New(vm, gen(1)), Change{Event: Demote})
	for name, l := range map[string]Lineage{
		"demoting": must(t, begun, mark),
		"demoted":  must(t, begun, Change{Event: Seal, At: at(1, 9)}, mark),
	} {
		for _, c := range []Change{
			{Event: TakeBack, PeerConfirmed: true},
			{Event: ForceTakeBack, Generation: gen(2), At: at(1, 9)},
		} {
			back := must(t, l, c)
			if back.State != Primary || back.Diverged == nil || back.MayServe() {
				t.Errorf("%s, %s: %+v", name, c.Event, back)
			}
			if kept := must(t, back, Change{Event: Keep}); !kept.MayServe() {
				t.Errorf("%s, %s, keep: %+v", name, c.Event, kept)
			}
		}
		for _, e := range []Event{Seal, Follow} {
			if _, err := l.Apply(Change{Event: e, At: at(1, 9), Generation: gen(3)}); err == nil {
				t.Errorf("%s: %s although the copies have diverged", name, e)
			}
		}
	}
}

// Taking over by force is a person's choice for this host's data; being asked
// to is not.
func TestOnlyAForcedPromotionSettlesADivergence(t *testing.T) {
	l := must(t, New(vm, delta.Generation{}), Change{Event: Follow, Generation: gen(1)}, Change{Event: Diverge, Diverged: &Divergence{Row: "forked"}})
	if _, err := l.Apply(Change{Event: Promote, Generation: gen(2), At: at(1, 9)}); err == nil {
		t.Error("a diverged replica was promoted because the primary asked")
	}
	if p := must(t, l, Change{Event: ForcePromote, Generation: gen(2), At: at(1, 9)}); !p.MayServe() || !p.Forced {
		t.Errorf("%+v", p)
	}
}
