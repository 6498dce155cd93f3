package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// as is the context of a call that an authenticated host made.
func (w *pair) as(h wire.HostID) context.Context {
	return wire.WithPeer(w.t.Context(), wire.Peer{Host: h, Name: "evil"})
}

// forged is an epoch that B would take if its header and key were right.
func (w *pair) forged(change func(h *delta.Header, k *wire.EpochKey)) (wire.EpochKey, []byte) {
	w.t.Helper()
	r := w.b.vm().record()
	st, err := w.b.vm().storeStatus()
	must(w.t, err)
	vm, err := delta.ParseVM(string(testVM))
	must(w.t, err)
	h := delta.Header{VM: vm, Generation: r.Lineage.Generation, Epoch: st.Committed.Epoch + 1000, Parent: st.Committed, Nonce: 7, Disks: w.b.vm().deltaDisks()}
	k := wire.EpochKey{VM: testVM, Generation: h.Generation, Epoch: h.Epoch, Nonce: h.Nonce}
	if change != nil {
		change(&h, &k)
	}
	evil := make([]byte, diskSize)
	copy(evil, "evil")
	changed, content := make([][]block.Range, len(h.Disks)), make([][]byte, len(h.Disks))
	changed[0], content[0] = []block.Range{{Off: 0, Len: 4096}}, evil
	spec := delta.Spec{Header: h, Changed: changed, Content: content, Info: delta.ManifestInfo{Cut: time.Now()}}
	b, err := spec.Build()
	must(w.t, err)
	return k, b.Bytes()
}

// Streams that are not the announced epoch on the committed parent.
func TestAHostilePrimarysForgedEpochsAreRefused(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.b.grant.MaxBytes = 2 * diskSize
	w.protect()
	w.rest()
	w.a.silent.Store(true) // its own shipping stays away
	before, err := w.b.vm().storeStatus()
	must(t, err)
	for name, change := range map[string]func(h *delta.Header, k *wire.EpochKey){
		"another VM in the stream":         func(h *delta.Header, _ *wire.EpochKey) { h.VM[0] ^= 1 },
		"another generation in the stream": func(h *delta.Header, _ *wire.EpochKey) { h.Generation[0] ^= 1 },
		"another generation":               func(h *delta.Header, k *wire.EpochKey) { h.Generation[0] ^= 1; k.Generation = h.Generation },
		"no generation":                    func(h *delta.Header, k *wire.EpochKey) { k.Generation = delta.Generation{} },
		"another epoch in the stream":      func(h *delta.Header, _ *wire.EpochKey) { h.Epoch++ },
		"another nonce in the stream":      func(h *delta.Header, _ *wire.EpochKey) { h.Nonce++ },
		"a seed as an epoch": func(h *delta.Header, k *wire.EpochKey) {
			h.Seed, h.Epoch, h.Nonce, h.Parent = true, 0, 0, delta.Pos{}
			k.Epoch, k.Nonce = 0, 0
		},
		"a parent that is not committed": func(h *delta.Header, _ *wire.EpochKey) { h.Parent.Epoch += 5 },
		"a parent of other content":      func(h *delta.Header, _ *wire.EpochKey) { h.Parent.Digest[0] ^= 1 },
		"no parent":                      func(h *delta.Header, _ *wire.EpochKey) { h.Parent = delta.Pos{} },
		"the committed epoch, other bytes": func(h *delta.Header, k *wire.EpochKey) {
			h.Epoch = before.Committed.Epoch
			h.Parent.Epoch = h.Epoch - 1
			k.Epoch = h.Epoch
		},
		"an epoch below the committed one": func(h *delta.Header, k *wire.EpochKey) {
			h.Epoch = before.Committed.Epoch - 1
			h.Parent.Epoch = h.Epoch - 1
			k.Epoch = h.Epoch
		},
		"the number of a patch": func(h *delta.Header, k *wire.EpochKey) { h.Epoch = 1 << 62; k.Epoch = h.Epoch },
		"a disk too many": func(h *delta.Header, _ *wire.EpochKey) {
			h.Disks = append(h.Disks, delta.Disk{Name: "vdb", Size: 4096})
		},
		"a disk beyond its quota": func(h *delta.Header, _ *wire.EpochKey) { h.Disks[0].Size += 2 * diskSize },
		"a disk of another name":  func(h *delta.Header, _ *wire.EpochKey) { h.Disks[0].Name = "vdz" },
	} {
		t.Run(name, func(t *testing.T) {
			k, stream := w.forged(func(h *delta.Header, k *wire.EpochKey) {
				h.Disks = append([]delta.Disk(nil), h.Disks...)
				change(h, k)
			})
			pos, err := w.b.manager().PutEpoch(w.as(w.a.host), k, 0, bytes.NewReader(stream))
			if err == nil {
				t.Errorf("taken as %v", pos)
			}
		})
	}
	// And cut short, from any host, at any place.
	k, stream := w.forged(nil)
	for n := 0; n < len(stream); n += 1 + n/3 {
		if _, err := w.b.manager().PutEpoch(w.as(w.a.host), k, 0, bytes.NewReader(stream[:n])); err == nil {
			t.Errorf("%d of %d bytes are an epoch", n, len(stream))
		}
	}
	if _, err := w.b.manager().PutEpoch(w.as("00000000-0000-4000-8000-00000000000C"), k, 0, bytes.NewReader(stream)); !kindIs(err, wire.KindNotFound) {
		t.Errorf("from another host: %v", err)
	}
	after, err := w.b.vm().storeStatus()
	must(t, err)
	if after.Committed != before.Committed {
		t.Errorf("the replica moved from %v to %v", before.Committed, after.Committed)
	}
	// After a restart not even a perfect epoch is taken before a handshake.
	w.b.restart()
	w.until("the store to be open", func() error { _, err := w.b.vm().store(); return err })
	if _, err := w.b.manager().PutEpoch(w.as(w.a.host), k, 0, bytes.NewReader(stream)); !kindIs(err, wire.KindUnavailable) {
		t.Errorf("without a handshake: %v", err)
	}
	w.a.silent.Store(false)
	w.rest()
}

