package vm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/mount"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// A mount ends with the daemon, with the replica's role and when the store has
// to be opened again: the view under it ends then. Its clients see their
// connection end; nothing of it is left.

// mounted is one mount of this VM.
type mounted struct {
	status.Mount
	pos     points.Point
	view    *points.View
	m       *mount.Mount
	over    *patched // between the view and the clients; nil = nothing
	private bool     // an export's own, not listed
}

// MountOptions are a person's choices.
type MountOptions struct {
	Point    string // as points.Choose reads it
	Writable bool
	Quota    int64  // per disk, 0 = DefaultQuota
	TCP      *int   // port of the loopback interface; nil = a unix socket
	patch    *Patch // laid over the point
}

// DefaultQuota of a writable mount, per disk.
const DefaultQuota = 10 << 30

// maxMounts of one VM.
const maxMounts = 16

func (v *VM) mountsDir() string  { return mountsDir(v.deps.RunDir) }
func (v *VM) scratchDir() string { return filepath.Join(v.deps.StateDir, "scratch") }

func mountsDir(run string) string { return filepath.Join(run, "mounts") }

// MountPoint shows a point to NBD clients of this machine until it is
// unmounted. Replication, applying and thinning go on.
func (v *VM) MountPoint(o MountOptions) (status.Mount, error) {
	m, err := v.mountPoint(o, false)
	if err != nil {
		return status.Mount{}, err
	}
	v.log.Info("recovery point mounted", "mount", m.ID, "pos", m.pos.Pos, "writable", o.Writable)
	return m.Mount, nil
}

func (v *VM) mountPoint(o MountOptions, private bool) (*mounted, error) {
	switch {
	case o.Quota < 0 || o.Quota > 0 && !o.Writable:
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: "a quota is for a writable mount", Hint: "--rw --quota SIZE"}
	case o.TCP != nil && (*o.TCP < 0 || *o.TCP > 65535):
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("port %d", *o.TCP)}
	case len(v.Mounts()) >= maxMounts:
		return nil, &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("%d mounts are open", maxMounts), Hint: "replicactl point unmount " + v.record().Name}
	}
	if o.Quota == 0 {
		o.Quota = DefaultQuota
	}
	v.machine.Lock() // the store stays as it is until the mount is noted
	defer v.machine.Unlock()
	p, view, err := v.TakePoint(o.Point)
	if err != nil {
		return nil, err
	}
	s, err := v.store()
	if err != nil {
		return nil, errors.Join(err, view.Close())
	}
	x := &mounted{pos: p, view: view, private: private}
	if o.patch != nil {
		x.over, err = v.overlayPatch(view, o.patch)
	}
	if err == nil {
		err = v.show(s, x, o)
	}
	if err != nil {
		return nil, errors.Join(err, x.over.close(), view.Close())
	}
	v.mu.Lock()
	v.mounts = append(v.mounts, x)
	v.mu.Unlock()
	return x, nil
}

// show starts the server of a mount. A disk of which the state has only a part,
// because it was being added, is left out like one that it does not have.
func (v *VM) show(s *points.Store, x *mounted, o MountOptions) error {
	var id [4]byte
	_, _ = rand.Read(id[:]) // never fails
	opts := mount.Options{
		Dir: v.mountsDir(), ID: hex.EncodeToString(id[:]), TCP: o.TCP, Writable: o.Writable, Quota: o.Quota, Reserve: v.deps.Store.Reserve, ScratchDir: v.scratchDir(), Log: v.log,
	}
	if o.Writable {
		if err := os.MkdirAll(opts.ScratchDir, 0o700); err != nil {
			return fmt.Errorf("make the directory of scratch overlays: %w", err)
		}
	}
	has, err := v.wholeAt(s, x.pos.Pos)
	if err != nil {
		return err
	}
	var disks []mount.Disk
	for _, d := range has {
		dev, err := x.view.Disk(d.Name)
		if err != nil {
			return err
		}
		if x.over != nil {
			dev = x.over.disks[d.Name]
		}
		disks = append(disks, mount.Disk{Name: d.Name, Device: dev})
	}
	m, err := mount.Start(disks, opts)
	if err != nil {
		return &wire.Error{Kind: wire.KindInternal, Text: err.Error(), Hint: "another port, or none: without --tcp a unix socket is used"}
	}
	x.m = m
	x.Mount = status.Mount{
		ID: opts.ID, VM: v.record().Name, Number: x.pos.Ordinal, Time: x.pos.Cut, Position: x.pos.Pos.String(), App: x.pos.App,
		Writable: o.Writable, Since: v.deps.Now(), Disks: []status.MountDisk{},
	}
	if o.Writable {
		x.Quota = o.Quota
	}
	if o.patch != nil {
		x.Patch = o.patch.ID
	}
	for _, d := range disks {
		x.Disks = append(x.Disks, status.MountDisk{Name: wire.DiskName(d.Name), Size: d.Device.Size(), URI: m.URI(d.Name)})
	}
	return nil
}

