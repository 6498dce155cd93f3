package dataplane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"kvmreplica/cbt"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/version"
	"kvmreplica/nbd"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// trackerConfig describes the tracker to cbt.
func (p *Plane) trackerConfig() (cbt.Config, error) {
	boot, err := p.cfg.bootID()
	if err != nil {
		return cbt.Config{}, fmt.Errorf("read the boot id: %w", err)
	}
	c := cbt.Config{
		FS: fsx.Sub(p.state, trackerDir), SharedDir: p.cfg.SharedDir, BootID: boot, VMID: string(p.cfg.VM), Log: p.log.With("part", "cbt"),
		CaptureBytes: p.cfg.CaptureBytes, SpillDir: p.cfg.StateDir, Idle: p.cfg.Idle,
	}
	if c.Idle < 0 {
		c.IdleEpochs = -1
	}
	for _, i := range p.images {
		c.Disks = append(c.Disks, cbt.DiskConfig{Name: string(i.cfg.Name), Device: i.dev, Identity: i.identity()})
	}
	if p.parts.Tracker != nil {
		p.parts.Tracker(&c)
	}
	return c, nil
}

// openTracker continues the tracker; without one it waits for CreateTracker.
func (p *Plane) openTracker() error {
	c, err := p.trackerConfig()
	if err != nil {
		return err
	}
	g, report, err := cbt.Open(c)
	if errors.Is(err, cbt.ErrNoTracker) {
		return nil
	}
	if errors.Is(err, cbt.ErrCorrupt) {
		// The daemon knows the generation and decides; until then nothing is
		// exported.
		p.log.Error("the tracker cannot be read", "err", err)
		text := err.Error()
		p.lost.Store(&text)
		return nil
	}
	if err != nil {
		return err
	}
	p.group.Store(g)
	p.report.Store(report)
	p.log.Info("tracker opened", "source", report.Source, "reason", report.Reason)
	return nil
}

// unclean: the tracker was not closed in order; requests were under way.
func unclean(r *cbt.OpenReport) bool {
	return r != nil && r.Source != cbt.SourceExact && r.Source != cbt.SourceSealed
}

// createTracker makes a tracker on command only: a lost one must never be
// replaced by an empty one.
func (p *Plane) createTracker(ctx context.Context, r CreateRequest) error {
	p.exportMu.Lock()
	defer p.exportMu.Unlock()
	p.epochMu.Lock()
	defer p.epochMu.Unlock()
	if r.Generation.IsZero() {
		return invalid("create: no generation")
	}
	if (r.Lost != "" || r.Highest != 0) && (!r.DirtyAll || !r.Base.IsZero() || r.Replace) {
		return invalid("create: a lost tracker is replaced by one that knows nothing")
	}
	r.Dirty = p.withTails(r.Dirty)
	if g := p.group.Load(); g != nil {
		if g.Generation() == r.Generation {
			return markAll(g, r.Dirty) // a repeated call: a crash may have come between
		}
		if !r.Replace {
			return &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("a tracker of generation %s exists", delta.Generation(g.Generation()))}
		}
		if err := p.dropTracker(ctx, g); err != nil {
			return err
		}
	}
	c, err := p.trackerConfig()
	if err != nil {
		return err
	}
	start := cbt.Start{Generation: r.Generation, Base: cbtPos(r.Base), Dirty: cbt.DirtyNone, Highest: r.Highest}
	if r.DirtyAll {
		start.Dirty = cbt.DirtyAll
	}
	if len(r.Parents) > 0 {
		start.Parent = cbtPos(r.Parents[0])
	}
	start.Again = p.halfMade == r.Generation // a failed sync may leave what looks whole
	p.halfMade = r.Generation
	g, err := cbt.Create(c, start)
	if err != nil {
		return err
	}
	err = markAll(g, r.Dirty)
	if r.Lost != "" {
		err = errors.Join(err, g.MarkAll(r.Lost))
	}
	if err != nil {
		return errors.Join(err, g.Close(ctx))
	}
	p.halfMade = delta.Generation{}
	p.group.Store(g)
	p.lost.Store(nil)
	p.report.Store(&cbt.OpenReport{})
	p.log.Info("tracker created", "generation", r.Generation, "base", r.Base)
	return p.restoreLocked()
}

