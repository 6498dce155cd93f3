package vm

import (
	"context"
	"errors"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// upgradeTries is how often an upgrade that was taken back, because not
// everything came to rest in time, is tried again.
const (
	upgradeTries = 8
	upgradeLimit = 2 * time.Minute
)

// Upgrade lets the installed program take the VM's data plane over, and then its
// keeper, without a word to the guest. One that runs the installed program
// already is left alone, unless forced. A dry run asks the installed program
// whether it could.
func (v *VM) Upgrade(ctx context.Context, dryRun, force bool) (u status.Upgrade, err error) {
	unlock, err := v.lockAsked(ctx, "upgrade the data plane")
	if err != nil {
		return u, err
	}
	defer unlock()
	c, err := v.plane()
	if err != nil {
		return u, err
	}
	ctx, cancel := context.WithTimeout(ctx, upgradeLimit)
	defer cancel()
	st, err := c.Status(ctx)
	if err != nil {
		return u, err
	}
	u = status.Upgrade{VM: v.record().Name, From: st.Version, To: st.Version, Outdated: st.Outdated || st.KeeperOutdated, DryRun: dryRun}
	if dryRun {
		a, err := c.Upgrade(ctx, dataplane.UpgradeRequest{DryRun: true})
		u.To, u.Program = a.To, a.Program
		return u, err
	}
	if st.Outdated || force {
		if err := v.handOver(ctx, c, st, &u); err != nil {
			return u, err
		}
	}
	v.failpoint("upgrade/succeeded")
	if st.KeeperOutdated || force {
		if err := v.replaceKeeper(ctx); err != nil {
			return u, err
		}
		u.Keeper = true
	}
	return u, nil
}

// handOver upgrades the data plane; what was taken back is tried again.
func (v *VM) handOver(ctx context.Context, c *dataplane.Client, before dataplane.Status, u *status.Upgrade) error {
	pause := newPause()
	for {
		u.Tries++
		a, err := c.Upgrade(ctx, dataplane.UpgradeRequest{})
		if err == nil {
			u.To, u.Program, u.Pause, u.Connections, u.Done = a.To, a.Program, a.Pause, a.Connections, true
			v.log.Info("data plane upgraded", "from", u.From, "to", u.To, "pause", u.Pause, "tries", u.Tries)
			return nil
		}
		// An answer that was lost may have been a yes.
		if st, serr := c.Status(ctx); serr == nil && st.Instance != before.Instance && !st.Outdated {
			u.To, u.Done = st.Version, true
			return nil
		}
		var w *wire.Error
		if !errors.As(err, &w) || w.Kind != wire.KindUnavailable || u.Tries >= upgradeTries || !pause.wait(ctx) {
			return err
		}
	}
}

// failpoint is where a test may end the daemon.
func (v *VM) failpoint(name string) {
	if f := v.deps.Failpoint; f != nil {
		f(name)
	}
}

// replaceKeeper puts a keeper of the installed program in the old one's place.
func (v *VM) replaceKeeper(ctx context.Context) error {
	v.machine.Lock()
	defer v.machine.Unlock()
	v.mu.Lock()
	s := v.ship
	v.mu.Unlock()
	if s == nil {
		return nil
	}
	if err := dataplane.EndKeeper(ctx, s.cfg); err != nil {
		return err
	}
	v.failpoint("upgrade/keeperless")
	c, err := dataplane.Ensure(ctx, s.cfg)
	if err != nil {
		return err
	}
	c.Close()
	return nil
}
