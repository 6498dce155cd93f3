package vm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"kvmreplica/internal/breakglass"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
)

// A released VM was taken out of this daemon's hands by replicafsck: its domain
// stands on its own images, which nobody tracks. As long as the mark is there
// nothing of it is served or shipped, and its start is not this host's affair.
// It is taken back while its guest is off: the definition points to the exports
// again and everything counts as different until digests prove the contrary.

// errReleased: not an error to show, the VM is not ours now.
var errReleased = errors.New("the VM was released and its guest runs")

// hands is what is known of a release.
type hands struct {
	off bool // the VM is out of our hands
	why string
	// seal of an offline promotion that is not completed: this host is the
	// VM's primary, whatever the record says.
	seal *points.Seal
}

func (v *VM) outOfHands() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.facts.hands.off
}

// marked reports that what this host's tracker says must not be believed.
func (v *VM) marked() bool {
	_, ok := breakglass.Read(v.fsys)
	return ok
}

func (v *VM) setReleased(off bool, why string) {
	v.mu.Lock()
	v.facts.hands = hands{off: off, why: why}
	v.mu.Unlock()
}

func releaseText(m breakglass.Mark) string {
	if m.At.IsZero() {
		return "released by " + m.By
	}
	return fmt.Sprintf("released by %s at %s", m.By, m.At.Local().Format(time.DateTime))
}

// noticeRelease sees a release that happened under a running daemon; true also
// while that cannot be known: the VM is left alone for now. A released one
// stays out of our hands until the next start: whoever forced it wants it so.
func (v *VM) noticeRelease() bool {
	if v.outOfHands() {
		return true
	}
	m, ok, err := breakglass.Look(v.fsys)
	if err != nil {
		if v.unreadAgain() < unreadLooks {
			v.log.Warn("whether the VM was released cannot be read; looking again", "err", err)
			return true
		}
		m, ok = breakglass.Read(v.fsys)
	}
	v.mu.Lock()
	v.facts.unread = 0
	v.mu.Unlock()
	if !ok {
		return false
	}
	v.setReleased(true, releaseText(m)+"; restart replicad with the guest off to protect it again")
	v.log.Error("the VM was released under the running daemon", "by", m.By)
	v.stopShipping()
	v.machine.Lock()
	v.mu.Lock()
	if v.ship != nil {
		v.ship.plane.Close()
		v.ship = nil
	}
	v.mu.Unlock()
	v.machine.Unlock()
	v.publishGate()
	return true
}

// unreadLooks is how often in a row the mark may be impossible to read before
// it counts. Nothing is decided meanwhile: an error of the disk that passes must
// not end protection until the next start.
const unreadLooks = 60

func (v *VM) unreadAgain() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.facts.unread++
	return v.facts.unread
}

// reclaim takes a released VM back, or says with errReleased that it must wait.
// Doing it again after a crash at any point is right: the mark goes last.
func (v *VM) reclaim(ctx context.Context) error {
	m, marked := breakglass.Read(v.fsys)
	if !marked && v.record().Lineage.State != lineage.Replica {
		v.setReleased(false, "")
		return nil
	}
	unlock, err := v.lockOwn("take the VM back")
	if err != nil {
		return err
	}
	defer unlock()
	if marked {
		v.setReleased(true, releaseText(m))
	}
	if v.record().Lineage.State == lineage.Replica {
		if again, err := v.adoptRecovered(ctx); err != nil || !again {
			return err
		}
	}
	if marked {
		return v.takeHands(ctx)
	}
	return nil
}

// takeHands puts a released VM back onto its exports.
func (v *VM) takeHands(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, swapTimeout)
	defer cancel()
	if err := v.wayBack(ctx); err != nil {
		v.publishGate()
		return err
	}
	v.hold("it is being taken back under protection")
	if err := v.wayBack(ctx); err != nil { // started before the gate was shut
		v.hold("")
		return err
	}
	if err := v.startPlane(ctx); err != nil {
		return err
	}
	c, err := v.plane()
	if err != nil {
		return err
	}
	if err := c.Mark(ctx, dataplane.MarkRequest{Reason: "the VM was released; what its guest wrote then is not known"}); err != nil {
		return fmt.Errorf("distrust the tracker: %w", err)
	}
	if _, err := v.pointIn(ctx); err != nil {
		return fmt.Errorf("point the definition at the exports again: %w", err)
	}
	// As its guest was left: what ran before the release does not count.
	runs := v.guestRuns()
	if err := v.update(func(r *Record) error { r.WantRunning = runs; return nil }); err != nil {
		return err
	}
	if err := breakglass.Clear(v.fsys); err != nil {
		return err
	}
	v.setReleased(false, "")
	v.hold("")
	v.log.Warn("the released VM is back under protection; everything is compared by digest")
	return nil
}

// wayBack checks that nothing is in the way: the guest is off and the
// definition names the images we know.
func (v *VM) wayBack(ctx context.Context) error {
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil {
		return fmt.Errorf("take the released VM back: %w", err)
	}
	if !off(st) {
		if v.standsOnExports(ctx) {
			return nil // the release never came that far
		}
		return errReleased
	}
	saved, err := v.deps.Hyper.HasSaved(ctx, string(v.id))
	if err != nil {
		return err
	}
	name := v.record().Name
	if saved {
		return v.inTheWay(fmt.Errorf("a managed save image would start the guest past the tracker; virsh start %s and shut it down, or: virsh managedsave-remove %s", name, name))
	}
	doc, err := v.deps.Hyper.XML(ctx, string(v.id), libvirt.XMLPersistent)
	if err != nil {
		return err
	}
	return v.inTheWay(v.sameSources(doc))
}

