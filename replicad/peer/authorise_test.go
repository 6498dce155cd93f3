package peer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// everyCall calls each method about vm.
func everyCall(ctx context.Context, c *Client, vm wire.VMID) map[string]error {
	k := key()
	k.VM = vm
	got := map[string]error{}
	_, got["check"] = c.Check(ctx, wire.CheckRequest{VM: vm, For: "planned"})
	got["withdraw"] = c.Withdraw(ctx, wire.Withdraw{VM: vm})
	got["delete"] = c.Withdraw(ctx, wire.Withdraw{VM: vm, Delete: true})
	_, got["handshake"] = c.Handshake(ctx, wire.HandshakeRequest{VM: vm})
	_, got["seed"] = c.PutSeed(ctx, wire.SeedRequest{VM: vm, Disk: "vda", Generation: k.Generation}, bytes.NewReader(nil))
	_, got["progress"] = c.EpochProgress(ctx, k)
	_, got["epoch"] = c.PutEpoch(ctx, k, 0, bytes.NewReader(nil))
	got["beat"] = c.Beat(ctx, wire.Beat{VM: vm})
	_, got["digests"] = c.Digests(ctx, wire.DigestRequest{VM: vm, Disk: "vda", Pos: delta.Pos{Epoch: 1}})
	_, got["status"] = c.Status(ctx, vm)
	_, got["points"] = c.Points(ctx, vm)
	_, got["failover"] = c.Failover(ctx, wire.FailoverRequest{VM: vm, Step: "promote"})
	_, got["reverse"] = c.Failover(ctx, wire.FailoverRequest{VM: vm, Step: "request-planned"})
	return got
}

func TestAPeerTouchesOnlyItsOwnVMs(t *testing.T) {
	p, r, c := pairOf(t)
	r.own.set(vmB, Relation{Peer: "99999999-0000-4000-8000-000000000009", Receives: true})
	ctx := soon(t)
	foreign, unknown := everyCall(ctx, c, vmB), everyCall(ctx, c, vmC)
	for name, err := range foreign {
		if kindOf(err) != wire.KindNotFound {
			t.Errorf("%s of another host's VM: %v", name, err)
		}
		// Nobody learns which VMs others have.
		if u := unknown[name]; u == nil || strings.ReplaceAll(u.Error(), string(vmC), string(vmB)) != err.Error() {
			t.Errorf("%s: a foreign VM answers %q, an unknown one %q", name, err, u)
		}
	}
	if n := r.svc.count(); n != 0 {
		t.Errorf("%d calls reached the service", n)
	}
	for name, err := range everyCall(ctx, c, vmA) {
		if err != nil {
			t.Errorf("%s of its own VM: %v", name, err)
		}
	}
	_ = p
}

func TestDataIsTakenOnlyWhereAReplicaIs(t *testing.T) {
	p, r, c := pairOf(t)
	// Here this host is the primary of vmA, and the caller holds the replica.
	r.own.set(vmA, Relation{Peer: p.id.Host()})
	may := map[string]bool{"check": true, "withdraw": true, "handshake": true, "status": true, "points": true, "failover": true, "reverse": true}
	for name, err := range everyCall(soon(t), c, vmA) {
		switch {
		case may[name] && err != nil:
			t.Errorf("%s: %v", name, err)
		case !may[name] && kindOf(err) != wire.KindRefused:
			t.Errorf("%s reached a primary: %v", name, err)
		}
	}
	if _, err := c.Offer(soon(t), offer()); kindOf(err) != wire.KindConflict {
		t.Errorf("an offer of this host's own VM: %v", err)
	}
	a := all()
	a.MayRequestReverse = false
	errFatal(t, r.store.Allow(p.id.Host(), a))
	if _, err := c.Failover(soon(t), wire.FailoverRequest{VM: vmA, Step: "request-planned"}); kindOf(err) != wire.KindRefused {
		t.Errorf("a replica asked for the VM without leave: %v", err)
	}
	if _, err := c.Failover(soon(t), wire.FailoverRequest{VM: vmA, Step: "release"}); kindOf(err) != wire.KindRefused {
		t.Errorf("a replica asked for a release without leave: %v", err)
	}
}

