package replicad

import (
	"context"
	"path/filepath"
	"time"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/media"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// media exports a VM onto an external medium, or imports one.
func (d *Daemon) media(ctx context.Context, a api.Action, emit func(api.Event)) error {
	o := vm.MediaOptions{
		Name: a.VM, Disks: a.Disks, Dir: a.To, Progress: mediaProgress(a.Verb, emit),
		Key: media.Key{Recipient: a.Recipient, Passphrase: a.Passphrase, Identity: a.Identity},
	}
	if a.Verb == api.VMImport {
		o.Dir = a.From
	}
	if !filepath.IsAbs(o.Dir) {
		return &wire.Error{Kind: wire.KindInvalid, Text: "the medium's directory must be an absolute path"}
	}
	if a.Verb == api.VMExport {
		dir, m, err := d.vms.ExportMedia(ctx, o)
		if err != nil {
			return err
		}
		note(emit, "Written: %s, %d bytes of %s. Carry it to the replica host, and there: replicactl vm import %s --from PEER", dir, m.Bytes(), count.Of(len(m.Disks), "disk"), dir)
		return nil
	}
	rec, err := d.peers.Find(a.Peer)
	if err != nil {
		return err
	}
	o.Peer = rec.Host
	dir, m, err := d.vms.ImportMedia(ctx, o)
	if err != nil {
		return err
	}
	note(emit, "Every block was verified. The images of %s lie ready in %s.", m.Name, dir)
	note(emit, "Now on %s: replicactl vm enable %s --to %s --initial existing. It compares them with the disks; only what differs is sent.", rec.Name, m.Name, d.name)
	return nil
}

func mediaProgress(verb api.Verb, emit func(api.Event)) func(done, total int64) {
	begun, last := time.Now(), time.Time{}
	phase := map[api.Verb]string{api.VMExport: "export", api.VMImport: "import"}[verb]
	return func(done, total int64) {
		now := time.Now()
		if now.Sub(last) < progressEvery {
			return
		}
		last = now
		j := status.Job{Phase: phase, Done: min(done, total), Total: total, ETA: -1}
		if s := now.Sub(begun).Seconds(); s > 0 {
			j.Rate = int64(float64(done) / s)
		}
		emit(api.Event{Job: &j})
	}
}
