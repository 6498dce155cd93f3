package vm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// Reverse replicates a promoted VM back to the old primary, which gives up
// what it wrote by itself. It must be called on the new primary. A failover that
// is on trial is committed first, as o says.
func (v *VM) Reverse(ctx context.Context, o CommitOptions, event func(failover.Event)) error {
	unlock, err := v.lockAsked(ctx, "reverse")
	if err != nil {
		return err
	}
	defer unlock()
	r := v.record()
	if st := r.Lineage.State; st != lineage.Promoted && st != lineage.Primary {
		return &wire.Error{Kind: wire.KindRefused, Text: "this host is not the primary of the VM", Hint: "run the command on the host whose data is to be kept"}
	}
	if r.Overlay != nil && !r.Overlay.Committed && r.Lineage.Diverged == nil {
		if err := v.commitLocked(ctx, o, event); err != nil {
			return err
		}
	}
	return v.execute(ctx, failover.Reverse, o.Request, &commitVars{KeepPoints: v.keepsPoints(o.KeepPoints)}, event)
}

func (v *VM) reverseSteps(r *failover.Runner, p *commitVars) []failover.Step {
	return []failover.Step{
		{Name: "keep", Title: "Decide for this host's data", Do: func(context.Context) (string, error) {
			// What an earlier return marked counts no more.
			if err := v.update(func(r *Record) error { r.UnionMarked = false; return nil }); err != nil {
				return "", err
			}
			if v.record().Lineage.Diverged == nil {
				return "", nil
			}
			return "the divergence is settled", v.move(lineage.Change{Event: lineage.Keep}, nil)
		}},
		{Name: "final", Title: "Make the failover final", Do: func(ctx context.Context) (string, error) {
			if o := v.record().Overlay; o == nil {
				return "", nil
			}
			return "", v.finish(ctx, p, r.Journal().Request) // it was diverged until now, or it is so already
		}, Undo: func(ctx context.Context) error {
			if !p.KeepPoints {
				return nil
			}
			return v.dropTrialHistory(ctx, r.Journal().Request)
		}},
		{Name: "release", Title: "Turn the old primary into a replica", Commit: true, Do: func(ctx context.Context) (string, error) {
			return v.askRelease(ctx, r.Journal().Request)
		}},
		{Name: "ship", Title: "Replicate back", Do: func(ctx context.Context) (string, error) {
			// A handshake of the old primary, before it gave up, may have found once
			// more what was just settled.
			if v.record().Lineage.Diverged != nil {
				if err := v.move(lineage.Change{Event: lineage.Keep}, nil); err != nil {
					return "", err
				}
			}
			if err := v.update(func(r *Record) error { r.NoReverse, r.Verified = false, false; return nil }); err != nil {
				return "", err
			}
			if err := v.up(ctx); err != nil {
				return "", err
			}
			if s := v.session(); s != nil {
				s.Retry()
			}
			return "", nil
		}},
	}
}

// askRelease makes the old primary a replica and marks here what it had
// changed by itself, so that the next epochs bring it to this host's content.
func (v *VM) askRelease(ctx context.Context, request string) (string, error) {
	if err := v.startPlane(ctx); err != nil { // a plan is continued before the role is up
		return "", err
	}
	peer, err := v.peer()
	if err != nil {
		return "", err
	}
	reply, err := peer.Failover(ctx, wire.FailoverRequest{VM: v.id, Step: stepRelease, Request: request, At: v.record().Lineage.Parent(), Also: v.replacing(ctx), Sizes: v.sizes()})
	if refusal(err) && !conflict(err) {
		return "", fmt.Errorf("ask the old primary: %w: %w", err, failover.ErrNotTaken)
	}
	if err != nil {
		return "", fmt.Errorf("ask the old primary: %w", err)
	}
	if reply.State != stateAccepted {
		err := &wire.Error{Kind: wire.KindRefused, Text: "the old primary refuses: " + reply.Detail, Hint: "stop the VM there first"}
		return "", fmt.Errorf("%w: %w", err, failover.ErrNotTaken)
	}
	c, err := v.plane()
	if err != nil {
		return "", err
	}
	between, known, why := v.middle()
	switch {
	case reply.All:
		return "everything will be compared: " + reply.Detail, c.Mark(ctx, dataplane.MarkRequest{Reason: "the old primary's changes are not known"})
	case !known:
		return "everything will be compared: " + why, c.Mark(ctx, dataplane.MarkRequest{Reason: "what the failover to an older point took back is not known"})
	}
	for disk, rs := range v.sizesDiffer(reply.Sizes) {
		if err := markAll(ctx, c, disk, rs, "behind the end of the old primary's disk"); err != nil {
			return "", err
		}
	}
	mine := v.sizes() // either host may have had other disks
	for disk, rs := range between {
		if mine[disk] == 0 {
			continue
		}
		if err := markAll(ctx, c, disk, rs, "taken back by the failover to an older point"); err != nil {
			return "", err
		}
	}
	var bytes int64
	for disk, rs := range reply.Dirty {
		for _, r := range rs {
			bytes += r.Len
		}
		if mine[disk] == 0 {
			continue
		}
		if err := markAll(ctx, c, disk, within(rs, mine[disk]), "changed on the old primary"); err != nil {
			return "", err
		}
	}
	kept := ""
	if reply.Patch != "" {
		kept = fmt.Sprintf("; %d bytes are kept there as patch %s", reply.Bytes, reply.Patch)
	}
	return fmt.Sprintf("%d bytes changed there are discarded%s", bytes, kept), v.update(func(r *Record) error { r.UnionMarked = true; return nil })
}

