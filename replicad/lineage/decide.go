package lineage

import (
	"fmt"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Values of wire.HandshakeReply.Role.
const (
	RoleReplica = "replica"
	RolePrimary = "primary"
	RoleNone    = "none"
)

// Decide compares the primary's half p with the other host's half r. It is
// pure and total: the same halves give the same answer on both hosts, and a
// case no row names is Refused.
func Decide(p wire.HandshakeRequest, r wire.HandshakeReply) Decision {
	f := gather(p, r)
	for _, row := range rows() {
		if !row.when(f) {
			continue
		}
		d := row.then(f)
		d.Row = row.name
		return distrust(f, d)
	}
	return Decision{
		Outcome: Refused, Row: "not-listed", Alarm: true, Diverged: true,
		Reason: "these two histories fit no known case",
	}
}

// distrust turns every outcome that trusts a set of changes into a full
// comparison when the replica says that its own content is not proven.
func distrust(f facts, d Decision) Decision {
	switch d.Outcome {
	case Incremental, ReverseIncremental, VerifyUnion:
		if f.r.VerifyAll != "" {
			d.Outcome, d.Union, d.LostAck = VerifyAll, nil, false
			d.Reason = "the replica asks for a full comparison: " + f.r.VerifyAll
		}
	}
	return d
}

// row is one line of the table. The first row whose when holds decides.
type row struct {
	name string
	when func(facts) bool
	then func(facts) Decision
}

// rows is the handshake table in the order in which it is read: first what
// makes the halves unusable, then what both sides must stop for, then the
// seeds, then the new generations, then the ordinary case.
func rows() []row {
	var all []row
	all = append(all, rowsUnusable()...)
	all = append(all, rowsTwoWriters()...)
	all = append(all, rowsSeeding()...)
	all = append(all, rowsNewGeneration()...)
	return append(all, rowsSameGeneration()...)
}

// RowNames lists the names of the table's rows in the order in which it is read.
func RowNames() (names []string) {
	for _, r := range rows() {
		names = append(names, r.name)
	}
	return names
}

func rowsUnusable() []row {
	return []row{
		{
			"no-generation",
			func(f facts) bool { return f.p.Generation.IsZero() },
			says(Decision{Outcome: Refused, Reason: "the primary names no generation"}),
		},
		{
			"unknown-role",
			func(f facts) bool {
				return f.r.Role != RoleReplica && f.r.Role != RolePrimary && f.r.Role != RoleNone
			},
			func(f facts) Decision {
				return Decision{Outcome: Refused, Reason: fmt.Sprintf("the other host reports the unknown role %.32q", f.r.Role)}
			},
		},
		{
			"other-vm",
			func(f facts) bool { return f.r.VM != "" && f.r.VM != f.p.VM },
			says(Decision{
				Outcome: Unrelated, Alarm: true,
				Reason: "the other host's records belong to another VM; its state was copied or mixed up",
			}),
		},
		{
			"malformed-position",
			func(f facts) bool {
				return !f.r.Committed.IsZero() && f.r.Committed.Generation != f.r.Generation
			},
			says(Decision{Outcome: Refused, Alarm: true, Reason: "the other host's position and generation contradict each other"}),
		},
		{
			"discards-our-generation",
			func(f facts) bool { return f.r.Discard == f.p.Generation },
			says(Decision{
				Outcome: Refused, Alarm: true, Diverged: true,
				Reason: "the other host gave up writes of this host's own generation: two hosts have owned it",
			}),
		},
		{
			"one-name-two-contents",
			func(f facts) bool { return f.clash != [2]delta.Pos{} },
			func(f facts) Decision {
				return Decision{
					Outcome: Stop, Alarm: true, Diverged: true,
					Reason: fmt.Sprintf("epoch %d of generation %.8s has two contents (%.8s here, %.8s there): corruption, or a host's state was copied",
						f.clash[0].Epoch, f.clash[0].Generation, f.clash[0].Digest, f.clash[1].Digest),
				}
			},
		},
	}
}

func rowsTwoWriters() []row {
	const keep = "replicactl failover reverse NAME on the host whose data is to be kept"
	split := func(reason string) func(facts) Decision {
		return says(Decision{Outcome: SplitBrain, Alarm: true, Diverged: true, Reason: reason, Hint: keep})
	}
	return []row{
		{"marked-diverged", func(f facts) bool {
			return f.p.Diverged || f.r.Diverged && !f.consent()
		}, split("the two copies were found to have diverged and nobody has decided which one to discard")},
		{"two-primaries-one-generation", func(f facts) bool {
			return f.r.Role == RolePrimary && f.kin == kinSame
		}, says(Decision{
			Outcome: Stop, Alarm: true, Diverged: true,
			Reason: "both hosts claim to be the primary of the same generation: a host's identity or state was copied",
		})},
		{"unrelated-primary", func(f facts) bool {
			return f.r.Role == RolePrimary && (f.kin == kinNone || f.kin == kinUnstated)
		}, says(Decision{Outcome: Unrelated, Alarm: true, Reason: "the other host is the primary of an unrelated VM with this id"})},
		{"both-run", func(f facts) bool {
			return f.p.Running && f.r.Running
		}, split("the VM runs on both hosts")},
		{"no-replica", func(f facts) bool { return f.r.Role == RoleNone }, func(f facts) Decision {
			return Decision{
				Outcome: Unrelated, Alarm: !f.p.Base.IsZero() || f.r.Running,
				Reason: "the other host holds no replica of this VM", Hint: "replicactl vm enable NAME",
			}
		}},
		{"promoted-while-we-run", func(f facts) bool {
			return f.r.Role == RolePrimary && f.kin == kinRNewer && f.p.Running
		}, split("the replica was promoted while the VM still runs here")},
		{"promoted", func(f facts) bool {
			return f.r.Role == RolePrimary && f.kin == kinRNewer
		}, says(Decision{
			Outcome: Stale, Alarm: true,
			Reason: "the replica was promoted; this copy is out of date, must not be started and must not be shipped",
			Hint:   "replicactl failover reverse NAME on the new primary",
		})},
		{"forked-discard", func(f facts) bool {
			return f.kin == kinFork && f.consent() && !f.r.Running
		}, func(f facts) Decision {
			return Decision{
				Outcome: VerifyAll, Parent: f.r.Committed, SaveLosing: true,
				Reason: "an operator gave up the other host's side of the fork; everything is compared",
			}
		}},
		{"forked", func(f facts) bool {
			return f.kin == kinFork && !f.seeding()
		}, split("both sides went on from a common point in different directions")},
		{"old-primary-runs", func(f facts) bool {
			return f.r.Role == RolePrimary && f.kin == kinPNewer && f.r.Running
		}, split("the VM runs on the old primary although this host was promoted")},
		{"replica-runs", func(f facts) bool { return f.r.Running }, says(Decision{
			Outcome: OperatorDecides, Alarm: true,
			Reason: "the VM runs on the replica host although it was not promoted",
			Hint:   "stop it there, or promote it there",
		})},
		{"other-disks", func(f facts) bool { return f.disks != "" }, func(f facts) Decision {
			return Decision{
				Outcome: Unrelated, Alarm: true,
				Reason: fmt.Sprintf("the two hosts do not hold the same disks (%.16q is missing on one side)", f.disks),
				Hint:   "replicactl vm resync NAME",
			}
		}},
	}
}

func rowsSeeding() []row {
	restart := func(reason string, alarm bool) func(facts) Decision {
		return says(Decision{Outcome: SeedContinue, Restart: true, Alarm: alarm, Reason: reason})
	}
	return []row{
		{"promotion-discarded", func(f facts) bool {
			return f.follows() && f.kin == kinRNewer && f.consent()
		}, func(f facts) Decision {
			return Decision{
				Outcome: VerifyAll, Parent: f.r.Committed, SaveLosing: true,
				Reason: "an operator gave up what the promoted replica wrote; everything is compared",
			}
		}},
		{"seed-from-the-future", func(f facts) bool {
			return f.seeding() && f.kin == kinRNewer
		}, wentBack("the replica is being seeded from a newer generation than this host knows")},
		{"seed-from-existing-images", func(f facts) bool {
			return f.seeding() && !f.consent() && f.r.VerifyAll != "" && f.r.Generation.IsZero() && f.p.Base.IsZero() && f.p.Acked.IsZero()
		}, func(f facts) Decision {
			return Decision{Outcome: VerifyAll, Reason: "the replica did not begin empty: " + f.r.VerifyAll}
		}},
		// Below a seed's cursor lies content from before the primary's marks
		// were cleared; only a seed from zero is sure to be whole.
		{"seed-after-ack", func(f facts) bool {
			return f.seeding() && !f.consent() && (!f.p.Base.IsZero() || !f.p.Acked.IsZero())
		}, restart("the replica has lost what it had committed; the initial copy starts again", true)},
		{"seeding", func(f facts) bool {
			return f.seeding() && !f.consent() && (f.kin == kinSame || untouched(f.r.Seeding))
		}, func(f facts) Decision {
			return Decision{
				Outcome: SeedContinue, Cursors: f.r.Seeding,
				Reason: "the initial copy goes on where the replica stands; changed blocks are sent again",
			}
		}},
		{"seed-of-another-generation", func(f facts) bool {
			return f.seeding() && !f.consent()
		}, restart("the replica's partial copy belongs to another generation; the initial copy starts again", false)},
	}
}

func untouched(cursors map[wire.DiskName]int64) bool {
	for _, c := range cursors {
		if c != 0 {
			return false
		}
	}
	return true
}

// says is a row's answer that does not depend on the facts.
func says(d Decision) func(facts) Decision {
	return func(facts) Decision { return d }
}

// wentBack is the answer when the primary's own state is older than what the
// replica proves to have existed.
func wentBack(reason string) func(facts) Decision {
	return says(Decision{
		Outcome: OperatorDecides, Alarm: true,
		Reason: reason + ": this host's state or image was put back to an earlier time",
		Hint:   "replicactl vm resync NAME to keep this host's data, or replicactl failover unplanned NAME on the other host to keep the replica's",
	})
}