// From the moment a promotion is decided until its role is durable, even a
// perfect epoch is not taken.
func TestNoEpochIsTakenWhileAPromotionIsDecided(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	m, asked := w.b.manager(), false
	var taken error
	w.b.mu.Lock()
	w.b.atPoint = map[string]func(){"promote/apply/acted": func() {
		asked = true
		k, stream := w.forged(nil)
		_, taken = m.PutEpoch(w.as(w.a.host), k, 0, bytes.NewReader(stream))
	}}
	w.b.mu.Unlock()
	must(t, w.a.do(planned))
	if !asked || !kindIs(taken, wire.KindUnavailable) {
		t.Fatalf("asked %t, an epoch meanwhile: %v", asked, taken)
	}
	w.rest()
}

// What a replica's host may say, and what must not come of it.
func TestAHostileReplicaChangesNeitherDataNorRole(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	before := w.a.vm().record()
	m, evil := w.a.manager(), w.as(w.b.host)
	gen := before.Lineage.Generation
	pos := w.a.vm().session().Status().Committed
	k, stream := w.forged(nil)
	attack := func(when string) {
		t.Helper()
		for name, err := range map[string]error{
			"release":        refusedOr(m.Failover(evil, wire.FailoverRequest{VM: testVM, Step: stepRelease, Request: "evil-1", At: pos, Force: true})),
			"a step of none": second(m.Failover(evil, wire.FailoverRequest{VM: testVM, Step: "demote", Request: "evil-2", Force: true})),
			"epoch":          second(m.PutEpoch(evil, k, 0, bytes.NewReader(stream))),
			"seed":           second(m.PutSeed(evil, wire.SeedRequest{VM: testVM, Generation: gen, Disk: "vda"}, bytes.NewReader(stream))),
			"beat":           m.Beat(evil, wire.Beat{VM: testVM, Pos: pos}),
			"withdraw":       m.Withdraw(evil, wire.Withdraw{VM: testVM, Delete: true, Request: "evil-3"}),
			"digests":        second(m.Digests(evil, wire.DigestRequest{VM: testVM, Disk: "vda", Pos: pos, Ranges: []wire.Range{{Off: 0, Len: 4096}}})),
		} {
			if err == nil {
				t.Errorf("%s: %s is done", when, name)
			}
		}
		// These change nothing, whatever they answer.
		_, _ = m.Failover(evil, wire.FailoverRequest{VM: testVM, Step: stepPromote, Request: "evil-4", At: pos, Start: true})
		_, _ = m.Failover(evil, wire.FailoverRequest{VM: testVM, Step: stepQuery, Request: "evil-5"})
		_, _ = m.Offer(evil, wire.Offer{VM: testVM, Name: "evil", Spec: before.Spec, Disks: before.wireDisks(), Interval: time.Hour, Generation: gen, Request: "evil-6"})
		after := w.a.vm().record()
		if l := after.Lineage; l.State != lineage.Primary || l.Generation != gen || !l.MayServe() || after.Name != "web" || after.Interval != before.Interval {
			t.Errorf("%s: the record is %+v now", when, after)
		}
	}
	attack("while it runs")
	if !w.a.hyper.runs() {
		t.Error("the guest was stopped")
	}
	w.write(w.a, 3) // its disk answers
	w.rest()

	// An old primary whose guest is off is asked to give its data up after an
	// unplanned failover; this one was never failed over.
	must(t, w.a.hyper.Shutdown(t.Context(), string(testVM), libvirt.ShutdownOptions{}))
	attack("while it is off")
	must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }))
	w.rest()

	// A claim of another generation is an alarm until a person decides; what
	// runs goes on.
	other := gen
	other[0] ^= 1
	_, _ = m.Handshake(evil, wire.HandshakeRequest{VM: testVM, Generation: other, Disks: before.wireDisks(), Running: true})
	if l := w.a.vm().record().Lineage; l.State != lineage.Primary || l.Generation != gen {
		t.Errorf("after a claim the role is %+v", l)
	}
	w.write(w.a, 3)
	w.check()
}