// dropTracker ends an earlier generation's tracker. Its exports are closed
// first: nothing may be written untracked in between.
func (p *Plane) dropTracker(ctx context.Context, g *cbt.Group) error {
	if err := p.closeExports(ctx); err != nil {
		return err
	}
	if err := p.dropHeld(); err != nil {
		return err
	}
	p.group.Store(nil)
	return g.Close(ctx)
}

// restoreExports opens what was open before a restart.
func (p *Plane) restoreExports() error {
	p.exportMu.Lock()
	defer p.exportMu.Unlock()
	return p.restoreLocked()
}

func (p *Plane) restoreLocked() error {
	ch := p.choices.get()
	g := p.group.Load()
	if g == nil || ch.Refuse != "" {
		return nil
	}
	for _, i := range p.images {
		if ch.Exported[i.cfg.Name] && !p.exported[i.cfg.Name] {
			if err := p.addExport(g, i); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *Plane) addExport(g *cbt.Group, i *image) error {
	d := g.Disk(string(i.cfg.Name))
	if d == nil {
		return fmt.Errorf("disk %s is not tracked", i.cfg.Name)
	}
	e := nbd.Export{
		Name: string(i.cfg.Name), Device: d, ReadOnly: i.cfg.ReadOnly,
		Description: p.cfg.Name, SingleClient: !i.cfg.ReadOnly,
	}
	if !i.cfg.ReadOnly {
		e.AllowPID = p.admit
	}
	err := p.server.Add(e)
	if err != nil {
		return err
	}
	p.exported[i.cfg.Name] = true
	return nil
}

// export opens or closes exports, durably.
func (p *Plane) export(ctx context.Context, r ExportRequest) error {
	p.exportMu.Lock()
	defer p.exportMu.Unlock()
	names, err := p.names(r.Disk)
	if err != nil {
		return err
	}
	g, err := p.tracker()
	if err != nil {
		return err
	}
	if reason := p.choices.get().Refuse; r.On && reason != "" {
		return &wire.Error{Kind: wire.KindRefused, Text: "the exports of " + p.cfg.Name + " stay closed: " + reason}
	}
	if err := p.choices.change(func(c *choices) {
		for _, n := range names {
			c.Exported[n] = r.On
		}
	}); err != nil {
		return err
	}
	for _, n := range names {
		if r.On == p.exported[n] {
			continue
		}
		if !r.On {
			err = p.removeExport(ctx, n)
		} else if _, img, ierr := p.image(n); ierr == nil {
			err = p.addExport(g, img)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *Plane) names(disk wire.DiskName) ([]wire.DiskName, error) {
	if disk != "" {
		_, _, err := p.image(disk)
		return []wire.DiskName{disk}, err
	}
	var all []wire.DiskName
	for _, i := range p.images {
		all = append(all, i.cfg.Name)
	}
	return all, nil
}

func (p *Plane) removeExport(ctx context.Context, n wire.DiskName) error {
	err := p.server.Remove(ctx, string(n))
	if err != nil && !errors.Is(err, nbd.ErrUnknownExport) {
		return err
	}
	delete(p.exported, n)
	return nil
}

// closeExports closes all of them for now; the durable choice stays.
func (p *Plane) closeExports(ctx context.Context) error {
	for n := range p.exported {
		if err := p.removeExport(ctx, n); err != nil {
			return err
		}
	}
	return nil
}

// refuse closes every export and keeps it closed, durably first.
func (p *Plane) refuse(ctx context.Context, reason string) error {
	p.exportMu.Lock()
	defer p.exportMu.Unlock()
	if err := p.choices.change(func(c *choices) { c.Refuse = reason }); err != nil {
		return err
	}
	if reason == "" {
		return nil
	}
	return p.closeExports(ctx)
}

// seal ends the generation: exports closed, images synced, nothing dirty.
func (p *Plane) seal(ctx context.Context, pos delta.Pos) error {
	g, err := p.tracker()
	if err != nil {
		return err
	}
	p.exportMu.Lock()
	defer p.exportMu.Unlock()
	if err := p.closeExports(ctx); err != nil {
		return err
	}
	if own := deltaPos(g.Status().Acked); own != pos {
		return &wire.Error{Kind: wire.KindPosMismatch, Text: fmt.Sprintf("seal at %v: the last acknowledged position is %v", pos, own), Have: &own}
	}
	return g.Seal(ctx)
}

func (p *Plane) unseal() error {
	g, err := p.tracker()
	if err != nil {
		return err
	}
	return g.Unseal()
}

// lockQEMU takes or gives up QEMU's lock bytes on every image, and remembers it.
func (p *Plane) lockQEMU(disk wire.DiskName, on bool) error {
	p.exportMu.Lock()
	defer p.exportMu.Unlock()
	if !slices.ContainsFunc(p.images, func(i *image) bool { return disk == "" || i.cfg.Name == disk }) {
		return &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("the VM has no disk %q", disk)}
	}
	for _, i := range p.images {
		if disk != "" && i.cfg.Name != disk {
			continue
		}
		var err error
		if on {
			err = i.lock()
		} else {
			err = i.unlock()
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", i.cfg.Name, err)
		}
	}
	return p.choices.change(func(c *choices) {
		for _, i := range p.images {
			if disk == "" || i.cfg.Name == disk {
				c.QemuLock[i.cfg.Name] = on
			}
		}
	})
}

// sync makes every image durable, through the tracker where there is one: it
// has to know of a failure.
func (p *Plane) sync() error {
	g := p.group.Load()
	for _, i := range p.images {
		var err error
		if g != nil {
			err = g.Disk(string(i.cfg.Name)).Sync()
		} else {
			err = i.dev.Sync()
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", i.cfg.Name, err)
		}
	}
	return nil
}

// mark marks ranges, or everything.
func (p *Plane) mark(r MarkRequest) error {
	g, err := p.tracker()
	if err != nil {
		return err
	}
	if r.Disk == "" {
		if !r.Pos.IsZero() {
			return g.Rebase(cbtPos(r.Pos), r.Reason)
		}
		return g.MarkAll(r.Reason)
	}
	return markRanges(g, r.Disk, r.Ranges)
}

func markAll(g *cbt.Group, dirty map[wire.DiskName][]wire.Range) error {
	for disk, ranges := range dirty {
		if err := markRanges(g, disk, ranges); err != nil {
			return err
		}
	}
	return nil
}

func markRanges(g *cbt.Group, disk wire.DiskName, ranges []wire.Range) error {
	d := g.Disk(string(disk))
	if d == nil {
		return &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("no disk %q", disk)}
	}
	for _, r := range ranges {
		if err := d.Mark(r.Off, r.Len); err != nil {
			return fmt.Errorf("mark %s at %d: %w", disk, r.Off, err)
		}
	}
	return nil
}

// clean runs the clean step.
func (p *Plane) clean(ctx context.Context) (CleanReply, error) {
	g, err := p.tracker()
	if err != nil {
		return CleanReply{}, err
	}
	before := marked(g.Status())
	if err := g.CleanStep(ctx, p.parts.now()); err != nil {
		return CleanReply{}, err
	}
	st := g.Status()
	return CleanReply{Base: deltaPos(st.Base), Marked: marked(st), Cleared: before - marked(st)}, nil
}

func marked(s cbt.Status) (n int64) {
	for _, d := range s.Disks {
		n += d.MarkedRegions
	}
	return n
}

func cbtPos(p delta.Pos) cbt.Position {
	return cbt.Position{Generation: p.Generation, Epoch: p.Epoch, Digest: p.Digest}
}

func deltaPos(p cbt.Position) delta.Pos {
	return delta.Pos{Generation: p.Generation, Epoch: p.Epoch, Digest: p.Digest}
}

// Status is everything at once.
func (p *Plane) Status() Status {
	ch := p.choices.get()
	s := Status{VM: p.cfg.VM, PID: os.Getpid(), Started: p.started, Instance: p.instance, Refuse: ch.Refuse, Version: version.String()}
	s.Overlay = p.overlayStatus()
	s.Outdated = p.cfg.outdated(s.PID)
	if pid, err := runningPID(p.cfg.keeperPID()); err == nil && pid != 0 {
		s.KeeperPID, s.KeeperOutdated = pid, p.cfg.outdated(pid)
	}
	for _, i := range p.images {
		d := DiskStatus{Name: i.cfg.Name, Size: p.size(i), QemuLock: i.locked.Load()}
		d.Grown = i.grown(d.Size)
		d.Late = i.upstream != nil && i.upstream.late.handed() != nil
		if st, ok := p.server.Stats(string(i.cfg.Name)); ok {
			d.Exported, d.Clients, d.ClientPID = true, st.Connections, st.ClientPID
			d.Requests, d.Errors, d.ReadBytes, d.WrittenBytes = st.Requests, st.Errors, st.BytesRead, st.BytesWritten
			d.LastActivity = st.LastActivity
		}
		s.Disks = append(s.Disks, d)
	}
	g := p.group.Load()
	if g == nil {
		if why := p.lost.Load(); why != nil {
			s.TrackerLost = *why
		}
		return s
	}
	st := g.Status()
	s.Tracker, s.Sealed = true, st.State == "sealed"
	s.Generation, s.Base, s.Acked, s.Highest = st.Generation, deltaPos(st.Base), deltaPos(st.Acked), st.Highest
	s.Abandoned = int64(st.Abandoned)
	if r := p.report.Load(); r != nil && r.Reason != "" {
		s.Recovered = string(r.Source) + ": " + r.Reason
	}
	if (st.Degraded || st.Held) && len(st.Reasons) > 0 {
		s.TrackingLost = st.Reasons[len(st.Reasons)-1]
	}
	for _, d := range st.Disks {
		if i := slices.IndexFunc(s.Disks, func(x DiskStatus) bool { return string(x.Name) == d.Name }); i >= 0 {
			s.Disks[i].Pending, s.Disks[i].Suspect = d.DirtyBytes, d.SuspectBytes
		}
		s.Pending += d.DirtyBytes
		s.Suspect += d.SuspectBytes
	}
	if f := p.held.Load(); f != nil {
		e := f.snapshot()
		s.Frozen = &e
	}
	return s
}

// counters are for people who debug.
func (p *Plane) counters() Counters {
	c := Counters{}
	g := p.group.Load()
	if g == nil {
		return c
	}
	st := g.Status()
	c["super_syncs"] = int64(st.SuperSyncs)
	c["capture_bytes"] = st.CaptureBytes
	c["capture_limit"] = st.CaptureLimit
	c["spilled_bytes"] = st.SpilledBytes
	c["writes_in_flight"] = st.WritesInFlight
	c["marked_regions"] = marked(st)
	for _, d := range st.Disks {
		c["intent_syncs."+d.Name] = int64(d.IntentSyncs)
		c["marked_regions."+d.Name] = d.MarkedRegions
	}
	for _, i := range p.images {
		if st, ok := p.server.Stats(string(i.cfg.Name)); ok {
			c["parked."+st.Name] = int64(st.Parked)
			c["in_flight."+st.Name] = int64(st.InFlight)
		}
	}
	return c
}
