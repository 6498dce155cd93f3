package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"kvmreplica/integration/lab/console"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// rehearse starts a copy of an older recovery point on B, apart from every
// network, while A goes on, and holds what its guest finds against what was
// durable at the point's time.
func (s *show) rehearse(ctx context.Context, tl *timeline) error {
	s.title("Test failover of an older recovery point, while replication goes on")
	p, err := s.olderPoint(ctx, tl.begin())
	if err != nil {
		return err
	}
	if err := s.ctl(ctx, "B", "point", "list", vmName); err != nil {
		return err
	}
	if err := s.ctl(ctx, "B", "failover", "test", vmName, "--point", strconv.FormatUint(p.Ordinal, 10)); err != nil {
		return err
	}
	v, err := s.e.Status(ctx, "B", vmName)
	if err != nil {
		return err
	}
	if len(v.Tests) != 1 {
		return fmt.Errorf("%d test copies", len(v.Tests))
	}
	c := console.Open(s.e.Lab.Host("B").Path(v.Tests[0].Console))
	boot, err := c.WaitBoot(ctx)
	if err != nil {
		return err
	}
	found, durable := boot.Uint("highest"), tl.at(p.Cut)
	fmt.Printf("guest: the copy finds record %d, bad %s; record %d was durable at the point's time, %s\n", found, boot.Args["bad"], durable, p.Cut.Local().Format("15:04:05.000"))
	if boot.Int("bad") >= 0 || found < durable || found > durable+blur {
		return errors.New("the copy does not show its recovery point")
	}
	if err := s.ctl(ctx, "B", "failover", "test-stop", vmName, "--all"); err != nil {
		return err
	}
	_, err = s.e.WaitStatus(ctx, "B", vmName, "without test copies", func(v status.VM) bool { return len(v.Tests) == 0 })
	return err
}

// olderPoint waits for a point cut after a time, with another one behind it.
func (s *show) olderPoint(ctx context.Context, after time.Time) (wire.Point, error) {
	for {
		out, err := s.e.Ctl(ctx, "B", "--json", "point", "list", vmName)
		if err != nil {
			return wire.Point{}, err
		}
		var r wire.PointsReply
		if err := json.NewDecoder(strings.NewReader(out)).Decode(&r); err != nil {
			return wire.Point{}, fmt.Errorf("point list: %w in %s", err, out)
		}
		for i, p := range r.Points {
			if p.Ordinal > 0 && !p.Latest && p.Cut.After(after) && i+1 < len(r.Points) {
				return p, nil
			}
		}
		select {
		case <-ctx.Done():
			return wire.Point{}, fmt.Errorf("wait for two recovery points: %w", ctx.Err())
		case <-time.After(time.Second):
		}
	}
}

// begin is the time of the first sample.
func (t *timeline) begin() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.samples) == 0 {
		return time.Now()
	}
	return t.samples[0].at
}