// Mounts lists the mounts of this VM, oldest first.
func (v *VM) Mounts() []status.Mount {
	v.mu.Lock()
	all := slices.Clone(v.mounts)
	v.mu.Unlock()
	out := []status.Mount{}
	for _, x := range all {
		if !x.private {
			m := x.Mount
			m.Connections, m.Used = x.m.Connections(), x.m.Used()
			out = append(out, m)
		}
	}
	return out
}

// mountedAt counts the mounts of each position.
func (v *VM) mountedAt() map[delta.Pos]int {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := map[delta.Pos]int{}
	for _, x := range v.mounts {
		out[x.pos.Pos]++
	}
	return out
}

// UnmountPoint ends one mount, or, with an empty id, all of them. One that is
// in use is refused unless forced. Ending what has ended is no error.
func (v *VM) UnmountPoint(id string, force bool) (ended int, err error) {
	v.mu.Lock()
	all := slices.Clone(v.mounts)
	v.mu.Unlock()
	for _, x := range all {
		if x.private || id != "" && !strings.HasPrefix(x.ID, id) {
			continue
		}
		if n := x.m.Connections(); n > 0 && !force {
			return ended, &wire.Error{
				Kind: wire.KindConflict, Text: fmt.Sprintf("mount %s is in use by %s", x.ID, count.Of(n, "connection")),
				Hint: "end its clients, or: replicactl point unmount --force " + v.record().Name + " " + x.ID,
			}
		}
		if err := v.endMount(x); err != nil {
			return ended, err
		}
		ended++
	}
	return ended, nil
}

// endMount takes one mount down. A second call waits for the first.
func (v *VM) endMount(x *mounted) error {
	err := errors.Join(x.m.Close(), x.over.close(), x.view.Close())
	v.mu.Lock()
	defer v.mu.Unlock()
	v.mounts = slices.DeleteFunc(slices.Clone(v.mounts), func(o *mounted) bool { return o == x })
	return err
}

// endMounts takes all mounts down because the store under them ends.
func (v *VM) endMounts(why string) {
	v.mu.Lock()
	all := slices.Clone(v.mounts)
	v.mu.Unlock()
	for _, x := range all {
		v.log.Info("mount ended", "mount", x.ID, "why", why)
		if err := v.endMount(x); err != nil {
			v.log.Warn("end a mount", "mount", x.ID, "err", err)
		}
	}
}

// ExportPoint writes the disks of a point into files: see package mount. The
// point stays while it runs.
func (v *VM) ExportPoint(ctx context.Context, o ExportOptions, progress func(mount.Progress)) ([]string, error) {
	f, err := mount.ParseFormat(o.Format)
	if err != nil {
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: "--format raw or qcow2"}
	}
	p, err := v.ChoosePoint(o.Point)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, d := range p.Disks {
		names = append(names, d.Name)
	}
	files, err := mount.Files(o.To, v.record().Name, names, f)
	if err != nil {
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: "--to a file that does not exist, or a directory"}
	}
	x, err := v.mountPoint(MountOptions{Point: p.PosText()}, true)
	if err != nil {
		return nil, err
	}
	begun := v.deps.Now()
	err = x.m.Export(ctx, files, f, progress)
	err = errors.Join(err, v.endMount(x))
	if err != nil {
		return nil, exportError(err)
	}
	v.log.Info("recovery point exported", "pos", p.Pos, "to", o.To, "format", o.Format, "took", v.deps.Now().Sub(begun).Round(time.Millisecond))
	return files, nil
}

// ExportOptions are a person's choices.
type ExportOptions struct {
	Point  string // as points.Choose reads it
	To     string // an absolute path of a file, or of a directory
	Format string // "raw" or "qcow2"
}

func exportError(err error) error {
	switch {
	case errors.Is(err, mount.ErrExists):
		return &wire.Error{Kind: wire.KindConflict, Text: err.Error(), Hint: "name another file: nothing is overwritten"}
	case errors.Is(err, mount.ErrNoTool):
		return &wire.Error{Kind: wire.KindRefused, Text: err.Error(), Hint: "apt-get install qemu-utils; or --format raw"}
	case errors.Is(err, mount.ErrNoRoom):
		return &wire.Error{Kind: wire.KindNoSpace, Text: err.Error(), Hint: "free space there; nothing is left of the attempt"}
	case errors.Is(err, points.ErrGone), errors.Is(err, context.Canceled):
		return &wire.Error{Kind: wire.KindUnavailable, Text: "the export ended early, nothing is left of it: " + err.Error(), Hint: "repeat it"}
	}
	return err
}