func TestNothingIsReceivedUntilItIsSwitchedOnAndAllowed(t *testing.T) {
	receiving := true
	p, r, c := pairOf(t, func(cfg *ServerConfig) { cfg.Receiving = func() bool { return receiving } })
	sends := func(when string) {
		t.Helper()
		ctx := soon(t)
		before := r.svc.count()
		got := everyCall(ctx, c, vmA)
		_, got["offer"] = c.Offer(ctx, offer())
		for _, name := range []string{"offer", "seed", "epoch", "progress", "beat", "digests"} {
			if kindOf(got[name]) != wire.KindRefused {
				t.Errorf("%s: %s: %v", when, name, got[name])
			}
		}
		if n := r.svc.count() - before; n != 8 {
			t.Errorf("%s: %d calls reached the service, want the 8 that send nothing", when, n)
		}
	}
	receiving = false
	sends("receiving off")
	receiving = true
	errFatal(t, r.store.Allow(p.id.Host(), Authorisation{MayRequestReverse: true}))
	sends("sending not allowed")
	errFatal(t, r.store.Allow(p.id.Host(), all()))
	if _, err := c.Offer(soon(t), offer()); err != nil {
		t.Errorf("allowed: %v", err)
	}
}

func TestQuotasAreCheckedBeforeAnythingIsMade(t *testing.T) {
	p, r, c := pairOf(t)
	r.own.rel = map[wire.VMID]Relation{}
	try := func(change func(*Authorisation, *wire.Offer, *Usage)) error {
		a, o, u := all(), offer(), Usage{}
		change(&a, &o, &u)
		errFatal(t, r.store.Allow(p.id.Host(), a))
		r.own.mu.Lock()
		r.own.use = u
		r.own.mu.Unlock()
		_, err := c.Offer(soon(t), o)
		return err
	}
	two := func(o *wire.Offer) {
		o.Disks = append(o.Disks, wire.Disk{Name: "vdb", Size: 1 << 30, Format: "raw"})
	}
	for name, x := range map[string]struct {
		change func(*Authorisation, *wire.Offer, *Usage)
		kind   wire.Kind
	}{
		"as granted":           {func(*Authorisation, *wire.Offer, *Usage) {}, -1},
		"on the list":          {func(a *Authorisation, _ *wire.Offer, _ *Usage) { a.VMs = []wire.VMID{vmC, vmA} }, -1},
		"not on the list":      {func(a *Authorisation, _ *wire.Offer, _ *Usage) { a.VMs = []wire.VMID{vmC} }, wire.KindRefused},
		"one VM too many":      {func(a *Authorisation, _ *wire.Offer, u *Usage) { a.MaxVMs, u.VMs = 3, 3 }, wire.KindNoSpace},
		"the last VM":          {func(a *Authorisation, _ *wire.Offer, u *Usage) { a.MaxVMs, u.VMs = 3, 2 }, -1},
		"one disk too many":    {func(a *Authorisation, o *wire.Offer, _ *Usage) { a.MaxDisks = 1; two(o) }, wire.KindNoSpace},
		"one point too many":   {func(a *Authorisation, o *wire.Offer, _ *Usage) { a.MaxPoints, o.Points = 2, 3 }, wire.KindNoSpace},
		"one sector too large": {func(a *Authorisation, _ *wire.Offer, _ *Usage) { a.MaxBytes = 1<<30 - 512 }, wire.KindNoSpace},
		"exactly full":         {func(a *Authorisation, _ *wire.Offer, u *Usage) { a.MaxBytes, u.Bytes = 1<<31, 1<<30 }, -1},
		"full with the others": {func(a *Authorisation, o *wire.Offer, u *Usage) { a.MaxBytes, u.Bytes = 1<<31, 1<<30; two(o) }, wire.KindNoSpace},
		"usage beyond quota":   {func(a *Authorisation, _ *wire.Offer, u *Usage) { a.MaxBytes, u.Bytes = 1, 1<<62 }, wire.KindNoSpace},
		"sizes that overflow": {func(a *Authorisation, o *wire.Offer, _ *Usage) {
			a.MaxBytes = 1<<63 - 1
			o.Disks[0].Size = 1<<63 - 512
		}, wire.KindInvalid},
		"a disk of 8 EiB":    {func(_ *Authorisation, o *wire.Offer, _ *Usage) { o.Disks[0].Size = 1 << 62 }, wire.KindInvalid},
		"ten thousand disks": {func(_ *Authorisation, o *wire.Offer, _ *Usage) { o.Disks = make([]wire.Disk, 10_000) }, wire.KindInvalid},
		"twice the same":     {func(_ *Authorisation, o *wire.Offer, _ *Usage) { o.Disks = append(o.Disks, o.Disks[0]) }, wire.KindInvalid},
		"qcow2":              {func(_ *Authorisation, o *wire.Offer, _ *Usage) { o.Disks[0].Format = "qcow2" }, wire.KindInvalid},
		"name with escape":   {func(_ *Authorisation, o *wire.Offer, _ *Usage) { o.Name = "a\x1b[2J" }, wire.KindInvalid},
		"name right to left": {func(_ *Authorisation, o *wire.Offer, _ *Usage) { o.Name = "a\u202eb" }, wire.KindInvalid},
		"name of 64 KiB":     {func(_ *Authorisation, o *wire.Offer, _ *Usage) { o.Name = strings.Repeat("a", 1<<16) }, wire.KindInvalid},
		"half a sector":      {func(_ *Authorisation, o *wire.Offer, _ *Usage) { o.Disks[0].Size = 1000 }, wire.KindInvalid},
	} {
		before := r.svc.count()
		err := try(x.change)
		if kindOf(err) != x.kind || (x.kind == -1) != (err == nil) {
			t.Errorf("%s: %v", name, err)
		}
		if reached := r.svc.count() != before; reached != (x.kind == -1) {
			t.Errorf("%s: reached the service: %v", name, reached)
		}
	}
}

