package dataplane_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

const mib = 1 << 20

func kind(err error) wire.Kind {
	var e *wire.Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return -1
}

func TestEpochsCarryEveryCutExactly(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 24*mib, 8*mib+512)
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, cfg, 1)
	replica := map[string]*block.Mem{}
	var parent delta.Pos
	for range 6 {
		g.Scribble(60)
		want := g.Snapshot()
		e, err := p.Freeze(ctx, dataplane.FreezeRequest{Parent: parent})
		if err != nil {
			t.Fatal(err)
		}
		g.Scribble(60) // after the cut: must not be seen
		frames, err := p.Frames(ctx, e.Epoch, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := dt.MustApply(t, frames, replica)
		for name, w := range want {
			dt.SameContent(t, "replica's "+string(name), dt.Content(t, replica[string(name)]), w)
		}
		if err := p.Ack(ctx, got.Pos); err != nil {
			t.Fatal(err)
		}
		if err := p.Ack(ctx, got.Pos); err != nil {
			t.Fatalf("the same ack again: %v", err)
		}
		parent = got.Pos
	}
	g.Check()
}

func TestAnUnchangedVMGivesAnEmptyCutWithoutANumber(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 4*mib)
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	first := shipOne(t, p, delta.Pos{})
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{Parent: first})
	if err != nil || !e.Empty {
		t.Fatalf("freeze: %+v, %v; want an empty cut", e, err)
	}
	st, err := p.Status(ctx)
	if err != nil || st.Frozen != nil || st.Highest != first.Epoch || st.Acked != first {
		t.Fatalf("status after an empty cut: %+v, %v", st, err)
	}
	// Firmware alone is worth an epoch.
	e, err = p.Freeze(ctx, dataplane.FreezeRequest{Parent: first, Force: true})
	if err != nil || e.Empty || e.Bytes != 0 {
		t.Fatalf("forced freeze: %+v, %v", e, err)
	}
	if err := p.Attach(ctx, e.Epoch, []delta.Blob{{Kind: delta.BlobNVRAM, Data: []byte("vars")}}); err != nil {
		t.Fatal(err)
	}
	r, err := p.Frames(ctx, e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := io.ReadAll(r)
	if err != nil || !bytes.Contains(raw, []byte("vars")) {
		t.Fatalf("the stream does not carry the firmware: %v", err)
	}
	if err := p.Attach(ctx, e.Epoch, nil); kind(err) != wire.KindConflict {
		t.Fatalf("attach after the stream began: %v", err)
	}
}

func TestTheFirstCutOfAGenerationIsAnEpochEvenWhenNothingChanged(t *testing.T) {
	ctx := context.Background()
	p := dt.Serve(t, dt.Config(t, 4*mib))
	parent := delta.Pos{Generation: dt.Generation(1), Epoch: 7, Digest: delta.Digest{1}}
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(2), Base: parent})
	first := shipOne(t, p, parent)
	if first.Generation != dt.Generation(2) || first.Epoch == 0 {
		t.Fatalf("the promoted generation has no position of its own: %v", first)
	}
	if e, err := p.Freeze(ctx, dataplane.FreezeRequest{Parent: first}); err != nil || !e.Empty {
		t.Fatalf("the second cut: %+v, %v; want an empty one", e, err)
	}
}

// shipOne freezes, streams and acknowledges one epoch.
func shipOne(t *testing.T, p *dt.Run, parent delta.Pos) delta.Pos {
	t.Helper()
	ctx := context.Background()
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.Frames(ctx, e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	pos := dt.MustApply(t, r, map[string]*block.Mem{}).Pos
	if err := p.Ack(ctx, pos); err != nil {
		t.Fatal(err)
	}
	return pos
}

func TestAStreamCutAnywhereContinuesAtTheFirstMissingChunk(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 16*mib)
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, cfg, 2)
	g.Scribble(200)
	want := g.Snapshot()
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	replica, tally := map[string]*block.Mem{}, new(delta.Tally)
	var from uint32
	var got dt.Decoded
	for cut := int64(10); got.Pos.IsZero(); cut = cut*3 + 7 {
		g.Scribble(10)
		r, err := p.Frames(ctx, e.Epoch, from)
		if err != nil {
			t.Fatal(err)
		}
		got, err = dt.Apply(io.LimitReader(r, cut), replica, tally, from)
		_ = r.Close()
		if err == nil && got.Pos.IsZero() {
			t.Fatal("a cut stream was taken for a whole one")
		}
		from = tally.Len()
		if cut > 1<<40 {
			t.Fatalf("the epoch never arrives: %v", err)
		}
	}
	dt.SameContent(t, "replica", dt.Content(t, replica["vda"]), want["vda"])
	if err := p.Ack(ctx, got.Pos); err != nil {
		t.Fatal(err)
	}
}

