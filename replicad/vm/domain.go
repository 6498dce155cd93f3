package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/lineage"
)

// specOf is the allow-listed description of a domain document, as JSON.
func (v *VM) specOf(doc []byte) (json.RawMessage, error) {
	s, _, err := libvirt.SpecFromXML(doc)
	if err != nil {
		return nil, err
	}
	r := v.record()
	keep := r.served()
	kept := s.Disks[:0]
	for _, d := range s.Disks {
		for _, k := range keep {
			if d.Target == string(k.Name) {
				d.Size = k.Size
				kept = append(kept, d)
			}
		}
	}
	s.Disks = kept
	return json.Marshal(s)
}

// policy is how this host renders a peer's description: everything that names
// something outside of the guest comes from here.
func (v *VM) policy(s libvirt.Spec) libvirt.Policy {
	r := v.record()
	p := libvirt.Policy{
		Type: v.deps.DomainType, Emulator: v.deps.Emulator, Disks: map[string]libvirt.PolicySource{},
		Networks: map[string]libvirt.PolicyNetwork{}, AutoFirmware: s.Firmware.UEFI, AllowKernel: v.deps.Kernels,
	}
	for _, d := range r.Disks {
		src := libvirt.PolicySource{File: d.Path}
		if d.Kind == diskBlock {
			src = libvirt.PolicySource{Block: d.Path}
		}
		p.Disks[string(d.Name)] = src
	}
	v.plugIn(s, &p)
	if s.GenID && r.Lineage.MayServe() {
		p.GenID = genID(r.Lineage.Generation)
	}
	if v.deps.ConsoleDir != "" {
		p.ConsoleLog = filepath.Join(v.deps.ConsoleDir, string(v.id)+".log")
	}
	return p
}

// defineReplica renders the peer's description into a domain of this host,
// off, on our exports. A domain that was this host's own is left as it is.
func (v *VM) defineReplica(ctx context.Context) (dropped []string, err error) {
	r := v.record()
	if r.Native {
		return nil, nil
	}
	s, err := r.specWith(Disk.whole)
	if err != nil {
		return nil, err
	}
	if s.UUID != string(r.VM) {
		return nil, fmt.Errorf("the description is of %s", s.UUID)
	}
	doc, err := libvirt.Render(s, v.policy(s))
	if err != nil {
		return nil, err
	}
	doc, originals, err := v.onExports(doc)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	if _, err := v.deps.Hyper.Define(ctx, doc); err != nil {
		return nil, err
	}
	return nil, v.keepOriginals(originals)
}

// keepOriginals remembers what a definition said of the disks that stand on
// exports now.
func (v *VM) keepOriginals(originals []libvirt.DiskOriginal) error {
	return v.update(func(r *Record) error { r.setOriginals(originals); return nil })
}

func (r *Record) setOriginals(originals []libvirt.DiskOriginal) {
	r.Disks = slices.Clone(r.Disks)
	for i := range r.Disks {
		for _, o := range originals {
			if o.Target == string(r.Disks[i].Name) {
				r.Disks[i].Original = &o
			}
		}
	}
}

// redefineLater is redefine for whoever does not hold the plan token. Whoever
// does places the domain himself.
func (v *VM) redefineLater() {
	if unlock, err := v.lockOwn("follow the set of disks"); err == nil {
		defer unlock()
		v.redefine()
	}
}

// redefine follows a set of disks that became another one.
func (v *VM) redefine() {
	if v.record().Lineage.State != lineage.Replica {
		return
	}
	_, err := v.defineReplica(v.mgr.lifetime())
	if err == nil && v.record().Native {
		err = v.pointOutGone(v.mgr.lifetime())
	}
	if err != nil {
		v.log.Warn("follow the VM's set of disks in its definition", "err", err)
	}
}

