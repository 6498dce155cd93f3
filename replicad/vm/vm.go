package vm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// VM is one virtual machine's replication on this host. All methods are safe
// for concurrent use.
//
// Locks, in this order: plan (held for a whole plan), setting (held while disks
// join or are forgotten), machine (held while a role's machinery starts or
// stops), intake (read-held while an epoch begins),
// gate (held while the start gate's files are written), mu (held for moments,
// never across I/O but the replacement of the record file).
type VM struct {
	deps *Deps
	mgr  *Manager
	id   wire.VMID
	fsys fsx.FS // this VM's state directory
	log  *slog.Logger

	plan    chan struct{} // holds one token; taken by whoever changes roles
	loaded  bool          // found by Open: Run brings it into its role
	setting sync.Mutex
	machine sync.Mutex
	intake  sync.RWMutex
	gate    sync.Mutex

	mu       sync.Mutex
	rec      Record            // guarded by mu; the file is never newer
	running  *failover.Journal // guarded by mu; the plan under way, nil = none
	cancel   func()            // guarded by mu; ends what the running plan does now
	step     string            // guarded by mu; the title of that
	stuck    *failover.Journal // guarded by mu; a plan that has not ended and does not run
	asked    *answered         // guarded by mu; the last planned failover the peer asked for
	closed   bool              // guarded by mu; nothing is received: a promotion is under way
	facts    guestFacts        // guarded by mu
	held     string            // guarded by mu; why the guest is not started
	trouble  string            // guarded by mu; why the role is not up
	applying error             // guarded by mu; why the last try to apply failed
	gone     bool              // guarded by mu; the relationship ended
	holds    string            // guarded by mu; what the plan token was taken for
	owns     bool              // guarded by mu; the daemon took it by itself
	starting bool              // guarded by mu; the role has not been tried since the start

	mounts  []*mounted // guarded by mu
	frozen  time.Time  // guarded by mu; since when the guest may be frozen by us, zero = it is not
	thawing bool       // guarded by mu; somebody thaws in the background
	untold  int        // guarded by mu; settings the other host has not heard of, 0 = none

	figures figures
	band    Limiter // nil = nothing bounds what is sent

	// The role's machinery; set while the role is up, guarded by mu.
	ship *shipping
	keep *keeping
}

// shipping is the primary's machinery.
type shipping struct {
	plane  *dataplane.Client
	cfg    dataplane.Config
	sess   *session.Session
	cancel context.CancelFunc
	done   chan struct{}
}

func (v *VM) record() Record {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.rec
}

// update changes the record; durable when it returns nil, unchanged otherwise.
func (v *VM) update(change func(*Record) error) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.rec
	if err := change(&r); err != nil {
		return err
	}
	if err := saveRecord(v.fsys, r); err != nil {
		return err
	}
	v.rec = r
	return nil
}

// move applies a change of role to the durable lineage.
func (v *VM) move(c lineage.Change, also func(*Record)) error {
	err := v.update(func(r *Record) error {
		l, err := r.Lineage.Apply(c)
		if err != nil {
			return err
		}
		r.Lineage = l
		if also != nil {
			also(r)
		}
		return nil
	})
	if err == nil {
		l := v.record().Lineage
		v.log.Info("role changed", "event", string(c.Event), "state", string(l.State))
		v.audit(v.request(), "daemon", "role "+string(c.Event), fmt.Sprintf("%s in generation %.8s", l.State, l.Generation))
		v.publishGate()
	}
	return err
}

// request is the correlation id of the plan that runs.
func (v *VM) request() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.running == nil {
		return ""
	}
	return v.running.Request
}

func (v *VM) qemuOwner() (uid, gid *int) {
	if v.deps.QEMUOwner == nil {
		return nil, nil
	}
	return v.deps.QEMUOwner()
}

// planeConfig is the data plane's configuration for the present record.
func (v *VM) planeConfig() dataplane.Config {
	r := v.record()
	uid, gid := v.qemuOwner()
	c := dataplane.Config{
		VM: r.VM, Name: r.Name,
		StateDir:  filepath.Join(v.deps.StateDir, "vms", string(r.VM), "track"),
		SharedDir: filepath.Join(v.deps.RunDir, "shm", string(r.VM)),
		RunDir:    filepath.Join(v.deps.RunDir, "vm", string(r.VM)),
		Binary:    v.deps.Binary, CaptureBytes: v.deps.CaptureBytes, DirtyBytes: v.deps.DirtyBytes, AnyClient: v.deps.AnyClient,
		SocketUID: uid, SocketGID: gid,
	}
	for _, d := range r.served() {
		k := dataplane.DiskConfig{Name: d.Name, Kind: dataplane.Kind(d.Kind), Path: d.Path, URI: d.URI, Size: d.Size, QemuLock: r.Placed && (d.State != joining || d.Original != nil)}
		if r.Overlay != nil {
			k.Overlay = v.overlayFile(d)
		}
		c.Disks = append(c.Disks, k)
	}
	if r.Overlay != nil {
		c.Overlay = &dataplane.OverlayConfig{Dir: v.overlayPath(), Store: filepath.Join(v.deps.StateDir, "vms", string(v.id), storeDir)}
		for _, d := range r.Disks {
			if (d.Out || d.State == left) && !d.New {
				c.Overlay.Aside = append(c.Overlay.Aside, dataplane.DiskConfig{Name: d.Name, Kind: dataplane.Kind(d.Kind), Path: d.Path, URI: d.URI, QemuLock: true})
			}
		}
	}
	return c
}

// Socket is where QEMU finds the exports of the VM on any host of ours.
func (v *VM) socket() string { return v.planeConfig().NBDSocket() }

// peer dials the other host.
func (v *VM) peer() (wire.Service, error) {
	host := v.record().Peer
	s, err := v.deps.Dial(host)
	if err != nil {
		return nil, fmt.Errorf("reach host %s: %w", host, err)
	}
	return s, nil
}

// plane returns the data plane's client while the primary role is up.
func (v *VM) plane() (*dataplane.Client, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ship == nil || v.ship.plane == nil {
		return nil, &wire.Error{Kind: wire.KindRefused, Text: "this host does not serve the VM's disks", Hint: "replicactl vm status " + v.rec.Name}
	}
	return v.ship.plane, nil
}

func (v *VM) session() *session.Session {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ship == nil {
		return nil
	}
	return v.ship.sess
}

// up starts the machinery of the present role. It is a no-op for what runs
// already.
func (v *VM) up(ctx context.Context) error {
	r := v.record()
	switch {
	case r.Lineage.State == lineage.Replica:
		if err := v.completeStore(ctx); err != nil {
			return err
		}
		if err := v.startKeeping(ctx); err != nil {
			return err
		}
		return v.catchUp()
	case r.Lineage.MayServe():
		if err := v.trackedPlane(ctx); err != nil {
			return err
		}
		if !r.NoReverse {
			v.startShipping()
		}
	case r.Lineage.State == lineage.Primary || r.Lineage.State == lineage.Promoted:
		// diverged: the disks stay served to a guest that runs, nothing ships
		return v.trackedPlane(ctx)
	}
	return nil
}

// down stops the machinery; the data plane of a guest stays when keepPlane.
func (v *VM) down(ctx context.Context, keepPlane bool) error {
	v.stopShipping()
	errs := []error{v.stopKeeping()}
	if !keepPlane {
		errs = append(errs, v.stopPlane(ctx))
	}
	return errors.Join(errs...)
}
