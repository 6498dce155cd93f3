package vm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// keepAll is what becomes of the points of an orphan: none is thinned.
func keepAll() points.Policy {
	const ever = 100 * 365 * 24 * time.Hour
	return points.Policy{Max: 1 << 30, Grid: []points.Row{{For: ever}}}
}

// retention is the policy in force while this host is the replica.
func (v *VM) retention() points.Policy {
	r := v.record()
	if r.Orphan != nil {
		return keepAll()
	}
	p, err := points.ParsePolicy(r.Retention)
	if err != nil { // checked before it was written
		v.log.Error("the retention in the record; the default counts", "err", err)
		p, _ = points.ParsePolicy("")
	}
	if n := v.deps.MaxPoints; n > 0 {
		p.Max = min(p.Max, n)
	}
	return p
}

// limits are the host's, with this VM's own quota.
func (v *VM) limits() points.Limits {
	l := v.deps.Store
	if q := v.record().PointsQuota; q > 0 {
		l.UndoBytes = q
	}
	if v.record().Orphan != nil {
		l.UndoBytes, l.Reserve = 0, 0
	}
	return l
}

// replicaOnly refuses what only the replica's host decides.
func (v *VM) replicaOnly(command string) error {
	r := v.record()
	switch r.Lineage.State {
	case lineage.Replica:
		return nil
	case lineage.Demoted:
		return &wire.Error{Kind: wire.KindRefused, Text: "a role change of " + r.Name + " is under way", Hint: "replicactl vm status " + r.Name}
	}
	return &wire.Error{
		Kind: wire.KindRefused, Text: fmt.Sprintf("the recovery points of %s are kept, and looked after, on %s", r.Name, v.mgr.peerName(r.Peer)),
		Hint: "there: replicactl " + command + " " + r.Name,
	}
}

// RetentionOptions are a person's choices; nil leaves as it is.
type RetentionOptions struct {
	Retention *string // as points.ParsePolicy reads it
	Quota     *int64  // bytes, 0 = no limit but space
}

// SetRetention changes which recovery points this host keeps, at once.
func (v *VM) SetRetention(o RetentionOptions) (wire.PointsReply, error) {
	if err := v.replicaOnly("point keep"); err != nil {
		return wire.PointsReply{}, err
	}
	if v.record().Orphan != nil && o.Retention != nil {
		return wire.PointsReply{}, v.orphaned("nothing of an orphan is thinned")
	}
	if o.Retention != nil {
		p, err := points.ParsePolicy(*o.Retention)
		if err != nil {
			return wire.PointsReply{}, pointError(err, "")
		}
		text := p.String()
		o.Retention = &text
	}
	if o.Quota != nil && *o.Quota < 0 {
		return wire.PointsReply{}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("a quota of %d bytes", *o.Quota)}
	}
	err := v.update(func(r *Record) error {
		if o.Retention != nil {
			r.Retention = *o.Retention
		}
		if o.Quota != nil {
			r.PointsQuota = *o.Quota
		}
		return nil
	})
	if err != nil {
		return wire.PointsReply{}, err
	}
	if s, err := v.store(); err == nil {
		s.SetPolicy(v.retention(), v.limits().UndoBytes)
	}
	v.log.Info("retention changed", "retention", v.record().Retention, "quota", v.record().PointsQuota)
	return v.points()
}

// Points lists the recovery points of a VM for the peer.
func (m *Manager) Points(ctx context.Context, id wire.VMID) (wire.PointsReply, error) {
	v, err := m.ofPeer(ctx, id)
	if err != nil {
		return wire.PointsReply{}, err
	}
	return v.points()
}

