package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"kvmreplica/internal/count"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// A VM's set of disks can change while it is protected. The primary decides and
// says so with its next offer; for the replica what counts is what the epochs
// have, since each carries its own list: a disk that is added grows in it from
// nothing to its size over several epochs, while the others go on; one that is
// removed is missing from the next one. Recovery points keep the disks they had.

// DiskState is where a disk stands between being protected and not.
type DiskState string

const (
	member  DiskState = ""
	joining DiskState = "joining" // being added: the replica has a part of it
	// Of a replica: the primary offers the VM without it; the newest state still
	// has it.
	leaving DiskState = "leaving"
	// Of a replica: the newest state does not have it; recovery points may.
	left DiskState = "left"
)

// Span is commits of a replica's store: From the first in which a disk that was
// being added may be, To the first that has all of it, 0 = none yet.
type Span struct {
	From uint64 `json:"from"`
	To   uint64 `json:"to,omitempty"`
}

// partial reports that a state of the store has only a part of the disk.
func (d Disk) partial(ordinal uint64) bool {
	return slices.ContainsFunc(d.Joins, func(s Span) bool { return s.From <= ordinal && (s.To == 0 || ordinal < s.To) })
}

// whole reports that the newest state has all of the disk.
func (d Disk) whole() bool { return !d.Out && (d.State == member || d.State == leaving) }

// served are the disks that this host's data plane serves, or would.
func (r *Record) served() []Disk {
	return slices.DeleteFunc(slices.Clone(r.Disks), func(d Disk) bool { return d.Out || d.State == left })
}

// placed are the disks of the domain that stand, or should stand, on exports.
func (r *Record) placed() []Disk {
	return slices.DeleteFunc(r.served(), func(d Disk) bool { return !r.Native && !d.whole() })
}

// specWith is the description with the disks that has names.
func (r *Record) specWith(has func(Disk) bool) (libvirt.Spec, error) {
	s, err := libvirt.ParseSpec(r.Spec)
	if err != nil {
		return s, err
	}
	s.Disks = slices.DeleteFunc(s.Disks, func(k libvirt.SpecDisk) bool {
		d, ok := r.disk(wire.DiskName(k.Target))
		return ok && !has(d)
	})
	for _, d := range r.Disks {
		known := slices.ContainsFunc(s.Disks, func(k libvirt.SpecDisk) bool { return k.Target == string(d.Name) })
		if known || !has(d) || len(d.Spec) == 0 {
			continue
		}
		var k libvirt.SpecDisk
		if err := json.Unmarshal(d.Spec, &k); err != nil {
			return s, fmt.Errorf("what disk %s was: %w", d.Name, err)
		}
		s.Disks = append(s.Disks, k)
	}
	return s, nil
}

// offered compares the set of an offer with the record.
func (r *Record) offered(disks []wire.Disk) (joins []wire.Disk, leaves, stays []wire.DiskName) {
	for _, w := range disks {
		switch d, ok := r.disk(w.Name); {
		case !ok || d.State == left:
			joins = append(joins, w)
		case d.State == leaving:
			stays = append(stays, w.Name)
		}
	}
	for _, d := range r.served() {
		if d.State != leaving && !slices.ContainsFunc(disks, func(w wire.Disk) bool { return w.Name == d.Name }) {
			leaves = append(leaves, d.Name)
		}
	}
	return joins, leaves, stays
}

