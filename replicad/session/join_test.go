package session_test

import (
	"context"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// memReplica keeps the committed state in memory and takes disks as the epochs
// list them.
type memReplica struct {
	mu    sync.Mutex
	pos   delta.Pos             // guarded by mu
	disks map[string]*block.Mem // guarded by mu
	sizes []int64               // guarded by mu: of vdb, by epoch; -1 = not listed
}

func (r *memReplica) Handshake(_ context.Context, q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := wire.HandshakeReply{VM: q.VM, Role: "replica", Generation: r.pos.Generation, Committed: r.pos, Sizes: map[wire.DiskName]int64{}}
	for n, d := range r.disks {
		h.Sizes[wire.DiskName(n)] = d.Size()
	}
	return h, nil
}

func (r *memReplica) PutEpoch(_ context.Context, _ wire.EpochKey, _ uint32, body io.Reader) (delta.Pos, error) {
	return r.take(body)
}

func (r *memReplica) EpochProgress(context.Context, wire.EpochKey) (uint32, error) { return 0, nil }

func (r *memReplica) Beat(context.Context, wire.Beat) error { return nil }

func (r *memReplica) PutSeed(context.Context, wire.SeedRequest, io.Reader) (wire.SeedReply, error) {
	return wire.SeedReply{}, &wire.Error{Kind: wire.KindInvalid, Text: "nothing is to be seeded"}
}

func (r *memReplica) Digests(context.Context, wire.DigestRequest) (wire.DigestReply, error) {
	return wire.DigestReply{}, &wire.Error{Kind: wire.KindInvalid, Text: "nothing is to be compared"}
}

// take applies a whole epoch and commits it.
func (r *memReplica) take(body io.Reader) (delta.Pos, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d, err := dt.Apply(body, r.disks, new(delta.Tally), 0)
	if err != nil || d.Pos.IsZero() {
		return delta.Pos{}, &wire.Error{Kind: wire.KindUnavailable, Text: "cut off"}
	}
	r.pos = d.Pos
	at := slices.IndexFunc(d.Header.Disks, func(x delta.Disk) bool { return x.Name == "vdb" })
	size := int64(-1)
	if at >= 0 {
		size = d.Header.Disks[at].Size
	}
	r.sizes = append(r.sizes, size)
	return d.Pos, nil
}

// A disk of 200 MiB is added to a VM whose guest writes to both disks: it comes
// in slices, over a line that loses answers, and when all of it is there that is
// said until the owner does not call it joining any more. Nothing is seeded,
// nothing compared.
func TestADiskJoinsSliceBySliceWhileTheGuestWrites(t *testing.T) {
	const a, b = 8 * mib, 200*mib + 512
	both := dt.Config(t, a, b)
	only := both
	only.Disks = both.Disks[:1]
	plane := dt.Serve(t, only)
	plane.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	g := dt.Boot(t, only, 1)
	g.Scribble(20)
	ctx := context.Background()
	rep := &memReplica{disks: map[string]*block.Mem{}}
	e, err := plane.Freeze(ctx, dataplane.FreezeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	frames, err := plane.Frames(ctx, e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	pos, err := rep.take(frames)
	if err == nil {
		err = plane.Ack(ctx, pos)
	}
	if err != nil {
		t.Fatal(err)
	}
	plane.Stop()
	plane = dt.Serve(t, both)
	if err := plane.Export(ctx, dataplane.ExportRequest{Disk: "vdb", On: true}); err != nil {
		t.Fatal(err)
	}
	added := both
	added.Disks = both.Disks[1:]
	n := dt.Boot(t, added, 2)
	n.Scribble(50)

	var mu sync.Mutex
	var told []wire.DiskName // guarded by mu
	whole := false           // guarded by mu
	p := &pair{t: t, plane: plane, line: &line{Replica: rep, loseReply: func(n int) bool { return n == 1 }}}
	p.run(func(c *session.Config) {
		c.Interval, c.Rand = 50*time.Millisecond, rand.New(rand.NewPCG(1, 2))
		c.Complete = func(r *wire.HandshakeRequest) {
			mu.Lock()
			defer mu.Unlock()
			r.Disks[1].Joining = !whole
		}
		c.OnJoined = func(disks []wire.DiskName) {
			mu.Lock()
			defer mu.Unlock()
			told, whole = append(told, disks...), true
		}
	})
	p.until("joined", func(s session.Status) bool {
		g.Scribble(1)
		n.Scribble(2)
		return s.Joining["vdb"] == session.Joining{Done: b, Total: b}
	})
	p.until("a disk like any other", func(s session.Status) bool {
		p.sess.Retry() // one that comes during an operation counts nothing
		return len(s.Joining) == 0
	})
	if _, err := p.sess.SyncFinal(ctx); err != nil {
		t.Fatal(err)
	}
	p.stop()
	for name, want := range map[string][]byte{"vda": g.Snapshot()["vda"], "vdb": n.Snapshot()["vdb"]} {
		dt.SameContent(t, "replica's "+name, dt.Content(t, rep.disks[name]), want)
	}
	if !slices.Equal(told, []wire.DiskName{"vdb"}) {
		t.Errorf("told of %v", told)
	}
	if len(rep.sizes) < 4 || rep.sizes[0] != -1 || rep.sizes[1] != 64*mib || !slices.IsSorted(rep.sizes) {
		t.Errorf("the epochs list vdb with %v", rep.sizes)
	}
}
