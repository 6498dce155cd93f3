package replicad

import (
	"context"
	"errors"
	"sync"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// watchPoliciesEvery is how often domains that nobody protects are looked for.
const watchPoliciesEvery = 20 * time.Second

// unprotected remembers since when domains that a policy with an alarm fits have
// been without protection. The zero value is ready.
type unprotected struct {
	mu    sync.Mutex
	found map[string]status.NotProtected // guarded by mu; by UUID
}

// looked takes over what was found: domains that nobody protects. Where nothing
// could be looked at it is not called: what is known stays, nothing new is said.
func (u *unprotected) looked(now time.Time, all []libvirt.Domain, c config.Config) {
	u.mu.Lock()
	defer u.mu.Unlock()
	was := u.found
	u.found = map[string]status.NotProtected{}
	for _, k := range all {
		p, ok := c.PolicyFor(k.Name, k.Tags)
		if !ok || !p.Alarm {
			continue
		}
		n := status.NotProtected{Name: k.Name, ID: wire.VMID(k.UUID), Policy: p.Name, Since: now, After: p.AlarmAfter}
		if w, ok := was[k.UUID]; ok {
			n.Since = w.Since
		}
		n.Condition = health.NotProtected(n.Name, n.Policy, n.Since)
		u.found[k.UUID] = n
	}
}

// alarms are the domains that have been without protection for too long and are
// still, in no order.
func (u *unprotected) alarms(now time.Time, protected func(uuid string) bool) (out []status.NotProtected) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, n := range u.found {
		if now.Sub(n.Since) >= n.After && !protected(id) {
			out = append(out, n)
		}
	}
	return out
}

// watchPolicies looks for domains that a policy with an alarm fits and nobody
// protects, until ctx ends.
func (d *Daemon) watchPolicies(ctx context.Context) {
	tick := time.NewTicker(watchPoliciesEvery)
	defer tick.Stop()
	for told := false; ; {
		err := d.lookForUnprotected(ctx)
		if err != nil && !told && !errors.Is(err, context.Canceled) {
			d.log.Warn("domains that are not protected cannot be looked for", "err", err)
		}
		told = err != nil
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

const lookWithin = 30 * time.Second

func (d *Daemon) lookForUnprotected(ctx context.Context) error {
	c := d.conf()
	wanted := false
	for _, p := range c.Policies {
		wanted = wanted || p.Alarm
	}
	var all []libvirt.Domain
	if wanted {
		ctx, cancel := context.WithTimeout(ctx, lookWithin)
		defer cancel()
		var err error
		if all, err = d.domains(ctx, d.protects()); err != nil {
			return err
		}
	}
	d.unprotected.looked(time.Now(), all, c)
	return nil
}

// protects says of a domain's UUID whether it has a record here, be it one that
// cannot be read: that is told elsewhere.
func (d *Daemon) protects() func(uuid string) bool {
	broken := d.vms.Broken()
	return func(uuid string) bool {
		_, err := d.vms.Lookup(uuid)
		return err == nil || broken[uuid] != nil
	}
}
