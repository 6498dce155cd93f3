package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/nbd"
	"kvmreplica/replicad/media"
	"kvmreplica/replicad/wire"
)

// MediaOptions are a person's choices for an external medium.
type MediaOptions struct {
	Name     string      // export: domain name or UUID
	Disks    []string    // export: empty = every disk that can be protected
	Peer     wire.HostID // import: the host that will send the VM
	Dir      string      // absolute path on this host
	Key      media.Key
	Progress func(done, total int64)
}

// ExportMedia writes the content of a VM's disks into DIR/UUID, which it
// returns: of a VM that is protected from here, or of one that is not yet. The
// guest runs on.
func (m *Manager) ExportMedia(ctx context.Context, o MediaOptions) (string, media.Medium, error) {
	r, err := m.mediaDisks(ctx, o)
	if err != nil {
		return "", media.Medium{}, err
	}
	s := media.Source{VM: string(r.VM), Name: r.Name}
	defer func() {
		for _, d := range s.Disks {
			_ = d.Device.Close() // only read
		}
	}()
	for _, d := range r.Disks {
		dev, err := openSource(ctx, d)
		if err != nil {
			return "", media.Medium{}, &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("disk %s cannot be read: %v", d.Name, err), Hint: "virsh domblklist " + r.Name}
		}
		s.Disks = append(s.Disks, media.SourceDisk{Name: string(d.Name), Device: dev})
	}
	dir := filepath.Join(o.Dir, string(r.VM))
	to, err := mediumDir(o.Dir, string(r.VM))
	if err != nil {
		return dir, media.Medium{}, mediaError(err, dir)
	}
	med, err := media.Export(ctx, to, s, media.Options{Key: o.Key, Now: m.deps.Now, Progress: o.Progress})
	return dir, med, mediaError(err, dir)
}

// mediumDir opens DIR/UUID; DIR must exist: a medium that is not mounted must
// not fill the disk below.
func mediumDir(dir, vm string) (fsx.FS, error) {
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: dir + " is no directory that exists", Hint: "mount the medium, make the directory"}
	}
	root, err := fsx.OS(dir)
	if err != nil {
		return nil, err
	}
	return fsx.Sub(root, vm), root.MkdirAll(vm)
}

// mediaDisks are the disks of a VM as a record has them.
func (m *Manager) mediaDisks(ctx context.Context, o MediaOptions) (Record, error) {
	if v, err := m.Lookup(o.Name); err == nil {
		r := v.record()
		switch {
		case !r.Lineage.MayServe():
			return r, &wire.Error{Kind: wire.KindRefused, Text: "this host is the replica of " + r.Name, Hint: "export on the primary; a recovery point: replicactl point export " + r.Name}
		case r.Overlay != nil:
			return r, &wire.Error{Kind: wire.KindRefused, Text: "the guest's writes lie beside the images while a failover is on trial", Hint: "replicactl failover commit " + r.Name}
		}
		return r, choose(&r, o.Disks)
	}
	d, err := m.domain(ctx, o.Name)
	if err != nil {
		return Record{}, err
	}
	p := &EnablePlan{rec: Record{VM: wire.VMID(d.UUID), Name: d.Name}}
	p.checkDisks(ctx, d, o.Disks)
	for _, c := range p.Checks {
		if c.Result == wire.Failed {
			return p.rec, &wire.Error{Kind: wire.KindRefused, Text: c.Name + ": " + c.Detail, Hint: c.Remedy}
		}
	}
	return p.rec, nil
}

// choose leaves only the named disks.
func choose(r *Record, names []string) error {
	for _, n := range names {
		if _, ok := r.disk(wire.DiskName(n)); !ok {
			return &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("%s has no protected disk %q", r.Name, n), Hint: "replicactl vm status " + r.Name}
		}
	}
	if len(names) > 0 {
		r.Disks = slices.DeleteFunc(slices.Clone(r.Disks), func(d Disk) bool { return !slices.Contains(names, string(d.Name)) })
	}
	return nil
}

// openSource opens a disk's content for reading beside whoever writes it.
func openSource(ctx context.Context, d Disk) (block.Device, error) {
	if d.Kind == diskNBD {
		ctx, cancel := context.WithTimeout(ctx, nbdTimeout)
		defer cancel()
		return nbd.DialURI(ctx, d.URI, nbd.ClientOptions{ReadOnly: true})
	}
	return block.OpenFile(d.Path, block.FileOptions{ReadOnly: true, NoLock: true})
}

// ImportMedia makes images of a medium where "enable --initial existing" looks
// for them, and returns that directory.
func (m *Manager) ImportMedia(ctx context.Context, o MediaOptions) (string, media.Medium, error) {
	g, err := m.deps.Grant(o.Peer)
	if err != nil {
		return "", media.Medium{}, err
	}
	if !g.MaySend || g.Root == "" {
		return "", media.Medium{}, &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("this host does not accept replicas from %s", g.Name), Hint: "replicactl peer allow " + g.Name + " --may-send …"}
	}
	from, err := fsx.OS(o.Dir)
	if err != nil {
		return "", media.Medium{}, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("the medium's directory: %v", err), Hint: "mount the medium; the directory is the one that vm export named"}
	}
	med, err := media.Load(from)
	if errors.Is(err, fs.ErrNotExist) {
		return "", med, &wire.Error{Kind: wire.KindNotFound, Text: o.Dir + " holds no export", Hint: "the directory is the one that vm export named: DIR/VM_UUID"}
	}
	if err != nil {
		return "", med, mediaError(err, o.Dir)
	}
	if v, ok := m.get(wire.VMID(med.VM)); ok {
		return "", med, &wire.Error{Kind: wire.KindConflict, Text: "VM " + v.record().Name + " is " + string(v.record().Lineage.State) + " here already", Hint: "replicactl vm status " + v.record().Name}
	}
	dir := imageDir(g.Root, wire.VMID(med.VM))
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return dir, med, fmt.Errorf("make the images' directory: %w", err)
	}
	to, err := mediumDir(dir, existingDir)
	if err == nil {
		med, err = media.Import(ctx, from, to, o.Key, o.Progress)
	}
	return filepath.Join(dir, existingDir), med, mediaError(err, o.Dir)
}

// mediaError gives an error its kind and the next command.
func mediaError(err error, dir string) error {
	if err == nil {
		return nil
	}
	var w *wire.Error
	if errors.As(err, &w) {
		return err
	}
	e := &wire.Error{Text: err.Error()}
	switch {
	case errors.Is(err, context.Canceled):
		e.Kind, e.Hint = wire.KindUnavailable, "repeat the command: it goes on where it was"
	case errors.Is(err, media.ErrIncomplete):
		e.Kind, e.Hint = wire.KindRefused, "on the primary repeat vm export: it goes on where it was"
	case errors.Is(err, media.ErrExists):
		e.Kind, e.Hint = wire.KindConflict, "move it away, or take another directory"
	case errors.Is(err, media.ErrForeign):
		e.Kind, e.Hint = wire.KindConflict, "take another directory than "+dir
	case errors.Is(err, media.ErrDamaged):
		e.Kind, e.Hint = wire.KindCorrupt, "copy the named file from the medium again, or export anew into another directory"
	case errors.Is(err, media.ErrKey):
		e.Kind, e.Hint = wire.KindRefused, "--identity FILE or --passphrase-file FILE that belongs to this medium"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		e.Kind, e.Hint = wire.KindNoSpace, "make room, then repeat the command: it goes on where it was"
	default:
		return err
	}
	return e
}