// maySet refuses a set of disks that this replica cannot follow.
func (v *VM) maySet(r *Record, o wire.Offer) error {
	joins, leaves, _ := r.offered(o.Disks)
	if len(joins)+len(leaves) == 0 {
		return nil
	}
	no := func(hint, format string, a ...any) error {
		return &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf(format, a...), Hint: hint}
	}
	again := "on the replica host: replicactl vm disable --force " + r.Name + ", then enable it again"
	s, err := v.store()
	if err != nil {
		return err
	}
	if s.Status().State != points.Replica {
		return no(again, "the replica of %s was made for other disks", r.Name)
	}
	g, err := v.deps.Grant(r.Peer)
	if err != nil {
		return err
	}
	if len(r.Disks)+len(joins) > delta.MaxDisks {
		return no("repeat the command when recovery points that have removed disks are gone", "the replica would know %d disks of %s, %d are possible", len(r.Disks)+len(joins), r.Name, delta.MaxDisks)
	}
	for _, w := range joins {
		switch {
		case !w.Joining:
			return no(again, "the replica of %s was made for other disks: it has no %s", r.Name, w.Name)
		case r.Native:
			return no(again, "the VM's own definition on the replica host has no place for disk %s", w.Name)
		case g.MaxDisks > 0 && len(o.Disks) > g.MaxDisks:
			return no("on the replica host: replicactl peer allow "+g.Name+" --may-send …", "%s may send %s a VM, this one would have %d", g.Name, count.Of(g.MaxDisks, "disk"), len(o.Disks))
		}
		if _, known := r.disk(w.Name); known {
			continue
		}
		if err := (&Record{Disks: []Disk{{Path: r.imageOf(g.Root, w.Name)}}}).foreignImages(); err != nil {
			return err
		}
	}
	return nil
}

// imageOf is where the image of a disk that joins is made: beside the others.
func (r *Record) imageOf(root string, name wire.DiskName) string {
	dir := imageDir(root, r.VM)
	for _, d := range r.Disks {
		if d.Kind == diskRaw {
			dir = filepath.Dir(d.Path)
		}
	}
	return filepath.Join(dir, string(name)+".raw")
}

// followSet takes an offered set into the record. What leaves is told by the
// next epoch, what joins gets an image.
func (v *VM) followSet(o wire.Offer) error {
	v.setting.Lock()
	defer v.setting.Unlock()
	r := v.record()
	joins, leaves, stays := r.offered(o.Disks)
	if len(joins)+len(leaves)+len(stays) > 0 || r.otherSize(o.Disks) {
		s, err := v.store()
		if err != nil {
			return err
		}
		g, err := v.deps.Grant(r.Peer)
		if err != nil {
			return err
		}
		next := s.Ordinal() + 1
		err = v.update(func(r *Record) error {
			r.Disks = slices.Clone(r.Disks)
			for i := range r.Disks {
				r.Disks[i].follow(r.Spec, leaves, stays)
			}
			r.sizeJoining(o.Disks)
			for _, w := range joins {
				r.join(w, r.imageOf(g.Root, w.Name), next)
			}
			return nil
		})
		if err != nil {
			return err
		}
		v.log.Info("the VM's set of disks changes", "joins", len(joins), "leaves", leaves, "stays", stays)
	}
	return errors.Join(v.makeNew(), v.followStore())
}

// follow notes that the primary offers the VM without the disk, or with it again.
func (d *Disk) follow(spec json.RawMessage, leaves, stays []wire.DiskName) {
	switch {
	case slices.Contains(leaves, d.Name):
		d.State = leaving
		if s, err := libvirt.ParseSpec(spec); err == nil {
			for _, k := range s.Disks {
				if k.Target == string(d.Name) {
					d.Spec, _ = json.Marshal(k) // it was read from JSON
				}
			}
		}
	case slices.Contains(stays, d.Name):
		if d.State = member; d.Joins != nil && d.Joins[len(d.Joins)-1].To == 0 {
			d.State = joining
		}
	}
}

// join takes a disk in, or one that had left and comes back.
func (r *Record) join(w wire.Disk, path string, ordinal uint64) {
	for i := range r.Disks {
		if d := &r.Disks[i]; d.Name == w.Name {
			d.State, d.Size, d.Spec = joining, w.Size, nil
			d.Joins = append(slices.Clone(d.Joins), Span{From: ordinal})
			return
		}
	}
	r.Disks = append(r.Disks, Disk{
		Name: w.Name, Size: w.Size, Kind: diskRaw, Path: path, State: joining, New: true, Joins: []Span{{From: ordinal}},
	})
}