// pointOutGone gives disks that left their own sources back in a definition
// that was this host's own.
func (v *VM) pointOutGone(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if err != nil {
		return err
	}
	changed := false
	for _, d := range v.record().Disks {
		if !d.Out && d.State != left || d.Original == nil {
			continue
		}
		if doc, changed, err = v.pointOut(doc, d, changed); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	_, err = v.deps.Hyper.Define(ctx, doc)
	return err
}

// pointOut gives one disk its own source back, where it stands on its export.
func (v *VM) pointOut(doc []byte, d Disk, changed bool) ([]byte, bool, error) {
	dom, err := libvirt.ParseDomain(doc)
	if err != nil {
		return nil, false, err
	}
	k, ok := dom.Disk(string(d.Name))
	if !ok || d.Original == nil || k.Kind != libvirt.SourceNBD {
		return doc, changed, nil
	}
	doc, err = libvirt.SwapOut(doc, *d.Original)
	return doc, true, err
}

// onImages completes disks that were never under a guest of this host without
// our exports, because the VM came here by a failover: what each is on its own
// image says the definition that was rendered.
func (v *VM) onImages(ctx context.Context, disks []Disk) ([]Disk, error) {
	if !slices.ContainsFunc(disks, func(d Disk) bool { return d.Live.Target == "" }) {
		return disks, nil
	}
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if err != nil {
		return nil, err
	}
	if doc, err = v.offExports(doc); err != nil {
		return nil, err
	}
	own, err := libvirt.ParseDomain(doc)
	if err != nil {
		return nil, err
	}
	disks = slices.Clone(disks)
	for i, d := range disks {
		if d.Live.Target != "" {
			continue
		}
		k, ok := own.Disk(string(d.Name))
		if !ok || k.Kind == libvirt.SourceNBD && k.Socket == v.socket() {
			return nil, fmt.Errorf("the definition does not say what disk %s is without its export", d.Name)
		}
		disks[i].Live = k
	}
	return disks, nil
}

// onExports points the record's disks in a document to our exports.
func (v *VM) onExports(doc []byte) ([]byte, []libvirt.DiskOriginal, error) {
	r := v.record()
	disks := r.placed()
	originals := make([]libvirt.DiskOriginal, len(disks))
	for i, d := range disks {
		var err error
		src := libvirt.NBDSource{Socket: v.socket(), Export: string(d.Name), Reconnect: libvirt.ReconnectDelay}
		if doc, originals[i], err = libvirt.SwapIn(doc, string(d.Name), src); err != nil {
			return nil, nil, err
		}
	}
	r.setOriginals(originals)
	doc, err := libvirt.InsertMetadata(doc, metadata(r))
	return doc, originals, err
}

// metadata says in the domain's own definition who protects it, so that every
// tool can see it, and what its disks were, so that it can be released without
// our state.
func metadata(r Record) string {
	b, err := json.Marshal(map[string]any{
		"role": r.Lineage.State, "generation": r.Lineage.Generation, "peer": r.Peer, "disks": r.Disks, "autostart": r.Autostart,
	})
	if err != nil {
		return "{}"
	}
	return string(b)
}

// offExports gives a document its own disk sources back.
func (v *VM) offExports(doc []byte) ([]byte, error) {
	for _, d := range v.record().Disks {
		var err error
		if doc, _, err = v.pointOut(doc, d, false); err != nil {
			return nil, err
		}
	}
	return libvirt.RemoveMetadata(doc)
}

// placeDomain makes sure that the domain exists and stands on our exports.
func (v *VM) placeDomain(ctx context.Context) (string, error) {
	lctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	doc, err := v.deps.Hyper.XML(lctx, string(v.id), libvirt.XMLPersistent)
	switch {
	case errors.Is(err, libvirt.ErrNotFound):
		if v.record().Native {
			return "", fmt.Errorf("the domain is gone from libvirt; define it again, then: replicactl failover resume %s", v.record().Name)
		}
		_, err = v.defineReplica(ctx)
		return "defined", err
	case err != nil:
		return "", err
	}
	d, err := libvirt.ParseDomain(doc)
	if err != nil {
		return "", err
	}
	if err := v.pointOutGone(ctx); err != nil {
		return "", err
	}
	if v.record().Native {
		if doc, err = v.deps.Hyper.XML(lctx, string(v.id), libvirt.XMLPersistent); err != nil {
			return "", err
		}
	} else if v.standsOnMore(d) {
		_, err = v.defineReplica(ctx)
		return "defined again: it has other disks now", err
	}
	for name, src := range v.exports() {
		k, ok := d.Disk(name)
		if ok && k.Kind == libvirt.SourceNBD && k.Socket == src.Socket && k.Export == src.Export {
			continue
		}
		if v.record().Native {
			return "", fmt.Errorf("disk %s of the domain no longer points to its export; set it back or disable protection first", name)
		}
		_, err = v.defineReplica(ctx)
		return "defined again", err
	}
	if v.pluggedElsewhere(d) {
		_, err = v.defineReplica(ctx)
		return "defined again: its networks were mapped anew", err
	}
	if doc, err = libvirt.SetGenID(doc, genID(v.record().Lineage.Generation)); err != nil {
		return "", err
	}
	if doc, err = libvirt.InsertMetadata(doc, metadata(v.record())); err == nil {
		_, err = v.deps.Hyper.Define(lctx, doc)
	}
	return "stands on its exports", err
}

// standsOnMore reports that a domain points to an export that there is not.
func (v *VM) standsOnMore(d libvirt.Domain) bool {
	exports := v.exports()
	return slices.ContainsFunc(d.Disks, func(k libvirt.Disk) bool {
		_, ok := exports[k.Target]
		return !ok && k.Kind == libvirt.SourceNBD && k.Socket == v.socket()
	})
}

// undefineReplica removes a domain that was rendered here.
func (v *VM) undefineReplica(ctx context.Context) error {
	if v.record().Native {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	return v.deps.Hyper.Undefine(ctx, string(v.id), libvirt.UndefineOptions{DropNVRAM: true, DropTPM: true, DropSaved: true, DropSnapshots: true})
}

// deleteImages removes images that were made here for a replica.
func (v *VM) deleteImages() error {
	r := v.record()
	if r.Native {
		return nil
	}
	if r.Existing {
		return v.giveBack()
	}
	var errs []error
	for _, d := range r.Disks {
		if d.Kind != diskRaw {
			continue
		}
		if err := os.Remove(d.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		if err := os.Remove(filepath.Dir(d.Path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			v.log.Warn("the replica's directory stays", "err", err)
		}
	}
	return errors.Join(errs...)
}

// endReplica takes the replica role apart.
func (v *VM) endReplica(ctx context.Context, m *Manager, del bool) error {
	if err := v.stopKeeping(); err != nil {
		return err
	}
	if err := v.undefineReplica(ctx); err != nil {
		return err
	}
	if del {
		if err := v.deleteImages(); err != nil {
			return err
		}
	}
	if v.record().Native && v.record().Lineage.State == lineage.Replica {
		if err := v.restoreDomain(ctx); err != nil {
			return err
		}
	}
	return m.remove(v)
}