// ListPoints lists the recovery points, wherever they are kept.
func (v *VM) ListPoints(ctx context.Context) (wire.PointsReply, error) {
	r := v.record()
	if r.Lineage.State == lineage.Replica {
		return v.points()
	}
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	p, err := v.peer()
	if err == nil {
		var out wire.PointsReply
		if out, err = p.Points(ctx, v.id); err == nil {
			return out, nil
		}
	}
	var w *wire.Error
	if errors.As(err, &w) && w.Kind != wire.KindUnavailable {
		return wire.PointsReply{}, fmt.Errorf("ask %s for the recovery points: %w", v.mgr.peerName(r.Peer), err)
	}
	return wire.PointsReply{}, &wire.Error{
		Kind: wire.KindUnavailable, Text: fmt.Sprintf("the recovery points are kept on %s, which cannot be asked: %v", v.mgr.peerName(r.Peer), err),
		Hint: "there: replicactl point list " + r.Name,
	}
}

// points is the list of this host.
func (v *VM) points() (wire.PointsReply, error) {
	s, err := v.store()
	if err != nil {
		return wire.PointsReply{}, err
	}
	r := v.record()
	st := s.Status()
	out := wire.PointsReply{
		Host: v.deps.HostName, Points: []wire.Point{}, Retention: s.Policy().String(), Quota: st.Quota, Used: st.Undo, Free: st.Free, Reserve: st.Reserve,
		PerDay: st.Forecast.Rate, Full: st.Forecast.Full, GivenUp: st.Sacrificed,
	}
	if r.Orphan != nil {
		out.Retention, out.Orphan = "", v.orphanText()
	}
	list, mounts := s.States(), v.mountedAt()
	if n := len(list); n > wire.MaxPointsListed {
		list = list[n-wire.MaxPointsListed:]
	}
	for _, p := range list {
		w := wire.Point{Ordinal: p.Ordinal, Cut: p.Cut, At: p.At, Pos: p.Pos, App: p.App, Latest: p.Latest, Pinned: p.Pinned, Bytes: p.Bytes, Mounted: mounts[p.Pos]}
		if p.Damage != nil {
			w.Damage = wire.CleanText(p.Damage.Error(), wire.MaxText)
		}
		out.Points = append(out.Points, w)
	}
	return out, nil
}

// ChoosePoint finds the state a person means in this host's store: see
// points.Choose. Errors are *wire.Error with the next command.
func (v *VM) ChoosePoint(text string) (points.Point, error) {
	if err := v.replicaOnly("point list"); err != nil {
		return points.Point{}, err
	}
	s, err := v.store()
	if err != nil {
		return points.Point{}, err
	}
	p, err := s.Choose(text)
	return p, pointError(err, v.record().Name)
}

// TakePoint chooses as ChoosePoint does and opens the state, so that it cannot
// pass on before it is kept. The caller closes the view.
func (v *VM) TakePoint(text string) (points.Point, *points.View, error) {
	if err := v.replicaOnly("point list"); err != nil {
		return points.Point{}, nil, err
	}
	s, err := v.store()
	if err != nil {
		return points.Point{}, nil, err
	}
	p, view, err := s.Take(text)
	return p, view, pointError(err, v.record().Name)
}

// pointError gives errors of choosing and keeping points their kinds.
func pointError(err error, name string) error {
	var ambiguous *points.AmbiguousError
	list := "replicactl point list " + name
	switch {
	case err == nil:
		return nil
	case errors.As(err, &ambiguous):
		return &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: "say more, or the number: " + list}
	case errors.Is(err, points.ErrNoPoint):
		return &wire.Error{Kind: wire.KindNotFound, Text: err.Error(), Hint: list}
	case errors.Is(err, points.ErrChoice):
		return &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: list}
	case errors.Is(err, points.ErrDamaged):
		return &wire.Error{Kind: wire.KindCorrupt, Text: err.Error(), Hint: "choose another: " + list}
	case errors.Is(err, points.ErrPolicy):
		return &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: "replicactl point keep --help"}
	}
	return storeError(err)
}