// otherSize: a disk that is being added was taken out meanwhile and added again
// with another size.
func (r *Record) otherSize(disks []wire.Disk) bool {
	next := *r
	next.Disks = slices.Clone(r.Disks)
	next.sizeJoining(disks)
	return !slices.EqualFunc(r.Disks, next.Disks, func(a, b Disk) bool { return a.Size == b.Size })
}

// sizeJoining gives disks that are being added the size they will have.
func (r *Record) sizeJoining(disks []wire.Disk) {
	for i := range r.Disks {
		for _, w := range disks {
			if d := &r.Disks[i]; d.State == joining && d.Name == w.Name {
				d.Size = w.Size
			}
		}
	}
}

// makeNew makes the images of disks that joined. Later an image that is missing
// is an error, since its content was acknowledged.
func (v *VM) makeNew() error {
	for _, d := range v.record().Disks {
		if !d.New {
			continue
		}
		if err := makeImage(d.Path); err != nil {
			return err
		}
		if err := v.updateDisk(d.Name, func(d *Disk) { d.New = false }); err != nil {
			return err
		}
	}
	return nil
}

func (v *VM) updateDisk(name wire.DiskName, change func(*Disk)) error {
	return v.update(func(r *Record) error {
		r.Disks = slices.Clone(r.Disks)
		for i := range r.Disks {
			if r.Disks[i].Name == name {
				change(&r.Disks[i])
			}
		}
		return nil
	})
}

// setOf judges an epoch that has other disks than the one before.
func (v *VM) setOf(disks []delta.Disk) error {
	r := v.record()
	has := map[wire.DiskName]bool{}
	for _, d := range disks {
		has[wire.DiskName(d.Name)] = true
		if k, ok := r.disk(wire.DiskName(d.Name)); !ok || k.New || k.State == left {
			return fmt.Errorf("disk %s was not offered", d.Name)
		}
	}
	for _, d := range r.Disks {
		if d.State == member && !has[d.Name] {
			return fmt.Errorf("disk %s is missing and was not taken back", d.Name)
		}
	}
	return nil
}

// followStore keeps the record of a replica at the disks of its newest epoch.
func (v *VM) followStore() error {
	s, err := v.store()
	if err != nil {
		return nil // it is followed when the store is opened
	}
	return v.followDisks(s.Disks(), s.Ordinal())
}

func (v *VM) followDisks(disks []delta.Disk, ordinal uint64) error {
	have := map[wire.DiskName]int64{}
	for _, d := range disks {
		have[wire.DiskName(d.Name)] = d.Size
	}
	was := v.record()
	now := slices.Clone(was.Disks)
	for i := range now {
		now[i].settle(have[now[i].Name], ordinal)
	}
	sizes, moved := map[wire.DiskName]int64{}, false
	for i, d := range now {
		moved = moved || d.State != was.Disks[i].State
		if d.State == member && !d.Out {
			if n, ok := have[d.Name]; ok {
				sizes[d.Name] = n
			}
		}
	}
	if !moved {
		return v.setSizes(sizes)
	}
	if err := v.update(func(r *Record) error { r.Disks = now; return nil }); err != nil {
		return err
	}
	v.log.Info("the newest state has another set of disks", "disks", have)
	return v.setSizes(sizes)
}

// settle ends a change of the set when the newest state has it; size is the
// disk's in that state, 0 = it does not have it.
func (d *Disk) settle(size int64, ordinal uint64) {
	end := func() {
		if n := len(d.Joins); n > 0 && d.Joins[n-1].To == 0 {
			d.Joins = slices.Clone(d.Joins)
			d.Joins[n-1].To = ordinal
		}
	}
	switch {
	case d.State == joining && size == d.Size:
		d.State = member
		end()
	case d.State == leaving && size == 0:
		d.State = left
		end()
	}
}

// wholeAt are the disks of which a state of the store has everything.
func (v *VM) wholeAt(s *points.Store, pos delta.Pos) ([]delta.Disk, error) {
	disks, err := s.DisksAt(pos)
	if err != nil {
		return nil, err
	}
	ordinal := s.Ordinal()
	for _, p := range s.Points() {
		if p.Pos == pos {
			ordinal = p.Ordinal
		}
	}
	r := v.record()
	return slices.DeleteFunc(disks, func(k delta.Disk) bool {
		d, ok := r.disk(wire.DiskName(k.Name))
		return !ok || d.partial(ordinal)
	}), nil
}

