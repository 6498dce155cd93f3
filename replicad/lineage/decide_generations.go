package lineage

import "kvmreplica/replicad/delta"

// rowsNewGeneration: R's content belongs to another generation than P's.
func rowsNewGeneration() []row {
	return []row{
		{"replica-of-newer-generation", func(f facts) bool {
			return f.follows() && f.kin == kinRNewer
		}, wentBack("the replica follows a newer generation than this host knows")},
		{"unrelated", func(f facts) bool {
			return f.kin == kinNone || f.kin == kinUnstated
		}, says(Decision{Outcome: Unrelated, Alarm: true, Reason: "the two copies have no common history"})},
		{"old-primary", func(f facts) bool {
			return f.r.Role == RolePrimary && f.kin == kinPNewer && !f.consent()
		}, operatorDecides("the old primary wrote after the replica was promoted")},
		{"old-primary-discards", func(f facts) bool {
			return f.kin == kinPNewer && f.consent()
		}, discard},
		{"sealed-at-parent", func(f facts) bool {
			return f.atParent() && f.r.Sealed
		}, func(f facts) Decision {
			return f.relativeToParent(Decision{
				Outcome: ReverseIncremental, Parent: f.parent,
				Reason: "the old primary was sealed exactly where this generation begins",
			})
		}},
		{"replica-at-parent", func(f facts) bool { return f.atParent() }, func(f facts) Decision {
			return f.relativeToParent(Decision{
				Outcome: Incremental, Parent: f.parent,
				Reason: "the replica stands exactly where this generation begins",
			})
		}},
		{"beyond-the-fork", func(f facts) bool {
			return f.follows() && f.kin == kinPNewer && f.r.Committed.Epoch > f.forkEpoch()
		}, operatorDecides("the other host holds epochs of the old generation from after the fork")},
		{"behind-the-fork", func(f facts) bool {
			return f.follows() && f.kin == kinPNewer
		}, verify("the replica stands in an earlier generation than the tracker is relative to", true)},
	}
}

// rowsSameGeneration: the ordinary case. R follows and stands in P's own
// generation.
func rowsSameGeneration() []row {
	same := func(f facts) bool { return f.follows() && f.kin == kinSame }
	return []row{
		{"sealed-in-our-generation", func(f facts) bool {
			return same(f) && f.r.Sealed
		}, says(Decision{
			Outcome: Refused, Alarm: true, Diverged: true,
			Reason: "the other host sealed this generation itself: two hosts have owned it",
		})},
		{"newer-than-ever-frozen", func(f facts) bool {
			return same(f) && f.r.Committed.Epoch > f.p.Highest
		}, wentBack("the replica holds an epoch this host never froze")},
		{"before-base", func(f facts) bool {
			return same(f) && before(f.r.Committed, f.p.Base)
		}, verify("the replica went back behind what the tracker is relative to", true)},
		// The exact bits of an acknowledged epoch are dropped at once, long
		// before base moves; a replica that lost such an epoch needs them.
		{"before-acked", func(f facts) bool {
			return same(f) && before(f.r.Committed, f.p.Acked)
		}, verify("the replica lost an epoch it had acknowledged", true)},
		{"foreign-base", func(f facts) bool {
			return same(f) && !f.p.Base.IsZero() && f.p.Base.Generation != f.p.Generation && f.p.Base != f.parent
		}, verify("the tracker is relative to a position that is not on this chain", true)},
		{"equal-position", func(f facts) bool {
			return same(f) && f.r.Committed == f.p.Acked
		}, func(f facts) Decision {
			return Decision{
				Outcome: Incremental, Parent: f.r.Committed,
				Reason: "the replica stands at the last acknowledged epoch",
			}
		}},
		{"lost-ack", same, func(f facts) Decision {
			return Decision{
				Outcome: Incremental, Parent: f.r.Committed, LostAck: true,
				Reason: "the replica committed an epoch whose answer was lost",
			}
		}},
	}
}

// before reports a < b within one generation; positions of other generations
// are not ordered by it.
func before(a, b delta.Pos) bool {
	return a.Generation == b.Generation && a.Epoch < b.Epoch
}

// atParent: a following R stands exactly where P's generation began.
func (f facts) atParent() bool {
	return f.follows() && f.kin == kinPNewer && !f.parent.IsZero() && f.r.Committed == f.parent
}

// forkEpoch is the epoch at which P's history left R's generation.
func (f facts) forkEpoch() uint64 {
	for _, a := range f.p.Ancestors {
		if a.Generation == f.r.Generation {
			return a.Epoch
		}
	}
	return 0
}

// relativeToParent keeps d only if P's tracker is relative to its parent
// position and nothing of this generation was acknowledged before.
func (f facts) relativeToParent(d Decision) Decision {
	switch {
	case f.p.Base != f.parent:
		return verify("the tracker is not relative to the point where this generation begins", true)(f)
	case f.p.Acked.Generation == f.p.Generation:
		return verify("the replica lost epochs of this generation it had acknowledged", true)(f)
	}
	return d
}

func verify(reason string, alarm bool) func(facts) Decision {
	return func(f facts) Decision {
		return Decision{Outcome: VerifyAll, Parent: f.r.Committed, Alarm: alarm, Reason: reason + "; everything is compared"}
	}
}

func operatorDecides(reason string) func(facts) Decision {
	return says(Decision{
		Outcome: OperatorDecides, Alarm: true, Reason: reason + "; its writes would be lost",
		Hint: "replicactl failover reverse NAME (shows what would be lost, saves it, then compares)",
	})
}

// discard: an operator gave up R's writes after the fork. The three sets of
// Union cover every difference only when each is proven; else everything is
// compared.
func discard(f facts) Decision {
	reached := f.p.Before
	if reached.IsZero() {
		reached = f.parent
	}
	d := Decision{Outcome: VerifyAll, Parent: f.r.Committed, SaveLosing: true}
	why := ""
	switch {
	case f.parent.Generation != f.r.Generation:
		why = "more than one role change lies between the two copies"
	case !f.r.Tracked:
		why = "the old primary's set of changes is not proven"
	case f.r.Base.Generation != f.r.Generation || f.r.Base.Epoch > reached.Epoch:
		why = "the old primary's set of changes is relative to a position this host never held"
	case f.p.Base != f.parent || f.p.Acked.Generation == f.p.Generation:
		why = "this host's set of changes is not relative to the promoted position"
	case reached.Generation != f.parent.Generation || reached.Epoch < f.parent.Epoch:
		why = "this host's record of the promotion contradicts itself"
	case reached != f.parent && !f.p.Between:
		why = "undo segments between the promoted and the newest position are missing"
	}
	if why != "" {
		d.Reason = "an operator gave up the old primary's writes; everything is compared because " + why
		return d
	}
	d.Outcome = VerifyUnion
	d.Union = &Union{RBase: f.r.Base, Promoted: f.parent, Before: reached}
	d.Reason = "an operator gave up the old primary's writes; only blocks changed on either side since are compared"
	return d
}