// becomePoint waits until a committed state has become a recovery point: a view
// of it makes the store do so as soon as it is applied.
func (v *VM) becomePoint(ctx context.Context, s *points.Store, p points.Point) error {
	view, err := s.View(p.Pos)
	if err != nil {
		return err
	}
	defer func() { _ = view.Close() }() // closing a view cannot fail
	ctx, cancel := context.WithTimeout(ctx, pointTimeout)
	defer cancel()
	tick := time.NewTicker(pointPoll)
	defer tick.Stop()
	for {
		for _, q := range s.Points() {
			if q.Pos == p.Pos {
				return s.Pin(p.Pos) // before the view lets go
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return &wire.Error{
				Kind: wire.KindUnavailable, Text: "the newest state is not applied yet, so that it is no recovery point",
				Hint: "replicactl vm status " + v.record().Name + ", and repeat",
			}
		}
	}
}

const (
	pointTimeout = time.Minute
	pointPoll    = 20 * time.Millisecond
)

// PinPoint keeps a point from being thinned or given up, or lets go of it; what
// a test copy pinned it keeps until it ends.
func (v *VM) PinPoint(ctx context.Context, text string, on bool) (points.Point, error) {
	p, view, err := v.TakePoint(text)
	if err != nil {
		return p, err
	}
	defer func() { _ = view.Close() }() // closing a view cannot fail
	s, err := v.store()
	if err != nil {
		return p, err
	}
	if !on {
		err = s.Unpin(p.Pos)
	} else if err = s.Pin(p.Pos); errors.Is(err, points.ErrNoPoint) {
		err = v.becomePoint(ctx, s, p)
	}
	if err == nil {
		p.Pinned, p.Owners = on, nil
		for _, q := range s.Points() {
			if q.Pos == p.Pos {
				p.Pinned, p.Owners = q.Pinned, q.Owners
			}
		}
		v.log.Info("recovery point pinned", "pos", p.Pos, "on", on)
	}
	return p, pointError(err, v.record().Name)
}

func (v *VM) orphanText() string {
	r := v.record()
	if r.Orphan == nil {
		return ""
	}
	return fmt.Sprintf("%s ended the relationship on %s; the copy and its recovery points are kept", v.mgr.peerName(r.Peer), r.Orphan.Since.UTC().Format("2006-01-02T15:04:05Z"))
}

// Orphaned reports that the primary ended the relationship and the copy is kept.
func (v *VM) Orphaned() bool { return v.record().Orphan != nil }

// orphaned refuses what an orphan cannot do.
func (v *VM) orphaned(what string) error {
	name := v.record().Name
	return &wire.Error{
		Kind: wire.KindConflict, Text: what + ": " + v.orphanText(),
		Hint: "on this host: replicactl point list " + name + "; to delete the copy: replicactl vm disable " + name + " --delete-replica",
	}
}

// Bounds of the interval of application-consistent points.
const (
	minAppEvery = time.Minute
	maxAppEvery = 7 * 24 * time.Hour
)

// check refuses choices that cannot be, and spells the retention out.
func (o *EnableOptions) check() error {
	p, err := points.ParsePolicy(o.Retention)
	if err != nil {
		return &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: "replicactl vm enable --help"}
	}
	if o.Retention != "" {
		o.Retention = p.String()
	}
	if o.AppEvery != 0 && (o.AppEvery < minAppEvery || o.AppEvery > maxAppEvery || o.AppEvery%time.Second != 0) {
		return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("application-consistent points every %s", o.AppEvery), Hint: "from 1m to 168h, or 0 for none"}
	}
	return nil
}

// pointsStep says which points the replica is asked for.
func pointsStep(o EnableOptions) string {
	p, _ := points.ParsePolicy(o.Retention) // checked before
	s := fmt.Sprintf("ask for recovery points: %s (about %d)", p, p.Count())
	if o.AppEvery > 0 {
		s += fmt.Sprintf(", application-consistent ones every %s through the guest agent", o.AppEvery)
	}
	return s
}