// without lists disks of the VM that a state does not have whole.
func (v *VM) without(pos delta.Pos) (names []wire.DiskName) {
	s, err := v.store()
	if err != nil {
		return nil
	}
	has, err := v.wholeAt(s, pos)
	if err != nil {
		return nil // whoever starts from it will say why it cannot be read
	}
	for _, d := range v.serving() {
		if !slices.ContainsFunc(has, func(k delta.Disk) bool { return k.Name == string(d.Name) }) {
			names = append(names, d.Name)
		}
	}
	return names
}

// standOn leaves out the disks that the state failed over to did not have.
func (r *Record) standOn(names []wire.DiskName) {
	r.Disks = slices.Clone(r.Disks)
	for i := range r.Disks {
		d := &r.Disks[i]
		if in := slices.Contains(names, d.Name); in {
			d.State, d.Out = member, false
		} else if d.State != left || d.Out {
			d.Out = true
		}
	}
}

// wholeNames are the disks of the newest state.
func (r *Record) wholeNames() (names []wire.DiskName) {
	for _, d := range r.Disks {
		if d.whole() {
			names = append(names, d.Name)
		}
	}
	return names
}

// stands are the disks that a promotion in place will have: those of the newest
// state, or of the one at which the store was promoted offline.
func (v *VM) stands() (names []wire.DiskName) {
	r := v.record()
	s, err := v.store()
	if err != nil || s.Status().State != points.Promoted {
		return r.wholeNames()
	}
	for _, k := range s.Disks() {
		if d, ok := r.disk(wire.DiskName(k.Name)); ok && !d.partial(s.Ordinal()) {
			names = append(names, d.Name)
		}
	}
	return names
}

// tendGone forgets disks that nothing needs any more. The copy of one that left
// a replica is deleted with the last recovery point that has it; a host that
// took the VM over, or that has a definition of its own, keeps its files.
func (v *VM) tendGone(ctx context.Context) {
	r := v.record()
	if r.Overlay != nil || !slices.ContainsFunc(r.Disks, v.needless) {
		return
	}
	unlock, err := v.lockOwn("forget a disk that left")
	if err != nil {
		return // a plan decides now
	}
	defer unlock()
	v.setting.Lock() // the disk may come back this moment
	defer v.setting.Unlock()
	if r = v.record(); r.Overlay != nil {
		return
	}
	if r.Native {
		if err := v.pointOutGone(ctx); err != nil {
			v.log.Warn("point a disk that left back to its own image", "err", err)
			return
		}
	}
	for _, d := range r.Disks {
		if !v.needless(d) {
			continue
		}
		// In this order: a record that names a disk without its image would refuse
		// every epoch, should the disk come back.
		if err := v.withoutDisk(d.Name); err != nil {
			v.log.Warn("forget a disk that left", "disk", string(d.Name), "err", err)
			return
		}
		mine := d.Kind == diskRaw && !r.Native && r.Lineage.State == lineage.Replica
		if mine {
			if err := os.Remove(d.Path); err != nil && !absent(err) {
				v.log.Warn("the image of a disk that left stays; delete it", "disk", string(d.Name), "image", d.Path, "err", err)
			}
		}
		v.log.Info("a disk that left is forgotten", "disk", string(d.Name), "image", d.where(), "deleted", mine)
	}
}

// needless reports that no state of this host's has a disk that left.
func (v *VM) needless(d Disk) bool {
	if !d.Out && d.State != left {
		return false
	}
	if v.record().Lineage.State != lineage.Replica {
		return v.record().Lineage.MayServe()
	}
	s, err := v.store()
	if err != nil {
		return false
	}
	_, err = s.SeedCursor(string(d.Name))
	return slices.Contains(s.Absent(), string(d.Name)) || errors.Is(err, points.ErrDisks)
}