func TestTheServerChecksWhatAHostileClientWouldSkip(t *testing.T) {
	_, r, c := pairOf(t)
	for name, body := range map[string]string{
		"offer":   `{"VM":"` + string(vmA) + `","Name":"x","Disks":[{"Name":"../x","Size":512,"Format":"raw"}]}`,
		"digests": `{"VM":"` + string(vmA) + `","Disk":"vda","Pos":{"epoch":1},"Ranges":[{"Off":9223372036854775807,"Len":1}]}`,
		"beat":    `{"VM":"` + string(vmA) + `","Pending":-1}`,
	} {
		if _, e := raw(t, c, "POST", "/v1/"+name, jsonType, body); e == nil || e.Kind != wire.KindInvalid {
			t.Errorf("%s: %v", name, e)
		}
	}
	if r.svc.count() != 0 {
		t.Error("the service was reached")
	}
}

func TestAVMMovesOnlyWithinItsGroup(t *testing.T) {
	p, r, c := pairOf(t)
	other := newHost(t, "other")
	r.trust(t, other, all())
	r.own.set(vmA, Relation{Peer: other.id.Host(), Receives: true})
	try := func() error { _, err := c.Offer(soon(t), offer()); return err }
	if err := try(); kindOf(err) != wire.KindConflict {
		t.Errorf("no group: %v", err)
	}
	a := all()
	a.Group = "site"
	errFatal(t, r.store.Allow(p.id.Host(), a))
	if err := try(); kindOf(err) != wire.KindConflict {
		t.Errorf("one of them in a group: %v", err)
	}
	errFatal(t, r.store.Allow(other.id.Host(), a))
	if err := try(); err != nil {
		t.Errorf("both in the group: %v", err)
	}
}

func TestBandwidthHoldsAndChangesWhileATransferRuns(t *testing.T) {
	_, r, _ := pairOf(t)
	r.svc.put = func(_ context.Context, b io.Reader) error { _, err := io.Copy(io.Discard, b); return err }
	p := newHost(t, "limited")
	r.trust(t, p, all())
	p.trust(t, r, Authorisation{})
	r.own.set(vmB, Relation{Peer: p.id.Host(), Receives: true})
	k := key()
	k.VM = vmB
	band := &Bandwidth{}
	c := p.client(t, r, func(cfg *ClientConfig) { cfg.Bandwidth = band })
	put := func(n int) time.Duration {
		begin := time.Now()
		if _, err := c.PutEpoch(soon(t), k, 0, io.LimitReader(&counting{}, int64(n))); err != nil {
			t.Error(err)
		}
		return time.Since(begin)
	}
	band.Set(1 << 20)
	if took := put(512 << 10); took < 350*time.Millisecond {
		t.Errorf("512 KiB at 1 MiB/s took %v", took)
	}
	band.Set(64 << 10)
	band.Set(0)
	put(12 << 20) // at 64 KiB/s nobody would wait so long
	// The receiver's own limit, lifted while the transfer runs.
	a := all()
	a.Bandwidth = 100_000
	errFatal(t, r.store.Allow(p.id.Host(), a))
	if took := put(60_000); took < 350*time.Millisecond {
		t.Errorf("60 kB into a receiver that takes 100 kB/s took %v", took)
	}
	body := &counting{}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(soon(t))
	defer cancel()
	go func() {
		_, err := c.PutEpoch(ctx, k, 0, io.LimitReader(body, 20<<20))
		done <- err
	}()
	waitFor(t, func() bool { return body.read() > 0 })
	a.Bandwidth = 0
	errFatal(t, r.store.Allow(p.id.Host(), a))
	if err := <-done; err != nil {
		t.Errorf("20 MiB after the limit of 100 kB/s was lifted: %v", err)
	}
}

func TestBandwidthWaitEndsWithItsContext(t *testing.T) {
	band := &Bandwidth{}
	band.Set(1)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := io.Copy(io.Discard, band.Reader(ctx, &counting{}))
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}