// replacing lists what this host has that the old primary may have otherwise:
// what it wrote itself and what an older point took back. It is for the patch
// alone, so that what is not known is left out.
func (v *VM) replacing(ctx context.Context) map[wire.DiskName][]wire.Range {
	c, err := v.plane()
	if err != nil {
		return nil
	}
	out, _, _ := v.middle()
	if out == nil {
		out = map[wire.DiskName][]wire.Range{}
	}
	disks := v.serving()
	for _, d := range disks {
		rs, err := allRanges(ctx, c, d.Name)
		if err != nil {
			v.log.Warn("list this host's changes for the patch", "disk", string(d.Name), "err", err)
		}
		out[d.Name] = fewer(append(rs, out[d.Name]...), maxAlso/len(disks))
	}
	return out
}

// release gives up this host's own writes: the peer was promoted and a person
// decided for its data.
func (v *VM) release(ctx context.Context, q wire.FailoverRequest) (wire.FailoverReply, error) {
	unlock, err := v.lockAsked(ctx, "release")
	if err != nil {
		return wire.FailoverReply{}, err
	}
	defer unlock()
	switch isOff, err := v.guestIsOff(ctx); {
	case err != nil:
		return wire.FailoverReply{}, err
	case !isOff:
		return wire.FailoverReply{State: stateRefused, Detail: "the VM runs on this host"}, nil
	case v.marked():
		return wire.FailoverReply{}, &wire.Error{Kind: wire.KindUnavailable, Text: "the VM was released there by replicafsck and is not taken back yet", Hint: "there: replicactl vm status " + v.record().Name}
	}
	j, err := failover.Load(v.fsys, planFile)
	if err != nil {
		return wire.FailoverReply{}, err
	}
	if j != nil && !handingOver(j) {
		return wire.FailoverReply{}, &wire.Error{Kind: wire.KindUnavailable, Text: "a plan of that host has not ended: " + string(j.Kind), Hint: "there: replicactl failover resume " + v.record().Name}
	}
	if v.record().Lineage.State == lineage.Replica {
		v.openIntake() // a promotion of an earlier time had closed it
	}
	if err := v.yield(); err != nil {
		return wire.FailoverReply{}, err
	}
	if l := v.record().Lineage; l.State == lineage.Replica && l.Discard.IsZero() {
		// It follows already, cleanly: the handshake knows where it stands.
		return wire.FailoverReply{State: stateAccepted, Detail: "nothing was changed there"}, v.up(ctx)
	}
	if v.record().Lineage.State == lineage.Replica {
		// A repeated request: what was changed is not known any more.
		return wire.FailoverReply{State: stateAccepted, All: true, Detail: "released before"}, v.up(ctx)
	}
	if err := v.overtaken(ctx); err != nil {
		return wire.FailoverReply{}, err
	}
	reply, err := v.giveUp(ctx, q)
	v.audit(q.Request, "host "+v.mgr.peerName(v.record().Peer), "release asked for", released(reply, err))
	if err != nil {
		return wire.FailoverReply{}, errors.Join(err, v.up(ctx))
	}
	if j != nil { // a hand-over that the peer's promotion has overtaken
		if err := v.fsys.Remove(planFile); err != nil && !absent(err) {
			return wire.FailoverReply{}, err
		}
		if err := v.noteStuck(nil); err != nil {
			return wire.FailoverReply{}, err
		}
	}
	v.openIntake()
	v.hold("")
	return reply, v.up(ctx)
}

