package vm

import (
	"context"
	"fmt"

	"kvmreplica/replicad/dataplane"
)

// lostStep is how far above the last known epoch those of a replaced tracker
// begin. What is known is at most ackKept old, or as old as the last contact
// with the replica; five epochs a second would take a month for so many.
const lostStep = 1 << 24

// trackedPlane starts the data plane of a VM whose definition stands on its
// exports, with a tracker. One that is gone or cannot be read is replaced by one
// that knows nothing: the guest must run, and everything is compared with the
// replica. An epoch number is never used twice, so the new one begins far above.
func (v *VM) trackedPlane(ctx context.Context) error {
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	r := v.record()
	if !r.Placed {
		return nil // a plan makes the tracker
	}
	c, err := v.plane()
	if err != nil {
		return err
	}
	st, err := c.Status(ctx)
	if err != nil || st.Tracker {
		return nil // a silent data plane is tended by others
	}
	why := st.TrackerLost
	if why == "" {
		why = "its files are gone"
	}
	err = v.update(func(r *Record) error {
		if r.Acked.Generation == r.Lineage.Generation {
			r.EpochFloor = max(r.EpochFloor, r.Acked.Epoch)
		}
		r.EpochFloor += lostStep
		r.Verified = false
		return nil
	})
	if err != nil {
		return err
	}
	r = v.record()
	v.log.Error("the change tracker is lost; everything will be compared with the replica", "why", why)
	err = c.CreateTracker(ctx, dataplane.CreateRequest{
		Generation: r.Lineage.Generation, Parents: r.Lineage.Ancestors, DirtyAll: true,
		Lost: "the change tracker was lost: " + why, Highest: r.EpochFloor,
	})
	if err == nil && v.guestRuns() {
		err = v.openExports(ctx)
	}
	if err != nil {
		return fmt.Errorf("replace a lost change tracker: %w", err)
	}
	return nil
}
