package session_test

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// A disk joins a replica that keeps it in a real store, over a line that loses
// answers. When its first slice is there everything is marked as after an
// unclean stop: the comparison reads what the replica has of the disk and not
// what lies behind, for which there is nothing to compare with. The store is
// opened again on the way, and at the end it has both disks whole.
func TestADiskJoinsAStoreAndAComparisonEndsAtItsWindow(t *testing.T) {
	const a, b, slice = 8 * mib, 150*mib + 512, 64 * mib
	const slack = 16 * mib // what is written meanwhile is read again
	p := &pair{t: t, cfg: dt.Config(t, a, b)}
	only := p.cfg
	only.Disks = p.cfg.Disks[:1]
	p.plane = dt.Serve(t, only)
	p.plane.Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	p.guest = dt.Boot(t, only, 1)
	p.guest.Scribble(20)
	p.rep = newReplica(t, dt.Generation(1), delta.Disk{Name: "vda", Size: a})
	p.line = &line{Replica: p.rep}
	p.run(nil)
	p.final()
	p.stop()
	p.plane.Stop()

	p.plane = dt.Serve(t, p.cfg)
	ctx := context.Background()
	if err := p.plane.Export(ctx, dataplane.ExportRequest{Disk: "vdb", On: true}); err != nil {
		t.Fatal(err)
	}
	added := p.cfg
	added.Disks = p.cfg.Disks[1:]
	n := dt.Boot(t, added, 2)
	n.Scribble(200)
	fast := make(chan struct{}) // closed when the first slice was compared
	p.line = &line{Replica: p.rep, loseReply: func(n int) bool { return n == 1 }}
	p.run(func(c *session.Config) {
		c.Interval, c.Rand = 50*time.Millisecond, rand.New(rand.NewPCG(1, 2))
		c.Complete = func(r *wire.HandshakeRequest) { r.Disks[1].Joining = true }
		p.line.after = func(int) {
			select {
			case <-fast:
			default:
				if sizeOf(p.rep, "vdb") > 0 {
					p.sess.Pause()
				}
			}
		}
	})
	p.until("paused with a slice", func(s session.Status) bool {
		g := s.Phase == session.PausedPhase && sizeOf(p.rep, "vdb") > 0
		if !g && s.Phase == session.PausedPhase {
			p.sess.Resume()
		}
		return g
	})
	has := sizeOf(p.rep, "vdb")
	if has < slice || has >= b {
		t.Fatalf("the replica has %d bytes of the disk", has)
	}
	close(fast)
	p.rep.restart()
	n.Scribble(20)
	if err := p.plane.Mark(ctx, dataplane.MarkRequest{Reason: "as after an unclean stop"}); err != nil {
		t.Fatal(err)
	}
	before := p.rep.Hashed()
	p.sess.Resume()
	p.until("joined", func(s session.Status) bool {
		p.guest.Scribble(1)
		n.Scribble(2)
		return s.Joining["vdb"] == session.Joining{Done: b, Total: b}
	})
	if read := p.rep.Hashed() - before; read < has/2 || read > a+has+slack {
		t.Errorf("%d bytes were compared, the replica had %d", read, a+has)
	}
	if _, err := p.sess.SyncFinal(ctx); err != nil {
		t.Fatal(err)
	}
	dt.SameContent(t, "replica's vda", p.rep.content("vda"), p.guest.Snapshot()["vda"])
	dt.SameContent(t, "replica's vdb", p.rep.content("vdb"), n.Snapshot()["vdb"])
}

// sizeOf is how much of a disk the replica's newest state has.
func sizeOf(r *replica, disk string) int64 {
	s, err := r.get()
	if err != nil {
		return 0
	}
	for _, d := range s.Status().Disks {
		if d.Name == disk {
			return d.Size
		}
	}
	return 0
}
