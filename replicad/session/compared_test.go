package session

import (
	"testing"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// A replica that does not trust its content is told by the next handshake that
// it was compared: after the epoch with what differed, and not before. Its next
// wish is another comparison, although it stands where it stood; a wish that it
// goes on having is not compared twice, and not told without end.
func TestAReplicaThatAskedForAComparisonIsToldOfItsEnd(t *testing.T) {
	g := delta.Generation{1}
	at := func(n uint64) delta.Pos { return delta.Pos{Generation: g, Epoch: n, Digest: delta.Digest{byte(n)}} }
	now := time.Unix(1_700_000_000, 0)
	m := NewMachine(MachineConfig{Interval: time.Minute, Verified: true, Rand: func() float64 { return 0 }}, now)
	shake := func(n, asked uint64) EvHandshake {
		e := EvHandshake{
			Request: wire.HandshakeRequest{Generation: g, Base: at(n), Acked: at(n), Highest: n, Disks: []wire.Disk{{Name: "vda", Size: 64 << 20}}},
			Reply:   wire.HandshakeReply{Role: "replica", Generation: g, Committed: at(n), VerifyAll: "x", Asked: asked},
			Source:  dataplane.Status{Instance: "one", Generation: g},
		}
		if asked == 0 {
			e.Reply.VerifyAll = ""
		}
		return e
	}
	var acts []Action
	step := func(ev Event) { acts = m.Step(now, ev) }
	want := func(what string, ok func(Action) bool) {
		t.Helper()
		if len(acts) != 1 || !ok(acts[0]) {
			t.Fatalf("not %s: %+v in %+v", what, acts, m.Status())
		}
	}
	is := func(compared uint64, p delta.Pos) func(Action) bool {
		return func(a Action) bool { return a == DoHandshake{Compared: compared, At: p} }
	}
	compare := func() {
		t.Helper()
		want("a mark", func(a Action) bool { _, ok := a.(DoMark); return ok })
		step(EvMarked{})
		want("a comparison", func(a Action) bool { _, ok := a.(DoVerify); return ok })
		step(EvVerified{})
		if len(acts) == 0 {
			step(EvTrigger{})
		}
		want("a cut", func(a Action) bool { _, ok := a.(DoFreeze); return ok })
	}
	step(EvStart{})
	want("a plain handshake", is(0, delta.Pos{}))
	step(shake(4, 7))
	compare()
	step(EvFrozen{Epoch: dataplane.Epoch{Generation: g, Epoch: 5, Nonce: 1, Bytes: 4096, Parent: at(4)}})
	want("an epoch", func(a Action) bool { _, ok := a.(DoShip); return ok })
	step(EvShipped{Pos: at(5)})
	want("an acknowledgement", func(a Action) bool { _, ok := a.(DoAck); return ok })
	step(EvAcked{Source: dataplane.Status{Instance: "one", Generation: g}})
	want("the news of 7", is(7, at(5)))
	step(shake(5, 8)) // it was opened again, and does not know of 7
	compare()
	step(EvFrozen{Epoch: dataplane.Epoch{Generation: g, Empty: true, Parent: at(5)}})
	want("the news of 8", is(8, at(5)))
	step(shake(5, 8)) // not taken: waits for the next cut
	if len(acts) != 0 {
		t.Fatalf("at once: %+v", acts)
	}
	step(EvTrigger{})
	step(EvFrozen{Epoch: dataplane.Epoch{Generation: g, Empty: true, Parent: at(5)}})
	want("the news of 8 again", is(8, at(5)))
	step(shake(5, 0))
	step(EvTrigger{})
	step(EvFrozen{Epoch: dataplane.Epoch{Generation: g, Empty: true, Parent: at(5)}})
	want("a beat", func(a Action) bool { _, ok := a.(DoBeat); return ok })
}