// A replica that lies, and says that it went on from the last position and runs,
// makes its primary record a divergence. That costs the replication until a
// person decides, and nothing else: the guest runs and its disk answers, after a
// restart too, the reason and the next command are said, and that command brings
// the copy up to date.
func TestALyingReplicaCostsNothingButItsCopy(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	r := w.a.vm().record()
	pos := w.a.vm().session().Status().Committed
	other := r.Lineage.Generation
	other[0] ^= 1
	_, _ = w.a.manager().Handshake(w.as(w.b.host), wire.HandshakeRequest{
		VM: testVM, Generation: other, Ancestors: []delta.Pos{pos}, Disks: r.wireDisks(), Running: true,
	})
	said := func() {
		t.Helper()
		w.until("A to say what it was told", func() error {
			for _, c := range w.a.vm().Status(t.Context(), "b").Conditions {
				if c.Code == "diverged" && strings.Contains(c.Text, "runs") && strings.Contains(c.Remedy, "replicactl failover reverse web") {
					return nil
				}
			}
			return fmt.Errorf("%+v", w.a.vm().Status(t.Context(), "b").Conditions)
		})
		if !w.a.hyper.runs() || w.a.vm().record().Lineage.State != lineage.Primary {
			t.Error("the guest was stopped, or its host changed its role")
		}
		w.write(w.a, 3)
	}
	said()
	w.a.restart()
	said()
	var err error
	w.until("no other operation to run", func() error { // A is coming up
		if err = w.a.do(reverse); busy(err) {
			return err
		}
		return nil
	})
	must(t, err)
	w.rest()
	w.check()
}

// refusedOr is the error of a step, or what its answer refuses.
func refusedOr(r wire.FailoverReply, err error) error {
	if err == nil && r.State == stateRefused {
		return errors.New(r.Detail)
	}
	return err
}

// A third host that is paired with both knows the VM's id, and nothing else.
func TestAStrangerFindsNoVM(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	gen := w.a.vm().record().Lineage.Generation
	ctx := w.as("00000000-0000-4000-8000-00000000000C")
	for _, s := range []*side{w.a, w.b} {
		m := s.manager()
		for name, err := range map[string]error{
			"handshake": second(m.Handshake(ctx, wire.HandshakeRequest{VM: testVM, Generation: gen})),
			"seed":      second(m.PutSeed(ctx, wire.SeedRequest{VM: testVM, Generation: gen, Disk: "vda"}, bytes.NewReader(nil))),
			"progress":  second(m.EpochProgress(ctx, wire.EpochKey{VM: testVM, Generation: gen})),
			"epoch":     second(m.PutEpoch(ctx, wire.EpochKey{VM: testVM, Generation: gen}, 0, bytes.NewReader(nil))),
			"beat":      m.Beat(ctx, wire.Beat{VM: testVM}),
			"digests":   second(m.Digests(ctx, wire.DigestRequest{VM: testVM, Disk: "vda", Ranges: []wire.Range{{Off: 0, Len: 4096}}})),
			"status":    second(m.Status(ctx, testVM)),
			"points":    second(m.Points(ctx, testVM)),
			"promote":   second(m.Failover(ctx, wire.FailoverRequest{VM: testVM, Step: stepPromote, Request: "x"})),
			"release":   second(m.Failover(ctx, wire.FailoverRequest{VM: testVM, Step: stepRelease, Request: "x"})),
		} {
			if !kindIs(err, wire.KindNotFound) {
				t.Errorf("%s on %s: %v", name, s.name, err)
			}
		}
	}
	w.rest()
}

