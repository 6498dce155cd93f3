package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/console"
	"kvmreplica/replicad/status"
)

// timeline knows which record was durable at which moment.
type timeline struct {
	mu      sync.Mutex
	samples []sample // guarded by mu
	stop    func()
}

type sample struct {
	at     time.Time
	synced uint64
}

// watchRecords samples a console until stop.
func watchRecords(c *console.Console) *timeline {
	ctx, cancel := context.WithCancel(context.Background())
	t := &timeline{}
	done := make(chan struct{})
	t.stop = func() { cancel(); <-done }
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			n := c.Synced()
			t.mu.Lock()
			t.samples = append(t.samples, sample{time.Now(), n})
			t.mu.Unlock()
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return t
}

// at is the highest record that was announced as durable by then.
func (t *timeline) at(when time.Time) (n uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.samples {
		if s.at.After(when) {
			break
		}
		n = s.synced
	}
	return n
}

// disaster is the second act: host A dies, B goes on with what it has, A comes
// back and follows, and the VM returns.
func (s *show) disaster(ctx context.Context) error {
	src, err := s.e.Console("A", s.dom, false)
	if err != nil {
		return err
	}
	watch, err := s.e.Console("A", s.dom, false)
	if err != nil {
		return err
	}
	if _, err := src.WaitSynced(ctx, s.last+50); err != nil {
		return err
	}
	tl := watchRecords(watch)
	defer tl.stop()
	if err := s.rehearse(ctx, tl); err != nil {
		return err
	}
	v, err := s.e.Status(ctx, "A", vmName)
	if err != nil {
		return err
	}
	if _, err := s.e.WaitStatus(ctx, "A", vmName, "two cycles further", func(n status.VM) bool { return n.Epoch >= v.Epoch+2 }); err != nil {
		return err
	}
	// A few records that the last copy cannot hold, so that there is a loss.
	if _, err := src.WaitSynced(ctx, src.Synced()+5); err != nil {
		return err
	}
	s.title("Host A loses power, without warning")
	if err := s.e.Lab.Host("A").Crash(); err != nil {
		return err
	}
	tl.stop()
	written := src.Synced()
	fmt.Printf("guest: its last durable record was %d\n", written)
	s.title("What would be lost is shown first")
	if err := s.ctl(ctx, "B", "failover", "unplanned", vmName, "--force", "--dry-run"); err != nil {
		return err
	}
	if v, err = s.e.Status(ctx, "B", vmName); err != nil {
		return err
	}
	covered := tl.at(v.LastCommit)
	fmt.Printf("the last copy is of %s: record %d was durable then, so %d records are lost\n", v.LastCommit.Local().Format("15:04:05.000"), covered, written-covered)
	s.title("Unplanned failover to B")
	dst, err := s.e.Console("B", s.dom, true)
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := s.ctl(ctx, "B", "failover", "unplanned", vmName, "--force", "--yes", "--reason", "host A burnt down"); err != nil {
		return err
	}
	s.rto = time.Since(begun)
	if err := s.found(ctx, dst, covered, written); err != nil {
		return err
	}
	s.moved = append(s.moved, time.Since(begun))
	if _, err := dst.WaitSynced(ctx, s.last+20); err != nil {
		return err
	}
	s.title("It is what we want to keep: commit")
	if err := s.ctl(ctx, "B", "failover", "commit", vmName, "--yes"); err != nil {
		return err
	}
	return s.comeBack(ctx)
}

// blur is how many records a guest makes durable between two looks at its
// console.
const blur = 10

// found compares what the guest found on B with what the last copy held. A
// record may have been durable a moment before its announcement was read.
func (s *show) found(ctx context.Context, dst *console.Console, covered, written uint64) error {
	boot, err := dst.WaitBoot(ctx)
	if err != nil {
		return err
	}
	s.last = boot.Uint("highest")
	s.lost = written - min(written, s.last)
	fmt.Printf("guest: record %d is the highest on B, bad %s; %d records lost, %d were announced\n", s.last, boot.Args["bad"], s.lost, written-covered)
	switch bad := boot.Int("bad"); {
	case bad >= 0:
		return fmt.Errorf("record %d is damaged on the new host: %s", bad, boot.Raw)
	case s.last < covered:
		s.miss += covered - s.last
	case s.last > covered+blur:
		return fmt.Errorf("record %d was found, but the loss that was shown ends at %d", s.last, covered)
	}
	return nil
}

// comeBack is the return of the old primary and the way home.
func (s *show) comeBack(ctx context.Context) error {
	s.title("Host A is back: it neither starts the VM nor ships")
	a := s.e.Lab.Host("A")
	if err := a.Start(ctx); err != nil {
		return err
	}
	if err := s.e.StartDaemon(ctx, "A"); err != nil {
		return err
	}
	if _, err := s.e.WaitStatus(ctx, "A", vmName, "held back", func(v status.VM) bool { return !v.Running && strings.Contains(v.Reason, "promoted") }); err != nil {
		return err
	}
	if err := s.ctl(ctx, "A", "health", vmName); err != nil {
		fmt.Printf("(exit code: %v)\n", strings.SplitN(err.Error(), "\n", 2)[0])
	}
	if out, err := a.Virsh(ctx, "start", vmName); err == nil {
		return fmt.Errorf("the old primary could start the VM: %s", out)
	}
	fmt.Println("virsh start on A: refused")
	s.title("Replicate back: only what differs travels")
	if err := s.ctl(ctx, "B", "failover", "reverse", vmName, "--yes"); err != nil {
		return err
	}
	v, err := s.e.WaitStatus(ctx, "B", vmName, "replicating back", func(v status.VM) bool {
		return v.State == status.Replicating && v.Role == status.Primary && !v.LastCommit.IsZero()
	})
	if err != nil {
		return err
	}
	s.back = v.Stats
	fmt.Printf("the way back: %d KiB differed or changed, %d KiB sent, of a disk of %d KiB\n", v.Stats.RawBytes>>10, v.Stats.SentBytes>>10, v.Disks[0].Size>>10)
	s.title("Planned failover home to %s", estate.Peer("A"))
	src, err := s.e.Console("B", s.dom, true)
	if err != nil {
		return err
	}
	dst, err := s.e.Console("A", s.dom, false)
	if err != nil {
		return err
	}
	if err := s.ctl(ctx, "B", "failover", "planned", vmName, "--yes"); err != nil {
		return err
	}
	if err := s.compare(ctx, src, dst); err != nil {
		return err
	}
	_, err = s.e.WaitStatus(ctx, "A", vmName, "replicating", func(v status.VM) bool {
		return v.State == status.Replicating && v.Role == status.Primary && v.Stats.Cycles > 1
	})
	return err
}