// yield ends a divergence that a replica is marked with: a person decided for
// the other host. What this one holds is given up when it lies on another
// branch, and is judged by the next handshake when it is only older.
func (v *VM) yield() error {
	l := v.record().Lineage
	if l.State != lineage.Replica || l.Diverged == nil {
		return nil
	}
	v.mu.Lock()
	peer, ancestors := v.facts.peerGeneration, v.facts.peerAncestors
	v.mu.Unlock()
	behind := slices.ContainsFunc(ancestors, func(p delta.Pos) bool { return p.Generation == l.Generation })
	c := lineage.Change{Event: lineage.Discard}
	if l.Generation.IsZero() || peer.IsZero() || l.Generation == peer || behind {
		c.Event = lineage.Keep
	}
	return v.move(c, nil)
}

// overtaken refuses a release to a host that never took over: a primary does not
// give its data up because its replica asks for it.
func (v *VM) overtaken(ctx context.Context) error {
	r := v.record()
	switch l := r.Lineage; {
	case l.State == lineage.Demoting, l.State == lineage.Demoted, l.Diverged != nil, r.Superseded != "":
		return nil
	}
	why, answered := v.askPeer(ctx)
	switch {
	case !answered:
		return &wire.Error{Kind: wire.KindUnavailable, Text: "the old primary cannot ask this host whether it was promoted", Hint: "there: replicactl peer test " + v.mgr.peerName(r.Peer)}
	case why == "":
		return &wire.Error{Kind: wire.KindRefused, Text: "that host is the VM's primary and knows of no failover", Hint: "there: replicactl failover planned " + r.Name}
	}
	return nil
}

// released is the answer to a release in words.
func released(reply wire.FailoverReply, err error) string {
	switch {
	case err != nil:
		return "failed: " + err.Error()
	case reply.Patch != "":
		return fmt.Sprintf("given up; %d bytes kept as patch %s", reply.Bytes, reply.Patch)
	}
	return "given up; nothing kept: " + reply.Detail
}

// giveUp ends the role and makes it durable that what this host wrote is void.
func (v *VM) giveUp(ctx context.Context, q wire.FailoverRequest) (wire.FailoverReply, error) {
	reply := wire.FailoverReply{State: stateAccepted, Sizes: v.sizes()}
	v.hold("its writes are being given up")
	// Somebody may have started it before the gate was shut.
	if isOff, err := v.guestIsOff(ctx); err != nil || !isOff {
		v.hold("")
		return reply, errors.Join(err, &wire.Error{Kind: wire.KindUnavailable, Text: "the guest was started meanwhile"})
	}
	trial := v.record().Overlay != nil
	base, tracked, why := v.ownChanges(ctx, &reply)
	if trial { // its images are not what its guest saw
		tracked, why = false, "a failover there was not final yet"
	}
	if why != "" {
		reply.All, reply.Dirty, reply.Detail = true, nil, why
	}
	err := v.stopPlane(ctx)
	if err == nil && why == "" {
		err = v.keepLosing(ctx, q, base, &reply)
	}
	if err == nil {
		err = v.move(lineage.Change{Event: lineage.Discard}, func(r *Record) {
			r.Incomplete, r.NoReverse, r.WantRunning = true, false, false
			if q.Sizes != nil { // the survivor may run from a state that had other disks
				r.standOn(slices.Collect(maps.Keys(q.Sizes)))
			}
			r.ReleasedBase, r.ReleasedTracked, r.Overlay, r.Given = base, tracked, nil, reply.Patch
			r.Paused, r.Superseded, r.Next = false, "", nil
			r.Bypass, r.Snapshots = "", nil
		})
	}
	if err != nil {
		v.hold("")
		return reply, err
	}
	v.forgetPath()
	if trial {
		if err := v.dropOverlay(); err != nil {
			v.log.Warn("drop the overlay of the failover that was given up", "err", err)
		}
	}
	return reply, v.adoptBase(delta.Pos{}, true)
}

// keepLosing keeps what the images hold in every block that the survivor may
// replace, before the first is overwritten.
func (v *VM) keepLosing(ctx context.Context, q wire.FailoverRequest, base delta.Pos, reply *wire.FailoverReply) error {
	all := map[wire.DiskName][]wire.Range{}
	for _, d := range v.serving() {
		rs := slices.Concat(reply.Dirty[d.Name], within(q.Also[d.Name], d.Size))
		if n, ok := q.Sizes[d.Name]; ok && n < d.Size {
			rs = append(rs, behind(n, d.Size))
		}
		all[d.Name] = joined(rs)
	}
	bytes, err := v.savePatch(ctx, q.Request, base, all)
	if errors.Is(err, unix.ENOSPC) {
		err = &wire.Error{Kind: wire.KindNoSpace, Text: err.Error(), Hint: "there: free space below the state directory, or delete old patches: replicactl failover patch list " + v.record().Name}
	}
	if err != nil {
		return err
	}
	reply.Bytes, reply.Patch = bytes, strings.TrimSuffix(patchName(v.record().Lineage.Generation, q.Request), patchSuffix)
	return nil
}