// A promotion that was declined stays declined, whatever is asked later.
func TestAPromotionElsewhereIsDeclinedForGood(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	w.a.silent.Store(true)
	st, err := w.b.vm().storeStatus()
	must(t, err)
	elsewhere := st.Committed
	elsewhere.Epoch++
	ask := func(at delta.Pos) wire.FailoverReply {
		t.Helper()
		r, err := w.b.manager().Failover(w.as(w.a.host), wire.FailoverRequest{VM: testVM, Step: stepPromote, Request: "one", At: at})
		must(t, err)
		return r
	}
	if r := ask(elsewhere); r.State != stateRefused || !strings.Contains(r.Detail, "stands at") {
		t.Fatalf("asked for a position that is not here: %+v", r)
	}
	w.b.restart()
	w.until("the store to be open", func() error { _, err := w.b.vm().store(); return err })
	if r := ask(st.Committed); r.State != stateRefused {
		t.Fatalf("the same request later, with the right position: %+v", r)
	}
	if l := w.b.vm().record().Lineage; l.State != lineage.Replica {
		t.Fatalf("the role is %s", l.State)
	}
	w.a.silent.Store(false)
	w.rest()
}

func TestASilentPeerAfterABootIsWaitedForAndThenThePolicyDecides(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"start", "hold"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			must(t, w.a.do(func(_ context.Context, _ *Manager, v *VM) error {
				return v.update(func(r *Record) error { r.OnSilent = policy; return nil })
			}))
			w.b.silent.Store(true)
			w.a.patient = policy == "start"
			w.a.reboot()
			w.until("A to decide", func() error {
				v := w.a.vm()
				v.mu.Lock()
				held := v.held
				v.mu.Unlock()
				switch {
				case policy == "hold" && strings.Contains(held, "on-silent-peer=hold"):
					return nil
				case policy == "start" && held == "the other host is being asked":
					return nil
				}
				return fmt.Errorf("held %q, runs %t", held, w.a.hyper.runs())
			})
			if w.a.hyper.runs() {
				t.Fatal("the guest was started")
			}
			if policy == "hold" {
				return
			}
			w.a.patient = false
			w.a.reboot()
			w.until("A to start its guest", func() error {
				if !w.a.hyper.runs() {
					return fmt.Errorf("held %q", w.a.describe())
				}
				return nil
			})
			w.check()
		})
	}
}

func TestAFailoverWaitsForAFenceThatWorks(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	w.b.kill()
	w.b.fence = filepath.Join(w.b.dir, "fence")
	script := func(text string) { must(t, os.WriteFile(w.b.fence, []byte("#!/bin/sh\n"+text+"\n"), 0o700)) }
	script("echo no answer from the switch; exit 3")
	w.b.start()
	w.a.kill()
	w.a.hyper.halt()
	w.lossy.Store(true)
	w.forced.Store(true)
	var e *wire.Error
	w.until("the fence to be asked", func() error { // the daemon is still starting
		if err := w.b.do(unplanned(true)); !errors.As(err, &e) || !strings.Contains(e.Text, "no answer from the switch") {
			return fmt.Errorf("the failover says: %w", err)
		}
		return nil
	})
	if !strings.Contains(e.Hint, "--unfenced") {
		t.Errorf("no remedy: %v", e)
	}
	if l := w.b.vm().record().Lineage; l.State != lineage.Replica || w.b.hyper.runs() {
		t.Fatalf("it took over: %+v", l)
	}
	script("exit 0")
	must(t, w.b.do(unplanned(true)))
	if !w.b.hyper.runs() {
		t.Fatal("the guest does not run")
	}
}
