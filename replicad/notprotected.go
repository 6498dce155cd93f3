package replicad

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"sync"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// watchPoliciesEvery is how often domains that nobody protects are looked for.
const watchPoliciesEvery = 20 * time.Second

// notProtectedFile keeps since when: an alarm must not be put off by a restart.
const notProtectedFile = "not-protected.json"

type notProtectedRecord struct {
	Version int                  `json:"version"`
	Since   map[string]time.Time `json:"since"` // by UUID
}

const maxNotProtectedFile = 4 << 20

// unprotected remembers since when domains that a policy with an alarm fits have
// been without protection. The zero value is ready, and forgets.
type unprotected struct {
	state fsx.FS               // nil: nothing is kept
	kept  map[string]time.Time // what the file says; of the one who looks

	mu    sync.Mutex
	found map[string]status.NotProtected // guarded by mu; by UUID
}

// open reads what an earlier daemon found. When that cannot be read the time
// begins anew.
func (u *unprotected) open(state fsx.FS) error {
	u.state = state
	var r notProtectedRecord
	err := fsx.ReadJSON(state, notProtectedFile, maxNotProtectedFile, &r)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && r.Version != 1 {
		err = fmt.Errorf("%s has version %d", notProtectedFile, r.Version)
	}
	if err != nil {
		return err
	}
	u.kept = r.Since
	return nil
}

// keep makes what was found durable, if it is news.
func (u *unprotected) keep() error {
	u.mu.Lock()
	since := make(map[string]time.Time, len(u.found))
	for id, n := range u.found {
		since[id] = n.Since
	}
	u.mu.Unlock()
	if u.state == nil || maps.EqualFunc(since, u.kept, time.Time.Equal) {
		return nil
	}
	if err := fsx.WriteJSON(u.state, notProtectedFile, notProtectedRecord{Version: 1, Since: since}); err != nil {
		return err
	}
	u.kept = since
	return nil
}

// looked takes over what was found: domains that nobody protects. Where nothing
// could be looked at it is not called: what is known stays, nothing new is said.
func (u *unprotected) looked(now time.Time, all []libvirt.Domain, c config.Config) {
	u.mu.Lock()
	defer u.mu.Unlock()
	was, since := u.found, u.kept
	u.found = map[string]status.NotProtected{}
	for _, k := range all {
		p, ok := c.PolicyFor(k.Name, k.Tags)
		if !ok || !p.Alarm {
			continue
		}
		n := status.NotProtected{Name: k.Name, ID: wire.VMID(k.UUID), Policy: p.Name, Since: now, After: p.AlarmAfter}
		if w, ok := was[k.UUID]; ok {
			n.Since = w.Since
		} else if t, ok := since[k.UUID]; ok && was == nil && t.Before(now) { // the first look since the start
			n.Since = t
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
			d.log.Warn("look for domains that are not protected", "err", err)
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
	if err := d.unprotected.keep(); err != nil {
		return fmt.Errorf("keep since when they are not: %w", err)
	}
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
