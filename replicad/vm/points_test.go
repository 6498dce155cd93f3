package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

func ptr[T any](v T) *T { return &v }

func kindIs(err error, k wire.Kind) bool {
	var w *wire.Error
	return errors.As(err, &w) && w.Kind == k
}

// pin pins the newest state on B and returns it.
func (w *pair) pin() wire.Point {
	w.t.Helper()
	var pos delta.Pos
	must(w.t, w.b.do(func(ctx context.Context, _ *Manager, v *VM) error {
		p, err := v.PinPoint(ctx, "latest", true)
		pos = p.Pos
		return err
	}))
	for _, p := range w.list(w.b).Points {
		if p.Pos == pos && p.Pinned {
			return p
		}
	}
	w.t.Fatalf("the pinned point %v is not listed: %+v", pos, w.list(w.b).Points)
	return wire.Point{}
}

func (w *pair) list(s *side) (r wire.PointsReply) {
	w.t.Helper()
	must(w.t, s.do(func(ctx context.Context, _ *Manager, v *VM) (err error) {
		r, err = v.ListPoints(ctx)
		return err
	}))
	return r
}

func TestPointsAreListedOnBothHostsAndKeptOnTheReplicaOnly(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	pinned := w.pin()
	a, b := w.list(w.a), w.list(w.b)
	if a.Host != b.Host || len(a.Points) == 0 || a.Retention != "all:1h,1h:1d" {
		t.Fatalf("A lists %+v, B %+v", a, b)
	}
	if last := b.Points[len(b.Points)-1]; !last.Latest {
		t.Errorf("the last point of the list is not the latest: %+v", last)
	}
	keep := func(s *side, o RetentionOptions) error {
		return s.do(func(_ context.Context, _ *Manager, v *VM) error { _, err := v.SetRetention(o); return err })
	}
	if err := keep(w.a, RetentionOptions{Retention: ptr("0")}); !kindIs(err, wire.KindRefused) || !strings.Contains(err.Error(), "point keep") {
		t.Errorf("the primary changes the retention: %v", err)
	}
	if err := w.a.do(func(ctx context.Context, _ *Manager, v *VM) error {
		_, err := v.PinPoint(ctx, "latest", true)
		return err
	}); !kindIs(err, wire.KindRefused) {
		t.Errorf("the primary pins: %v", err)
	}
	for _, bad := range []string{"25", "all", "1h:", "nonsense"} {
		if err := keep(w.b, RetentionOptions{Retention: &bad}); !kindIs(err, wire.KindInvalid) {
			t.Errorf("retention %q: %v", bad, err)
		}
	}
	must(t, keep(w.b, RetentionOptions{Retention: ptr(" all:1h, 1h:24h,1d:4w "), Quota: ptr(int64(1 << 30))}))
	w.b.restart()
	w.rest()
	w.pin() // a second point, however few the cuts of a slow machine were
	r := w.list(w.b)
	if r.Retention != "all:1h,1h:1d,1d:28d" || r.Quota != 1<<30 {
		t.Errorf("after a restart: %q, quota %d", r.Retention, r.Quota)
	}
	found := false
	for _, p := range r.Points {
		found = found || p.Pos == pinned.Pos && p.Pinned
	}
	if !found {
		t.Errorf("the pin did not survive: %+v", r.Points)
	}
	for text, kind := range map[string]wire.Kind{"4711": wire.KindNotFound, "gibberish!": wire.KindInvalid, fmt.Sprint(pinned.Cut.Year()) + "-": wire.KindInvalid} {
		if _, err := w.b.vm().ChoosePoint(text); !kindIs(err, kind) {
			t.Errorf("point %q: %v", text, err)
		}
	}
}

// A primary in the wrong hands says whatever it can say to the replica's host.
func TestAHostilePrimaryNeitherShortensTheRetentionNorDeletesTheReplica(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	pinned := w.pin()
	before := w.list(w.b)
	peer := wire.WithPeer(t.Context(), wire.Peer{Host: w.a.host, Name: "A"})
	r := w.a.vm().record()
	for _, retention := range []string{"0", "1s:1s", ""} {
		_, err := w.b.manager().Offer(peer, wire.Offer{
			VM: r.VM, Name: r.Name, Spec: json.RawMessage(r.Spec), Disks: r.wireDisks(), Interval: r.Interval, AppEvery: time.Hour,
			Generation: r.Lineage.Generation, Retention: retention, Request: "evil",
		})
		must(t, err)
	}
	if got := w.list(w.b); got.Retention != before.Retention || len(got.Points) < len(before.Points) {
		t.Fatalf("an offer changed what is kept: %+v", got)
	}
	w.a.kill() // else it goes on shipping
	for range 2 {
		if err := w.b.manager().Withdraw(peer, wire.Withdraw{VM: testVM, Delete: true, Request: "evil"}); err != nil && !kindIs(err, wire.KindNotFound) {
			t.Fatal(err)
		}
	}
	w.b.restart()
	w.until("the orphan to be up", func() error { _, err := w.b.vm().store(); return err })
	got := w.list(w.b)
	if got.Orphan == "" || len(got.Points) < len(before.Points) || got.Points[0].Pos != before.Points[0].Pos {
		t.Fatalf("after a withdrawal %+v is left of %+v", got, before)
	}
	st := w.b.vm().Status(t.Context(), "A")
	if st.State != "orphan" || len(st.Conditions) == 0 || !strings.Contains(st.Conditions[0].Remedy, "--delete-replica") {
		t.Errorf("status %s: %+v", st.State, st.Conditions)
	}
	for name, err := range map[string]error{
		"handshake": second(w.b.manager().Handshake(peer, wire.HandshakeRequest{VM: testVM, Generation: r.Lineage.Generation})),
		"points":    second(w.b.manager().Points(peer, testVM)),
		"failover":  second(w.b.manager().Failover(peer, wire.FailoverRequest{VM: testVM, Step: stepRelease, Request: "evil"})),
	} {
		if !kindIs(err, wire.KindNotFound) {
			t.Errorf("%s of an orphan: %v", name, err)
		}
	}
	_, err := w.b.manager().Offer(peer, wire.Offer{
		VM: r.VM, Name: r.Name, Spec: json.RawMessage(r.Spec), Disks: r.wireDisks(), Interval: r.Interval, Generation: r.Lineage.Generation, Request: "again",
	})
	if !kindIs(err, wire.KindConflict) || !strings.Contains(err.Error(), "--delete-replica") {
		t.Errorf("an offer over an orphan: %v", err)
	}
	v, err := w.b.vm().store()
	must(t, err)
	view, err := v.View(pinned.Pos)
	must(t, err)
	must(t, view.Close())
	must(t, w.b.do(func(ctx context.Context, m *Manager, v *VM) error {
		return m.Disable(ctx, v, DisableOptions{Delete: true, Request: "delete"}, nil)
	}))
	if w.b.vm() != nil {
		t.Error("its administrator cannot delete the orphan")
	}
}

func second[T any](_ T, err error) error { return err }
