package vm

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/wire"
)

// Snapshot is an external snapshot above a disk's export: the guest writes into
// its files, the top one first, and not into the export.
type Snapshot struct {
	Disk  wire.DiskName `json:"disk"`
	Files []string      `json:"files"`
}

// snapshotText lists snapshots for people; empty for none.
func snapshotText(all []Snapshot) string {
	var out []string
	for _, s := range all {
		out = append(out, fmt.Sprintf("%s (%s)", s.Disk, strings.Join(s.Files, ", ")))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// standsBelow takes in which disks have a snapshot above their export. There
// the export stands still while the guest goes on: its empty cuts must not pass
// for fresh ones. The record has it until the guest was seen without, for a
// guest that is off, or a daemon that starts again, cannot be asked.
func (v *VM) standsBelow(below []Snapshot) {
	text := snapshotText(below)
	v.mu.Lock()
	known, was := snapshotText(v.rec.Snapshots), v.facts.overlay
	v.facts.overlay, v.facts.stranded = text, false
	v.mu.Unlock()
	s := v.session()
	if text != "" && was == "" && s != nil {
		s.Pause()
	}
	if text != known {
		if err := v.update(func(r *Record) error { r.Snapshots = below; return nil }); err != nil {
			if text != was {
				v.log.Error("keep that snapshots lie above the exports; it is tried again", "err", err)
			}
			return
		}
	}
	if text == "" && s != nil && (known != "" || was != "") {
		v.proceed(s)
	}
}

// overlay says which snapshots lie above the exports, or did when the guest was
// seen last; the caller holds the lock.
func (v *VM) overlay() string { return cmp.Or(v.facts.overlay, snapshotText(v.rec.Snapshots)) }

// heldBySnapshot begins the reason why a guest is held that ended below one.
const heldBySnapshot = "its newest writes lie in a snapshot that its definition does not name: "

// withoutSnapshot says why the guest must not be started as it is defined: it
// ended below a snapshot, and the definition stands on the exports, as libvirt
// leaves it when they came under a running guest. It would go back to what the
// disks were when the snapshot was made, and could never return.
func (v *VM) withoutSnapshot(ctx context.Context) (why string, err error) {
	r := v.record()
	if len(r.Snapshots) == 0 {
		return "", nil
	}
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if err != nil {
		return "", fmt.Errorf("look whether the guest's snapshot is in its definition: %w", err)
	}
	d, err := libvirt.ParseDomain(doc)
	if err != nil {
		return "", fmt.Errorf("look whether the guest's snapshot is in its definition: %w", err)
	}
	exports := v.exports()
	var left []Snapshot
	for _, s := range r.Snapshots {
		e := exports[string(s.Disk)]
		for _, k := range d.Disks {
			if k.Target == string(s.Disk) && k.Kind == libvirt.SourceNBD && k.Socket == e.Socket && k.Export == e.Export {
				left = append(left, s)
			}
		}
	}
	if len(left) == 0 {
		return "", nil
	}
	return heldBySnapshot + snapshotText(left), nil
}

// tendStranded holds a guest back that would be started without its snapshot.
func (v *VM) tendStranded(ctx context.Context) {
	why, err := v.withoutSnapshot(ctx)
	if err != nil || v.busy() {
		return // it is looked at again
	}
	v.mu.Lock()
	held := v.held
	v.facts.stranded = why != ""
	v.mu.Unlock()
	if (held == "" && why != "") || (strings.HasPrefix(held, heldBySnapshot) && held != why) {
		v.hold(why)
	}
}

// refuseStranded is the answer to a person who starts such a guest.
func (v *VM) refuseStranded(ctx context.Context) error {
	why, err := v.withoutSnapshot(ctx)
	if err != nil {
		return err
	}
	if why == "" {
		return nil
	}
	return &wire.Error{Kind: wire.KindRefused, Text: why, Hint: "docs/operations/day2.md (a guest that ended below a snapshot); to give those writes up: replicactl vm start " + v.record().Name + " --without-snapshot"}
}

// dropSnapshot gives up what lies in snapshots.
func (v *VM) dropSnapshot() error {
	text := snapshotText(v.record().Snapshots)
	if text == "" {
		return nil
	}
	if err := v.update(func(r *Record) error { r.Snapshots = nil; return nil }); err != nil {
		return err
	}
	v.log.Warn("the guest is started without what it wrote into a snapshot", "snapshot", text)
	v.mu.Lock()
	v.facts.overlay, v.facts.stranded = "", false
	v.mu.Unlock()
	if s := v.session(); s != nil {
		v.proceed(s)
	}
	return nil
}
