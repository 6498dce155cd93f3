package vm

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"kvmreplica/replicad/wire"
)

func TestAPlannedFailoverThereAndBackLosesNothing(t *testing.T) {
	w := newPair(t)
	w.protect()
	if err := w.a.do(planned); err != nil {
		t.Fatal(err)
	}
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	if err := w.b.do(planned); err != nil {
		t.Fatal(err)
	}
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}

// What the replica's operator asks the primary for is begun in time or not at
// all, and once: repeated, also late, it has the first one's answer.
func TestARequestForAPlannedFailoverIsBegunInTimeAndOnce(t *testing.T) {
	w := newPair(t)
	w.protect()
	ask := func(request string, before time.Time) (wire.FailoverReply, error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(wire.WithPeer(t.Context(), wire.Peer{Host: w.b.host, Name: w.b.name}), patience)
		defer cancel()
		return w.a.manager().Failover(ctx, wire.FailoverRequest{VM: testVM, Step: stepRequest, Request: request, Start: true, Reverse: true, Before: before})
	}
	for name, before := range map[string]time.Time{
		"no time": {}, "late": time.Now().Add(-time.Second), "far ahead": time.Now().Add(time.Hour),
	} {
		reply, err := ask(name, before)
		var e *wire.Error
		if !errors.As(err, &e) || e.Kind != wire.KindConflict || !strings.Contains(e.Text, "not begun") || w.owner() != w.a {
			t.Fatalf("%s: %+v, %v", name, reply, err)
		}
	}
	before := time.Now().Add(AskedWithin)
	for range 2 { // the second is answered from memory
		if reply, err := ask("in time", before); err != nil || reply.State != stateAccepted {
			t.Fatalf("%+v, %v", reply, err)
		}
	}
	if reply, err := ask("in time", time.Now().Add(-time.Second)); err != nil || reply.State != stateAccepted {
		t.Fatalf("repeated late: %+v, %v", reply, err)
	}
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	log, err := w.a.vm().Audit(100)
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, e := range log {
		if e.What == "planned failover asked for" {
			said = append(said, e.Request+": "+e.Result)
		}
	}
	if len(said) != 4 || !strings.HasPrefix(said[3], "in time: ") {
		t.Errorf("the audit log says %q", said)
	}
}