// planRelease says what a release would give up, and changes nothing.
func (v *VM) planRelease(ctx context.Context) (wire.FailoverReply, error) {
	unlock, err := v.lockAsked(ctx, "look at what a release gives up")
	if err != nil {
		return wire.FailoverReply{}, err
	}
	defer unlock()
	reply := wire.FailoverReply{State: stateAccepted}
	switch st := v.record().Lineage.State; st {
	case lineage.Primary, lineage.Promoted, lineage.Demoting, lineage.Demoted:
	default:
		reply.Detail = "it follows already"
		return reply, nil
	}
	var why string
	if v.record().Overlay != nil {
		why = "a failover there was not final yet"
	} else {
		_, _, why = v.ownChanges(ctx, &reply)
	}
	for _, rs := range reply.Dirty {
		for _, r := range rs {
			reply.Bytes += r.Len
		}
	}
	if why != "" {
		reply.All, reply.Bytes, reply.Detail = true, 0, why
	}
	reply.Dirty = nil
	return reply, nil
}

// ReversePlan is what a return would send and discard, as far as it is known.
type ReversePlan struct {
	// Own was changed here, Theirs by the old primary, Between was taken back by
	// the failover to an older point; in bytes, they may overlap. Between is
	// negative before the commit: not known yet.
	Own, Theirs, Between int64
	// Compare: everything is compared by digest instead, Size bytes, because Why.
	Compare bool
	Size    int64
	Why     string
}

// PlanReverse asks the old primary what the return would give up.
func (v *VM) PlanReverse(ctx context.Context) (ReversePlan, error) {
	var p ReversePlan
	r := v.record()
	p.Size = r.bytes()
	if c, err := v.plane(); err == nil {
		if st, err := c.Status(ctx); err == nil {
			if p.Own = st.Pending; st.TrackingLost != "" || st.Suspect > 0 {
				p.Compare, p.Why = st.TrackingLost != "", st.TrackingLost
			}
		}
	}
	between, known, why := v.middle()
	switch {
	case r.Overlay != nil && !r.Overlay.Committed && r.Overlay.At != r.Overlay.Newest:
		p.Between = -1 // the commit lists it
	case !known:
		p.Compare, p.Why = true, why
	}
	for _, rs := range between {
		for _, x := range rs {
			p.Between += x.Len
		}
	}
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	peer, err := v.peer()
	if err != nil {
		return p, err
	}
	reply, err := peer.Failover(ctx, wire.FailoverRequest{VM: v.id, Step: stepReleasePlan, Request: "plan"})
	if err != nil {
		return p, fmt.Errorf("ask the old primary: %w", err)
	}
	if p.Theirs = reply.Bytes; reply.All {
		p.Compare, p.Why = true, reply.Detail
	}
	return p, nil
}

// ownChanges lists what this host changed since its base.
func (v *VM) ownChanges(ctx context.Context, reply *wire.FailoverReply) (base delta.Pos, tracked bool, why string) {
	if err := v.startPlane(ctx); err != nil {
		return base, false, "the data plane does not start: " + err.Error()
	}
	c, err := v.plane()
	if err != nil {
		return base, false, err.Error()
	}
	// An epoch that is frozen and not acknowledged holds changes that are not in
	// the ranges: they return when it is given back.
	v.stopShipping()
	s, err := c.Status(ctx)
	if err == nil && s.Frozen != nil {
		if err = c.Abandon(ctx, s.Frozen.Epoch); err == nil {
			s, err = c.Status(ctx)
		}
	}
	if err != nil {
		return base, false, err.Error()
	}
	if s.TrackingLost != "" {
		return s.Base, false, "tracking was lost: " + s.TrackingLost
	}
	if disks := v.record().Bypass; disks != "" {
		return s.Base, false, "the guest wrote past the tracker: " + disks
	}
	reply.Dirty = map[wire.DiskName][]wire.Range{}
	for _, d := range v.serving() {
		rs, err := allRanges(ctx, c, d.Name)
		if err != nil {
			return s.Base, false, err.Error()
		}
		reply.Dirty[d.Name] = rs
	}
	return s.Base, true, ""
}