func TestAckTakesOnlyADigestThatWasComputedHere(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 4*mib)
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, cfg, 3)
	g.Scribble(20)
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	guess := delta.Pos{Generation: e.Generation, Epoch: e.Epoch, Digest: delta.Digest{1}}
	if err := p.Ack(ctx, guess); kind(err) != wire.KindCorrupt {
		t.Fatalf("ack before anything was encoded: %v", err)
	}
	r, err := p.Frames(ctx, e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	pos := dt.MustApply(t, r, map[string]*block.Mem{}).Pos
	if err := p.Ack(ctx, guess); kind(err) != wire.KindCorrupt {
		t.Fatalf("ack with another digest: %v", err)
	}
	if _, err := p.Freeze(ctx, dataplane.FreezeRequest{}); kind(err) != wire.KindConflict {
		t.Fatalf("second freeze while an epoch is held: %v", err)
	}
	if _, err := p.Frames(ctx, e.Epoch, 99); kind(err) != wire.KindInvalid {
		t.Fatalf("resume at a chunk that was never encoded: %v", err)
	}
	if err := p.Ack(ctx, pos); err != nil {
		t.Fatal(err)
	}
	if err := p.Ack(ctx, guess); kind(err) != wire.KindNotFound {
		t.Fatalf("ack of an epoch that is over: %v", err)
	}
}

func TestAbandonGivesEverythingBackAndBurnsTheNumber(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 24*mib)
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, cfg, 4)
	g.Scribble(800)
	first, err := p.Freeze(ctx, dataplane.FreezeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.Frames(ctx, first.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	if err := p.Abandon(ctx, first.Epoch); err != nil {
		t.Fatal(err)
	}
	if err := p.Abandon(ctx, first.Epoch); err != nil {
		t.Fatalf("abandon twice: %v", err)
	}
	// What was buffered before may still be read, but the stream never ends well.
	if _, err := io.Copy(io.Discard, r); err == nil {
		t.Fatal("the stream of an abandoned epoch ended like a whole one")
	}
	_ = r.Close()
	g.Scribble(10)
	want := g.Snapshot()
	second, err := p.Freeze(ctx, dataplane.FreezeRequest{})
	if err != nil || second.Epoch <= first.Epoch || second.Bytes < first.Bytes {
		t.Fatalf("after abandoning %+v comes %+v, %v", first, second, err)
	}
	replica := map[string]*block.Mem{}
	if r, err = p.Frames(ctx, second.Epoch, 0); err != nil {
		t.Fatal(err)
	}
	dt.MustApply(t, r, replica)
	dt.SameContent(t, "replica", dt.Content(t, replica["vda"]), want["vda"])
}

func TestTooLittleCaptureMemoryCostsTheEpochNotTheGuest(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 8*mib)
	cfg.CaptureBytes = 64 << 10
	p := dt.Serve(t, cfg)
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, cfg, 5)
	g.Write("vda", bytes.Repeat([]byte{1}, 4*mib), 0)
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	g.Write("vda", bytes.Repeat([]byte{2}, 4*mib), 0)
	if _, err := p.Frames(ctx, e.Epoch, 0); kind(err) != wire.KindConflict {
		t.Fatalf("frames of an overrun epoch: %v", err)
	}
	st, err := p.Status(ctx)
	if err != nil || st.Frozen == nil || st.Frozen.Lost == "" || st.Abandoned != 1 {
		t.Fatalf("status: %+v, %v", st, err)
	}
	if err := p.Abandon(ctx, e.Epoch); err != nil {
		t.Fatal(err)
	}
	shipOne(t, p, delta.Pos{})
	g.Check()
}

func TestASealIsAtTheAcknowledgedPositionOnly(t *testing.T) {
	ctx := context.Background()
	p := dt.Serve(t, dt.Config(t, 4*mib))
	p.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	e, err := p.Freeze(ctx, dataplane.FreezeRequest{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.Frames(ctx, e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	pos := dt.MustApply(t, r, map[string]*block.Mem{}).Pos
	if err := p.Ack(ctx, pos); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(q *delta.Pos){
		"the next epoch":     func(q *delta.Pos) { q.Epoch++ },
		"the epoch before":   func(q *delta.Pos) { q.Epoch-- },
		"another content":    func(q *delta.Pos) { q.Digest[0] ^= 1 },
		"another generation": func(q *delta.Pos) { q.Generation[0] ^= 1 },
		"nothing":            func(q *delta.Pos) { *q = delta.Pos{} },
	} {
		q := pos
		change(&q)
		if err := p.Seal(ctx, q); err == nil {
			t.Fatalf("sealed at %s", name)
		}
	}
	if err := p.Seal(ctx, pos); err != nil {
		t.Fatal(err)
	}
}