// standsOnExports reports that every write of the running guest passes us.
func (v *VM) standsOnExports(ctx context.Context) bool {
	g, err := v.deps.Hyper.Graph(ctx, string(v.id), v.exports())
	if err != nil {
		return false
	}
	for name := range v.exports() {
		if g[name].Position != libvirt.PositionTop {
			return false
		}
	}
	return true
}

// inTheWay keeps a reason for the status.
func (v *VM) inTheWay(err error) error {
	if err == nil {
		return nil
	}
	m, _ := breakglass.Read(v.fsys)
	v.setReleased(true, releaseText(m)+"; it cannot be taken back: "+err.Error())
	return errReleased
}

// sameSources refuses a definition whose disks are neither on our exports nor
// on the images they were on: our tracker and the replica are of those.
func (v *VM) sameSources(doc []byte) error {
	is, err := libvirt.ParseDomain(doc)
	if err != nil {
		return err
	}
	name := v.record().Name
	exports := v.exports()
	for _, k := range v.serving() {
		now, ok := is.Disk(string(k.Name))
		if !ok {
			return fmt.Errorf("the domain has no disk %s any more; put it back, or: replicactl vm disable %s", k.Name, name)
		}
		e := exports[string(k.Name)]
		if now.Kind == libvirt.SourceNBD && now.Socket == e.Socket && now.Export == e.Export || k.Original == nil {
			continue
		}
		own, err := libvirt.SwapOut(doc, *k.Original)
		if err != nil {
			return err
		}
		then, err := libvirt.ParseDomain(own)
		if err != nil {
			return err
		}
		if was, _ := then.Disk(string(k.Name)); place(was) != place(now) {
			return fmt.Errorf("disk %s stands on %s now, the replica is of %s; set it back with virsh edit %s, or: replicactl vm disable %s", k.Name, place(now), place(was), name, name)
		}
	}
	return nil
}

// place is where a disk's data is, for comparing and for people.
func place(d libvirt.Disk) string {
	return fmt.Sprintf("%s %s", d.Kind, d.Path+d.Socket+d.Address+d.Export)
}

// adoptRecovered ends a promotion that was made offline, by replicafsck
// recover: this host owns the VM from that position on, as after an unplanned
// failover. It reports whether there is more to take back.
func (v *VM) adoptRecovered(ctx context.Context) (bool, error) {
	if err := v.startKeeping(ctx); err != nil {
		return false, err
	}
	st, err := v.storeStatus()
	if err != nil || !v.sealedOffline(st) {
		v.setReleased(false, "")
		return false, err
	}
	v.setReleased(true, fmt.Sprintf("promoted offline at %v by replicafsck recover", st.Seal.At))
	v.mu.Lock()
	v.facts.hands.seal = st.Seal
	v.mu.Unlock()
	if err := v.wayBackRecovered(ctx); err != nil {
		return false, err
	}
	m := breakglass.Mark{At: v.deps.Now(), By: "replicafsck recover", Recovered: true}
	if !v.marked() {
		// What was written to the images since is not known.
		if err := breakglass.Set(v.fsys, m); err != nil {
			return false, err
		}
	}
	v.hold("its offline promotion is being completed")
	defer v.hold("")
	vars := &promoteVars{At: st.Seal.At, Generation: st.Seal.Generation}
	if err := v.execute(ctx, failover.Unplanned, "recovered-"+st.Seal.Generation.String()[:16], vars, nil); err != nil {
		return false, err
	}
	return true, nil
}

// promotedOffline is what this host is for its peer while an offline promotion
// waits for its completion: the primary of the seal's generation.
func (v *VM) promotedOffline() (g delta.Generation, ancestors []delta.Pos, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.facts.hands.seal
	if s == nil || v.rec.Lineage.State != lineage.Replica {
		return g, nil, false
	}
	return s.Generation, append([]delta.Pos{s.At}, ancestorsOf(v.rec.Lineage, s.At)...), true
}

// sealedOffline reports that somebody else than this daemon promoted the store:
// the generation of the seal is nowhere in the VM's history here.
func (v *VM) sealedOffline(st storeState) bool {
	r := v.record()
	if st.State != points.Promoted || st.Seal == nil || !st.Seal.Forced || r.Incomplete || !r.Lineage.Discard.IsZero() {
		return false
	}
	return !v.knows(st.Seal.Generation)
}

// knows reports that a generation is this host's own or an ancestor of it: an
// old primary that comes back after a promotion here has one of these.
func (v *VM) knows(g delta.Generation) bool {
	l := v.record().Lineage
	return l.Generation == g || slices.ContainsFunc(l.Ancestors, func(p delta.Pos) bool { return p.Generation == g })
}

func (v *VM) wayBackRecovered(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	switch {
	case errors.Is(err, libvirt.ErrNotFound):
		return nil
	case err != nil:
		return err
	case !off(st):
		v.publishGate()
		return errReleased
	}
	return nil
}

// forgotten reports that the relationship ended meanwhile.
func (v *VM) forgotten() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.gone
}
