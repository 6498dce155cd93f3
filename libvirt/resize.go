package libvirt

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// ResizeDisk lets a running guest see that the export under its disk has become
// longer, size bytes by now. The export's server must have ended its
// connections: QEMU learns the size when it connects again, and takes no larger
// one before. KindState: a snapshot lies above the export, or nothing of it is
// there. Repeating it is harmless.
func (h *Host) ResizeDisk(ctx context.Context, uuid, target string, src NBDSource, size int64) error {
	d, err := h.Domain(ctx, uuid)
	if err != nil {
		return err
	}
	k, ok := d.Disk(target)
	if !ok {
		return &Error{Op: "resize disk " + target + " of " + uuid, Kind: KindNotFound, Msg: "the domain has no such disk"}
	}
	if err := resizeDisk(ctx, domainMonitor{h, uuid}, target, k.Alias, src, size); err != nil {
		return fmt.Errorf("resize disk %s of %s: %w", target, uuid, err)
	}
	return nil
}

func resizeDisk(ctx context.Context, m monitor, target, alias string, src NBDSource, size int64) error {
	v, err := readGraph(ctx, m)
	if err != nil {
		return err
	}
	g, err := v.disk(target, alias)
	if err != nil {
		return err
	}
	if v.locate(&g, src); g.Position != PositionTop {
		return &Error{Op: "find the export", Kind: KindState, Msg: "it is not what the guest writes to (" + string(g.Position) + ")"}
	}
	if g.Size == size {
		return nil
	}
	// A connection that ended is noticed when it is used; the next use makes a new
	// one, at once or, without a reconnect delay, in the background.
	for n := 0; ; n++ {
		args := map[string]any{"command-line": fmt.Sprintf("qemu-io %s \"read -q 0 512\"", g.Top.Name)}
		if err := m.qmp(ctx, "human-monitor-command", args, nil); err != nil {
			return err
		}
		err := m.qmp(ctx, "block_resize", map[string]any{"node-name": g.Top.Name, "size": size}, nil)
		if err == nil || n == resizeTries {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(resizeEvery):
		}
	}
}

// How often QEMU is asked whether it knows the new size by now.
const (
	resizeTries = 100
	resizeEvery = 100 * time.Millisecond
)
