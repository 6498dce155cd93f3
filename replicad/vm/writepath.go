package vm

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// lookAtGraph compares the real block graph with what it should be.
func (v *VM) lookAtGraph(ctx context.Context) {
	asked := v.exports()
	g, err := v.deps.Hyper.Graph(ctx, string(v.id), asked)
	if err != nil || v.setChanges() {
		return
	}
	var bypass []string
	var below []Snapshot
	for name := range v.exports() {
		d, ok := g[name]
		switch {
		case asked[name].Export == "": // added since
		case !ok || d.Position == libvirt.PositionAbsent:
			bypass = append(bypass, name)
		case d.Position == libvirt.PositionBelowOverlay:
			below = append(below, Snapshot{Disk: wire.DiskName(name), Files: d.Overlays})
		}
	}
	slices.Sort(bypass)
	v.standsBelow(below)
	v.passes(ctx, strings.Join(bypass, ", "))
}

// passes takes in which disks' writes pass the tracker. As long as it lasts
// nothing is shipped: a cut would lack those writes, and a recovery point of it
// would be a state that the VM never was in. The record has it until everything
// is marked, so that neither an error nor the end of this process makes such
// writes be forgotten.
func (v *VM) passes(ctx context.Context, disks string) {
	v.mu.Lock()
	kept, was := v.rec.Bypass, cmp.Or(v.facts.bypass, v.rec.Bypass)
	news := v.facts.passing != (disks != "") || disks != "" && disks != v.facts.bypass
	if v.facts.passing = disks != ""; v.facts.passing {
		v.facts.bypass = disks
	}
	v.mu.Unlock()
	s := v.session()
	if disks != "" {
		if news {
			v.log.Error("the guest writes past the tracker", "what", disks)
		}
		if news && s != nil {
			s.Pause()
		}
		if kept == disks {
			return
		}
		if err := v.update(func(r *Record) error { r.Bypass = disks; return nil }); err != nil && news {
			v.log.Error("keep that the guest writes past the tracker; it is tried again", "err", err)
		}
		return
	}
	if was == "" {
		return
	}
	err := v.distrust(ctx, "the guest wrote past the tracker: "+was)
	if err == nil && kept != "" {
		err = v.update(func(r *Record) error { r.Bypass = ""; return nil })
	}
	if err != nil {
		if news {
			v.log.Error("have everything compared after the guest wrote past the tracker; it is tried again", "err", err)
		}
		return
	}
	v.mu.Lock()
	v.facts.bypass = ""
	v.mu.Unlock()
	if s != nil {
		v.proceed(s)
	}
}

// forgetPath drops what was seen of the guest's writes: a role begins or ends,
// and with it what they were relative to.
func (v *VM) forgetPath() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.facts.bypass, v.facts.passing, v.facts.overlay, v.facts.stranded = "", false, "", false
}

// bypass says what passes the tracker, or did and is not marked yet; the caller
// holds the lock.
func (v *VM) bypass() string {
	switch disks := cmp.Or(v.facts.bypass, v.rec.Bypass); {
	case disks == "":
		return ""
	case !v.facts.passing:
		return "the guest wrote past the tracker: " + disks + "; not everything is marked for comparison yet"
	default:
		return "the guest writes past the tracker: " + disks
	}
}

// writesArrive refuses what needs every write of the guest to have reached the
// exports.
func (v *VM) writesArrive() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch name := v.rec.Name; {
	case v.bypass() != "":
		return &wire.Error{Kind: wire.KindRefused, Text: v.bypass(), Hint: health.BypassRemedy}
	case v.overlay() != "":
		return &wire.Error{Kind: wire.KindRefused, Text: "the guest's newest writes lie in a snapshot: " + v.overlay(), Hint: "finish the backup (virsh blockcommit " + name + " … --active --pivot); docs/operations/day2.md"}
	}
	return nil
}

// waits reports whether nothing is to be shipped now: a person's word, a time that
// has not come, or a guest whose writes do not arrive; the caller holds the lock.
func (v *VM) waits() bool {
	return v.rec.Paused || v.deps.Now().Before(v.rec.StartAt) || v.overlay() != "" || v.bypass() != ""
}

// proceed ends a pause that nothing asks for any more.
func (v *VM) proceed(s *session.Session) {
	v.mu.Lock()
	waits := v.waits()
	v.mu.Unlock()
	if !waits {
		s.Resume()
	}
}
